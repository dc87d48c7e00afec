"""Ask an attention worker whether it lives, without disturbing whoever works with it."""

from __future__ import annotations

from contextlib import suppress

from flows.errors import TrunklineError
from flows.serving.lamina.attention.frames import FrameType, Header
from flows.serving.lamina.attention.transport import dial

NO_EPOCH = 0
"""Below that of every engine: a worker in use answers that it is further, and keeps its connections."""
TIMEOUT_S = 0.5


def answers(host: str, port: int, token: bytes, timeout_s: float = TIMEOUT_S) -> bool:
    """Whether a worker says anything at all to a HELLO. A stopped one still takes connections, but says
    nothing."""
    with suppress(TrunklineError):
        link = dial(host, port, timeout_s)
        try:
            link.send(Header(FrameType.HELLO, NO_EPOCH), token, timeout_s)
            link.receive(timeout_s)
        finally:
            link.close()
        return True
    return False
