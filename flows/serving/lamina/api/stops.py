"""Stop strings that may begin in one piece of text and end in another.

Text that could be the beginning of a stop string is held back until it is known. Of several the one that is
complete first ends the text, the longest if two are complete together; it is not shown itself. So what is
shown does not depend on how the text comes in pieces.
"""

from __future__ import annotations

from collections.abc import Sequence


class StopScanner:
    """Looks through the text of one answer."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.found: str | None = None

    def add(self, text: str) -> str:
        """What can be shown now; nothing more once `found` is set."""
        if self.found is not None:
            return ""
        held = self._held + text
        if (cut := self._find(held)) is not None:
            self._held = ""
            return held[:cut]
        keep = self._undecided(held)
        self._held = held[len(held) - keep :]
        return held[: len(held) - keep]

    def finish(self) -> str:
        """What was held back, once no text follows."""
        held, self._held = self._held, ""
        return held

    def _find(self, text: str) -> int | None:
        complete = [(at + len(stop), at, stop) for stop in self._stops if (at := text.find(stop)) >= 0]
        if not complete:
            return None
        _, begin, self.found = min(complete)
        return begin

    def _undecided(self, text: str) -> int:
        """Length of the longest end of the text that begins a stop string."""
        longest = 0
        for stop in self._stops:
            at = text.find(stop[0], max(0, len(text) - len(stop) + 1))
            while at >= 0 and not stop.startswith(text[at:]):
                at = text.find(stop[0], at + 1)
            if at >= 0:
                longest = max(longest, len(text) - at)
        return longest
