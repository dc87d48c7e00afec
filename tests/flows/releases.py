"""Versions to switch between: two good ones that answer differently, and broken ones."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper
from serving_workspace import Exported

from flows import files, paths
from flows.params import Serve
from flows.serving.golden import write_golden
from flows.serving.package import MANIFEST, Manifest, describe_variant
from flows.serving.vision.model import Release, load_model, top_class
from flows.serving.vision.uploads import prepare_image

MAX_PIXELS = 10**6


def make_releases(exported: Exported, root: Path) -> dict[str, Release]:
    """Versions 1 and 2 (its classes turned by one) with golden requests, and broken ones."""
    found = {}
    for version in ("1", "2"):
        folder = root / version
        shutil.copytree(exported.root / paths.EXPORT, folder)
        if version == "2":
            shift_answers(folder)
        record_golden(folder, exported)
        found[version] = release(folder, version)
    damaged = root / "damaged"
    shutil.copytree(found["2"].folder, damaged)
    (damaged / "model.onnx").write_bytes((damaged / "model.onnx").read_bytes()[:-100])
    found["damaged"] = release(damaged, "damaged", digest=found["2"].digest)
    found["other digest"] = release(found["2"].folder, "other digest", digest="0" * 64)
    forgetful = root / "forgetful"  # its golden answers are those of version 1
    shutil.copytree(found["2"].folder, forgetful)
    shutil.rmtree(forgetful / "golden")
    shutil.copytree(found["1"].folder / "golden", forgetful / "golden")
    found["golden mismatch"] = release(forgetful, "golden mismatch")
    return found


def shift_answers(folder: Path) -> None:
    """Turn the classes by one place: another network with another digest."""
    model = onnx.load(folder / "model.onnx")
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    head = next(name for name, tensor in tensors.items() if name.endswith("head.bias"))
    for name in (head, head.replace("bias", "weight")):
        tensor = tensors[name]
        turned = np.roll(numpy_helper.to_array(tensor), 1, axis=0)
        tensor.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(turned), name))
    onnx.save(model, folder / "model.onnx")
    plain = files.read_json(folder / MANIFEST)
    manifest = Manifest.from_dict(plain)
    plain["variants"] = {"fp32": vars(describe_variant(folder / manifest.variants["fp32"].file))}
    files.write_json(folder / MANIFEST, plain)


def record_golden(folder: Path, exported: Exported) -> None:
    model = load_model(Release(folder, "0", "c"), settings_of(exported), MAX_PIXELS)

    def classify(data: bytes) -> tuple[int, float]:
        image = prepare_image(data, model.manifest.preprocessing, MAX_PIXELS)
        return top_class(model.run(image[None])["logits"][0])

    write_golden(folder, [(str(i), data) for i, data in enumerate(exported.encoded[:4])], classify)


def release(folder: Path, version: str, digest: str | None = None) -> Release:
    if digest is None:
        digest = Manifest.from_dict(files.read_json(folder / MANIFEST)).variants["fp32"].digest
    return Release(folder, version, "c0ffee", "digits", digest)


def settings_of(exported: Exported, **changes: Any) -> Serve:
    return exported.params.serve.model_copy(
        update={"threads": 1, "providers": ["CPUExecutionProvider"]} | changes
    )
