"""The frame of a stage as a process: signals, a vanished parent, one line and an exit code."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from flows import errors, stage

ROOT = Path(__file__).resolve().parents[2]
PATIENCE_S = 60.0
BODY = """
import sys, time
from flows.errors import Interrupted
from flows.stage import run_stage

def run(params, stage):
    print("begun", flush=True)
    while not stage.stop_requested():
        time.sleep(0.01)
    print("asked to stop", flush=True)
    if "stubborn" in sys.argv:
        time.sleep(600)
    raise Interrupted("saved")

raise SystemExit(run_stage("ingest", run, [], stops_itself="heedless" not in sys.argv))
"""

Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """`start(*arguments, **variables)`: a stage that waits to be asked to stop, once it has begun."""
    (tmp_path / "params.yaml").write_bytes((ROOT / "params.yaml").read_bytes())
    (tmp_path / "body.py").write_text(BODY)
    started: list[subprocess.Popen[str]] = []

    def make(*arguments: str, shell: str = "", **variables: str) -> subprocess.Popen[str]:
        command = [sys.executable, "body.py", *arguments]
        process = subprocess.Popen(
            ["sh", "-c", shell, "sh", *command] if shell else command,
            cwd=tmp_path,
            env={
                **os.environ,
                "PYTHONPATH": str(ROOT),
                "TRUNKLINE_HOME": str(tmp_path),
                "TRUNKLINE_TRACKING": "off",
                **variables,
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        started.append(process)
        if not shell:
            assert line(process) == "begun"
        return process

    yield make
    for process in started:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


def line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_asks_to_stop_and_its_echo_changes_nothing(start: Start, signum: signal.Signals) -> None:
    """DVC's group, the flow and torchrun's agent may all pass the same signal on."""
    process = start()
    process.send_signal(signum)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=PATIENCE_S)
    assert output.splitlines() == ["asked to stop", "error: ingest: saved"]
    assert process.returncode == 75


def test_a_stage_that_does_not_look_for_a_signal_is_broken_off(start: Start) -> None:
    process = start("heedless")
    process.terminate()
    output, _ = process.communicate(timeout=PATIENCE_S)
    assert output.splitlines() == ["error: ingest: stopped; the same command starts this stage again"]
    assert process.returncode == 75


def test_a_second_signal_later_ends_it_at_once(start: Start) -> None:
    process = start("stubborn")
    process.send_signal(signal.SIGINT)
    assert line(process) == "asked to stop"
    time.sleep(stage.ECHO_S + 0.1)
    process.send_signal(signal.SIGINT)
    assert process.wait(PATIENCE_S) == -signal.SIGINT


def test_it_stops_when_the_flow_is_gone_or_a_zombie(start: Start) -> None:
    with psutil.Popen(["sleep", "600"]) as flow:
        process = start(TRUNKLINE_FLOW_PID=str(flow.pid))
        flow.kill()  # and not waited for
        output, _ = process.communicate(timeout=PATIENCE_S)
    assert output.splitlines() == ["asked to stop", "error: ingest: saved"]
    assert process.returncode == 75


def test_it_stops_when_the_flow_was_gone_before_it_began(start: Start) -> None:
    with subprocess.Popen(["true"]) as flow:
        pass
    process = start(TRUNKLINE_FLOW_PID=str(flow.pid))
    assert process.wait(PATIENCE_S) == 75


@pytest.mark.parametrize("variable", ["DVC_STAGE", "TORCHELASTIC_RUN_ID"])
def test_it_stops_when_its_parent_is_gone(start: Start, variable: str) -> None:
    parent = start(shell='"$@" & wait', **{variable: "x"})
    assert line(parent) == "begun"
    (child,) = psutil.Process(parent.pid).children()
    parent.kill()
    assert line(parent) == "asked to stop"
    psutil.wait_procs([child], PATIENCE_S)
    assert not child.is_running()


def test_it_stops_when_dvc_is_gone_above_a_shell_that_stays(start: Start) -> None:
    """Some shells do not replace themselves by the command they are given."""
    dvc = start(shell='sh -c \'"$@"; exit $?\' sh "$@"; exit $?', DVC_STAGE="x")
    assert line(dvc) == "begun"
    shell = psutil.Process(dvc.pid).children()
    dvc.kill()
    assert line(dvc) == "asked to stop"
    psutil.wait_procs(shell, PATIENCE_S)


def test_a_parent_matters_only_to_what_dvc_or_an_agent_started(start: Start) -> None:
    """`nohup python -m flows.stages.pretrain &` outlives its terminal."""
    parent = start(shell='"$@" & wait')
    assert line(parent) == "begun"
    (child,) = psutil.Process(parent.pid).children()
    parent.kill()
    time.sleep(2 * stage.ORPHAN_CHECK_S)
    assert child.status() != psutil.STATUS_ZOMBIE
    child.terminate()
    assert line(parent) == "asked to stop"


def test_only_the_agent_prints_a_workers_mistake(
    in_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from flows import files

    (in_folder / "params.yaml").write_bytes((ROOT / "params.yaml").read_bytes())
    monkeypatch.setenv("TRUNKLINE_TRACKING", "off")
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(in_folder / "error.json"))
    handlers = {signum: signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)}

    def fail(params: object, stage: object) -> None:
        raise errors.DataError("a shard is damaged")

    assert stage.run_stage("pretrain", fail, []) == 11
    for signum, handler in handlers.items():
        signal.signal(signum, handler)
    assert capsys.readouterr().err == ""
    assert files.read_json(in_folder / "error.json")["message"]["message"] == "pretrain: a shard is damaged"
