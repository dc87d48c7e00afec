"""The scale stage: subsets of the ingested digits."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from flows import params
from flows.data import ImageDataset, load_subset
from flows.errors import DataError
from flows.stage import Stage
from flows.stages import ingest, scale

REPOSITORY = Path(__file__).parents[3]
DIGITS_SUBSETS = {
    10: "590f37b59a077697",
    20: "aa674fa9daaab667",
    50: "5bd1e460c2edaa2f",
    100: "a733ebbd6c0598ec",
}


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scale")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        defaults = params.load(REPOSITORY / "params.yaml")
        ingest.run(defaults, Stage("ingest"))
        scale.run(defaults, Stage("scale"))
    return folder


def test_the_digits_subsets_are_the_same_everywhere(workspace: Path) -> None:
    """Pinned: a change here means that earlier scaling results are of other images."""
    summary = json.loads((workspace / "artifacts/subsets/subsets.json").read_text())
    assert {subset["percentage"]: subset["sha256"][:16] for subset in summary["subsets"]} == DIGITS_SUBSETS
    assert summary["seed"] == 0
    assert summary["of"] == 1168
    assert (
        summary["data_digest"]
        == json.loads((workspace / "artifacts/data/manifest.json").read_text())["digest"]
    )


def test_subsets_are_nested_and_keep_the_proportions(workspace: Path) -> None:
    subsets = {p: load_subset(workspace / "artifacts/subsets", p) for p in (10, 20, 50, 100)}
    assert set(subsets[10]) < set(subsets[20]) < set(subsets[50]) < set(subsets[100])
    assert subsets[100] == list(range(1168))
    data = workspace / "artifacts/data"
    whole = ImageDataset(data, "train", cache_mb=0, max_pixels=64)
    for percentage, rows in subsets.items():
        part = ImageDataset(data, "train", rows=rows, cache_mb=0, max_pixels=64)
        for label in range(10):
            quota = (whole.labels == label).sum() * percentage / 100
            assert abs((part.labels == label).sum() - quota) < 2


def test_metrics_are_written(workspace: Path) -> None:
    metrics = json.loads((workspace / "artifacts/metrics/scale.json").read_text())
    assert {name: metrics[name] for name in metrics if name.startswith("images")} == {
        "images_010": 117, "images_020": 234, "images_050": 584, "images_100": 1168,
    }  # fmt: skip
    assert metrics["smallest_class_010"] == 11


def test_damaged_data_stop_the_stage_before_any_training(
    workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    data = tmp_path / "artifacts" / "data"
    data.mkdir(parents=True)
    for path in (workspace / "artifacts/data").iterdir():
        (data / path.name).write_bytes(path.read_bytes())
    shard = data / "train-000000.tar"
    shard.write_bytes(shard.read_bytes()[:-1] + b"x")
    with pytest.raises(DataError, match=r"train-000000.tar is damaged"):
        scale.run(params.load(REPOSITORY / "params.yaml"), Stage("scale"))
    assert not (tmp_path / "artifacts" / "subsets").exists()


def test_classes_without_an_image_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """10 % of the 51 training images are 5: not enough for every class of two."""
    monkeypatch.chdir(tmp_path)
    for name, count in (("ape", 4), ("bee", 4), ("cat", 72)):
        (tmp_path / "images" / name).mkdir(parents=True)
        for number in range(count):
            color = (number, count, ord(name[0]))
            Image.new("RGB", (4, 4), color).save(tmp_path / "images" / name / f"{number}.png")
    values = params.read(REPOSITORY / "params.yaml")
    values["ingest"] |= {"dataset": "folder", "source": str(tmp_path / "images")}
    checked = params.check(values, "test")
    ingest.run(checked, Stage("ingest"))
    scale.run(checked, Stage("scale"))
    assert "note: the subset of 10 % has no image of bee\n" in capsys.readouterr().out
    assert json.loads(Path("artifacts/metrics/scale.json").read_text())["smallest_class_010"] == 0
