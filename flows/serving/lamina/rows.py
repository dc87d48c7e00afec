"""What the rows of one iteration are: the row table that the PLAN frame carries (spec 11 and 13).

Slices compute token row by token row and know no sequences; only attention does. The row table tells it: rows
lie request after request, each request once, its rows at consecutive positions. A decoding request has one
row, a prompt chunk many. The table also carries what changed in the block tables, so that the frames of each
layer hold nothing but tensors. Changes are addressed ("from entry f on, these pages"), never appended: a plan
that is sent twice changes nothing the second time.

Per layer and iteration the tensors beside it are q (rows, H, hd), k and v (rows, KV, hd), un-repeated, and
the answer out (rows, H, hd), float32 in row order.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from dataclasses import dataclass
from enum import IntEnum
from functools import cached_property
from typing import Self

import numpy as np
from numpy.typing import NDArray

from flows.errors import DataError

PAGE_TOKENS = 16
"""Tokens of one page of keys and values."""
MAX_SLOTS = 1 << 16
MAX_ROWS = 1 << 16
MAX_POSITION = (1 << 31) - 1

_COUNTS = struct.Struct("<II")  # spans, deltas
_SPAN = struct.Struct("<IIIB3x")  # slot, position, length, kind
_DELTA = struct.Struct("<III")  # slot, first entry, pages that follow


class RowKind(IntEnum):
    """Why a request has rows in this iteration. Attention treats both alike; the engine does not."""

    DECODE = 0
    CHUNK = 1


@dataclass(frozen=True, slots=True)
class Span:
    """The rows of one request in this iteration."""

    slot: int  # the request's number on the workers, reused after it ends
    position: int  # of the first row; the rows after it follow without a gap
    length: int = 1  # rows
    kind: RowKind = RowKind.DECODE

    @property
    def end(self) -> int:
        """Position after the last row: what the request's context will be."""
        return self.position + self.length


@dataclass(frozen=True, slots=True)
class TableDelta:
    """Entries of one request's block table: page `pages[i]` holds positions 16 (first + i) to + 15."""

    slot: int
    first: int
    pages: tuple[int, ...]


@dataclass(frozen=True)
class RowTable:
    """The rows of one micro-batch of one iteration, in order, and what changed in the block tables."""

    spans: tuple[Span, ...]
    deltas: tuple[TableDelta, ...] = ()

    def __post_init__(self) -> None:
        seen = set()
        for span in self.spans:
            if not (0 <= span.slot < MAX_SLOTS and span.length >= 1 and span.position >= 0):
                raise DataError(f"row table: {span} has no meaning; slots start at 0 and rows at 1")
            if span.end > MAX_POSITION or self.rows > MAX_ROWS:
                raise DataError(f"row table: {span} goes beyond {MAX_ROWS} rows or position {MAX_POSITION}")
            if span.kind is RowKind.DECODE and span.length != 1:
                raise DataError(f"row table: slot {span.slot} decodes {span.length} rows, one is possible")
            if span.slot in seen:
                raise DataError(f"row table: slot {span.slot} has two spans, its rows must lie in one")
            seen.add(span.slot)
        for delta in self.deltas:
            if not (0 <= delta.slot < MAX_SLOTS and delta.first >= 0):
                raise DataError(f"row table: {delta} has no meaning")
            if (delta.first + len(delta.pages)) * PAGE_TOKENS > MAX_POSITION + 1:
                raise DataError(f"row table: the block table of slot {delta.slot} would be too long")
            if any(not 0 <= page < 1 << 32 for page in delta.pages):
                raise DataError(f"row table: slot {delta.slot} is given a page outside 32 bits")

    @cached_property
    def rows(self) -> int:
        return sum(span.length for span in self.spans)

    @cached_property
    def slots(self) -> NDArray[np.int64]:
        """Of each row, (rows,)."""
        return np.repeat(
            np.array([span.slot for span in self.spans], dtype=np.int64),
            [span.length for span in self.spans],
        )

    @cached_property
    def positions(self) -> NDArray[np.int64]:
        """Of each row, (rows,): the model's position_ids."""
        return _concatenate(np.arange(span.position, span.end, dtype=np.int64) for span in self.spans)

    @cached_property
    def starts(self) -> NDArray[np.int64]:
        """First row of each span, and the number of rows at the end, (spans + 1,)."""
        return np.cumsum([0, *(span.length for span in self.spans)], dtype=np.int64)

    @property
    def last_rows(self) -> NDArray[np.int64]:
        """Last row of each span, (spans,): the rows whose logits may be sampled."""
        return self.starts[1:] - 1

    def select(self, slots: Iterable[int]) -> tuple[RowTable, NDArray[np.int64]]:
        """The part that concerns `slots`, and which rows of this table it holds."""
        wanted = frozenset(slots)
        chosen = [index for index, span in enumerate(self.spans) if span.slot in wanted]
        rows = _concatenate(
            np.arange(self.starts[index], self.starts[index + 1], dtype=np.int64) for index in chosen
        )
        spans = tuple(self.spans[index] for index in chosen)
        return RowTable(spans, tuple(delta for delta in self.deltas if delta.slot in wanted)), rows

    def encode(self) -> bytes:
        """Little-endian: counts, spans, deltas, each delta followed by its pages as u32."""
        parts = [_COUNTS.pack(len(self.spans), len(self.deltas))]
        parts += [_SPAN.pack(span.slot, span.position, span.length, span.kind) for span in self.spans]
        for delta in self.deltas:
            parts.append(_DELTA.pack(delta.slot, delta.first, len(delta.pages)))
            parts.append(struct.pack(f"<{len(delta.pages)}I", *delta.pages))
        return b"".join(parts)

    @classmethod
    def decode(cls, payload: bytes | bytearray | memoryview) -> Self:
        """Read bytes that nobody vouches for.

        Raises:
            DataError: they are not a whole row table; nothing is allocated beyond their own size.
        """
        try:
            spans_count, deltas_count = _COUNTS.unpack_from(payload, 0)
            offset = _COUNTS.size
            if spans_count * _SPAN.size + deltas_count * _DELTA.size > len(payload) - offset:
                raise DataError(f"row table: {len(payload)} bytes cannot hold {spans_count} spans")
            spans = []
            for _ in range(spans_count):
                slot, position, length, kind = _SPAN.unpack_from(payload, offset)
                spans.append(Span(slot, position, length, RowKind(kind)))
                offset += _SPAN.size
            deltas = []
            for _ in range(deltas_count):
                slot, first, count = _DELTA.unpack_from(payload, offset)
                offset += _DELTA.size
                if count * 4 > len(payload) - offset:
                    raise DataError(f"row table: cut off in the pages of slot {slot}")
                deltas.append(TableDelta(slot, first, struct.unpack_from(f"<{count}I", payload, offset)))
                offset += count * 4
        except (struct.error, ValueError) as error:
            raise DataError(f"row table: not readable ({error})") from None
        if offset != len(payload):
            raise DataError(f"row table: {len(payload) - offset} bytes too many")
        return cls(tuple(spans), tuple(deltas))


def _concatenate(parts: Iterable[NDArray[np.int64]]) -> NDArray[np.int64]:
    return np.concatenate([np.empty(0, np.int64), *parts])
