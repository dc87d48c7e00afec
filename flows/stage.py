"""The frame around every stage: checked params, signals, one-line errors, exit codes, a receipt.

A stage module reads:

    def run(params: Params, stage: Stage) -> None: ...      # files and params in, files out

    def main(argv: list[str] | None = None) -> int:
        return run_stage("ingest", run, argv)

    if __name__ == "__main__":
        raise SystemExit(main())

and may look at `stage.cell` (matrix stages), `stage.stop_requested()` (long work) and `stage.run` (tracking).
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

import psutil

from flows import files, params, paths, tracking
from flows.errors import Interrupted, PeerLost, TrunklineError, explain
from flows.params import Params

ORPHAN_CHECK_S = 1.0
ECHO_S = 2.0
"""A second signal within this time is the first one's echo: sent to the process as well as to its group or
agent."""
SHELLS = {"bash", "dash", "fish", "ksh", "sh", "tcsh", "zsh"}


@dataclass
class Stage:
    """One execution of a stage in this process."""

    name: str
    cell: str | None = None
    run: tracking.Run = field(default_factory=tracking.Run)
    device_hours: float = 0.0
    """Accelerator or CPU-process hours spent; training adds to it over all processes."""
    _stop: threading.Event = field(default_factory=threading.Event)

    @property
    def label(self) -> str:
        """DVC's name of the stage: `finetune@scratch`."""
        return f"{self.name}@{self.cell}" if self.cell else self.name

    @property
    def receipt_path(self) -> os.PathLike[str]:
        return paths.RECEIPTS / f"{self.name}{'-' + self.cell if self.cell else ''}.json"

    def stop_requested(self) -> bool:
        """True after SIGINT or SIGTERM, or when the process that started this one is gone."""
        return self._stop.is_set()

    def request_stop(self) -> None:
        self._stop.set()

    def abandon(self, error: TrunklineError) -> NoReturn:
        """Say it and end this process at once, from any thread: the main one may hang in a call for ever."""
        _say(self, error)
        os._exit(error.exit_code)


def is_main_process() -> bool:
    """True on rank 0, and everywhere outside torchrun."""
    return int(os.environ.get("RANK", "0")) == 0


def run_stage(
    name: str,
    body: Callable[[Params, Stage], None],
    argv: list[str] | None = None,
    cells: list[str] | None = None,
    stops_itself: bool = False,
) -> int:
    """Run `body`, turn errors into a line and an exit code (flows.errors), write the receipt on rank 0.

    Args:
        cells: values of `--cell`, for matrix stages.
        stops_itself: `body` looks at `stage.stop_requested()`; else a signal breaks it off at once.
    """
    parser = argparse.ArgumentParser(
        prog=f"python -m flows.stages.{name}", description=sys.modules[body.__module__].__doc__
    )
    if cells:
        parser.add_argument("--cell", required=True, choices=cells)
    cell: str | None = getattr(parser.parse_args(argv), "cell", None)
    stage = Stage(name, cell)
    started = time.monotonic()
    try:
        paths.workspace()
        checked = params.load()
        _watch_signals(stage, stops_itself)
        with tracking.stage_run(stage.name, stage.cell, checked) as stage.run:
            body(checked, stage)
            duration = time.monotonic() - started
            if is_main_process():
                _write_receipt(stage, duration)
        return 0
    except Exception as error:
        explained = explain(error)
        if explained is None:
            raise
        _say(stage, explained)
        return explained.exit_code


def _say(stage: Stage, error: TrunklineError) -> None:
    """One line on stderr, also when only one of several processes knows of the mistake: then through
    torchrun's agent (flows.launch), which prints the line of the process that failed first, or that another
    one was lost if none failed on this machine."""
    is_for_agent = isinstance(error, PeerLost) or not isinstance(error, Interrupted)
    if (path := os.environ.get("TORCHELASTIC_ERROR_FILE")) and is_for_agent:
        record = {"message": f"{stage.label}: {error}", "extraInfo": {"timestamp": str(int(time.time()))}}
        with open(path, "w") as file:
            json.dump({"message": record}, file)
    elif is_main_process():
        print(f"error: {stage.label}: {error}", file=sys.stderr, flush=True)


