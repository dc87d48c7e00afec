"""A workspace on which promotions can be tried: a real export, its data, a lock and a parity report that are
true."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import yaml
from onnx import numpy_helper
from serving_workspace import write_params

from flows import dvc_hash, files, paths, registry, tracking
from flows.exporting import write_onnx
from flows.gates import GATES, Candidate, Gate
from flows.imaging import Preprocessing
from flows.params import Params
from flows.registration import register_export
from flows.registry import Version
from flows.serving.package import Manifest, describe_variant, metadata

NAME = "trunkline-vision-digits"
OUTPUTS = {
    "ingest": paths.DATA,
    "pretrain": paths.PRETRAIN,
    "finetune@pretrained": paths.FINETUNE / "pretrained",
    "export": paths.EXPORT,
}
QUICK = {
    "promotion.latency_batch_sizes": [1, 4],
    "promotion.max_p95_ms": [60000, 60000],
    "promotion.latency_runs": 3,
}
"""Settings of the budget gate that take no time and hold on any machine."""


def complete(root: Path) -> None:
    """What the stages after export leave, in the current folder `root`: parity report, metrics, receipts,
    lock."""
    manifest = files.read_json(root / paths.EXPORT / "manifest.json")
    values = {
        "fp32_max_abs_error": 1e-6,
        "fp32_min_agreement": 1.0,
        "int8_max_mean_error": 0.05,
        "int8_min_agreement": 0.99,
        "int8_max_accuracy_drop": 0.0,
    }
    report = {
        "passed": True,
        "digests": {name: variant["digest"] for name, variant in manifest["variants"].items()},
        "checks": [{"key": key, "value": value} for key, value in values.items()],
    }
    files.write_json(root / paths.PARITY / "parity.json", report)
    files.write_json(root / paths.METRICS / "evaluate-pretrained.json", {"top1": 0.9})
    for stage in OUTPUTS:
        receipt = {"stage": stage, "run_id": f"run-of-{stage}", "git": "unknown"}
        files.write_json(root / paths.RECEIPTS / f"{stage.replace('@', '-')}.json", receipt)
    write_lock(root)


def write_lock(root: Path) -> None:
    stages: dict[str, Any] = {}
    for stage, path in OUTPUTS.items():
        if (root / path).exists():
            out = {"path": path.as_posix(), "md5": dvc_hash.md5_of(root / path)}
            stages[stage] = {"cmd": f"python -m flows.stages.{stage}", "outs": [out]}
    (root / "dvc.lock").write_text(yaml.safe_dump({"schema": "2.0", "stages": stages}))


def settings_of(root: Path, exported: Params, **changes: Any) -> Params:
    """The exported workspace's params with limits of `promotion` changed, also in its params.yaml."""
    base = {
        f"{section}.{key}": getattr(getattr(exported, section), key)
        for section, key in (
            ("model", "image_size"),
            ("model", "window_size"),
            ("model", "patch_size"),
            ("export", "dynamic_batch_max"),
        )
    }
    return write_params(
        root, {**base, **QUICK, **{f"promotion.{key}": value for key, value in changes.items()}}
    )


def register(settings: Params, root: Path) -> Version:
    """Register the export of `root` as it is now."""
    with tracking.pipeline_run(settings, "test", {}) as run:
        return register_export(settings, root, run)


def add_version(settings: Params, alias: str = "challenger", **tags: str) -> Version:
    """A version without files: enough for everything but the gates."""
    connection = tracking.client(settings)
    if NAME not in registry.model_names(settings):
        connection.create_registered_model(NAME)
    number = len(registry.versions(settings, NAME)) + 1
    tags = {"onnx.digest": f"{number:064d}", "git.commit": "unknown"} | tags
    made = connection.create_model_version(NAME, source=Path("nowhere").absolute().as_uri(), tags=tags)
    registry.set_alias(settings, NAME, alias, made.version)
    return registry.version_of(settings, NAME, str(made.version))


def aliases_of(settings: Params) -> dict[str, str]:
    found = registry.versions(settings, NAME)
    return {alias: version.version for version in found for alias in version.aliases}


def all_pass(name: str, candidate: Candidate, champion: Version | None) -> Gate:
    return Gate(name, True, "fine")


def failing(*names: str) -> Callable[[str, Candidate, Version | None], Gate]:
    """A checker under which the gates `names` fail."""

    def check(name: str, candidate: Candidate, champion: Version | None) -> Gate:
        assert name in GATES
        return Gate(name, name not in names, "no good" if name in names else "fine")

    return check


# ---- other models ------------------------------------------------------------------------------------------


def change_export(
    root: Path,
    edit: Callable[[onnx.ModelProto], None] = lambda model: None,
    *,
    labels: Sequence[str] | None = None,
    preprocessing: Preprocessing | None = None,
) -> None:
    """Another consistent fp32 model in the export of `root`, with reports that fit it."""
    folder = root / paths.EXPORT
    manifest = Manifest.from_dict(files.read_json(folder / "manifest.json"))
    names = tuple(labels or manifest.labels)
    feeding = preprocessing or manifest.preprocessing
    for variant in manifest.variants.values():
        model = onnx.load(folder / variant.file)
        if variant.file == "model.onnx":
            edit(model)
        write_onnx(model, folder / variant.file, metadata(feeding, names))
    variants = {name: describe_variant(folder / variant.file) for name, variant in manifest.variants.items()}
    changed = replace(manifest, labels=names, preprocessing=feeding, variants=variants)
    files.write_json(folder / "manifest.json", changed.to_dict())
    complete(root)


def edit_head(change: Callable[[np.ndarray], np.ndarray]) -> Callable[[onnx.ModelProto], None]:
    """Apply `change` along the classes (the last axis) of whatever computes the logits."""

    def edit(model: onnx.ModelProto) -> None:
        head = next(node for node in model.graph.node if "logits" in node.output)
        tensors = {tensor.name: tensor for tensor in model.graph.initializer}
        found = [tensors[name] for name in head.input if name in tensors]
        assert len(found) == 2, "weights and bias"
        for tensor in found:
            value = numpy_helper.to_array(tensor)
            axis = value.shape.index(10)
            changed = np.moveaxis(change(np.moveaxis(value, axis, -1)), -1, axis)
            tensor.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(changed), tensor.name))

    return edit


def confuse(value: np.ndarray) -> np.ndarray:
    """Three digits are answered as others."""
    return value[..., [0, 1, 2, 3, 4, 5, 6, 8, 9, 7]]
