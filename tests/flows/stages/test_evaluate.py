"""flows/stages/evaluate.py: a real network on real images, against the long way round."""

from __future__ import annotations

import csv
import io
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import fake_workspace
import pytest
import torch
from PIL import Image
from sklearn.metrics import precision_score

import models
from flows import files, imaging, paths, tracking
from flows import params as parameters
from flows.classifiers import ClassifierConfig, save_classifier
from flows.data import ImageDataset, manifest, preprocessing_for
from flows.errors import DataError, Diverged, Interrupted
from flows.stage import Stage
from flows.stages import evaluate
from models.classification import Classifier

FILES = ("predictions.csv", "confusion.csv", "per_class.csv", "reliability.csv", "confusion.png", "worst.png")


class RecordingRun(tracking.Run):
    def __init__(self) -> None:
        super().__init__()
        self.metrics: dict[str, float] = {}
        self.artifacts: list[str] = []

    def log_metrics(self, metrics: Any, step: int = 0) -> None:
        self.metrics.update(metrics)

    def log_artifact(self, path: Path, folder: str | None = None) -> None:
        self.artifacts.append(path.name)


@pytest.fixture
def workspace(tmp_path: Path, finished_workspace: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Data and a random, but fixed, network, with no evaluation yet."""
    shutil.copytree(finished_workspace / paths.DATA, tmp_path / paths.DATA)
    shutil.copy(finished_workspace / "params.yaml", tmp_path)
    monkeypatch.chdir(tmp_path)
    save_network()
    return tmp_path


def save_network(scale: float = 1.0, **changes: Any) -> Classifier:
    """A one-block Swin V2 with a large random head, so that answers differ between images."""
    params, data = parameters.load(), manifest.load(paths.DATA)
    torch.manual_seed(0)
    backbone = {"name": "swin_v2_pico", "image_size": 32, "window_size": 4, "patch_size": 4}
    arguments = {key: value for key, value in backbone.items() if key != "name"}
    model = Classifier(models.create("swin_v2_pico", **arguments), len(data.classes))
    torch.nn.init.normal_(model.head.weight, std=scale)
    fields = {
        "backbone": backbone,
        "classes": tuple(data.classes),
        "preprocessing": preprocessing_for(data, params.model),
        "data_digest": data.digest,
        "start_sha256": "",
        **changes,
    }
    save_classifier(paths.FINETUNE / "pretrained", model, ClassifierConfig(**fields))
    return model.eval()


def run(stage: Stage | None = None, **changes: Any) -> Stage:
    stage = stage or Stage("evaluate", "pretrained", run=RecordingRun())
    values = parameters.read(Path("params.yaml"))
    values["evaluate"] |= {"split": "val", "batch_size": 50, **changes}
    evaluate.run(parameters.check(values, "test"), stage)
    return stage


def rows(name: str) -> list[dict[str, str]]:
    with open(paths.EVALUATE / "pretrained" / name, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_predictions_equal_the_serving_path_image_by_image(workspace: Path) -> None:
    """Batches, uint8 tensors and device-side normalisation must not change an answer."""
    run()
    model = save_network()
    params, data = parameters.load(), manifest.load(paths.DATA)
    dataset = ImageDataset(paths.DATA, "val", cache_mb=0, max_pixels=1000)
    preprocessing = preprocessing_for(data, params.model)
    predictions = rows("predictions.csv")
    assert len(predictions) == len(dataset) == fake_workspace.SPLITS["val"]
    for index in (0, 49, 50, 59):
        image = imaging.decode(dataset.encoded(index), max_pixels=1000)
        with torch.inference_mode():
            logits = model(torch.from_numpy(imaging.preprocess(image, preprocessing))[None])
        found = predictions[index]
        assert int(found["predicted"]) == int(logits.argmax())
        assert float(found["confidence"]) == pytest.approx(float(logits.softmax(1).max()), abs=2e-5)
        assert (int(found["row"]), found["key"]) == (index, dataset.keys[index])
        assert int(found["label"]) == int(dataset.labels[index])


def test_tables_agree_with_each_other(workspace: Path) -> None:
    run()
    metrics = files.read_json(paths.METRICS / "evaluate-pretrained.json")
    predictions = rows("predictions.csv")
    actual, answers = [p["label"] for p in predictions], [p["predicted"] for p in predictions]
    assert len(set(answers)) > 1  # else the network would answer the same to everything and prove little
    correct = [a == b for a, b in zip(actual, answers, strict=True)]
    assert metrics["images"] == len(correct)
    assert metrics["top1"] == pytest.approx(sum(correct) / len(correct), abs=1e-6)
    assert metrics["top1_low"] < metrics["top1"] < metrics["top1_high"]
    assert metrics["top5"] >= metrics["top1"]

    pairs = Counter((row["actual"], row["predicted"]) for row in rows("confusion.csv"))
    assert pairs == Counter(zip(actual, answers, strict=True))  # a digit's class name is the digit
    expected = precision_score(
        actual, answers, labels=[str(i) for i in range(10)], average=None, zero_division=0
    )
    assert [float(row["precision"]) for row in rows("per_class.csv")] == pytest.approx(expected, abs=1e-6)
    assert sum(int(row["support"]) for row in rows("per_class.csv")) == len(correct)

    bins = rows("reliability.csv")
    assert len(bins) == parameters.load().evaluate.calibration_bins
    gap = sum(int(b["count"]) * abs(float(b["accuracy"]) - float(b["confidence"])) for b in bins) / len(
        correct
    )
    assert metrics["ece"] == pytest.approx(gap, abs=1e-5)


def test_speed_is_logged_but_stays_out_of_the_metrics(workspace: Path) -> None:
    stage = run()
    metrics = files.read_json(paths.METRICS / "evaluate-pretrained.json")
    assert set(metrics) == {"top1", "top5", "nll", "ece", "brier", "top1_low", "top1_high", "images"}
    assert isinstance(stage.run, RecordingRun)
    assert stage.run.metrics.keys() == {*metrics, "images_per_s"}
    assert {*FILES, "throughput.json"} == set(stage.run.artifacts)
    assert files.read_json(paths.EVALUATE / "pretrained" / "throughput.json")["images_per_s"] > 0


def test_equal_inputs_give_equal_files(workspace: Path) -> None:
    run()
    first = {name: (paths.EVALUATE / "pretrained" / name).read_bytes() for name in FILES}
    run()
    assert first == {name: (paths.EVALUATE / "pretrained" / name).read_bytes() for name in FILES}


def test_split_is_a_parameter(workspace: Path) -> None:
    run(split="test")
    assert len(rows("predictions.csv")) == fake_workspace.SPLITS["test"]


def test_a_class_may_have_no_image_and_all_answers_may_be_right(finished_workspace: Path) -> None:
    dataset = fake_workspace.dataset(finished_workspace, "val")
    labels = torch.from_numpy(dataset.labels)
    logits = 9.0 * torch.nn.functional.one_hot(labels, 11).double()
    predictions = evaluate.list_predictions(logits, labels, dataset.keys)
    names = [*dataset.manifest.classes, "never seen"]
    picture = evaluate.draw_worst(predictions, names, dataset)
    assert Image.open(io.BytesIO(picture)).size[0] > 500


def test_unlabelled_data_are_one_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copy(fake_workspace.ROOT / "params.yaml", tmp_path)
    fake_workspace.write_data(tmp_path / paths.DATA, labelled=False)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match="no labels") as caught:
        run()
    assert "\n" not in str(caught.value)


def test_a_model_of_other_data_is_refused(workspace: Path) -> None:
    save_network(data_digest="f" * 64)
    with pytest.raises(DataError, match="run finetune again"):
        run()


def test_a_missing_model_is_one_clear_error(workspace: Path) -> None:
    shutil.rmtree(paths.FINETUNE)
    with pytest.raises(DataError, match="run the finetune stage first"):
        run()


def test_a_broken_model_is_refused_and_earlier_results_stay(workspace: Path) -> None:
    run()
    before = (paths.EVALUATE / "pretrained" / "predictions.csv").read_bytes()
    save_network(scale=float("inf"))
    with pytest.raises(Diverged, match="not finite"):
        run()
    assert (paths.EVALUATE / "pretrained" / "predictions.csv").read_bytes() == before


def test_a_stop_request_ends_it_before_the_next_batch(workspace: Path) -> None:
    stage = Stage("evaluate", "pretrained")
    stage.request_stop()
    with pytest.raises(Interrupted):
        run(stage)
    assert not paths.EVALUATE.exists()
