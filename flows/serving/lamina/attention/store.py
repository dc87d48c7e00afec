"""Block tables of one attention worker: which page holds which tokens of which request (spec section 13).

A page is 16 tokens of all heads this worker has, in every layer; where its numbers lie is in `memory.py`.

Writes are addressed by block table and position, so a replayed iteration overwrites the same bytes. A page is
cleared when it enters a table, so what lies beyond the written tokens is zero and never another request's.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from flows.errors import DataError
from flows.serving.lamina.attention.memory import (
    FLOAT_BYTES,
    Floats,
    Memory,
    PageMemory,
    Places,
    TensorMemory,
)
from flows.serving.lamina.rows import PAGE_TOKENS, Span, TableDelta

NO_PAGE = -1
MAX_TABLE = 1 << 20
_NO_TABLE = np.empty(0, np.int64)


def page_bytes(layers: int, kv_heads: int, head_dim: int) -> int:
    """Bytes of one page, keys and values of all layers."""
    return layers * PAGE_TOKENS * 2 * kv_heads * head_dim * FLOAT_BYTES


class PageStore:
    """Pages of all layers and the block table of each slot.

    Args:
        block: tokens of a super-block and of an arena, a multiple of 16.
        debug: fill freed pages with NaN, so that a read of one cannot go unnoticed.
        device: other than None: keep tensors for torch on it instead of pages for the compiled kernel.
    """

    def __init__(
        self,
        layers: int,
        pages: int,
        kv_heads: int,
        head_dim: int,
        block: int = 1024,
        debug: bool = False,
        device: str | None = None,
    ) -> None:
        self.pages, self.block, self.debug = pages, block, debug
        self.pages_per_block = block // PAGE_TOKENS
        arenas = -(-pages // self.pages_per_block)
        sizes = (layers, arenas, kv_heads, head_dim, self.pages_per_block)
        self.memory: Memory = PageMemory(*sizes) if device is None else TensorMemory(*sizes, device)
        self.tables: dict[int, NDArray[np.int64]] = {}
        self.owners: dict[int, int] = {}  # page → slot
        self.releases = 0  # how often a page left a table

    @property
    def bytes(self) -> int:
        return self.memory.bytes

    def page(self, layer: int, page: int) -> tuple[Floats, Floats]:
        """Keys and values of one page, (16, KV, hd) each."""
        tokens = np.arange(PAGE_TOKENS)
        return self.memory.take(layer, np.stack([np.full_like(tokens, page), tokens], 1))

    def assign(self, delta: TableDelta) -> None:
        """Change a block table; the same change twice is one change.

        Raises:
            DataError: a page outside the store, or one that another request holds.
        """
        for page in delta.pages:
            if page >= self.pages:
                raise DataError(f"slot {delta.slot} is given page {page}, this worker has {self.pages} pages")
            if self.owners.get(page, delta.slot) != delta.slot:
                raise DataError(f"page {page} of slot {self.owners[page]} is given to slot {delta.slot} too")
        if len(set(delta.pages)) != len(delta.pages):
            raise DataError(f"slot {delta.slot} is given one page twice")
        table = self.tables.get(delta.slot, _NO_TABLE)
        end = delta.first + len(delta.pages)
        others = set(table[: delta.first].tolist()) | set(table[end:].tolist())
        if others.intersection(delta.pages):
            raise DataError(f"slot {delta.slot} is given a page that it has at another place")
        if end > len(table):
            if end > MAX_TABLE:  # entries without pages are cheap, but not without bound
                raise DataError(f"slot {delta.slot}: a block table of {end} entries is too long")
            table = np.concatenate([table, np.full(end - len(table), NO_PAGE)])
        replaced = table[delta.first : end].tolist()
        for old, page in zip(replaced, delta.pages, strict=True):
            if old not in (NO_PAGE, page) and old not in delta.pages:
                self._release(old)
            if self.owners.get(page) != delta.slot:
                self.memory.fill(page, 0.0)
                self.owners[page] = delta.slot
        table[delta.first : end] = delta.pages
        self.tables[delta.slot] = table

    def free(self, slot: int) -> None:
        """Forget a request; a slot that is not known is already forgotten."""
        for page in self.tables.pop(slot, _NO_TABLE).tolist():
            if page != NO_PAGE:
                self._release(page)

    def locate(self, slots: NDArray[np.int64], positions: NDArray[np.int64]) -> Places:
        """Where each row is; it stays true until `releases` changes.

        Raises:
            DataError: a position for which the slot has no page.
        """
        rows = zip(slots.tolist(), positions.tolist(), strict=True)
        pages = np.array([self._page_of(slot, position) for slot, position in rows], np.int64)
        return np.stack([pages, positions % PAGE_TOKENS], 1)

    def pages_of(self, slot: int, start: int, end: int) -> NDArray[np.int64]:
        """Pages of positions [start, end)."""
        return self.tables.get(slot, _NO_TABLE)[start // PAGE_TOKENS : -(-end // PAGE_TOKENS)]

    def holds(self, slot: int, start: int, end: int) -> bool:
        """Whether the pages of these positions, all of one block, are here and not on another worker.

        Raises:
            DataError: some are here and some are not, so that nobody would compute with the block.
        """
        pages = self.pages_of(slot, start, end)
        wanted = -(-end // PAGE_TOKENS) - start // PAGE_TOKENS
        here = int((pages != NO_PAGE).sum())
        if here not in (0, wanted):
            raise DataError(f"slot {slot} has {here} of {wanted} pages for positions {start} to {end - 1}")
        return here == wanted

    def require(self, span: Span) -> None:
        """
        Raises:
            DataError: the slot of `span` lacks a page for its own rows or for a token before them.
        """
        table = self.pages_of(span.slot, 0, span.end)
        missing = np.flatnonzero(table == NO_PAGE)
        if len(missing) or len(table) * PAGE_TOKENS < span.end:
            at = int(missing[0]) if len(missing) else len(table)
            raise DataError(
                f"slot {span.slot} has no page for position {at * PAGE_TOKENS}; send its block table first"
            )

    def check(self) -> None:
        """Raise AssertionError if a page is in two tables or the owners contradict the tables."""
        held = [
            (page, slot) for slot, table in self.tables.items() for page in table.tolist() if page != NO_PAGE
        ]
        assert len({page for page, _ in held}) == len(held), "a page is in two tables"
        assert dict(held) == self.owners, "owners and block tables differ"

    def _page_of(self, slot: int, position: int) -> int:
        table = self.tables.get(slot)
        index = position // PAGE_TOKENS
        page = int(table[index]) if table is not None and index < len(table) else NO_PAGE
        if page == NO_PAGE:
            raise DataError(f"slot {slot} has no page for position {position}; send its block table first")
        return page

    def _release(self, page: int) -> None:
        self.owners.pop(page, None)
        self.releases += 1
        if self.debug:
            self.memory.fill(page, float("nan"))
