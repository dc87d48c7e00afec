"""A small workspace to train in, and stages in it as child processes that a test can disturb."""

from __future__ import annotations

import csv
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil
import yaml

from flows import params
from flows.stage import Stage
from flows.stages import ingest, scale

ROOT = Path(__file__).resolve().parents[3]
PATIENCE_S = 120.0
STEPS = 96


def build(folder: Path) -> Path:
    """Ingested and scaled digits, a network of 16 x 16 pixels, the clone's code by reference. Changes the
    directory."""
    for name in ("flows", "models"):
        (folder / name).symlink_to(ROOT / name)
    training = {
        "steps": STEPS,
        "batch_size": 32,
        "threads": 1,
        "precision": "fp32",
        "warmup_steps": 4,
        "log_every": 3,
        "validate_every": 24,
        "checkpoint_every": 5,
    }
    values = params.overlay(
        params.read(ROOT / "params.yaml"),
        {
            "ingest": {"source": str(ROOT / "constraints.txt")},
            "model": {"image_size": 16},
            "pretrain": {"training": training},
            "finetune": {"training": training},
        },
        "test",
    )
    (folder / "params.yaml").write_text(yaml.safe_dump(values))
    os.chdir(folder)
    checked = params.load()
    ingest.run(checked, Stage("ingest"))
    scale.run(checked, Stage("scale"))
    return folder


def copy(source: Path, target: Path, change: Mapping[str, Any] | None = None) -> Path:
    """The workspace `source` as new folder `target` with some params changed."""
    shutil.copytree(source, target, symlinks=True)
    values = params.overlay(params.read(target / "params.yaml"), change or {}, "test")
    (target / "params.yaml").write_text(yaml.safe_dump(values))
    return target


def environment(workspace: Path, **variables: str) -> dict[str, str]:
    """Everything a stage writes lies in `workspace`; no tracking unless asked for."""
    inherited = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("DVC_", "TRUNKLINE_", "MLFLOW_TRACKING_"))  # another test's store
    }
    return {
        **inherited,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": "",
        "PIPELINE_SCRATCH": str(workspace / "scratch"),
        "TRUNKLINE_HOME": str(workspace),
        "TRUNKLINE_TRACKING": "off",
        **variables,
    }


class Attempt:
    """One execution of a stage's command, in a process group of its own, with its output as it comes."""

    def __init__(
        self,
        workspace: Path,
        *arguments: str,
        parent: bool = False,
        prefix: Sequence[str] = (),
        **variables: str,
    ) -> None:
        """
        Args:
            arguments: of `flows.launch`.
            parent: start it below a shell that stands for DVC.
            prefix: a command that becomes the one behind it, somewhere else.
        """
        command = [*prefix, sys.executable, "-m", "flows.launch", *arguments]
        if parent:
            command = ["sh", "-c", '"$@" & echo "stage is $!"; wait $!; exit $?', "dvc", *command]
            variables = {"DVC_STAGE": "pretrain", **variables}
        self.process = subprocess.Popen(
            command,
            cwd=workspace,
            env=environment(workspace, **variables),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        self.lines: list[str] = []
        self._changed = threading.Condition()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            with self._changed:
                self.lines.append(line.rstrip())
                self._changed.notify_all()
        with self._changed:
            self._changed.notify_all()

    @property
    def output(self) -> str:
        return "\n".join(self.lines)

    def wait_for(self, pattern: str) -> re.Match[str]:
        """The first line that matches, as soon as it is there."""
        found: re.Match[str] | None = None

        def look() -> bool:
            nonlocal found
            found = next(filter(None, (re.search(pattern, line) for line in self.lines)), None)
            return found is not None or not self._reader.is_alive()

        with self._changed:
            self._changed.wait_for(look, PATIENCE_S)
        assert found is not None, f"{pattern!r} did not come:\n{self.output}"
        return found

    def wait_for_step(self, step: int) -> None:
        """Until a line about `step` or a later one has been printed; a resume may begin beyond it."""
        later = "|".join(str(number) for number in range(step, STEPS + 1))
        self.wait_for(rf" step (?:{later})/{STEPS}  loss")

    def wait(self) -> int:
        """Exit code, once the output has ended, that is, when no process is left that could write to it."""
        self._reader.join(PATIENCE_S)
        assert not self._reader.is_alive(), f"it does not end:\n{self.output}"
        return self.process.wait(PATIENCE_S)

    def workers(self) -> list[psutil.Process]:
        """The training processes below torchrun's agent, by rank."""
        return sorted(
            psutil.Process(self.process.pid).children(), key=lambda process: process.environ()["RANK"]
        )

    def kill(self) -> None:
        """SIGKILL to it and all below it. (Workers of torchrun's agent have process groups of their own.)"""
        for process in [*psutil.Process(self.process.pid).children(recursive=True), self.process]:
            process.send_signal(signal.SIGKILL)

    def close(self) -> None:
        """End what a failed test may have left."""
        if self.process.poll() is None:
            self.kill()
        self._reader.join(PATIENCE_S)


def errors(attempt: Attempt) -> list[str]:
    return [line for line in attempt.lines if line.startswith("error: ")]


def weights(workspace: Path, folder: str = "pretrain") -> bytes:
    return (workspace / "artifacts" / folder / "model.safetensors").read_bytes()


def curves(workspace: Path, folder: str = "pretrain") -> dict[str, list[tuple[float, ...]]]:
    """Of each table the columns that say what was learnt, not how fast."""
    columns = {"curves": ("step", "train_loss", "lr", "grad_norm"), "validation": ("step", "val_loss")}
    tables = {}
    for name, kept in columns.items():
        with open(workspace / "artifacts" / folder / f"{name}.csv", newline="") as file:
            tables[name] = [tuple(float(row[column]) for column in kept) for row in csv.DictReader(file)]
    return tables


def wait_until_gone(pids: list[int]) -> float:
    """Seconds until none of the processes is left."""
    started = time.monotonic()
    while any(psutil.pid_exists(pid) for pid in pids):
        assert time.monotonic() - started < PATIENCE_S, f"{pids} are still there"
        time.sleep(0.1)
    return time.monotonic() - started
