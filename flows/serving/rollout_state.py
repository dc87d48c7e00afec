"""What a server says of the alias that it follows: the same words for images and for texts."""

from __future__ import annotations

import time
from dataclasses import dataclass


@dataclass(frozen=True)
class RolloutState:
    """What the follower of an alias does, for /healthz."""

    candidate: str | None  # the version that is to be served next
    state: str  # fixed | current | loading | failed | unreachable | missing
    reason: str
    since: str  # UTC


def utc(seconds: float) -> str:
    """Unix time for people and programs, to the second."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))


def utc_now() -> str:
    return utc(time.time())
