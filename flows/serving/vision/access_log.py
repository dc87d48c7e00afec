"""One JSON line per request, without payloads: to standard output, or to a file that rotates.

A thread of its own writes, because a full disk or a pipe that nobody reads must not stop the server. What it
cannot write is dropped and counted.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import sys
import threading
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import Any

import orjson

CAPACITY = 10_000  # lines that may wait to be written
STDOUT, OFF = "stdout", "off"


class AccessLog:
    """Accepts entries from the event loop and writes them."""

    def __init__(self, target: str, max_bytes: int, kept_files: int) -> None:
        """
        Args:
            target: "stdout", "off", or the path of a file.
            max_bytes: size at which a file is put aside.
            kept_files: how many of these stay.

        Raises:
            OSError: the file cannot be opened.
        """
        self.dropped = 0
        self._waiting: queue.Queue[dict[str, Any] | None] = queue.Queue(CAPACITY)
        self._handler = _handler(target, max_bytes, kept_files)
        self._thread: threading.Thread | None = None
        if self._handler is not None:
            self._handler.handleError = self._failed  # type: ignore[method-assign]
            self._thread = threading.Thread(target=self._work, name="access-log", daemon=True)
            self._thread.start()

    @property
    def is_on(self) -> bool:
        return self._handler is not None

    def write(self, entry: dict[str, Any]) -> None:
        """Never waits."""
        if self._handler is None:
            return
        try:
            self._waiting.put_nowait(entry)
        except queue.Full:
            self.dropped += 1

    def close(self, timeout_s: float) -> None:
        """Write what waits, `timeout_s` at most."""
        if self._thread is None or self._handler is None:
            return
        try:
            self._waiting.put(None, timeout=timeout_s)
        except queue.Full:
            return
        self._thread.join(timeout_s)
        if isinstance(self._handler, logging.FileHandler) and not self._thread.is_alive():
            with contextlib.suppress(OSError):  # what could not be written is counted already
                self._handler.close()

    def _failed(self, record: logging.LogRecord) -> None:
        if not self.dropped:
            logging.getLogger("trunkline.serving").error("the access log cannot be written", exc_info=True)
        self.dropped += 1

    def _work(self) -> None:
        assert self._handler is not None
        while (entry := self._waiting.get()) is not None:
            line = orjson.dumps(entry).decode()
            self._handler.emit(logging.LogRecord("access", logging.INFO, "", 0, line, None, None))


def _handler(target: str, max_bytes: int, kept_files: int) -> logging.StreamHandler[Any] | None:
    if target == OFF:
        return None
    if target == STDOUT:
        return logging.StreamHandler(sys.stdout)
    path = Path(target)
    path.parent.mkdir(parents=True, exist_ok=True)
    return RotatingFileHandler(path, maxBytes=max_bytes, backupCount=kept_files, encoding="utf-8")
