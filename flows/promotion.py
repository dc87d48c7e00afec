"""From an exported folder to a registered version, and from `challenger` to `champion`.

Effects outside the workspace live here and in other flows, never in DVC stages. The gates are absolute limits
from params.yaml plus the comparison with the present champion.
"""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from flows import dvc_stage, files, paths, registry, tracking
from flows.champion import measure_folder, measure_version
from flows.data import ImageDataset
from flows.errors import DataError
from flows.imaging import Preprocessing, preprocess
from flows.params import Params
from flows.placement import place
from flows.registry import Version
from flows.tracking import MlflowRun

CHALLENGER, CHAMPION, PREVIOUS = "challenger", "champion", "previous"


@dataclass(frozen=True)
class Gate:
    """One condition on the way to `champion`."""

    name: str
    passed: bool
    reason: str


@dataclass(frozen=True)
class Decision:
    version: Version
    gates: tuple[Gate, ...]
    promoted: bool
    champion: Version | None
    """The champion after the decision."""


def register_export(params: Params, root: Path, run: MlflowRun) -> Version:
    """Register `root`/artifacts/export as challenger; one registered already is found by its digest."""
    manifest = files.read_json(root / paths.EXPORT / "manifest.json")
    name = params.registered_model(files.read_json(root / paths.DATA / "manifest.json")["name"])
    digest = manifest["variants"]["fp32"]["digest"]
    version = registry.find_version(params, name, digest)
    if version is None:
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary) / "export"
            shutil.copytree(root / paths.EXPORT, folder)
            shutil.copy(root / paths.PARITY / "parity.json", folder)
            place(folder, root / paths.PARITY / "latency.csv", params.placement)
            example = example_input(params, root, Preprocessing.from_dict(manifest["preprocessing"]))
            version = registry.register_folder(
                params, run, name, folder, example, version_tags(root, manifest)
            )
    registry.tag_version(params, version, measurement_tags(params, root))
    if CHAMPION not in version.aliases:
        registry.set_alias(params, name, CHALLENGER, version.version)
    return registry.version_of(params, name, version.version)


def example_input(params: Params, root: Path, preprocessing: Preprocessing) -> Any:
    """The first validation image as the network sees it, float32 (1, 3, S, S)."""
    dataset = ImageDataset(
        root / paths.DATA, "val", rows=[0], cache_mb=0, max_pixels=params.ingest.max_pixels
    )
    return preprocess(dataset.image(0), preprocessing)[None]


def version_tags(root: Path, manifest: dict[str, Any]) -> dict[str, str]:
    """What leads from a version back to its code, data, parameters and training run."""
    data = files.read_json(root / paths.DATA / "manifest.json")
    return {
        "git.commit": tracking.git_commit(),
        "git.dirty": str(tracking.git_is_dirty()).lower(),
        "dvc.out_md5": locked_md5(root, "export", paths.EXPORT),
        "dvc.lock_sha256": files.sha256_file(root / "dvc.lock"),
        "onnx.digest": manifest["variants"]["fp32"]["digest"],
        "onnx.opset": str(manifest["opset"]),
        "data.digest": data["digest"],
        "data.name": data["name"],
        "data.md5": locked_md5(root, "ingest", paths.DATA),
        "params.sha256": hashlib.sha256((root / "params.yaml").read_bytes()).hexdigest(),
        "train.run_id": dvc_stage.read_receipt(root, "finetune@pretrained").get("run_id", ""),
        "license": data["licence"],
    }


def measurement_tags(params: Params, root: Path) -> dict[str, str]:
    """Accuracy of the export and the images it was measured on: equal weights can meet other data later."""
    return {
        "metric.test_top1": repr(measured_top1(root)),
        "metric.data_digest": files.read_json(root / paths.DATA / "manifest.json")["digest"],
        "metric.split": params.evaluate.split,
    }


def measured_top1(root: Path) -> float:
    return float(files.read_json(root / paths.METRICS / "evaluate-pretrained.json")["top1"])


def locked_md5(root: Path, stage: str, output: Path) -> str:
    """MD5 that dvc.lock holds for `output` of `stage`."""
    lock = yaml.safe_load((root / "dvc.lock").read_text())
    outputs = lock["stages"][stage]["outs"]
    return str(next(out["md5"] for out in outputs if out["path"] == output.as_posix()))


def decide(params: Params, root: Path, version: Version) -> Decision:
    """Check the gates and, if all pass, make `version` the champion; the old champion becomes `previous`.

    A failed gate changes no alias. Every gate leaves a tag on the version:
    `gate.<name> = passed|failed: reason`.
    """
    champion = registry.alias(params, version.name, CHAMPION)
    if champion is not None and champion.version == version.version:
        if CHALLENGER in champion.aliases:  # left by a promotion that was cut off before its last step
            registry.delete_alias(params, version.name, CHALLENGER)
            champion = registry.version_of(params, version.name, version.version)
        return Decision(champion, (), False, champion)
    gates = check_gates(params, root, version, champion)
    verdicts = {
        f"gate.{gate.name}": f"{'passed' if gate.passed else 'failed'}: {gate.reason}" for gate in gates
    }
    registry.tag_version(params, version, verdicts)
    if not all(gate.passed for gate in gates):
        return Decision(version, gates, False, champion)
    if champion is not None:
        registry.set_alias(params, version.name, PREVIOUS, champion.version)
    registry.set_alias(params, version.name, CHAMPION, version.version)
    if CHALLENGER in version.aliases:
        registry.delete_alias(params, version.name, CHALLENGER)
    promoted = registry.version_of(params, version.name, version.version)
    return Decision(promoted, gates, True, promoted)


def check_gates(params: Params, root: Path, version: Version, champion: Version | None) -> tuple[Gate, ...]:
    """Absolute floors, then the comparison with `champion`; all are checked, so that all reasons are
    known."""
    limits = params.registry
    top1 = measured_top1(root)
    parity = files.read_json(root / paths.PARITY / "parity.json")
    return (
        Gate(
            "accuracy",
            top1 >= limits.min_test_top1,
            f"test top-1 {top1:.4f}, at least {limits.min_test_top1}",
        ),
        Gate(
            "parity",
            bool(parity["passed"]) or not limits.require_parity,
            "inside the tolerances" if parity["passed"] else "outside the tolerances",
        ),
        champion_gate(params, root, top1, champion),
    )


def champion_gate(params: Params, root: Path, top1: float, champion: Version | None) -> Gate:
    """Does the export in `root`, with test accuracy `top1`, beat the present champion on the same images?

    A champion that was measured on other images is measured now; then so is the export, with the same code.
    """
    if champion is None:
        return Gate("champion", True, "there is no champion yet")
    now, where = measurement_tags(params, root), "the same images"
    if all(champion.tags.get(key) == now[key] for key in ("metric.data_digest", "metric.split")):
        best = float(champion.tags["metric.test_top1"])
    else:
        try:
            best = measure_version(params, root, champion)
        except DataError as error:
            return Gate("champion", False, f"version {champion.version} cannot be compared: {error}")
        top1, where = measure_folder(params, root, root / paths.EXPORT), "both measured now"
    gain = round(top1 - best, 6)  # 0.98 - 0.97 is a little more than 0.01
    return Gate(
        "champion",
        gain > params.registry.min_gain,
        f"gain {gain:+.4f} over version {champion.version} ({best:.4f}, {where}), "
        f"more than {params.registry.min_gain} needed",
    )
