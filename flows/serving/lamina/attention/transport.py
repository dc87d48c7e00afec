"""Connections that carry frames: tcp with no-delay, deadlines and byte counters, and one that misbehaves.

A link blocks: what the peer does not take in time is an error, never a buffer that grows. `SimulatedLink`
stands where a real network is missing; it delays, drops and damages what is sent, by a seed.
"""

from __future__ import annotations

import math
import random
import select
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Protocol

from flows.errors import ResourceError
from flows.serving.lamina.attention.frames import (
    HEADER_BYTES,
    MAX_PAYLOAD,
    Frame,
    FrameError,
    Header,
    decode_header,
    encode,
    verify,
)

READ_AHEAD = 1 << 16  # bytes


class LinkClosed(ResourceError):
    """The peer ended the connection or it broke."""


class LinkTimeout(ResourceError):
    """The peer said nothing, or took nothing, until the deadline."""


class Link:
    """One tcp connection. One thread sends and one receives at a time."""

    def __init__(self, connection: socket.socket, peer: str) -> None:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.peer = peer
        self.sent_bytes = 0
        self.received_bytes = 0
        connection.setblocking(False)
        self._socket = connection
        self._readable, self._writable = select.poll(), select.poll()
        self._readable.register(connection, select.POLLIN)
        self._writable.register(connection, select.POLLOUT)
        # a small frame comes with one call of the system, header and payload
        self._ahead = bytearray(READ_AHEAD)
        self._start = self._end = 0  # of what was read and not yet taken

    def send(
        self, header: Header, payload: bytes | bytearray | memoryview = b"", timeout_s: float = 10.0
    ) -> None:
        """
        Raises:
            LinkClosed, LinkTimeout: the frame may have been sent in part; the link is of no more use.
        """
        head, body = encode(header, payload)
        self._write(head, body, time.monotonic() + timeout_s)
        self.sent_bytes += len(head) + len(body)

    def receive(self, timeout_s: float | None = None, limit: int = MAX_PAYLOAD) -> Frame:
        """The next frame.

        Args:
            timeout_s: for the whole frame; None waits for ever.
            limit: bytes of payload that are taken at most; more is refused before memory is.

        Raises:
            LinkClosed, LinkTimeout: no frame.
            FrameError: bytes that are not one.
        """
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while self._end - self._start < HEADER_BYTES:
            self._read_ahead(deadline)
        head = self._ahead[self._start : self._start + HEADER_BYTES]
        header = decode_header(head, limit)
        self._start += HEADER_BYTES
        payload = bytearray(header.payload_bytes)
        here = min(len(payload), self._end - self._start)
        payload[:here] = memoryview(self._ahead)[self._start : self._start + here]
        self._start += here
        rest = memoryview(payload)[here:]
        while len(rest):
            rest = rest[self._read(rest, deadline) :]
        verify(header, head, payload)
        self.received_bytes += len(head) + len(payload)
        return Frame(header, payload)

    def close(self) -> None:
        with suppress(OSError):  # the peer was faster
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()

    def _write(self, head: bytes, body: memoryview, deadline: float) -> None:
        buffers = [memoryview(head), body] if len(body) else [memoryview(head)]
        while buffers:
            try:  # there is nearly always room, so nobody asks first
                count = self._socket.sendmsg(buffers)
            except BlockingIOError:
                self._wait(self._writable, deadline)
                continue
            except OSError as error:
                raise self._broken(error) from None
            while buffers and count >= len(buffers[0]):
                count -= len(buffers.pop(0))
            if buffers:
                buffers[0] = buffers[0][count:]

    def _read_ahead(self, deadline: float | None) -> None:
        kept = self._end - self._start
        self._ahead[:kept] = self._ahead[self._start : self._end]
        self._start, self._end = 0, kept
        self._end += self._read(memoryview(self._ahead)[kept:], deadline)

    def _read(self, view: memoryview, deadline: float | None) -> int:
        while True:
            self._wait(self._readable, deadline)
            try:
                count = self._socket.recv_into(view)
            except BlockingIOError:
                continue
            except OSError as error:
                raise self._broken(error) from None
            if not count:
                raise LinkClosed(f"{self.peer} closed the connection")
            return count

    def _wait(self, ready: select.poll, deadline: float | None) -> None:
        remaining = None if deadline is None else deadline - time.monotonic()
        try:
            if remaining is None:
                ready.poll()
                return
            if remaining > 0 and ready.poll(math.ceil(remaining * 1000)):
                return
        except OSError as error:
            raise self._broken(error) from None
        raise LinkTimeout(f"{self.peer} did not answer in time")

    def _broken(self, error: OSError) -> LinkClosed:
        return LinkClosed(f"the connection to {self.peer} broke ({error.strerror or error})")


class SimulatedLink(Link):
    """A link whose sending side is a bad network.

    Args:
        latency_s: added before every frame.
        drop: probability that a frame never leaves.
        corrupt: probability that one bit of it is turned over.
    """

    def __init__(
        self,
        connection: socket.socket,
        peer: str,
        latency_s: float = 0.0,
        drop: float = 0.0,
        corrupt: float = 0.0,
        seed: int = 0,
    ) -> None:
        super().__init__(connection, peer)
        self.latency_s, self.drop, self.corrupt = latency_s, drop, corrupt
        self.dropped = self.corrupted = 0
        self._random = random.Random(seed)

    def _write(self, head: bytes, body: memoryview, deadline: float) -> None:
        time.sleep(self.latency_s)
        if self._random.random() < self.drop:
            self.dropped += 1
            return
        if self._random.random() < self.corrupt:
            self.corrupted += 1
            data = bytearray(head) + body
            # not the size: a wrong size is a frame that never ends, which the deadline finds
            place = self._random.randrange(HEADER_BYTES - 4, len(data))
            data[place] ^= 1 << self._random.randrange(8)
            head, body = bytes(data[:HEADER_BYTES]), memoryview(bytes(data[HEADER_BYTES:]))
        super()._write(head, body, deadline)


class Connection(Protocol):
    """What both ends of a conversation use, see `Link`."""

    peer: str
    sent_bytes: int
    received_bytes: int

    def send(
        self, header: Header, payload: bytes | bytearray | memoryview = b"", timeout_s: float = 10.0
    ) -> None: ...

    def receive(self, timeout_s: float | None = None, limit: int = MAX_PAYLOAD) -> Frame: ...

    def close(self) -> None: ...


Dial = Callable[[str, int, float], Connection]


def dial(host: str, port: int, timeout_s: float) -> Link:
    """A link to a worker.

    Raises:
        LinkClosed: nobody listens there.
    """
    return Link(_connect(host, port, timeout_s), f"{host}:{port}")


def dial_badly(latency_s: float = 0.0, drop: float = 0.0, corrupt: float = 0.0, seed: int = 0) -> Dial:
    """Like `dial`, through a bad network."""

    def dial_simulated(host: str, port: int, timeout_s: float) -> Link:
        connection = _connect(host, port, timeout_s)
        return SimulatedLink(connection, f"{host}:{port}", latency_s, drop, corrupt, seed)

    return dial_simulated


def _connect(host: str, port: int, timeout_s: float) -> socket.socket:
    try:
        return socket.create_connection((host, port), timeout=timeout_s)
    except OSError as error:
        raise LinkClosed(
            f"cannot connect to {host}:{port} ({error.strerror or error}); is the worker running?"
        ) from None


__all__ = [
    "Connection",
    "Dial",
    "FrameError",
    "Link",
    "LinkClosed",
    "LinkTimeout",
    "SimulatedLink",
    "dial",
    "dial_badly",
]
