"""In-flight checkpoints: where they lie, which one is whole, how one is resumed.

They live in a scratch folder outside DVC's outputs, named by a fingerprint of everything that determines the
result, so that a repeated command continues and a changed one starts afresh. A checkpoint counts only once
its `complete.json` is there, which is written last and atomically; two are kept, so that a kill while saving
loses nothing.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import shutil
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import torch

from flows import files
from flows.errors import ResourceError
from flows.training.distributed import Processes, full_state_dict

KEPT = 2
LOCK_PATIENCE_S = 30.0


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
    def hold(self) -> Iterator[None]:
        """Keep a second training of the same run out, also one that was orphaned and is about to stop.

        Raises:
            ResourceError: another process still trains here after `LOCK_PATIENCE_S`.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        with open(self.folder / "lock", "w") as lock:
            if self.processes.is_main:
                self._lock(lock)
            self.processes.barrier()
            yield

    def _lock(self, lock: IO[str]) -> None:
        deadline = time.monotonic() + LOCK_PATIENCE_S
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise ResourceError(
                        f"another process is training in {self.folder}; wait for it or stop it"
                    ) from None
                time.sleep(0.2)

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
        engine.save_checkpoint(str(self.folder), tag=tag, client_state={"trunkline": state})
        checksum = self._weights_checksum(engine)
        self.processes.barrier()
        if self.processes.is_main:
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
        _, client_state = engine.load_checkpoint(str(path.parent), tag=path.name)
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
