"""The smoke test of a registered version: the real command serves it and answers as was recorded."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import psutil
import pytest
from serving_workspace import ROOT, Exported

from flows import environment, files, paths, registry, smoke, tracking
from flows.data import ImageDataset
from flows.errors import GateFailed
from flows.imaging import preprocess
from flows.params import Params
from flows.registry import Version
from flows.serving.session import open_session

IMAGES = 4


@pytest.fixture
def workspace(home: Path, exported: Exported) -> Path:
    """The exported workspace with recorded predictions; also the clone and the current directory."""
    shutil.copytree(exported.root, home, dirs_exist_ok=True)
    package = exported.package
    session = open_session(package.path("fp32"), ["CPUExecutionProvider"], threads=1)
    dataset = ImageDataset(paths.DATA, "test", rows=range(IMAGES), cache_mb=0, max_pixels=10**6)
    images = np.stack(
        [preprocess(dataset.image(row), package.manifest.preprocessing) for row in range(IMAGES)]
    )
    logits = session.run(images).astype(np.float64)
    shares = np.exp(logits - logits.max(1, keepdims=True))
    confidence = (shares / shares.sum(1, keepdims=True)).max(1)
    lines = ["row,key,label,predicted,confidence"]
    for row in range(IMAGES):
        predicted = logits[row].argmax()
        lines.append(f"{row},{dataset.keys[row]},{dataset.labels[row]},{predicted},{confidence[row]:.6f}")
    files.write_text(paths.EVALUATE / "pretrained" / "predictions.csv", "\n".join(lines) + "\n")
    return home


@pytest.fixture
def settings(exported: Exported) -> Params:
    pipeline = exported.params.pipeline.model_copy(update={"smoke_images": IMAGES})
    return exported.params.model_copy(update={"pipeline": pipeline})


def no_server_is_left() -> bool:
    return not [child for child in psutil.Process().children() if "serve" in child.cmdline()]


def test_a_registered_version_answers_as_recorded(
    workspace: Path, settings: Params, exported: Exported, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")  # as in many companies: not for loopback
    monkeypatch.setenv("NO_PROXY", environment.QUIET["NO_PROXY"])
    with tracking.pipeline_run(settings, "test", {}) as run:
        digest = exported.package.variant("fp32").digest
        version = registry.register_folder(
            settings, run, "digits", workspace / paths.EXPORT, exported.images[:1], {"onnx.digest": digest}
        )
    answer = smoke.smoke_test(settings, workspace, version)
    assert answer.images == IMAGES
    assert answer.correct >= 1
    assert no_server_is_left()

    table = workspace / paths.EVALUATE / "pretrained" / "predictions.csv"
    text = table.read_text().splitlines()
    first = text[1].split(",")
    text[1] = ",".join([*first[:3], str((int(first[3]) + 1) % 10), first[4]])
    table.write_text("\n".join(text) + "\n")
    with pytest.raises(GateFailed, match="the server says class"):
        smoke.smoke_test(settings, workspace, version)
    assert no_server_is_left()


def test_a_server_that_does_not_start_says_why(
    workspace: Path, settings: Params, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    nowhere = Version("nosuch", "1", (), {}, "nowhere")
    with pytest.raises(GateFailed, match="the registry has no model 'nosuch'"):
        smoke.smoke_test(settings, workspace, nowhere)
    assert no_server_is_left()


@pytest.mark.parametrize(
    ("answer", "same"),
    [
        ({"index": 3, "confidence": 0.9}, True),
        ({"index": 3, "confidence": 0.904}, True),
        ({"index": 3, "confidence": 0.92}, False),
        ({"index": 4, "confidence": 0.9}, False),
    ],
)
def test_class_and_confidence_are_compared(answer: dict[str, object], same: bool) -> None:
    recorded = {"key": "a.png", "predicted": "3", "confidence": "0.900000"}
    if same:
        smoke._compare(answer, recorded)
    else:
        with pytest.raises(GateFailed, match=r"a\.png"):
            smoke._compare(answer, recorded)
