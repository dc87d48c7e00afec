"""A child process whose life ends with this one's, and what it says."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import IO

MAX_LINE = 1 << 16
ERROR = "error: "
Say = Callable[[str], None]


def say_on_stderr(line: str) -> None:
    with contextlib.suppress(OSError):  # nobody reads: no reason to stop
        print(line, file=sys.stderr, flush=True)


class Child:
    """Started with `--exit-with-stdin`: its stdin is a pipe that closes when this process ends, however.

    It has a process group of its own, so that Ctrl-C reaches this process only, which then ends it in order.
    """

    def __init__(
        self, name: str, command: Sequence[str], say: Say, environment: Mapping[str, str] | None = None
    ) -> None:
        self.name, self.started = name, time.monotonic()
        self.first_line = ""
        """Of its stdout; empty until it is there."""
        self._last_line, self._last_error = "", ""
        self._say = say
        self._process = subprocess.Popen(
            [*command, "--exit-with-stdin"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=dict(os.environ, **(environment or {})),
            process_group=0,
        )
        assert self._process.stdout is not None
        assert self._process.stderr is not None
        self._readers = [
            threading.Thread(target=self._read_output, args=(self._process.stdout,), daemon=True),
            threading.Thread(target=self._read_errors, args=(self._process.stderr,), daemon=True),
        ]
        for reader in self._readers:
            reader.start()

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def age_s(self) -> float:
        return time.monotonic() - self.started

    def poll(self) -> int | None:
        """Its exit code once it has ended and all it said was read; negative: the signal that killed it."""
        code = self._process.poll()
        if code is not None:
            for reader in self._readers:
                reader.join(1.0)  # somebody else may hold the pipe
        return code

    @property
    def said_error(self) -> bool:
        """Whether it has said `error: …`, which comes last: it is ending by itself."""
        return bool(self._last_error)

    @property
    def last_words(self) -> str:
        """Why it ended, in its own words; empty if it had none."""
        return self._last_error or self._last_line

    def terminate(self) -> None:
        self._process.terminate()

    def kill(self) -> None:
        self._process.kill()

    def wait(self, timeout_s: float) -> bool:
        """Whether it ended in time."""
        try:
            self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            return False
        return True

    def close(self) -> None:
        """Forget a child that has ended."""
        for reader in self._readers:
            reader.join(1.0)
        for pipe in (self._process.stdin, self._process.stdout, self._process.stderr):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()

    def _read_output(self, pipe: IO[bytes]) -> None:
        for line in _lines(pipe):
            self.first_line = self.first_line or line

    def _read_errors(self, pipe: IO[bytes]) -> None:
        for line in _lines(pipe):
            if not line.strip():
                continue
            self._last_line = line
            if line.startswith(ERROR):
                self._last_error = line.removeprefix(ERROR)
            self._say(f"{self.name}: {line}")


def end_children(children: Iterable[Child], patience_s: float) -> None:
    """SIGTERM to all, SIGKILL to those that are still there after `patience_s`."""
    children = list(children)
    for child in children:
        child.terminate()
    deadline = time.monotonic() + patience_s
    for child in children:
        if not child.wait(max(0.0, deadline - time.monotonic())):
            child.kill()
            child.wait(patience_s)
        child.close()


def describe_exit(code: int) -> str:
    """`"ended with exit code 74"`, `"was killed by SIGKILL"`."""
    if code >= 0:
        return f"ended with exit code {code}"
    try:
        return f"was killed by {signal.Signals(-code).name}"
    except ValueError:
        return f"was killed by signal {-code}"


def _lines(pipe: IO[bytes]) -> Iterable[str]:
    with contextlib.suppress(OSError, ValueError):  # closed
        while data := pipe.readline(MAX_LINE):
            yield data.decode(errors="replace").rstrip("\n")
