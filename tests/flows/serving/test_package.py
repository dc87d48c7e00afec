"""A package is used only if every byte is the one that was exported."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
from onnx import numpy_helper

from flows import files
from flows.errors import DataError
from flows.serving.package import ModelPackage, content_digest, describe_variant, load_onnx

FOLDER = Path("artifacts/export")


def change_manifest(change: Callable[[dict[str, Any]], object]) -> None:
    manifest = json.loads((FOLDER / "manifest.json").read_text())
    change(manifest)
    (FOLDER / "manifest.json").write_text(json.dumps(manifest))


def test_an_untouched_package_opens(workspace: Path) -> None:
    package = ModelPackage.open(FOLDER)
    assert package.manifest.labels == tuple("0123456789")
    assert package.manifest.inputs[0].shape == (-1, 3, 16, 16)
    assert package.path("int8").name == "model_int8.onnx"
    assert ModelPackage.open(FOLDER, digest=package.variant("fp32").digest) == package


@pytest.mark.parametrize("file", ["model.onnx", "model_int8.onnx"])
def test_one_flipped_bit_is_refused(workspace: Path, file: str) -> None:
    data = bytearray((FOLDER / file).read_bytes())
    data[len(data) // 2] ^= 1
    (FOLDER / file).write_bytes(data)
    with pytest.raises(DataError, match=f"{file} was changed after its export"):
        ModelPackage.open(FOLDER)


def test_changed_weights_with_a_matching_file_hash_are_refused(workspace: Path) -> None:
    """Whoever edits the model and its sha256 still meets the content digest, and then the registry's."""
    path = FOLDER / "model.onnx"
    model = onnx.load(path)
    bias = next(tensor for tensor in model.graph.initializer if tensor.name.endswith("head.bias"))
    bias.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(bias) + 1, bias.name))
    original = describe_variant(path).digest
    path.write_bytes(model.SerializeToString())
    change_manifest(lambda manifest: manifest["variants"]["fp32"].update(sha256=files.sha256_file(path)))
    with pytest.raises(DataError, match="has content digest"):
        ModelPackage.open(FOLDER)

    change_manifest(
        lambda manifest: manifest["variants"]["fp32"].update(digest=describe_variant(path).digest)
    )
    ModelPackage.open(FOLDER)  # consistent in itself …
    with pytest.raises(DataError, match="as recorded"):
        ModelPackage.open(FOLDER, digest=original)  # … but not what the registry knows


@pytest.mark.parametrize(
    "change",
    [
        lambda manifest: manifest["labels"].reverse(),
        lambda manifest: manifest["preprocessing"].update(mean=[0.5, 0.5, 0.5]),
    ],
)
def test_swapped_labels_or_preprocessing_are_refused(
    workspace: Path, change: Callable[[dict[str, Any]], object]
) -> None:
    change_manifest(change)
    with pytest.raises(DataError, match=r"preprocessing or labels .* differ from those inside"):
        ModelPackage.open(FOLDER)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.update(format=2), "format 2 is not 1"),
        (lambda m: m.update(task="detection"), "task 'detection'"),
        (lambda m: m.pop("labels"), "key 'labels' is missing"),
        (lambda m: m.update(variants=[1]), "not a usable manifest"),
        (lambda m: m["variants"]["fp32"].update(file="../model.onnx"), "outside its folder"),
        (lambda m: m["variants"]["fp32"].update(file="other.onnx"), r"other\.onnx is missing"),
    ],
)
def test_unusable_manifests_are_refused(
    workspace: Path, change: Callable[[dict[str, Any]], object], message: str
) -> None:
    change_manifest(change)
    with pytest.raises(DataError, match=message):
        ModelPackage.open(FOLDER)


def test_folders_without_a_manifest_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is not an exported model"):
        ModelPackage.open(tmp_path)
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(DataError, match="not a usable manifest"):
        ModelPackage.open(tmp_path)


def test_unknown_variants_are_named(workspace: Path) -> None:
    with pytest.raises(DataError, match="no variant 'fp16', only fp32, int8"):
        ModelPackage.open(FOLDER).path("fp16")


def test_the_digest_survives_another_storage_of_the_same_model(workspace: Path, tmp_path: Path) -> None:
    """The model registry stores weights in a file of its own naming."""
    path = FOLDER / "model.onnx"
    copy = tmp_path / "model.onnx"
    onnx.save_model(
        onnx.load(path), copy, save_as_external_data=True, location="weights.bin", size_threshold=64
    )
    stored, original = describe_variant(copy), describe_variant(path)

    assert stored.digest == original.digest
    assert stored.sha256 != original.sha256
    assert [part["file"] for part in stored.external] == ["weights.bin"]
    assert stored.bytes > (tmp_path / "weights.bin").stat().st_size


def test_a_package_with_external_weights_is_verified_too(workspace: Path) -> None:
    path = FOLDER / "model.onnx"
    model = onnx.load(path)
    path.unlink()
    onnx.save_model(model, path, save_as_external_data=True, location="model.onnx.data", size_threshold=64)
    described = describe_variant(path)
    change_manifest(
        lambda m: m["variants"]["fp32"].update(sha256=described.sha256, external=list(described.external))
    )
    ModelPackage.open(FOLDER)
    data = bytearray((FOLDER / "model.onnx.data").read_bytes())
    data[100] ^= 1
    (FOLDER / "model.onnx.data").write_bytes(data)
    with pytest.raises(DataError, match=r"model\.onnx\.data was changed"):
        ModelPackage.open(FOLDER)


@pytest.mark.parametrize("part", ["node order", "attribute", "initializer", "input", "opset", "labels"])
def test_the_digest_covers_what_the_model_does(workspace: Path, part: str) -> None:
    model = load_onnx(FOLDER / "model.onnx")
    before = content_digest(model)
    if part == "node order":
        model.graph.node[0].input[0] += "x"
    elif part == "attribute":
        node = next(node for node in model.graph.node if node.op_type == "LayerNormalization")
        next(entry for entry in node.attribute if entry.name == "epsilon").f *= 2
    elif part == "initializer":
        model.graph.initializer[0].name += "x"
    elif part == "input":
        model.graph.input[0].type.tensor_type.shape.dim[0].dim_param = "n"
    elif part == "opset":
        model.opset_import[0].version += 1
    else:
        next(entry for entry in model.metadata_props if entry.key == "trunkline.labels").value = "[]"
    assert content_digest(model) != before


def test_the_digest_ignores_annotations(workspace: Path) -> None:
    model = load_onnx(FOLDER / "model.onnx")
    before = content_digest(model)
    model.producer_version = "9"
    model.graph.node[0].doc_string = "written on a Monday"
    model.metadata_props.add(key="registry", value="somewhere")
    assert content_digest(model) == before
