"""Attention in the engine's own process: a link whose other end is a session here, without sockets.

What a worker does is done by the same code, so that "no offload" differs from offloading by nothing but the
wire, and can be compared with it.
"""

from __future__ import annotations

from collections import deque

from flows.errors import TrunklineError
from flows.serving.lamina.attention.frames import MAX_PAYLOAD, Frame, FrameType, Header
from flows.serving.lamina.attention.session import Session, error_frame
from flows.serving.lamina.attention.transport import Dial, LinkTimeout


class LocalLink:
    """The calls of `transport.Link`; a frame is handled when it is sent, its answer waits to be received."""

    def __init__(self, session: Session) -> None:
        self.peer = "this process"
        self.sent_bytes = self.received_bytes = 0  # nothing travels
        self._session = session
        self._answers: deque[Frame] = deque()

    def send(
        self, header: Header, payload: bytes | bytearray | memoryview = b"", timeout_s: float = 10.0
    ) -> None:
        if isinstance(payload, bytes):  # what a socket reads into can be written to, too
            payload = bytearray(payload)
        frame = Frame(header, payload)
        if header.type is FrameType.HELLO:
            self._session.enter_epoch(header.epoch)
            self._answers.append(Frame(header, b"{}"))
            return
        if header.type in (FrameType.PING, FrameType.DRAIN):
            self._answers.append(frame)
            return
        try:
            answer = self._session.handle(frame)
        except TrunklineError as error:
            answer = error_frame(header, str(error))
        if answer is not None:
            self._answers.append(answer)

    def receive(self, timeout_s: float | None = None, limit: int = MAX_PAYLOAD) -> Frame:
        """
        Raises:
            LinkTimeout: nothing that would be answered was sent.
        """
        if not self._answers:
            raise LinkTimeout("attention in this process was not asked anything")
        return self._answers.popleft()

    def close(self) -> None:
        self._answers.clear()


def dial_local(session: Session) -> Dial:
    """For `AttentionPool`: every address leads to `session`."""
    return lambda host, port, timeout_s: LocalLink(session)
