"""An engine with its attention workers as processes, spoken to over its socket: for measurements and fault
tests.

    with running(bundle, workers=2, settings={"sched.max_rows": 64}) as engine:
        answer = engine.generate([Submit(…), …])

No HTTP and no supervision: who breaks a worker here starts the next one.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flows import params
from flows.serving.lamina.requests import (
    Finished,
    Follow,
    Heartbeat,
    Rejected,
    Submit,
    ToEngine,
    TokenEvent,
    WorkerLost,
    decode_from_engine,
    encode,
)

ROOT = Path(__file__).resolve().parents[1]
READY_S = 120.0
WORKER = "flows.serving.lamina.attention.worker"
ENGINE = "flows.serving.lamina.engine.process"


@dataclass
class Answer:
    """What came of one request, and when (monotonic seconds of this process)."""

    tokens: list[int] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    logprobs: list[float | None] = field(default_factory=list)
    finished: Finished | None = None
    rejected: Rejected | None = None

    @property
    def ended(self) -> bool:
        return self.finished is not None or self.rejected is not None


def section(changes: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Section `lamina` of params.yaml with changes by dotted name."""
    raw: dict[str, Any] = params.read(ROOT / "params.yaml")["lamina"]
    for name, value in (changes or {}).items():
        group, key = name.split(".")
        raw[group][key] = value
    return raw


