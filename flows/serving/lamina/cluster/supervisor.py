"""Start engine and attention workers, keep them running, end them.

A thread beside the HTTP server. What the engine reports comes in through `worker_lost` and `engine_silent`,
which only take note; the thread acts. An engine that ends with an error of its user (its bundle, its
settings), or that dies again and again soon after its start, ends the service with that error: starting it
once more would end in the same way.

A worker that the engine reports as lost is ended, if it is still the process that the engine spoke to: it may
have been started again before the engine noticed that its predecessor was gone.
"""

from __future__ import annotations

import json
import sys
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from flows.errors import ConfigError, DataError, GateFailed, ResourceError, TrunklineError
from flows.serving.lamina.cluster.child import Say, say_on_stderr
from flows.serving.lamina.cluster.fleet import TICK_S, Address, Fleet
from flows.serving.lamina.cluster.keeper import Ending, Keeper
from flows.serving.lamina.cluster.probe import answers
from flows.serving.lamina.cluster.run_folder import RunFolder, write_private
from flows.serving.lamina.requests import WorkersMoved

ENGINE_MODULE = "flows.serving.lamina.engine.process"
MOST_EARLY_ENDINGS = 6
STOP_PATIENCE_S = 5.0
FINAL: dict[int, type[TrunklineError]] = {
    ConfigError.exit_code: DataError,
    GateFailed.exit_code: GateFailed,
}
"""Exit codes of an engine that would only end in the same way again, and what the service then ends with."""


