"""Answers on their way to a client that may read slowly, or be gone.

Server-sent events: `data: {json}`, an empty line, and `data: [DONE]` at the end. A stream that holds more
than `http.slow_reader_kb` of unread bytes for a second is given up. A client that closes its connection
cancels its request at once, streamed or not, also while it waits in the queue (spec 14-16).
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from typing import Any, TypeVar

import orjson
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Send

from flows.serving.lamina.api.answers import Piece
from flows.serving.lamina.api.service import Generation

GRACE_S = 1.0
SEND_BYTES = 16_384  # at once: what is with the web server no longer counts as unread
HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # a proxy would hold tokens back
]
DONE = b"data: [DONE]\n\n"
T = TypeVar("T")


class SlowReader(Exception):
    """Nobody reads the stream."""


class Presence:
    """The client of one request, from the end of its body on."""

    def __init__(self, gone: asyncio.Task[None]) -> None:
        self._gone = gone

    async def await_while_there(self, work: Coroutine[Any, Any, T]) -> T:
        """
        Raises:
            ClientDisconnect: it closed the connection before this was done.
        """
        task = asyncio.create_task(work)
        try:
            await asyncio.wait({task, self._gone}, return_when=asyncio.FIRST_COMPLETED)
            if not task.done():
                raise ClientDisconnect
            return task.result()
        finally:
            await _end(task)


@asynccontextmanager
async def presence(receive: Receive) -> AsyncIterator[Presence]:
    async def wait() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    gone = asyncio.create_task(wait())
    try:
        yield Presence(gone)
    finally:
        await _end(gone)


async def _end(task: asyncio.Task[Any]) -> None:
    if not task.done():
        task.cancel()
        await asyncio.wait({task})


class Outbox:
    """Bytes between the engine's pace and the client's."""

    def __init__(self, limit: int) -> None:
        self.unread = 0
        self._limit = limit
        self._waiting = bytearray()
        self._closed = False
        self._changed = asyncio.Event()
        self._over = asyncio.Event()

    def put(self, data: bytes) -> None:
        self._waiting += data
        self.unread += len(data)
        self._changed.set()
        if self.unread > self._limit:
            self._over.set()

    def close(self) -> None:
        self._closed = True
        self._changed.set()

    async def send_all(self, send: Send) -> None:
        """Until closed and empty."""
        while True:
            await self._changed.wait()
            self._changed.clear()
            while self._waiting:
                data = bytes(self._waiting[:SEND_BYTES])
                del self._waiting[:SEND_BYTES]
                await send({"type": "http.response.body", "body": data, "more_body": True})
                self.unread -= len(data)
            if self._closed:
                await send({"type": "http.response.body", "body": b"", "more_body": False})
                return

    async def watch(self) -> None:
        """
        Raises:
            SlowReader: over the limit, and still so after the grace.
        """
        while True:
            await self._over.wait()
            self._over.clear()
            await asyncio.sleep(GRACE_S)
            if self.unread > self._limit:
                raise SlowReader


async def send_stream(
    generation: Generation, there: Presence, send: Send, *, limit: int, include_usage: bool
) -> None:
    """The whole stream, from the headers to `[DONE]`.

    Raises:
        ClientDisconnect: the client went away.
        SlowReader: it does not read.
    """
    outbox = Outbox(limit)

    async def fill() -> None:
        try:
            async for data in events(generation, include_usage):
                outbox.put(data)
        finally:
            outbox.close()

    async def deliver() -> None:
        tasks = [asyncio.create_task(work) for work in (fill(), outbox.watch(), outbox.send_all(send))]
        filling, watching, sending = tasks
        try:
            await asyncio.wait({watching, sending}, return_when=asyncio.FIRST_COMPLETED)
            (sending if sending.done() else watching).result()
            filling.result()
        finally:
            for task in tasks:
                await _end(task)

    await send({"type": "http.response.start", "status": 200, "headers": HEADERS})
    await there.await_while_there(deliver())


async def events(generation: Generation, include_usage: bool) -> AsyncIterator[bytes]:
    """The stream as bytes, event by event."""
    shape = generation.format
    blank = {"usage": None} if include_usage else {}
    for opening in shape.opening():
        yield _event({**opening, **blank})
    async for piece in generation.pieces():
        yield _event({**shape.part(piece, None), **blank})
    last = {**shape.part(Piece(), generation.finish_reason), **blank}
    if generation.error is not None:
        last.update(generation.error.body())
    yield _event(last)
    if include_usage:
        yield _event({**shape.bare(), "usage": generation.usage()})
    yield DONE


def _event(value: dict[str, Any]) -> bytes:
    return b"data: " + orjson.dumps(value) + b"\n\n"
