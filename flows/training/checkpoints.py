"""In-flight checkpoints: where they lie, which one is whole, how one is resumed.

They live in a scratch folder outside DVC's outputs, named by a fingerprint of everything that determines the
result, so that a repeated command continues and a changed one starts afresh. A checkpoint counts only once
its `complete.json` is there, which is written last and atomically; two are kept, so that a kill while saving
loses nothing.
"""

from __future__ import annotations

import fcntl
import hashlib
import itertools
import json
import os
import pickle
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import torch

from flows import files
from flows.errors import Interrupted, ResourceError
from flows.training.distributed import Processes, full_state_dict

KEPT = 2
LOCK_PATIENCE_S = 30.0
ABANDONED_S = 14 * 24 * 3600.0
"""Unfinished runs of the same stage that nothing has touched for so long are removed: their fingerprint is
history."""


_TORCH_WRITER = ("PytorchStreamWriter", "inline_container")


def fingerprint(settings: Any, inputs: dict[str, str], sources: Iterable[Path]) -> str:
    """Hash of params (JSON-able), input digests and the bytes of all Python files in `sources`."""
    digest = hashlib.sha256(json.dumps([settings, inputs], sort_keys=True).encode())
    for source in sources:
        for path in sorted(source.rglob("*.py")) if source.is_dir() else [source]:
            digest.update(path.as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


class Checkpoints:
    """Checkpoints of one training run in `folder`; collective over all processes."""

    def __init__(self, folder: Path, processes: Processes) -> None:
        self.folder = folder
        self.processes = processes

    @contextmanager
    def hold(self, stop_requested: Callable[[], bool] = lambda: False) -> Iterator[None]:
        """Keep a second training of the same run out, also one that was orphaned and is about to stop.

        To be held until the outputs are written and the checkpoints pruned.

        Raises:
            ResourceError: another process still trains here after `LOCK_PATIENCE_S`.
            Interrupted: `stop_requested` became true while waiting for it.
        """
        if not self.processes.is_main:
            self.processes.barrier()
            yield
            return
        with self._locked(stop_requested):
            self._tidy()
            self.processes.barrier()
            yield

    @contextmanager
    def _locked(self, stop_requested: Callable[[], bool]) -> Iterator[None]:
        deadline = time.monotonic() + LOCK_PATIENCE_S
        for attempt in itertools.count():
            self.folder.mkdir(parents=True, exist_ok=True)
            with open(self.folder / "lock", "w") as lock:
                if _try_to_lock(lock):
                    yield
                    return
            if time.monotonic() > deadline:
                raise ResourceError(f"another process is training in {self.folder}; wait for it or stop it")
            if attempt == 0:
                print(
                    f"waiting for another process that is training in {self.folder}",
                    file=sys.stderr,
                    flush=True,
                )
            if stop_requested():
                raise Interrupted("stopped while another process was training the same")
            time.sleep(0.2)

    def _tidy(self) -> None:
        """Remove what a kill left half-written here, and other runs of this stage that were given up."""
        for path in self.folder.glob("step-*"):
            if not (path / "complete.json").is_file():
                shutil.rmtree(path)
        for other in self.folder.parent.iterdir():
            if other == self.folder or not (other / "lock").is_file():
                continue
            touched = max(path.stat().st_mtime for path in (other, *other.iterdir()))
            with open(other / "lock") as lock:
                if time.time() - touched > ABANDONED_S and _try_to_lock(lock):
                    shutil.rmtree(other)

    def complete(self) -> list[Path]:
        """Whole checkpoints, newest first."""
        found = [path.parent for path in self.folder.glob("step-*/complete.json")]
        return sorted(found, key=lambda path: path.name, reverse=True)

    def save(self, engine: Any, step: int, state: dict[str, Any]) -> Path:
        """Write checkpoint `step` on all processes, then mark it complete and drop old ones."""
        tag = f"step-{step:08d}"
        path = self.folder / tag
        if self.processes.is_main:
            shutil.rmtree(path, ignore_errors=True)  # what a kill may have left
        self.processes.barrier()
        try:
            engine.save_checkpoint(str(self.folder), tag=tag, client_state={"trunkline": state})
        except RuntimeError as error:  # torch's writer, in C++, says neither which file nor why
            if not any(name in str(error) for name in _TORCH_WRITER):
                raise
            free = shutil.disk_usage(self.folder).free >> 20
            raise ResourceError(
                f"a checkpoint cannot be written to {path} ({free} MB free); free some space or let "
                "PIPELINE_SCRATCH "
                "name a folder on another disk, and run the same command again"
            ) from error
        checksum = self._weights_checksum(engine)
        self.processes.barrier()
        if self.processes.is_main:
            for written in path.iterdir():
                _sync(written)
            files.write_json(path / "complete.json", {"step": step, "weights_checksum": checksum})
            for old in self.complete()[KEPT:]:
                shutil.rmtree(old)
        self.processes.barrier()
        return path

    def load(self, engine: Any, path: Path) -> dict[str, Any]:
        """Restore weights, optimiser and saved state; only from what this pipeline wrote (they are pickles).

        Raises:
            ResourceError: what was loaded is not what was saved.
        """
        try:
            _, client_state = engine.load_checkpoint(str(path.parent), tag=path.name)
        except (RuntimeError, EOFError, pickle.UnpicklingError, OSError) as error:
            raise ResourceError(
                f"{path} cannot be read ({' '.join(str(error).split())[:200]}); "
                "delete that folder to fall back to the previous checkpoint"
            ) from error
        expected = files.read_json(path / "complete.json")["weights_checksum"]
        found = self._weights_checksum(engine)
        if client_state is None or found != expected:
            raise ResourceError(
                f"{path} did not restore the weights it was saved with ({found} instead of {expected}); "
                "delete that folder to fall back to the previous checkpoint"
            )
        state: dict[str, Any] = client_state["trunkline"]
        return state

    def consolidated(self, engine: Any, path: Path) -> dict[str, torch.Tensor]:
        """Plain fp32 weights of the model from checkpoint `path`, whatever the ZeRO stage."""
        if engine.zero_optimization_stage() == 0:
            weights = {name: value.detach().float() for name, value in engine.module.state_dict().items()}
        else:
            weights = full_state_dict(path)
        return {name: value.detach().cpu().clone().contiguous() for name, value in weights.items()}

    def prune(self) -> None:
        """Remove everything once the stage's outputs are written."""
        if self.processes.is_main:
            shutil.rmtree(self.folder, ignore_errors=True)

    def _weights_checksum(self, engine: Any) -> float:
        """Sum over all weights in double precision: catches a load that quietly did nothing."""
        total = 0.0
        for index, parameter in enumerate(engine.module.parameters()):
            values = getattr(parameter, "ds_tensor", parameter)  # ZeRO-3 keeps this process's part there
            total += (index % 7 + 1) * float(values.detach().double().sum())
        return round(self.processes.sum([total])[0], 6)


def _try_to_lock(lock: IO[str]) -> bool:
    """Take the lock on an open file unless another process has it, or has removed the file when it was
    done."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    try:
        return os.path.samestat(os.fstat(lock.fileno()), os.stat(lock.name))
    except FileNotFoundError:
        return False


def _sync(path: Path) -> None:
    """Onto the disk, so that a power cut after the mark leaves no hollow files."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())