class Supervisor:
    """
    Args:
        settings: section `lamina` of params.yaml, for the engine.
        bundle, calibration: paths for the engine.
        command: of the engine, without `--config`.
    """

    def __init__(
        self,
        fleet: Fleet,
        folder: RunFolder,
        *,
        settings: Mapping[str, Any],
        bundle: str,
        calibration: str,
        command: Sequence[str] = (sys.executable, "-m", ENGINE_MODULE),
        say: Say = say_on_stderr,
    ) -> None:
        self.fleet, self.folder = fleet, folder
        self.failure: TrunklineError | None = None
        self._settings, self._bundle, self._calibration, self._say = settings, bundle, calibration, say
        self.engine = Keeper(
            "engine",
            [*command, "--config", str(folder.engine_config)],
            say,
            is_ready=lambda _: folder.socket.exists(),
            prepare=self._prepare_engine,
        )
        self._on_failure: Callable[[TrunklineError], None] | None = None
        self._reports: deque[tuple[Address, int, str]] = deque()
        self._silent: str | None = None
        self._on_moved: Callable[[WorkersMoved], None] | None = None
        self._addresses: list[Address] = []
        self._moved: WorkersMoved | None = None
        self._written = b""
        self._draining = self._drained = False
        self._stopping = threading.Event()
        self._wake = threading.Event()
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._run, name="supervisor", daemon=True)

    # --- for the thread of the command

    def start(self) -> None:
        """Returns when the attention workers listen and the engine was started.

        Raises:
            ConfigError, ResourceError: a worker cannot be started; nothing is left of the others.
        """
        self.fleet.start()
        self._addresses = list(self.fleet.addresses)
        self._thread.start()

    def stop(self) -> None:
        """End all processes; the engine first, which may still talk to the workers."""
        self._stopping.set()
        self._wake.set()
        if self._thread.is_alive():
            self._thread.join()
        self.engine.stop(STOP_PATIENCE_S)
        self.fleet.stop(STOP_PATIENCE_S)

    def watch(
        self,
        on_failure: Callable[[TrunklineError], None],
        on_moved: Callable[[WorkersMoved], None] = lambda _: None,
    ) -> None:
        """Be told of the error that ends the service, and of new addresses for the engine; also of what was
        before."""
        with self._lock:
            self._on_failure, failure = on_failure, self.failure
            self._on_moved, moved = on_moved, self._moved
        if failure is not None:
            on_failure(failure)
        if moved is not None:
            on_moved(moved)

    # --- for any thread; none of these waits

    def worker_lost(self, host: str, port: int, pid: int, reason: str) -> None:
        """
        Args:
            pid: of the process that the engine spoke to; 0: it never got an answer.
        """
        self._reports.append(((host, port), pid, reason))
        self._wake.set()

    def engine_silent(self) -> None:
        self._silent = "it sent no heartbeat"
        self._wake.set()

    def draining(self) -> None:
        """The service ends: an engine that exits with 0 is not replaced."""
        self._draining = True

    def drained(self) -> None:
        """Nothing is replaced from now on."""
        self._drained = True

    def is_replacing(self) -> bool:
        """Whether a process is missing and another one is on its way."""
        missing = not self.engine.ready or not all(map(self.fleet.pid_at, self.fleet.addresses))
        return missing and not self._drained and self.failure is None

    # --- the supervisor's own thread

    def _run(self) -> None:
        try:
            while not self._stopping.is_set() and self.failure is None:
                if not self._drained:
                    self._look()
                self._wake.wait(TICK_S)
                self._wake.clear()
        except TrunklineError as error:
            self._fail(error)
        except Exception as error:  # a thread that is gone looks after nothing
            self._fail(ResourceError(f"the supervisor failed: {type(error).__name__}: {error}"))
            raise

    def _look(self) -> None:
        while self._reports:
            self._judge(*self._reports.popleft())
        self.fleet.look()
        if self._addresses != self.fleet.addresses:
            self._move()
        silent, self._silent = self._silent, None
        child = self.engine.child
        # one that ends with an error is silent while it takes itself apart; its exit code must not be lost
        if silent and child and self.engine.ready and not (child.said_error and child.wait(STOP_PATIENCE_S)):
            self.engine.kill(silent)
        ending = self.engine.look()
        if ending is not None and not (self._draining and ending.code == 0):
            self._judge_engine(ending)

    def _judge(self, address: Address, pid: int, reason: str) -> None:
        present = self.fleet.pid_at(address)
        if not present or (pid and pid != present):
            return  # it is being replaced, or has been
        if not pid and answers(*address, self.folder.token.encode()):
            return  # whoever was there before did not
        self.fleet.replace(address, f"it was ended, because {reason}")

    def _move(self) -> None:
        self._addresses = list(self.fleet.addresses)
        self._write_config()  # for an engine that is started again
        with self._lock:
            self._moved, on_moved = WorkersMoved(addresses=tuple(self._addresses)), self._on_moved
        if on_moved is not None:
            on_moved(self._moved)

    def _judge_engine(self, ending: Ending) -> None:
        if kind := FINAL.get(ending.code):
            self._fail(kind(ending.words or ending.reason))
        elif ending.early >= MOST_EARLY_ENDINGS:
            self._fail(
                ResourceError(
                    f"the engine died {ending.early} times in a row soon after its start; the last time: "
                    f"{ending.reason}"
                )
            )
        else:
            self._say(ending.announcement)

    def _fail(self, error: TrunklineError) -> None:
        with self._lock:
            self.failure, on_failure = error, self._on_failure
        if on_failure is not None:
            on_failure(error)

    def _prepare_engine(self) -> None:
        self.folder.socket.unlink(missing_ok=True)  # of the engine before; a new one says that this one is up
        self._write_config()

    def _write_config(self) -> None:
        config = {
            "bundle": self._bundle,
            "lamina": self._settings,
            "workers": self._addresses,
            "token_file": str(self.folder.token_file),
            "socket": str(self.folder.socket),
            "journal": str(self.folder.journal) if self._settings["recover"]["journal"] else None,
            "calibration": self._calibration,
        }
        data = json.dumps(config, indent=2).encode()
        if data != self._written:  # nothing new: a disk that is full now does not matter
            write_private(self.folder.engine_config, data)
            self._written = data
