"""How a training stage is started: what is told of a failure among several processes, and what needs no
torch."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

from flows import launch, params

ROOT = Path(__file__).resolve().parents[2]


def failure(folder: Path, rank: int, code: int, message: str = "", timestamp: int = 5) -> ProcessFailure:
    path = folder / f"{rank}.json"
    if message:
        path.write_text(
            json.dumps({"message": {"message": message, "extraInfo": {"timestamp": str(timestamp)}}})
        )
    made = ProcessFailure(local_rank=rank, pid=1, exitcode=code, error_file=str(path))
    made.timestamp = timestamp
    return made


def test_the_cause_is_not_the_process_that_was_interrupted_by_it(tmp_path: Path) -> None:
    broken_off, mistaken = (
        failure(tmp_path, 0, 75),
        failure(tmp_path, 1, 11, "pretrain: a shard is damaged", 6),
    )
    cause = launch._cause([broken_off, mistaken])
    assert cause is mistaken
    assert launch._message(cause, "pretrain") == "pretrain: a shard is damaged"


def test_the_cause_is_not_the_process_that_the_agent_terminated(tmp_path: Path) -> None:
    terminated, killed = failure(tmp_path, 0, -signal.SIGTERM), failure(tmp_path, 1, -signal.SIGKILL, "", 6)
    assert launch._cause([terminated, killed]) is killed


def test_a_lost_machine_is_said_where_nothing_else_failed(tmp_path: Path) -> None:
    lost, mistaken = (
        failure(tmp_path, 0, 75, "pretrain: machine 1 is lost"),
        failure(tmp_path, 1, 74, "disk", 6),
    )
    assert launch._message(launch._cause([lost]), "pretrain") == "pretrain: machine 1 is lost"
    assert launch._cause([lost, mistaken]) is mistaken


def test_among_equals_the_first_is_the_cause(tmp_path: Path) -> None:
    late, early = failure(tmp_path, 0, 12, "late", 9), failure(tmp_path, 1, 12, "early", 8)
    assert launch._cause([late, early]) is early


def test_what_has_been_said_is_not_repeated(tmp_path: Path) -> None:
    assert launch._message(failure(tmp_path, 0, 1), "pretrain") == "", "a bug: its trace is on the screen"
    assert launch._message(failure(tmp_path, 0, 75), "pretrain") == "", "rank 0 has said where it stopped"
    assert "SIGKILL" in launch._message(failure(tmp_path, 0, -signal.SIGKILL), "pretrain")


def test_auto_is_one_process_without_an_accelerator(
    raw_params: dict[str, dict[str, dict[str, object]]],
) -> None:
    import torch

    raw_params["pretrain"]["training"]["processes"] = "auto"
    settings = params.check(raw_params, "test").pretrain.training
    assert launch.process_count(settings) == max(1, torch.cuda.device_count())


@pytest.mark.parametrize("processes", [1, 2])
def test_wrong_params_are_refused_before_torch_is_loaded(tmp_path: Path, processes: int) -> None:
    raw = params.read(ROOT / "params.yaml")
    raw["pretrain"]["training"] |= {"processes": processes, "lr": -1.0}
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(raw))
    (tmp_path / "torch.py").write_text("raise SystemExit('torch was loaded')")
    answer = subprocess.run(
        [sys.executable, "-m", "flows.launch", "pretrain"],
        cwd=tmp_path,
        env={"PATH": "", "PYTHONPATH": f"{tmp_path}:{ROOT}"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert answer.returncode == 11
    assert len(answer.stderr.splitlines()) == 1
    assert "pretrain.training.lr" in answer.stderr
