"""What goes wrong in training is said in one line with the right exit code, and costs nothing that was
done."""

from __future__ import annotations

import ctypes
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import training_workspace as workspaces

from flows import paths
from flows.data import manifest
from flows.stages import finetune, pretrain

SHORT = {"steps": 9, "warmup_steps": 2, "log_every": 3, "checkpoint_every": 3, "validate_every": 9}
MB = 1 << 20


def error_line(capsys: pytest.CaptureFixture[str]) -> str:
    """The only line on stderr beside progress."""
    lines = [line for line in capsys.readouterr().err.splitlines() if ": step " not in line]
    lines = [line for line in lines if "random weights" not in line and ": resume: " not in line]
    assert len(lines) == 1, lines
    assert lines[0].startswith("error: ")
    return lines[0]


def test_a_diverging_loss_stops_and_keeps_the_last_good_checkpoint(
    enter: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """The learning rate grows to absurdity during a long warm-up: the first steps are fine."""
    folder = enter(
        {
            "pretrain": {
                "training": {
                    **SHORT,
                    "steps": 60,
                    "warmup_steps": 59,
                    "lr": 1e38,
                    "warmup_lr": 1e-9,
                    "log_every": 1,
                    "checkpoint_every": 1,
                }
            }
        }
    )
    assert pretrain.main([]) == 12
    assert "lower pretrain.training.lr" in error_line(capsys)
    (run,) = (folder / "scratch" / "pretrain").iterdir()
    kept = sorted(run.glob("step-*/complete.json"))
    assert kept
    assert not (folder / paths.PRETRAIN).exists()


def test_unlabelled_data_cannot_be_finetuned(enter: Any, capsys: pytest.CaptureFixture[str]) -> None:
    folder = enter({"finetune": {"training": SHORT}})
    described = manifest.load(folder / paths.DATA)
    manifest.save(described.model_copy(update={"classes": []}).sealed(), folder / paths.DATA)
    assert finetune.main(["--cell", "scratch"]) == 11
    assert "no labels" in error_line(capsys)


def test_a_missing_pretraining_is_named(enter: Any, capsys: pytest.CaptureFixture[str]) -> None:
    enter({"finetune": {"training": SHORT}})
    assert finetune.main(["--cell", "pretrained"]) == 11
    assert "artifacts/pretrain/model.safetensors" in error_line(capsys)


def test_weights_that_are_no_weights_are_named(enter: Any, capsys: pytest.CaptureFixture[str]) -> None:
    folder = enter({"pretrain": {"initialize_from": "notes.txt", "training": SHORT}})
    (folder / "notes.txt").write_text("not weights")
    assert pretrain.main([]) == 11
    assert "`pretrain.initialize_from`" in error_line(capsys)


@pytest.mark.parametrize("fault", ["torn", "deleted"])
def test_a_damaged_shard_is_named(enter: Any, capsys: pytest.CaptureFixture[str], fault: str) -> None:
    folder = enter({"pretrain": {"training": SHORT}})
    shard = folder / paths.DATA / "train-000000.tar"
    if fault == "torn":
        shard.write_bytes(shard.read_bytes()[: shard.stat().st_size // 2])
    else:
        shard.unlink()
    assert pretrain.main([]) == 11
    assert "train-000000.tar" in error_line(capsys)


@pytest.mark.parametrize("key", ["initialize_from", "continue_from"])
def test_a_beginning_that_is_not_there_is_named(
    enter: Any, capsys: pytest.CaptureFixture[str], key: str
) -> None:
    enter({"pretrain": {key: "nowhere/step-00000010", "training": SHORT}})
    assert pretrain.main([]) == 11
    assert f"`pretrain.{key}`" in error_line(capsys)


def test_continuing_a_run_that_has_had_all_steps_is_refused(
    enter: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    first = enter({"pretrain": {"training": SHORT}}, "first")
    pretrain.write_outputs, written = _stop_before_outputs(), pretrain.write_outputs
    try:
        with pytest.raises(InterruptedError):
            pretrain.main([])
    finally:
        pretrain.write_outputs = written
    checkpoint = next((first / "scratch" / "pretrain").glob("*/step-00000009"))
    enter({"pretrain": {"continue_from": str(checkpoint), "training": {**SHORT, "log_every": 2}}}, "second")
    capsys.readouterr()
    assert pretrain.main([]) == 11
    assert "pretrain.training.steps must be larger" in error_line(capsys)


def _stop_before_outputs() -> Any:
    def stop(*arguments: Any) -> None:
        raise InterruptedError

    return stop


def test_a_torn_checkpoint_is_named_and_the_one_before_serves(
    enter: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As a power cut on a careless disk may leave it."""
    whole = enter({"pretrain": {"training": SHORT}}, "whole")
    assert pretrain.main([]) == 0
    folder = enter({"pretrain": {"training": SHORT}}, "torn")
    with monkeypatch.context() as patch:
        patch.setattr(pretrain, "write_outputs", _stop_before_outputs())
        with pytest.raises(InterruptedError):
            pretrain.main([])
    newest = next((folder / "scratch" / "pretrain").glob("*/step-00000009"))
    for path in newest.glob("*.pt"):
        path.write_bytes(path.read_bytes()[:1000])
    capsys.readouterr()
    assert pretrain.main([]) == 74
    assert f"{newest} cannot be read" in error_line(capsys)
    for path in newest.iterdir():
        path.unlink()
    assert pretrain.main([]) == 0
    assert "resume: step 6" in capsys.readouterr().err
    assert workspaces.weights(folder) == workspaces.weights(whole)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A folder on a file system of 24 MB: room for one checkpoint of the small network, not for two."""
    folder = tmp_path / "small-disk"
    folder.mkdir()
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mount(b"tmpfs", os.fsencode(folder), b"tmpfs", 0, b"size=24m") != 0:
        pytest.skip(f"cannot mount a small tmpfs here: {os.strerror(ctypes.get_errno())}")
    yield folder
    libc.umount2(os.fsencode(folder), 2)  # MNT_DETACH


def test_a_full_disk_is_said_in_one_line_and_the_run_goes_on_elsewhere(
    enter: Any, small_disk: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = enter({"pretrain": {"training": SHORT}}, "whole")
    assert pretrain.main([]) == 0
    folder = enter({"pretrain": {"training": SHORT}}, "full")
    monkeypatch.setenv("PIPELINE_SCRATCH", str(small_disk))
    capsys.readouterr()
    assert pretrain.main([]) == 74
    line = error_line(capsys)
    assert str(small_disk) in line
    assert "free some space" in line
    (run,) = (small_disk / "pretrain").iterdir()
    assert [path.parent.name for path in run.glob("step-*/complete.json")] == ["step-00000003"]

    shutil.copytree(small_disk, folder / "scratch")
    monkeypatch.setenv("PIPELINE_SCRATCH", str(folder / "scratch"))
    assert pretrain.main([]) == 0
    assert "resume: step 3" in capsys.readouterr().err
    assert workspaces.weights(folder) == workspaces.weights(whole)
    assert workspaces.curves(folder) == workspaces.curves(whole)


def test_a_full_disk_under_the_outputs_keeps_the_checkpoint(
    enter: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], small_disk: Path
) -> None:
    folder = enter({"pretrain": {"training": SHORT}})
    filler = small_disk / "filler"
    filler.write_bytes(bytes(23 * MB))
    (folder / "artifacts" / "pretrain").parent.mkdir(exist_ok=True)
    monkeypatch.setattr(paths, "PRETRAIN", small_disk / "pretrain")
    assert pretrain.main([]) == 74
    assert "the disk is full" in error_line(capsys)
    filler.unlink()
    assert pretrain.main([]) == 0
    assert "resume: step 9" in capsys.readouterr().err
