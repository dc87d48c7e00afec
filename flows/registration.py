"""From an exported folder to a registered version with the alias `challenger`.

The registered folder holds more than the export: `parity.json` (how it was checked), `golden/` (requests and
answers for whoever serves it) and `dvc.lock` with `receipts.json` (what its files were made from, and by
which runs). So a version can be judged and traced when its workspace is gone or has moved on.
"""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from flows import files, paths, registry, tracking
from flows.data import ImageDataset
from flows.imaging import Preprocessing, decode, preprocess
from flows.params import Params
from flows.placement import place
from flows.registry import CHALLENGER, CHAMPION, Version
from flows.serving import golden
from flows.serving.package import ModelPackage
from flows.serving.session import Session, open_session
from flows.tracking import MlflowRun

PARITY, PLACEMENT, LOCK, RECEIPTS = "parity.json", "placement.json", "dvc.lock", "receipts.json"
SEALED = {
    "parity.sha256": PARITY,
    "golden.sha256": f"{golden.FOLDER}/{golden.INDEX}",
    "dvc.lock_sha256": LOCK,
    "receipts.sha256": RECEIPTS,
}
"""Tags that hold the sha256 of files which the export's manifest does not list."""
PLACEMENT_SEAL = "placement.sha256"
"""Only of versions that have a placement file."""


def register_export(params: Params, root: Path, run: MlflowRun) -> Version:
    """Register `root`/artifacts/export as challenger; one registered already is found by its digest."""
    manifest = files.read_json(root / paths.EXPORT / "manifest.json")
    name = params.registered_model(files.read_json(root / paths.DATA / "manifest.json")["name"])
    version = registry.find_version(params, name, manifest["variants"]["fp32"]["digest"])
    if version is None or not SEALED.keys() <= version.tags.keys():
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary) / "export"
            fill_folder(params, root, folder)
            example = example_input(params, root, Preprocessing.from_dict(manifest["preprocessing"]))
            tags = version_tags(root, manifest) | seals(folder)
            version = registry.register_folder(params, run, name, folder, example, tags)
    registry.tag_version(params, version, measurement_tags(params, root))
    if CHAMPION not in version.aliases:
        registry.set_alias(params, name, CHALLENGER, version.version)
    return registry.version_of(params, name, version.version)


def fill_folder(params: Params, root: Path, folder: Path) -> None:
    """Copy what is registered into the new `folder`.

    Raises:
        DataError: the export is damaged, or the data it is asked golden requests from.
    """
    shutil.copytree(root / paths.EXPORT, folder)
    shutil.copy(root / paths.PARITY / "parity.json", folder / PARITY)
    place(folder, root / paths.PARITY / "latency.csv", params.placement)
    shutil.copy(root / "dvc.lock", folder / LOCK)
    files.write_json(folder / RECEIPTS, read_receipts(root))
    package = ModelPackage.open(folder, variants=("fp32",))
    session = open_session(package.path("fp32"), params.serve.providers, params.serve.threads)
    golden.write_golden(
        folder,
        golden_images(params, root),
        lambda data: answer(session, package.manifest.preprocessing, data, params.ingest.max_pixels),
    )


def golden_images(params: Params, root: Path) -> list[tuple[str, bytes]]:
    """`promotion.golden_requests` images of the evaluation split, evenly spaced."""
    dataset = ImageDataset(
        root / paths.DATA, params.evaluate.split, cache_mb=0, max_pixels=params.ingest.max_pixels
    )
    count = min(params.promotion.golden_requests, len(dataset))
    rows = np.linspace(0, len(dataset) - 1, count).round().astype(int)
    return [(dataset.keys[row], dataset.encoded(row)) for row in rows]


def answer(session: Session, preprocessing: Preprocessing, data: bytes, max_pixels: int) -> tuple[int, float]:
    """The most probable class of an encoded image and its softmax probability."""
    image = preprocess(decode(data, max_pixels=max_pixels), preprocessing)
    logits = session.run(image[np.newaxis])[0].astype(np.float64)
    shares = np.exp(logits - logits.max())
    return int(logits.argmax()), float(shares.max() / shares.sum())


def example_input(params: Params, root: Path, preprocessing: Preprocessing) -> Any:
    """The first validation image as the network sees it, float32 (1, 3, S, S)."""
    dataset = ImageDataset(
        root / paths.DATA, "val", rows=[0], cache_mb=0, max_pixels=params.ingest.max_pixels
    )
    return preprocess(dataset.image(0), preprocessing)[None]


# ---- tags --------------------------------------------------------------------------------------------------


def version_tags(root: Path, manifest: dict[str, Any]) -> dict[str, str]:
    """What leads from a version back to its code, data, parameters and training run."""
    return {
        "onnx.digest": manifest["variants"]["fp32"]["digest"],
        "onnx.opset": str(manifest["opset"]),
        **origin_tags(root, export=paths.EXPORT, data=paths.DATA, trained_by="finetune@pretrained"),
    }


def origin_tags(root: Path, *, export: Path, data: Path, trained_by: str) -> dict[str, str]:
    """Code, data, parameters and training run of a version of any kind.

    Args:
        export, data: outputs in the workspace `root`; `data` has a manifest with digest, name and licence.
        trained_by: label of the stage that trained.
    """
    described = files.read_json(root / data / "manifest.json")
    lock = read_lock(root / "dvc.lock")
    return {
        "git.commit": tracking.git_commit(),
        "git.dirty": str(tracking.git_is_dirty()).lower(),
        "dvc.out_md5": locked_md5(lock, export),
        "data.digest": described["digest"],
        "data.name": described["name"],
        "data.md5": locked_md5(lock, data),
        "params.sha256": hashlib.sha256((root / "params.yaml").read_bytes()).hexdigest(),
        "train.run_id": read_receipts(root).get(trained_by, {}).get("run_id", ""),
        "license": described["licence"],
    }


def seals(folder: Path) -> dict[str, str]:
    """The tags of `SEALED` for a filled folder, and that of the placement file if it has one."""
    found = {tag: files.sha256_file(folder / file) for tag, file in SEALED.items()}
    if (folder / PLACEMENT).is_file():
        found[PLACEMENT_SEAL] = files.sha256_file(folder / PLACEMENT)
    return found


def measurement_tags(params: Params, root: Path) -> dict[str, str]:
    """Accuracy found by the evaluate stage and the images it was measured on; the gates measure again."""
    top1 = files.read_json(root / paths.METRICS / "evaluate-pretrained.json")["top1"]
    return {
        "metric.test_top1": repr(float(top1)),
        "metric.data_digest": files.read_json(root / paths.DATA / "manifest.json")["digest"],
        "metric.split": params.evaluate.split,
    }


# ---- what DVC and the stages left --------------------------------------------------------------------------


def read_lock(path: Path) -> dict[str, Any]:
    """The stages of a dvc.lock by name; empty when it has none."""
    return dict((yaml.safe_load(path.read_text()) or {}).get("stages") or {})


def locked_md5(lock: dict[str, Any], output: Path) -> str:
    """MD5 that the lock holds for an output, whichever stage makes it; empty when there is no such output."""
    for stage in lock.values():
        for out in stage.get("outs", []):
            if out["path"] == output.as_posix():
                return str(out["md5"])
    return ""


def read_receipts(root: Path) -> dict[str, dict[str, Any]]:
    """What the executions that made the present outputs left, by stage: `finetune@pretrained`."""
    found = [files.read_json(path) for path in sorted((root / paths.RECEIPTS).glob("*.json"))]
    return {str(receipt["stage"]): receipt for receipt in found}
