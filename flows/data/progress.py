"""Progress of long loops: one refreshed line on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")
LINE_EVERY_S = 15.0
REFRESH_EVERY_S = 0.2


def report(
    items: Iterable[T], label: str, total: int, unit: str = "images", scale: float = 1.0
) -> Iterator[T]:
    """Yield `items` and tell how far the loop is; `scale` is how many items make one of the unit shown."""
    terminal = sys.stderr.isatty()
    every_s = REFRESH_EVERY_S if terminal else LINE_EVERY_S
    started = shown = time.monotonic()
    for done, item in enumerate(items, start=1):
        yield item
        now = time.monotonic()
        if now - shown >= every_s:
            shown = now
            rate = done / (now - started)
            left_s = max(0.0, (total - done) / rate)
            counts = f"{done / scale:,.0f} of {total / scale:,.0f} {unit}"
            line = f"{label}: {counts}, {rate / scale:,.0f}/s, {left_s:.0f} s left"
            print(
                f"\r\x1b[K{line}" if terminal else line,
                end="" if terminal else "\n",
                file=sys.stderr,
                flush=True,
            )
    if terminal and shown != started:
        print("\r\x1b[K", end="", file=sys.stderr, flush=True)
