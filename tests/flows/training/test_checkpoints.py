"""The folder of a run's checkpoints: who may use it, and what is removed from it and beside it."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
import torch

from flows.errors import Interrupted, ResourceError
from flows.training import Checkpoints, Processes
from flows.training import checkpoints as module

ALONE = Processes(0, 1, torch.device("cpu"))


def make_run(folder: Path, days_old: float) -> Path:
    """What an unfinished run leaves."""
    checkpoint = folder / "step-00000005"
    checkpoint.mkdir(parents=True)
    (checkpoint / "complete.json").write_text("{}")
    (folder / "lock").touch()
    then = time.time() - days_old * 24 * 3600
    for path in (folder / "lock", checkpoint, folder):
        os.utime(path, (then, then))
    return folder


def test_runs_that_were_given_up_are_removed_and_paused_ones_kept(tmp_path: Path) -> None:
    old, recent = make_run(tmp_path / "old", 15), make_run(tmp_path / "recent", 13)
    resumed = make_run(tmp_path / "resumed", 15)
    checkpoint = resumed / "step-00000010"
    checkpoint.mkdir()
    busy = make_run(tmp_path / "busy", 15)
    stranger = tmp_path / "not-a-run"
    stranger.mkdir()
    os.utime(stranger, (0, 0))
    with open(busy / "lock") as lock:
        assert module._try_to_lock(lock)
        with Checkpoints(tmp_path / "mine", ALONE).hold():
            assert not old.exists()
            assert all(folder.exists() for folder in (recent, resumed, busy, stranger))


def test_half_written_checkpoints_make_room(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", 0)
    (run / "step-00000010").mkdir()
    with Checkpoints(run, ALONE).hold():
        assert [path.name for path in run.glob("step-*")] == ["step-00000005"]


def test_a_lock_on_a_folder_that_its_holder_removed_does_not_count(tmp_path: Path) -> None:
    """Else one waits for the first, the first finishes and prunes, and two more train together."""
    path = tmp_path / "lock"
    with open(path, "w") as waiting:
        path.unlink()
        assert not module._try_to_lock(waiting)
        with open(path, "w") as fresh:
            assert not module._try_to_lock(waiting)
            assert module._try_to_lock(fresh)


def test_pruning_while_held_lets_the_next_one_begin_afresh(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path / "run", ALONE)
    with checkpoints.hold():
        checkpoints.prune()
        assert not checkpoints.folder.exists()
    with checkpoints.hold():
        assert (checkpoints.folder / "lock").exists()


def test_waiting_ends_when_asked_to_stop_or_out_of_patience(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints = Checkpoints(tmp_path / "run", ALONE)
    with checkpoints.hold():
        with pytest.raises(Interrupted), checkpoints.hold(lambda: True):
            pytest.fail("two hold it")
        monkeypatch.setattr(module, "LOCK_PATIENCE_S", 0.0)
        with pytest.raises(ResourceError, match="another process is training"), checkpoints.hold():
            pytest.fail("two hold it")
