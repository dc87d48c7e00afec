"""The way to the engine: one connection, made again when it breaks, and every open request across it.

A request is a `Call`. Its tokens carry their index; what was delivered already is dropped, so a connection
that breaks, or an engine that is started again and sends from the beginning, never doubles a token. A
`Submit` that was on its way when the connection broke may have been lost or not: the link asks with `Follow`,
and only if the engine does not know the request submits it again under the same id (spec 14, client
contract).

Everything here runs on one event loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from flows.errors import DataError
from flows.serving.lamina.api.errors import ApiError
from flows.serving.lamina.api.hooks import Hooks
from flows.serving.lamina.requests import (
    MAX_LINE,
    Accepted,
    AskMetrics,
    Cancel,
    Drain,
    Finished,
    Follow,
    FromEngine,
    Heartbeat,
    MetricsText,
    Rejected,
    Submit,
    ToEngine,
    TokenEvent,
    WorkerLost,
    WorkersMoved,
    decode_from_engine,
    encode,
)

FIRST_RETRY_S, LAST_RETRY_S = 0.05, 1.0
ENGINE_WAIT_S = 15.0  # a request waits so long for an engine that is away or loading
ADMITTING = frozenset({"ready", "recovering", "draining"})  # a draining engine refuses by itself
OVERDUE_S = 5.0  # past its deadline the engine has so long to say so
METRICS_WAIT_S = 1.0
Event = Accepted | Rejected | TokenEvent | Finished
OnEvent = Callable[["Call", Event], None]

log = logging.getLogger("trunkline.serving")


class Call:
    """One request of a client: what came of it so far, and what is yet to be read."""

    def __init__(self, submit: Submit, started: float) -> None:
        self.submit = submit
        self.started = started
        self.accepted = False
        self.next_index = 0
        self.end: Literal["cancelled", "stop"] | None = None  # once nobody reads on
        self.deleted = False
        self.settled = False  # whether its last event was told
        self._events: asyncio.Queue[Event] = asyncio.Queue()

    @property
    def id(self) -> str:
        return self.submit.id

    async def next(self) -> Event:
        """The next event; tokens in order, each once. Nothing follows a Rejected or Finished."""
        return await self._events.get()

    def put(self, event: Event) -> None:
        self._events.put_nowait(event)


@dataclass
class _Connection:
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    missed: int = 0  # heartbeats in a row
    resumed: bool = False  # whether the engine was asked for the requests of connections before
    silence_told: bool = False


class EngineLink:
    """Calls over whatever connection there is. `run` has to be running."""

    def __init__(
        self,
        socket_path: Path,
        *,
        heartbeat_s: float,
        silent_heartbeats: int,
        hooks: Hooks,
        on_event: OnEvent | None = None,
        on_heartbeat: Callable[[Heartbeat], None] | None = None,
    ) -> None:
        """
        Args:
            on_event: sees every event of every call, also of those that nobody reads any more.
        """
        self._socket_path = socket_path
        self._heartbeat_s = heartbeat_s
        self._silent_heartbeats = silent_heartbeats
        self._hooks = hooks
        self._on_event = on_event
        self._on_heartbeat = on_heartbeat
        self._connection: _Connection | None = None
        self._calls: dict[str, Call] = {}
        self._usable = asyncio.Event()  # connected, and the engine takes requests
        self._metrics_asked: asyncio.Future[str] | None = None
        self._metrics_text = ""
        self._moved: WorkersMoved | None = None  # the last one: an engine that comes back needs it, too
        self.heartbeat: Heartbeat | None = None  # of this connection
        self.connections = 0

    # ---- what the application asks ----

    @property
    def is_alive(self) -> bool:
        """Whether the engine was heard lately."""
        connection = self._connection
        return (
            connection is not None
            and self.heartbeat is not None
            and connection.missed < self._silent_heartbeats
        )

    @property
    def open_calls(self) -> int:
        return len(self._calls)

    async def submit(self, submit: Submit, started: float) -> Call:
        """Hand a request to the engine; its first event says whether it was taken.

        Args:
            started: when the client asked, of the monotonic clock; for measurements.

        Raises:
            ApiError: 503, no engine within `ENGINE_WAIT_S`.
        """
        try:
            async with asyncio.timeout(ENGINE_WAIT_S):
                await self._usable.wait()
        except TimeoutError:
            raise ApiError(
                503,
                "the engine is not there; it is being started or replaced, try again",
                code="engine_unavailable",
                retry_after_s=5,
            ) from None
        call = Call(submit, started)
        self._calls[call.id] = call
        self._send(submit)
        return call

    def cancel(self, call: Call, reason: Literal["cancelled", "stop"] = "cancelled") -> None:
        """Nobody reads on: end it wherever it is. The link forgets it once the engine has confirmed."""
        if call.end is None:
            call.end = reason
            if call.id in self._calls:
                self._send(Cancel(id=call.id, reason=reason))

    def delete(self, call: Call) -> None:
        """End a request whose reader goes on to the end: it is told that it was cancelled."""
        if self._usable.is_set():
            call.deleted = True
            self._send(Cancel(id=call.id))
        else:
            self._end(call, _finished(call, "cancelled"))

    def finish_all(self, code: str, message: str) -> None:
        """End every request with this error, for its reader too."""
        for call in list(self._calls.values()):
            self._end(call, _finished(call, "error", code, 503, message))

    def drain(self) -> None:
        self._send(Drain())

    def move_workers(self, message: WorkersMoved) -> None:
        self._moved = message
        self._send(message)

    async def metrics_text(self) -> str:
        """The engine's series; the last ones known if it does not answer in time."""
        if self._connection is None:
            return self._metrics_text
        if self._metrics_asked is None or self._metrics_asked.done():
            self._metrics_asked = asyncio.get_running_loop().create_future()
            self._send(AskMetrics())
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(METRICS_WAIT_S):
                return await asyncio.shield(self._metrics_asked)
        return self._metrics_text

    # ---- the connection ----

    async def run(self) -> None:
        """Keep a connection until cancelled."""
        delay = FIRST_RETRY_S
        async with asyncio.TaskGroup() as group:
            group.create_task(self._watch())
            while True:
                try:
                    reader, writer = await asyncio.open_unix_connection(
                        str(self._socket_path), limit=MAX_LINE + 1
                    )
                except OSError:
                    await asyncio.sleep(delay)
                    delay = min(delay * 2, LAST_RETRY_S)
                    continue
                heard = await self._converse(_Connection(reader, writer))
                delay = FIRST_RETRY_S if heard else min(delay * 2, LAST_RETRY_S)
                await asyncio.sleep(delay)

    async def _converse(self, connection: _Connection) -> bool:
        """Read one connection to its end. Returns whether anything was heard."""
        heard = False
        self._connection = connection
        self.connections += 1
        if self._moved is not None:
            self._send(self._moved)
        try:
            while (message := await _read(connection.reader)) is not None:
                self._handle(message)
                heard = True
        except DataError as error:
            log.error("the connection to the engine is given up and opened again: %s", error)
        finally:
            self._connection = self.heartbeat = None
            self._usable.clear()
            connection.writer.close()
            if self._metrics_asked is not None and not self._metrics_asked.done():
                self._metrics_asked.set_result(self._metrics_text)
        return heard

    def _resume(self, call: Call) -> None:
        """On a new connection, once the engine has read its journal: it may know the request, or not."""
        if call.end is not None or call.deleted:  # and an earlier Cancel may have been lost
            self._send(Cancel(id=call.id, reason=call.end or "cancelled"))
        self._send(Follow(id=call.id, index=call.next_index))

    def _send(self, message: ToEngine) -> None:
        """Without a connection nothing is sent: `_resume` says it again."""
        if self._connection is not None and not self._connection.writer.is_closing():
            self._connection.writer.write(encode(message))

    async def _watch(self) -> None:
        """Count missed heartbeats, and end what the engine should have ended.

        Ticks are counted and not seconds: a process that was stopped itself must not take that for silence.
        """
        while True:
            await asyncio.sleep(self._heartbeat_s)
            if (connection := self._connection) is not None:
                connection.missed += 1
                if connection.missed >= self._silent_heartbeats and not connection.silence_told:
                    connection.silence_told = True
                    self._usable.clear()
                    self._hooks.on_silent()
            now = time.time()
            for call in list(self._calls.values()):
                deadline = call.submit.deadline
                if deadline is not None and now > deadline + OVERDUE_S and not call.settled:
                    self._end(
                        call,
                        _finished(
                            call, "error", "deadline_exceeded", 504, "the deadline passed without the engine"
                        ),
                    )

    def _end(self, call: Call, finished: Finished) -> None:
        """Without waiting for the engine to say so."""
        self._tell(call, finished)
        self.cancel(call)
        if self._connection is None:
            del self._calls[call.id]  # an engine that comes back ends it by its deadline

    # ---- what the engine says ----

    def _handle(self, message: FromEngine) -> None:
        match message:
            case TokenEvent():
                if call := self._calls.get(message.id):
                    self._take_token(call, message)
            case Accepted():
                if call := self._calls.get(message.id):
                    first, call.accepted = not call.accepted, True
                    if first:
                        self._tell(call, message)
            case Rejected():
                if call := self._calls.pop(message.id, None):
                    self._tell(call, message)
            case Finished():
                if call := self._calls.get(message.id):
                    self._finish(call, message)
            case Heartbeat():
                self._beat(message)
            case WorkerLost():
                self._hooks.on_worker_lost(message.host, message.port, message.pid, message.reason)
            case MetricsText():
                self._metrics_text = message.text
                if self._metrics_asked is not None and not self._metrics_asked.done():
                    self._metrics_asked.set_result(message.text)

    def _take_token(self, call: Call, token: TokenEvent) -> None:
        if token.index < call.next_index:
            return  # delivered before the connection broke
        if token.index > call.next_index:
            self._send(Follow(id=call.id, index=call.next_index))
            return
        call.accepted = True  # what was asked to be followed is not accepted once more
        call.next_index += 1
        self._tell(call, token)

    def _finish(self, call: Call, finished: Finished) -> None:
        if finished.code == "unknown_request" and call.end is None:
            if call.next_index == 0:  # lost on its way, or with an engine that keeps no journal
                self._send(call.submit)
                return
            finished = finished.model_copy(
                update={
                    "code": "engine_lost",
                    "status": 503,
                    "message": "the engine was lost with this request, and it keeps no journal of it",
                }
            )
        del self._calls[call.id]
        self._tell(call, finished)

    def _tell(self, call: Call, event: Event) -> None:
        if call.settled:
            return
        call.settled = isinstance(event, Rejected | Finished)
        if self._on_event is not None:
            self._on_event(call, event)
        if call.end is None:
            call.put(event)

    def _beat(self, heartbeat: Heartbeat) -> None:
        self.heartbeat = heartbeat
        if self._connection is not None:
            self._connection.missed = 0
            self._connection.silence_told = False
        if heartbeat.state not in ADMITTING:
            self._usable.clear()
        else:
            self._usable.set()
            if self._connection is not None and not self._connection.resumed:
                self._connection.resumed = True
                for call in list(self._calls.values()):
                    self._resume(call)
        if self._on_heartbeat is not None:
            self._on_heartbeat(heartbeat)


async def _read(reader: asyncio.StreamReader) -> FromEngine | None:
    """One message; None at the end, however it came.

    Raises:
        DataError: not a message.
    """
    try:
        line = await reader.readline()
    except OSError:
        return None
    except ValueError:
        raise DataError(f"a message of more than {MAX_LINE} bytes") from None
    return decode_from_engine(line) if line.endswith(b"\n") else None


def _finished(
    call: Call,
    reason: Literal["cancelled", "error"],
    code: str | None = None,
    status: int = 500,
    message: str | None = None,
) -> Finished:
    """What the engine would say, said here."""
    return Finished(
        id=call.id,
        reason=reason,
        code=code,
        status=status,
        message=message,
        prompt_tokens=len(call.submit.prompt),
        completion_tokens=call.next_index,
    )
