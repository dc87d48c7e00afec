"""In-flight checkpoints: where they lie, which one is whole, how one is resumed.

They live in a scratch folder outside DVC's outputs, named by a fingerprint of everything that determines the
result, so that a repeated command continues and a changed one starts afresh. A checkpoint counts only once
its `complete.json` is there, which is written last and atomically; two are kept, so that a kill while saving
loses nothing. Any number of processes may resume: another one than that which saved loads a converted copy,
made beside the original. Every resume is checked against what the checkpoint says of itself
(`flows.training.restoration`).
"""

from __future__ import annotations

import fcntl
import hashlib
import itertools
import json
import os
import pickle
import secrets
import shutil
import socket
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import torch
from pydantic import BaseModel

from flows import files
from flows.errors import ConfigError, Interrupted, ResourceError, explain
from flows.params import Training
from flows.training import restoration, universal
from flows.training.distributed import Processes, full_state_dict, resolve_precision

KEPT = 2
LOCK_PATIENCE_S = 30.0
ABANDONED_S = 14 * 24 * 3600.0
"""Unfinished runs of the same stage that nothing has touched for so long are removed: their fingerprint is
history."""
SHARED_PATIENCE_S = 60.0
"""A network file system shows a new file to other machines after its caches' time, seconds to a minute."""

_TOKEN = "owner"
_UNIVERSAL = "universal-"
_WAY_OUT = "delete that folder to fall back to the previous checkpoint"
_TORCH_WRITER = ("PytorchStreamWriter", "inline_container")
_DIVISION = {"training": {"processes", "threads", "accumulation"}}
"""Settings that say how a step's images are divided, not which they are."""


