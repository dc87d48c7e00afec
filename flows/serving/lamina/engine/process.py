"""The engine process: open the bundle, find the workers, check, calibrate, serve.

    python -m flows.serving.lamina.engine.process --config FILE [--exit-with-stdin]

FILE is JSON, written by whoever supervises: bundle, settings, addresses of workers, token file, socket,
journal, calibration file. The socket answers from the first moment, with state `loading`. SIGTERM lets
running requests end and takes no new ones; a second one ends the process at once.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

import numpy
import onnxruntime
import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from flows import files
from flows.errors import ConfigError, DataError, ResourceError, TrunklineError, explain
from flows.params import Lamina
from flows.serving import session
from flows.serving.lamina.attention.pool import Address, ModelShape
from flows.serving.lamina.attention.pool import WorkerLost as WorkerLostError
from flows.serving.lamina.attention.session import LayerSettings
from flows.serving.lamina.attention.worker import read_token
from flows.serving.lamina.engine import calibration
from flows.serving.lamina.engine.calibration import Calibration
from flows.serving.lamina.engine.endpoint import Endpoint
from flows.serving.lamina.engine.engine import Engine
from flows.serving.lamina.engine.journal import Journal, JournalFull
from flows.serving.lamina.engine.self_check import slices_batch_invariant
from flows.serving.lamina.engine.workers import Workers
from flows.serving.lamina.lifeline import exit_with_stdin
from flows.serving.lamina.requests import Drain, Heartbeat, Message, ToEngine, WorkerLost
from flows.serving.lamina.slices.bundle import MANIFEST, Bundle, read_bundle
from flows.serving.lamina.slices.runner import Slices, open_slices

CALIBRATIONS = 5  # attempts; every one may lose a worker


class Config(BaseModel):
    """The content of FILE."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    bundle: Path
    lamina: Lamina
    workers: Annotated[tuple[Address, ...], Field(strict=False)] = ()
    token_file: Path
    socket: Path
    journal: Path | None = None
    calibration: Path


class Process:
    """The parts of the process that live longer than the engine, which is ready only after a while."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.engine: Engine | None = None
        self.drain_asked = False
        self._early: list[ToEngine] = []
        self._lock = threading.RLock()  # a signal may come while this very thread has it
        self.endpoint = Endpoint(
            config.socket,
            config.lamina.cluster.heartbeat_ms / 1000,
            deliver=self._deliver,
            heartbeat=self._heartbeat,
            metrics=lambda: self.engine.render_metrics() if self.engine else "",
        )

    def run(self) -> None:
        """Until drained."""
        config, settings = self.config, self.config.lamina
        torch.set_num_threads(1)  # for attention in this process; the slices have threads of their own
        bundle = read_bundle(config.bundle)
        journal = Journal(config.journal, settings.recover.journal_mb << 20)
        with suppress(JournalFull):
            journal.begin()
        workers = Workers(
            model_shape(bundle),
            settings,
            config.workers,
            read_token(config.token_file),
            first_epoch=max(journal.epoch + 1, int(time.time())),
            on_lost=self._tell_lost,
            on_epoch=_entered(journal),
        )
        workers.start(lambda: None)
        workers.link.free(range(settings.sched.max_requests))  # of an engine before this one
        slices, found = prepare(bundle, settings, workers, config.calibration)
        if settings.exact.require_batch_invariant and not found.batch_invariant:
            raise DataError(
                "on this machine the bits of a row depend on the rows beside it, so a text that is recovered "
                "may change; set exact.require_batch_invariant: false to serve all the same"
            )
        print(f"calibration: {found.describe()}", file=sys.stderr, flush=True)
        engine = Engine(slices, settings, workers, journal, found, self.endpoint.send)
        with self._lock:
            self.engine = engine
            for message in self._early:
                engine.inbox.put(message)
        try:
            engine.run()
        finally:
            workers.close()
            journal.close()
            self.endpoint.close()

    def drain(self) -> None:
        self.drain_asked = True
        self._deliver(Drain())

    def _deliver(self, message: ToEngine) -> None:
        with self._lock:
            if self.engine is None:
                self._early.append(message)
            else:
                self.engine.inbox.put(message)

    def _heartbeat(self) -> Heartbeat:
        if self.engine is None:
            return Heartbeat(state="loading", reasons=("the model is being loaded",))
        return self.engine.heartbeat()

    def _tell_lost(self, address: Address, pid: int, reason: str) -> None:
        self._send(WorkerLost(host=address[0], port=address[1], pid=pid, reason=reason))
        print(f"lost {reason}", file=sys.stderr, flush=True)

    def _send(self, message: Message) -> None:
        self.endpoint.send(message)


def prepare(
    bundle: Bundle, settings: Lamina, workers: Workers, file: Path | None
) -> tuple[Slices, Calibration]:
    """The slices as they will be run, and what decided it: the file, or a measurement written there."""
    wanted, threads = settings.model.split, settings.model.threads
    key = calibration.key_of(
        files.sha256_file(bundle.folder / MANIFEST), _relevant(settings), _machine(workers)
    )

    def opened(split: bool) -> Slices:
        return open_slices(bundle, split=split, threads=threads, spin=False)

    known = calibration.read(file, key) if file is not None else None
    if known is not None:
        slices = opened(known.split)
        return slices, known
    micro_batches = settings.sched.micro_batches
    both = {split: opened(split) for split in (True, False) if wanted in ("auto", split)}
    invariant = workers.link.batch_invariant and all(map(slices_batch_invariant, both.values()))
    found = None
    for attempt in range(CALIBRATIONS):
        try:
            found = calibration.measure(
                key, both.get(True), both.get(False), workers, settings.sched.max_requests, invariant,
                None if micro_batches == "auto" else micro_batches,
            )  # fmt: skip
            break
        except WorkerLostError as error:
            if attempt == CALIBRATIONS - 1:
                raise
            workers.reconnect(error, lambda: None)
    assert found is not None
    if file is not None:
        with suppress(OSError):  # the next start measures again
            calibration.write(file, found)
    return both[found.split], found


def model_shape(bundle: Bundle) -> ModelShape:
    """What attention has to know of the bundle's model."""
    manifest = bundle.manifest
    layers = [
        LayerSettings(scale=layer.scale, window=layer.window, soft_cap=layer.soft_cap)
        for layer in manifest.attention
    ]
    return ModelShape(layers, manifest.heads, manifest.kv_heads, manifest.head_size)