class RunningEngine:
    """Processes and one connection. `answers` fills by itself; tokens count once, by their index."""

    def __init__(self, folder: Path, bundle: Path, lamina: dict[str, Any], workers: int) -> None:
        self.folder = folder
        self.answers: dict[str, Answer] = {}
        self.heartbeat: Heartbeat | None = None
        self.lost: list[WorkerLost] = []
        self.on_token: Callable[[TokenEvent], None] = lambda event: None
        self.doubled: list[TokenEvent] = []  # same index, another token
        self._changed = threading.Condition()
        self._over = False  # the engine has closed the connection
        self._socket: socket.socket | None = None
        self.token = folder / "token"
        self.token.write_text(os.urandom(16).hex())
        self.token.chmod(0o600)
        self.workers: list[subprocess.Popen[str]] = []
        self.ports: list[int] = []
        self._megabytes = lamina["kv"]["mb_per_worker"]
        for _ in range(workers):
            process = self.start_worker(0)
            self.workers.append(process)
        for process in self.workers:
            assert process.stdout is not None
            self.ports.append(json.loads(process.stdout.readline())["port"])
        config = {
            "bundle": str(bundle),
            "lamina": lamina,
            "workers": [["127.0.0.1", port] for port in self.ports],
            "token_file": str(self.token),
            "socket": str(folder / "socket"),
            "journal": str(folder / "journal"),
            "calibration": str(folder / "calibration.json"),
        }
        (folder / "config.json").write_text(json.dumps(config))
        self.engine = self.start_engine()

    def start_worker(self, port: int) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", WORKER, "--port", str(port), "--token-file", str(self.token),
                   "--max-bytes", str(self._megabytes << 20)]  # fmt: skip
        return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)

    def start_engine(self) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", ENGINE, "--config", str(self.folder / "config.json")]
        log = open(self.folder / "engine.log", "ab")  # noqa: SIM115  # the process has it
        try:
            return subprocess.Popen(command, stderr=log, cwd=ROOT)
        finally:
            log.close()

    def connect(self) -> None:
        """Wait until the engine is ready; follow the requests that are open."""
        deadline = time.monotonic() + READY_S
        while True:
            if self.engine.poll() is not None:
                raise RuntimeError(f"the engine ended with {self.engine.returncode}: {self.log()[-500:]}")
            if time.monotonic() > deadline:
                raise RuntimeError(f"the engine is not ready: {self.heartbeat} {self.log()[-500:]}")
            connection = socket.socket(socket.AF_UNIX)
            try:
                connection.connect(str(self.folder / "socket"))
            except OSError:
                connection.close()
                time.sleep(0.02)
                continue
            break
        self._socket = connection
        self.heartbeat = None
        self._over = False
        threading.Thread(target=self._read, args=(connection,), daemon=True).start()
        for name, answer in list(self.answers.items()):
            if not answer.ended:
                self.send(Follow(id=name, index=len(answer.tokens)))
        with self._changed:
            ready = self._changed.wait_for(
                lambda: (self.heartbeat is not None and self.heartbeat.state == "ready") or self._over,
                READY_S,
            )
        if not ready or self._over:
            raise RuntimeError(f"the engine is not ready: {self.heartbeat} {self.log()[-500:]}")

    def send(self, message: ToEngine) -> None:
        assert self._socket is not None
        if isinstance(message, Submit):
            self.answers[message.id] = Answer()
        self._socket.sendall(encode(message))

    def wait(self, names: Sequence[str] | None = None, timeout_s: float = 300.0) -> bool:
        """Until these requests (default: all) have ended."""

        def done() -> bool:
            return all(self.answers[name].ended for name in names or list(self.answers))

        with self._changed:
            return self._changed.wait_for(done, timeout_s)

    def wait_for(self, condition: Callable[[], bool], timeout_s: float = 300.0) -> bool:
        """Until a message has made `condition` true."""
        with self._changed:
            return self._changed.wait_for(condition, timeout_s)

    def generate(self, requests: Sequence[Submit], timeout_s: float = 300.0) -> list[Answer]:
        for request in requests:
            self.send(request)
        self.wait([request.id for request in requests], timeout_s)
        return [self.answers[request.id] for request in requests]

    def replace_worker(self, index: int) -> None:
        """Start a worker where one was ended."""
        self.workers[index].kill()
        self.workers[index].wait()
        self.workers[index] = self.start_worker(self.ports[index])

    def restart_engine(self) -> None:
        self.engine.kill()
        self.engine.wait()
        self.engine = self.start_engine()
        self.connect()

    def log(self) -> str:
        return (self.folder / "engine.log").read_text(errors="replace")

    def close(self) -> None:
        if self._socket is not None:
            self._socket.close()
        for process in [self.engine, *self.workers]:
            process.kill()
            process.wait()

    def _read(self, connection: socket.socket) -> None:
        with suppress(OSError, ValueError), connection.makefile("rb") as lines:
            for line in lines:
                message = decode_from_engine(line)
                now = time.monotonic()
                with self._changed:
                    if isinstance(message, TokenEvent):
                        answer = self.answers[message.id]
                        if message.index == len(answer.tokens):
                            answer.tokens.append(message.token)
                            answer.times.append(now)
                            answer.logprobs.append(message.logprob)
                        elif (
                            message.index > len(answer.tokens)
                            or answer.tokens[message.index] != message.token
                        ):
                            self.doubled.append(message)
                    elif isinstance(message, Finished):
                        self.answers[message.id].finished = message
                    elif isinstance(message, Rejected):
                        self.answers[message.id].rejected = message
                    elif isinstance(message, Heartbeat):
                        self.heartbeat = message
                    elif isinstance(message, WorkerLost):
                        self.lost.append(message)
                    self._changed.notify_all()
                if isinstance(message, TokenEvent):
                    self.on_token(message)
        with self._changed:
            self._over = self._socket is connection
            self._changed.notify_all()


@contextmanager
def running(
    bundle: Path, workers: int, settings: Mapping[str, Any] | None = None, spares: int = 0
) -> Iterator[RunningEngine]:
    """An engine that is ready, with so many attention workers; 0: attention in its own process."""
    lamina = section({"cluster.attention_workers": workers, "cluster.spares": spares, **(settings or {})})
    with tempfile.TemporaryDirectory(prefix="engine-") as folder:
        engine = RunningEngine(Path(folder), bundle, lamina, workers + spares)
        try:
            engine.connect()
            yield engine
        finally:
            engine.close()