def settings_that_name(section: BaseModel) -> dict[str, Any]:
    """A stage's section of params.yaml as its runs' fingerprint needs it: a run stays the same run on another
    number of processes."""
    return section.model_dump(exclude=_DIVISION)


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
            ResourceError: another process still trains here after `LOCK_PATIENCE_S`, or the machines do not
                share this folder.
            ConfigError: not all processes train the same.
            Interrupted: `stop_requested` became true while waiting for it.
        """
        self._check_same_run()
        if not self.processes.is_main:
            self._check_shared(self.processes.share(""))
            yield
            return
        with self._locked(stop_requested):
            self._tidy()
            token = secrets.token_hex(8)
            files.write_text(self.folder / _TOKEN, token)
            self._check_shared(self.processes.share(token))
            yield

    def _check_same_run(self) -> None:
        """Else each machine would train with its own params, data or code, and nobody would notice."""
        mine = (self.folder.name, socket.gethostname())
        runs = self.processes.gather(mine)
        others = sorted(
            {f"{host} (process {rank})" for rank, (run, host) in enumerate(runs) if run != runs[0][0]}
        )
        if others:
            raise ConfigError(
                f"{', '.join(others)} would train something else than {runs[0][1]} (process 0): their "
                "params.yaml, artifacts/ or code differ; make them equal"
            )

    def _check_shared(self, token: str) -> None:
        """Every process must see this very folder: each writes its part of a checkpoint there."""
        if self.processes.machines == 1:
            return
        deadline = time.monotonic() + SHARED_PATIENCE_S
        seen = False
        while not seen and time.monotonic() < deadline:
            with suppress(FileNotFoundError):
                seen = (self.folder / _TOKEN).read_text() == token
            if not seen:
                time.sleep(0.5)
        hosts = self.processes.gather((seen, socket.gethostname()))
        blind = sorted({host for found, host in hosts if not found})
        if blind:
            raise ResourceError(
                f"{', '.join(blind)} does not see the folder of checkpoints that {hosts[0][1]} uses; let "
                f"PIPELINE_SCRATCH name a folder that all machines share (here {self.folder.parent.parent})"
            )

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
        for path in self.folder.iterdir():
            unfinished = path.name.startswith("step-") and not (path / "complete.json").is_file()
            if unfinished or path.name.startswith(f".{_UNIVERSAL}"):
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

    def newest(self) -> Path | None:
        """The checkpoint to resume from: the main process's choice, because its view of the folder counts."""
        found = self.complete() if self.processes.is_main else []
        name = self.processes.share(found[0].name if found else "")
        return self.folder / name if name else None

    def save(self, engine: Any, step: int, state: dict[str, Any], probe: float) -> Path:
        """Write checkpoint `step` on all processes, then mark it complete and drop old ones.

        Args:
            probe: loss of the fixed batch with these weights.
        """
        tag = f"step-{step:08d}"
        path = self.folder / tag
        if self.processes.is_main:
            shutil.rmtree(path, ignore_errors=True)  # what a kill may have left
        self.processes.barrier()
        with _explain_writing(path):
            engine.save_checkpoint(str(self.folder), tag=tag, client_state={"trunkline": state})
        summary = restoration.summarize(engine, self.processes)
        if self.processes.is_first_here:  # a machine can only vouch for what it wrote itself
            for written in path.iterdir():
                _sync(written)
        self.processes.barrier()
        if self.processes.is_main:
            described = {
                "step": step,
                "processes": self.processes.world_size,
                "state": summary,
                "probe": probe,
            }
            files.write_json(path / "complete.json", described)
            for old in (*self.complete()[KEPT:], *self.folder.glob(f"{_UNIVERSAL}*")):
                shutil.rmtree(old)
        self.processes.barrier()
        return path

    def load(self, engine: Any, path: Path, settings: Training, probe: Callable[[], float]) -> dict[str, Any]:
        """Restore weights, optimiser and saved state; only from what this pipeline wrote (they are pickles).

        Args:
            path: a whole checkpoint, of this run or another one.
            probe: the loss of the fixed batch, as it was computed for `save`.

        Raises:
            ResourceError: it cannot be read, or what was loaded is not what was saved.
        """
        described = self.processes.share(self._describe(path) if self.processes.is_main else {})
        is_other_count = described["processes"] != self.processes.world_size
        try:
            if is_other_count and engine.zero_optimization_stage() > 0:
                state = self._load_converted(engine, path, described)
            else:
                _, state = engine.load_checkpoint(str(path.parent), tag=path.name)
        except (
            RuntimeError,
            EOFError,
            pickle.UnpicklingError,
            OSError,
            AssertionError,
            LookupError,
        ) as error:
            if explained := explain(error):
                raise explained from error
            raise ResourceError(
                f"{path} cannot be read ({' '.join(str(error).split())[:200]}); {_WAY_OUT}"
            ) from error
        if state is None:
            raise ResourceError(f"{path} cannot be read (files are missing); {_WAY_OUT}")

        if found := restoration.differences(
            restoration.summarize(engine, self.processes), described["state"]
        ):
            raise ResourceError(
                f"{path} did not restore what it was saved with: {'; '.join(found)}; {_WAY_OUT}"
            )
        loss = probe()
        if restoration.probe_differs(loss, described["probe"], resolve_precision(settings)):
            raise ResourceError(
                f"{path} restored weights whose loss is {loss:.9g} instead of {described['probe']:.9g} on "
                f"the same images; {_WAY_OUT}"
            )
        return dict(state["trunkline"])

    def _describe(self, path: Path) -> dict[str, Any]:
        described: dict[str, Any] = files.read_json(path / "complete.json")
        if "processes" not in described:
            raise ResourceError(f"{path} was written by an earlier version of Trunkline; {_WAY_OUT}")
        return described

    def _load_converted(self, engine: Any, path: Path, described: dict[str, Any]) -> Any:
        """Through a copy in universal form in this run's folder, unless an earlier attempt has made it."""
        copy = self.folder / f"{_UNIVERSAL}{path.name}"
        origin = copy / "origin.json"
        if self.processes.is_main and not (origin.is_file() and files.read_json(origin) == described):
            print(
                f"converting {path}: written by {described['processes']} processes, to be read by "
                f"{self.processes.world_size}",
                file=sys.stderr,
                flush=True,
            )
            with _explain_writing(copy):
                universal.convert(path, copy)
                files.write_json(origin, described)
        self.processes.barrier()
        return universal.load(engine, copy)

    def consolidated(self, engine: Any, path: Path) -> dict[str, torch.Tensor]:
        """Plain fp32 weights of the model from checkpoint `path`, whatever the ZeRO stage."""
        stage = engine.zero_optimization_stage()
        weights = engine.module.state_dict() if stage == 0 else full_state_dict(path)
        if stage in (
            1,
            2,
        ):  # DeepSpeed makes floats of counts and, with stage 1, leaves frozen weights out
            kept = [*engine.module.named_buffers()]
            kept += [pair for pair in engine.module.named_parameters() if not pair[1].requires_grad]
            saved = engine.module.state_dict()
            weights |= {name: value for name, value in kept if name in saved}
        weights = {
            name: value.float() if value.is_floating_point() else value for name, value in weights.items()
        }
        return {name: value.detach().cpu().clone().contiguous() for name, value in weights.items()}

    def prune(self) -> None:
        """Remove everything once the stage's outputs are written."""
        if self.processes.is_main:
            shutil.rmtree(self.folder, ignore_errors=True)


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


@contextmanager
def _explain_writing(path: Path) -> Iterator[None]:
    """torch's writer, in C++, says neither which file nor why."""
    try:
        yield
    except RuntimeError as error:
        if not any(name in str(error) for name in _TORCH_WRITER):
            raise
        free = shutil.disk_usage(path.parent).free >> 20
        raise ResourceError(
            f"a checkpoint cannot be written to {path} ({free} MB free); free some space or let "
            "PIPELINE_SCRATCH name a folder on another disk, and run the same command again"
        ) from error