def _relevant(settings: Lamina) -> dict[str, Any]:
    """Settings on which the fastest way may depend."""
    return {
        "model": settings.model.model_dump(),
        "cluster": settings.cluster.model_dump(),
        "micro_batches": settings.sched.micro_batches,
        "max_requests": settings.sched.max_requests,
    }


def _machine(workers: Workers) -> dict[str, Any]:
    return {
        "cpu": platform.processor() or platform.machine(),
        "cores": session.available_threads(),
        "hosts": sorted({address[0] for address in workers.assigned if address}),
        "versions": [torch.__version__, numpy.__version__, onnxruntime.__version__],
    }


def _entered(journal: Journal) -> Any:
    def entered(epoch: int) -> None:
        with suppress(JournalFull):  # then the clock alone keeps epochs apart
            journal.entered(epoch)

    return entered


def read_config(path: Path) -> Config:
    """
    Raises:
        ConfigError: the file is missing or not what an engine needs.
    """
    try:
        return Config.model_validate(json.loads(path.read_text()))
    except OSError as error:
        raise ConfigError(f"cannot read {path} ({error.strerror})") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ConfigError(f"{path}: {where}: {first['msg']}") from None
    except ValueError as error:
        raise ConfigError(f"{path} is not JSON: {error}") from None


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m flows.serving.lamina.engine.process",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--exit-with-stdin", action="store_true", help="end when stdin does")
    arguments = parser.parse_args(argv)
    if arguments.exit_with_stdin:
        exit_with_stdin()
    try:
        process = Process(read_config(arguments.config))

        def stop(number: int, frame: FrameType | None) -> None:
            if process.drain_asked:
                os._exit(75)
            process.drain()

        for name in (signal.SIGTERM, signal.SIGINT):
            signal.signal(name, stop)
        process.run()
    except TrunklineError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return error.exit_code
    except MemoryError:
        print(
            "error: there is not enough memory for the model and its tables of pages",
            file=sys.stderr,
            flush=True,
        )
        return ResourceError.exit_code
    except OSError as error:
        explained = explain(error)
        if explained is None:
            raise
        print(f"error: {explained}", file=sys.stderr, flush=True)
        return explained.exit_code
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