def _write_receipt(stage: Stage, duration_s: float) -> None:
    files.write_json(
        paths.RECEIPTS / os.path.basename(stage.receipt_path),
        {
            "stage": stage.label,
            "run_id": stage.run.run_id,
            "git": tracking.git_commit(),
            "duration_s": round(duration_s, 3),
            "device_hours": round(stage.device_hours or duration_s / 3600, 6),
            **peak_memory(),
        },
    )


def peak_memory() -> dict[str, int]:
    """Bytes that this process has held at most: `peak_memory_bytes` of main memory, and on a GPU
    `peak_gpu_memory_bytes`. Of several training processes it is that of the first."""
    try:  # what getrusage says may be that of the process which started this one
        lines = Path("/proc/self/status").read_text().splitlines()
        resident = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        unit = 1 if sys.platform == "darwin" else 1024
        resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    found = {"peak_memory_bytes": resident}
    torch = sys.modules.get("torch")  # a stage that computes nothing has not imported it
    if torch is not None and torch.cuda.is_available() and (peak := torch.cuda.max_memory_allocated()):
        found["peak_gpu_memory_bytes"] = int(peak)
    return found


def _watch_signals(stage: Stage, stops_itself: bool) -> None:
    """Ask the stage to stop on SIGINT/SIGTERM, or when what started it dies; a second signal ends it at once.

    A worker of torchrun's agent gets signals twice (the agent passes them on) and is killed by the agent if
    it takes too long, so there the second one has no meaning.
    """
    first_s = 0.0

    def handle(signum: int, frame: object) -> None:
        nonlocal first_s
        if not stage.stop_requested():
            first_s = time.monotonic()
            stage.request_stop()
            if not stops_itself:  # outputs are replaced as a whole, so this leaves nothing half done
                raise Interrupted("stopped; the same command starts this stage again")
        elif time.monotonic() - first_s > ECHO_S and "TORCHELASTIC_RUN_ID" not in os.environ:
            signal.signal(signum, signal.SIG_DFL)
            os.kill(os.getpid(), signum)

    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, handle)
    stop_when_orphaned()


@functools.cache
def stop_when_orphaned() -> None:
    """Send this process SIGTERM when DVC, the flow or torchrun's agent that it works for is gone. Starts one
    thread.

    This covers what a process group cannot: a killed DVC or flow would leave the stage running as an orphan
    beside the next attempt (DVC ignores SIGINT while a command runs and does not forward SIGTERM).
    """
    try:
        guardians = [psutil.Process(pid) for pid in _guardians()]
    except psutil.NoSuchProcess:  # already gone
        os.kill(os.getpid(), signal.SIGTERM)
        return

    def watch() -> None:
        while all(_is_alive(process) for process in guardians):
            time.sleep(ORPHAN_CHECK_S)
        os.kill(os.getpid(), signal.SIGTERM)

    if guardians:
        threading.Thread(target=watch, daemon=True, name="orphan-watch").start()


def _guardians() -> list[int]:
    """Process ids without which this one's work is not wanted."""
    pids = []
    if "DVC_STAGE" in os.environ or "TORCHELASTIC_RUN_ID" in os.environ:
        pids.append(os.getppid())
        parent = psutil.Process(os.getppid())
        if (
            parent.name() in SHELLS and parent.ppid()
        ):  # DVC runs commands in a shell; not all shells exec the last one
            pids.append(parent.ppid())
    if flow := int(os.environ.get("TRUNKLINE_FLOW_PID", "0")):
        pids.append(flow)
    return pids


def _is_alive(process: psutil.Process) -> bool:
    """False also for a zombie, and when the pid has been given to another process."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
