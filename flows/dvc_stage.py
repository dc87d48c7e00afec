"""Run one DVC stage as a child process: stream its output, classify its exit code, read its receipt.

The order and names come from dvc.yaml through DVC's own index; execution goes through DVC's command line,
because the Python API keeps process-wide state.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import psutil
import yaml

from flows import files, paths
from flows.errors import RETRYABLE_EXIT_CODES, Interrupted, TrunklineError

KEPT_LINES = 50
TERMINATE_S = 60.0
LAST_WORDS_S = 5.0
ANSI = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\r")
RUNNING = re.compile(r"Running stage '([^']+)'")
LOCKED = ("Unable to acquire lock", "is busy, it is being blocked by")

Status = Literal["executed", "restored", "unchanged"]


class StageFailed(TrunklineError):
    """A stage ended with a non-zero exit code."""

    def __init__(self, message: str, exit_code: int, can_retry: bool) -> None:
        super().__init__(message)
        self.exit_code = exit_code
        self.can_retry = can_retry


@dataclass(frozen=True)
class StageInfo:
    """A stage of dvc.yaml."""

    name: str  # finetune@scratch
    needs: tuple[str, ...]  # names of the stages it depends on
    sections: tuple[str, ...]  # of params.yaml
    outs: tuple[str, ...] = ()  # paths of its outputs and metrics

    @property
    def family(self) -> str:
        return self.name.partition("@")[0]


def read_graph(root: Path) -> list[StageInfo]:
    """Stages in the order of `root`/dvc.yaml, as far as each comes after what it needs.

    Raises:
        TrunklineError: dvc.yaml or params.yaml cannot be read by DVC.
    """
    import networkx
    from dvc.exceptions import DvcException
    from dvc.repo import Repo

    try:
        with Repo(str(root)) as repo:
            graph = repo.index.graph  # edges point from a stage to what it needs
            families = list(yaml.safe_load((root / "dvc.yaml").read_text())["stages"])
            order = networkx.lexicographical_topological_sort(
                graph.reverse(),
                key=lambda stage: (families.index(stage.name.partition("@")[0]), stage.name),
            )
            return [
                StageInfo(
                    stage.name,
                    tuple(sorted(parent.name for parent in graph.successors(stage))),
                    tuple(name for dependency in stage.params for name in dependency.params),
                    tuple(out.def_path for out in stage.outs),
                )
                for stage in order
            ]
    except DvcException as error:
        raise TrunklineError(f"DVC cannot read the pipeline in {root}: {error}") from error


def leading_to(graph: Sequence[StageInfo], families: Sequence[str]) -> list[StageInfo]:
    """The stages of these families and all that they need, in the order of `graph`."""
    by_name = {info.name: info for info in graph}
    wanted: set[str] = set()
    waiting = [info.name for info in graph if info.family in families]
    while waiting:
        name = waiting.pop()
        if name not in wanted:
            wanted.add(name)
            waiting += by_name[name].needs
    return [info for info in graph if info.name in wanted]


def read_receipt(root: Path, stage: str) -> dict[str, Any]:
    """What the execution that made the stage's present outputs left; empty if there is none."""
    path = root / paths.RECEIPTS / f"{stage.replace('@', '-')}.json"
    return dict(files.read_json(path)) if path.is_file() else {}


def run_stage(
    root: Path,
    stage: str,
    environment: dict[str, str],
    on_line: Callable[[str], None],
) -> tuple[Status, dict[str, Any]]:
    """`dvc repro --single-item STAGE` in `root`: what DVC did and the receipt of the run that made the bytes.

    Raises:
        StageFailed: with the stage's own exit code, its error line and the command that repeats it.
    """
    before = read_receipt(root, stage)
    executed = reproduce(root, ["--single-item", stage], environment, on_line)
    receipt = read_receipt(root, stage)
    if executed:
        return "executed", receipt
    return ("unchanged" if receipt == before else "restored"), receipt


def reproduce(
    root: Path,
    arguments: Sequence[str],
    environment: dict[str, str],
    on_line: Callable[[str], None],
    keep_open: Sequence[int] = (),
) -> list[str]:
    """`dvc repro ARGUMENTS` in `root`: the stages that were executed, not those skipped or restored.

    Args:
        keep_open: file descriptors (locks) that DVC's process holds as well, should this one be killed.

    Raises:
        StageFailed: with the exit code of the stage that failed, its error line and the command that repeats
            it.
    """
    lines: deque[str] = deque(maxlen=KEPT_LINES)
    executed: list[str] = []
    process = subprocess.Popen(
        [sys.executable, "-m", "dvc", "--wait-for-lock", "repro", *arguments],
        cwd=root,
        env={
            **os.environ,
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            **environment,
        },
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        bufsize=1,
        pass_fds=tuple(keep_open),
    )
    try:
        assert process.stdout is not None
        for raw in process.stdout:
            line = ANSI.sub("", raw).rstrip()
            if line:
                if found := RUNNING.match(line):
                    executed.append(found[1])
                lines.append(line)
                on_line(line)
        code = process.wait()
    finally:
        if process.poll() is None:
            terminate_tree(process.pid)
    if code != 0:
        raise _failure(arguments, root, code, list(lines))
    return executed


def _failure(arguments: Sequence[str], root: Path, code: int, lines: list[str]) -> StageFailed:
    """DVC answers 255 to any failure of a command; the command's own code stands at the end of its last
    line."""
    matches = [found for line in lines if (found := re.search(r", exited with (-?\d+)$", line))]
    own = int(matches[-1].group(1)) if matches else code
    if own < 0:  # the shell that DVC runs commands in decides whether a signal is told as -9 or as 137
        own = 128 - own
    own_words = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    dvc_words = (
        [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR: ")] if not matches else []
    )
    said = own_words[-1:] or dvc_words[:1]
    text = said[0] if said else "\n".join([f"{arguments[-1]} failed:", *lines[-15:]])
    locked = any(mark in line for line in lines for mark in LOCKED)
    repeat = (
        "" if own == Interrupted.exit_code else f"\n  repeat: cd {root} && dvc repro {' '.join(arguments)}"
    )
    return StageFailed(text + repeat, own, locked or own in RETRYABLE_EXIT_CODES)


def terminate_tree(pid: int, patience_s: float = TERMINATE_S) -> None:
    """SIGTERM to all descendants, leaves first, so that training saves a checkpoint; SIGKILL to the rest.

    The process itself (DVC) comes last and gets some seconds to end by itself: only it can say how its
    command ended, and release its locks.
    """
    try:
        root = psutil.Process(pid)
        descendants = [*reversed(root.children(recursive=True))]
    except psutil.NoSuchProcess:
        return
    _signal(descendants, signal.SIGTERM)
    _wait(descendants, patience_s)
    if descendants:
        _wait([root], min(LAST_WORDS_S, patience_s))
    _signal([root], signal.SIGTERM)
    _wait([root], patience_s)
    _signal([*descendants, root], signal.SIGKILL)


def _signal(processes: list[psutil.Process], signum: int) -> None:
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.send_signal(signum)


def _wait(processes: list[psutil.Process], patience_s: float) -> None:
    """Until all have ended; one whose parent has not asked for its exit code yet has ended, too."""
    deadline = time.monotonic() + patience_s
    while any(_is_running(process) for process in processes) and time.monotonic() < deadline:
        time.sleep(0.05)


def _is_running(process: psutil.Process) -> bool:
    try:
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False
