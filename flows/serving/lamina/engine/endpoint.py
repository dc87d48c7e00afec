"""The engine's end of the socket to the HTTP process: lines in, lines out, a heartbeat in between.

One connection counts, the newest. What is sent while there is none is not kept here: tokens and ends are
asked for again with `Follow`. A peer that does not read is cut off, so that it can never stop the engine.
"""

from __future__ import annotations

import os
import queue
import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from flows.errors import DataError, ResourceError
from flows.serving.lamina.requests import (
    MAX_LINE,
    AskMetrics,
    Heartbeat,
    Message,
    MetricsText,
    ToEngine,
    decode_to_engine,
    encode,
)

MAX_UNSENT = 100_000  # messages
LINES_AT_ONCE = 256


class Endpoint:
    """Listens on a unix socket from the moment it is made.

    Args:
        deliver: takes what comes in, on a thread of the connection.
        heartbeat: makes the message that is sent every `heartbeat_s`.
        metrics: makes the text that AskMetrics is answered with, even during an iteration.
    """

    def __init__(
        self,
        path: Path,
        heartbeat_s: float,
        *,
        deliver: Callable[[ToEngine], None],
        heartbeat: Callable[[], Heartbeat],
        metrics: Callable[[], str],
    ) -> None:
        self._deliver, self._heartbeat, self._metrics = deliver, heartbeat, metrics
        self._heartbeat_s = heartbeat_s
        self._current: _Conversation | None = None
        self._closing = threading.Event()
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            path.unlink(missing_ok=True)  # an engine before this one left it
            self._listener.bind(str(path))
            os.chmod(path, 0o600)
            self._listener.listen(4)
        except OSError as error:
            raise ResourceError(f"cannot listen on {path} ({error.strerror or error})") from None
        for work in (self._accept, self._beat):
            threading.Thread(target=work, daemon=True).start()

    def send(self, message: Message) -> None:
        """Never blocks; without a connection the message is dropped."""
        current = self._current
        if current is not None:
            current.send(message)

    def close(self) -> None:
        """After what was sent has left."""
        current = self._current
        if current is not None:
            current.finish()
        self._closing.set()
        self._listener.close()

    def _accept(self) -> None:
        while not self._closing.is_set():
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            before, self._current = self._current, _Conversation(connection, self._take)
            if before is not None:
                before.cut()
            self.send(self._heartbeat())

    def _beat(self) -> None:
        while not self._closing.wait(self._heartbeat_s):
            self.send(self._heartbeat())

    def _take(self, message: ToEngine) -> None:
        if isinstance(message, AskMetrics):
            self.send(MetricsText(text=self._metrics()))
        else:
            self._deliver(message)


class _Conversation:
    """One connection with a thread for either direction."""

    def __init__(self, connection: socket.socket, take: Callable[[ToEngine], None]) -> None:
        self._socket, self._take = connection, take
        self._unsent: queue.Queue[Message | None] = queue.Queue(MAX_UNSENT)
        self._ended = False
        self._writer = threading.Thread(target=self._write, daemon=True)
        self._writer.start()
        threading.Thread(target=self._read, daemon=True).start()

    def send(self, message: Message) -> None:
        if self._ended:
            return  # nobody would take it from the queue
        try:
            self._unsent.put_nowait(message)
        except queue.Full:
            self.cut()

    def finish(self) -> None:
        with suppress(queue.Full):
            self._unsent.put_nowait(None)
        self._writer.join(2.0)

    def cut(self) -> None:
        self._ended = True
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        with suppress(queue.Full):  # then the writer is sending, and that fails now
            self._unsent.put_nowait(None)

    def _read(self) -> None:
        with suppress(OSError, DataError), self._socket.makefile("rb") as lines:
            # a line without an end, or one that is no message, ends the conversation
            while line := lines.readline(MAX_LINE + 1):
                self._take(decode_to_engine(line))
        self.cut()

    def _write(self) -> None:
        with suppress(OSError):
            while True:
                message = self._unsent.get()
                batch: list[Message] = []
                while message is not None:
                    batch.append(message)
                    if len(batch) == LINES_AT_ONCE or self._unsent.empty():
                        break
                    message = self._unsent.get()
                self._socket.sendall(b"".join(map(encode, batch)))
                if message is None:
                    break
        self.cut()
