"""Keys and values of one attention worker, in pages (spec section 13).

A page is 16 tokens of all heads this worker has, [KV_j, 16, hd] in every layer, and each layer's pages are
addressed as [pages, KV_j, 16, hd]. In memory the pages lie in arenas of one super-block each, head before
page: where a request's pages follow one another in an arena, as the allocator sees to, the keys of one head
are one run of memory and are read where they lie. Pages that do not follow one another are gathered first:
same numbers, one more copy.

Writes are addressed by block table and position, so a replayed iteration overwrites the same bytes. A page is
cleared when it enters a table, so what lies beyond the written tokens is zero and never another request's.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flows.errors import DataError
from flows.serving.lamina.rows import PAGE_TOKENS, Span, TableDelta

NO_PAGE = -1
MAX_TABLE = 1 << 20
FLOAT_BYTES = 4


def page_bytes(layers: int, kv_heads: int, head_dim: int) -> int:
    """Bytes of one page, keys and values of all layers."""
    return layers * PAGE_TOKENS * 2 * kv_heads * head_dim * FLOAT_BYTES


class PageStore:
    """Pages of all layers and the block table of each slot.

    Args:
        block: tokens of a super-block and of an arena, a multiple of 16.
        debug: fill freed pages with NaN, so that a read of one cannot go unnoticed.
    """

    def __init__(
        self,
        layers: int,
        pages: int,
        kv_heads: int,
        head_dim: int,
        block: int = 1024,
        device: str = "cpu",
        debug: bool = False,
    ) -> None:
        self.pages, self.block, self.debug = pages, block, debug
        self.pages_per_block = block // PAGE_TOKENS
        arenas = -(-pages // self.pages_per_block)
        shape = (layers, arenas, kv_heads, block, head_dim)
        self.keys = torch.zeros(shape, device=device)  # (L, arenas, KV, tokens of the arena, hd)
        self.values = torch.zeros(shape, device=device)
        self.tables: dict[int, NDArray[np.int64]] = {}
        self.owners: dict[int, int] = {}  # page → slot
        self.releases = 0  # how often a page left a table

    @property
    def bytes(self) -> int:
        return 2 * self.keys.numel() * FLOAT_BYTES

    def page(self, layer: int, page: int) -> tuple[Tensor, Tensor]:
        """Keys and values of one page, (KV, 16, hd) each: views of the store."""
        arena, index = divmod(page, self.pages_per_block)
        tokens = slice(index * PAGE_TOKENS, (index + 1) * PAGE_TOKENS)
        return self.keys[layer, arena, :, tokens], self.values[layer, arena, :, tokens]

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
        table = self.tables.get(delta.slot, np.empty(0, np.int64))
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
                self._fill(page, 0.0)
                self.owners[page] = delta.slot
        table[delta.first : end] = delta.pages
        self.tables[delta.slot] = table

    def free(self, slot: int) -> None:
        """Forget a request; a slot that is not known is already forgotten."""
        for page in self.tables.pop(slot, np.empty(0, np.int64)).tolist():
            if page != NO_PAGE:
                self._release(page)

    def locate(self, slots: NDArray[np.int64], positions: NDArray[np.int64]) -> tuple[Tensor, Tensor]:
        """Arena and token in it of each row; they stay true until `releases` changes.

        Raises:
            DataError: a position for which the slot has no page.
        """
        rows = zip(slots.tolist(), positions.tolist(), strict=True)
        pages = np.array([self._page_of(slot, position) for slot, position in rows], np.int64)
        tokens = pages % self.pages_per_block * PAGE_TOKENS + positions % PAGE_TOKENS
        return torch.from_numpy(pages // self.pages_per_block), torch.from_numpy(tokens)

    def write(self, layer: int, places: tuple[Tensor, Tensor], k: Tensor, v: Tensor) -> None:
        """Keys and values (rows, KV, hd) to the places that `locate` gave."""
        arenas, tokens = places
        self.keys[layer][arenas, :, tokens] = k
        self.values[layer][arenas, :, tokens] = v

    def read(self, layer: int, slot: int, start: int, end: int) -> tuple[Tensor, Tensor]:
        """Keys and values (KV, T, hd) of positions [start, end), whole pages of one block."""
        pages = self.tables[slot][start // PAGE_TOKENS : -(-end // PAGE_TOKENS)]
        arena, index = divmod(int(pages[0]), self.pages_per_block)
        count = len(pages)
        if index + count <= self.pages_per_block and (count == 1 or bool((np.diff(pages) == 1).all())):
            run = slice(index * PAGE_TOKENS, (index + count) * PAGE_TOKENS)
            return self.keys[layer, arena, :, run], self.values[layer, arena, :, run]
        parts = [self.page(layer, page) for page in pages.tolist()]
        return torch.cat([k for k, _ in parts], 1), torch.cat([v for _, v in parts], 1)

    def holds(self, slot: int, start: int, end: int) -> bool:
        """Whether the pages of these positions, all of one block, are here and not on another worker.

        Raises:
            DataError: some are here and some are not, so that nobody would compute with the block.
        """
        pages = self.tables.get(slot, np.empty(0, np.int64))[start // PAGE_TOKENS : -(-end // PAGE_TOKENS)]
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
        table = self.tables.get(span.slot, np.empty(0, np.int64))[: -(-span.end // PAGE_TOKENS)]
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
            self._fill(page, float("nan"))

    def _fill(self, page: int, value: float) -> None:
        arena, index = divmod(page, self.pages_per_block)
        tokens = slice(index * PAGE_TOKENS, (index + 1) * PAGE_TOKENS)
        self.keys[:, arena, :, tokens] = value
        self.values[:, arena, :, tokens] = value
