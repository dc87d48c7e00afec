"""The one error of this package: a checkpoint that is refused, in a sentence for the person who gave it."""

from __future__ import annotations

from collections.abc import Iterable

LISTED_NAMES = 12
NAME_LETTERS = 120


class CheckpointError(ValueError):
    """A checkpoint cannot be read, is of no known layout, or does not fit; nothing was loaded from it."""


def listed(names: Iterable[str], most: int = LISTED_NAMES) -> str:
    """The first names, then how many more there are; on one line, whatever is in them."""
    names = list(names)
    shown = ", ".join(_shown(name) for name in names[:most])
    more = len(names) - most
    return f"{shown} and {more} more" if more > 0 else shown


def _shown(name: str) -> str:
    printable = "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in name)
    return printable if len(printable) <= NAME_LETTERS else f"{printable[:NAME_LETTERS]}…"
