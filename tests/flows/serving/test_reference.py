"""The reference travels with the model, unchanged, and describes held-out images as the server would."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from serving_workspace import ROOT, Exported

from flows import files, paths
from flows.data import manifest as manifests
from flows.errors import DataError
from flows.samples import draw_samples
from flows.serving.package import Manifest, ModelPackage
from flows.serving.reference import FILE, describe_images, read_reference, write_reference
from flows.serving.session import CPU, open_session
from flows.serving.statistics import Records

PATH = paths.EXPORT / FILE


@pytest.mark.parametrize("variant", ["fp32", "int8"])
def test_the_reference_is_the_validation_split_as_served(exported: Exported, variant: str) -> None:
    reference = read_reference(exported.root / PATH)
    package, params = exported.package, exported.params
    images, _ = draw_samples(
        exported.root / paths.DATA, "val", 10**6, seed=0,
        preprocessing=package.manifest.preprocessing, max_pixels=10**6,
    )  # fmt: skip
    session = open_session(package.path(variant), [CPU], 1)
    expected = describe_images(session, images, reference.projection)
    found = reference.records[variant]
    for field in dataclasses.fields(Records):
        np.testing.assert_allclose(getattr(found, field.name), getattr(expected, field.name), atol=1e-4)
    assert reference.split == "val"
    assert reference.data_digest == manifests.load(exported.root / paths.DATA).digest
    assert reference.projection.dims == params.export.embedding_dims
    assert len(found) == len(images)


def test_its_bytes_are_the_same_in_every_process(exported: Exported, tmp_path: Path) -> None:
    """safetensors writes metadata in the order of a randomly seeded hash map."""
    command = (
        "from flows.serving.reference import *; from pathlib import Path; "
        f"write_reference(Path({str(tmp_path / 'again')!r}), "
        f"read_reference(Path({str(exported.root / PATH)!r})))"
    )
    for _ in range(2):
        subprocess.run([sys.executable, "-c", command], cwd=ROOT, check=True)
        assert (tmp_path / "again").read_bytes() == (exported.root / PATH).read_bytes()


def test_a_changed_or_lost_reference_is_refused(workspace: Path) -> None:
    data = bytearray(PATH.read_bytes())
    data[-1] ^= 1
    PATH.write_bytes(data)
    with pytest.raises(DataError, match=f"{FILE} was changed after its export"):
        ModelPackage.open(paths.EXPORT, variants=())
    PATH.unlink()
    with pytest.raises(DataError, match=f"{FILE} is missing"):
        ModelPackage.open(paths.EXPORT)


@pytest.mark.parametrize("content", [b"", b"no tensors at all, whatever the name says"])
def test_what_is_no_reference_is_one_clear_error(tmp_path: Path, content: bytes) -> None:
    (tmp_path / FILE).write_bytes(content)
    with pytest.raises(DataError, match="is damaged"):
        read_reference(tmp_path / FILE)
    with pytest.raises(DataError, match="does not exist"):
        read_reference(tmp_path / "absent")


def test_a_reference_that_lacks_a_variants_tensor_is_damaged(exported: Exported, tmp_path: Path) -> None:
    from safetensors.numpy import load, save

    head = json.dumps(
        {"format": 1, "data_digest": "", "split": "val", "projection": {}, "variants": ["fp32"]}
    )
    tensors = load((exported.root / PATH).read_bytes())
    del tensors["fp32.entropy"]
    (tmp_path / FILE).write_bytes(save(tensors, {"trunkline": head}))
    with pytest.raises(DataError, match="is damaged"):
        read_reference(tmp_path / FILE)


def test_answers_that_are_not_finite_are_no_reference(exported: Exported, tmp_path: Path) -> None:
    reference = read_reference(exported.root / PATH)
    broken = dataclasses.replace(
        reference.records["fp32"], confidence=reference.records["fp32"].confidence * np.float32(np.nan)
    )
    with pytest.raises(DataError, match="not finite"):
        write_reference(tmp_path / FILE, dataclasses.replace(reference, records={"fp32": broken}))
    assert not (tmp_path / FILE).exists()


def test_an_export_from_before_there_were_references_opens(workspace: Path) -> None:
    path = paths.EXPORT / "manifest.json"
    value = files.read_json(path)
    assert Manifest.from_dict(value).to_dict() == value
    del value["reference"]
    files.write_json(path, value)
    PATH.unlink()
    assert ModelPackage.open(paths.EXPORT).manifest.reference is None
