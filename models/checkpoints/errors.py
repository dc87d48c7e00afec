"""The one error of this package: a checkpoint that is refused, in a sentence for the person who gave it."""

from __future__ import annotations

from collections.abc import Iterable

LISTED_NAMES = 12


class CheckpointError(ValueError):
    """A checkpoint cannot be read, is of no known layout, or does not fit; nothing was loaded from it."""


def listed(names: Iterable[str]) -> str:
    """The first dozen names, then how many more there are."""
    names = list(names)
    shown = ", ".join(names[:LISTED_NAMES])
    more = len(names) - LISTED_NAMES
    return f"{shown} and {more} more" if more > 0 else shown
