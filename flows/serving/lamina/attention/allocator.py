"""Which pages are free: the engine's one allocator for a pool of page numbers (spec section 13).

Pages of a request are given as runs inside arenas of one super-block where there are any, because workers
read runs where they lie. A freed page is fenced: it stays out of use until every iteration that may mention
it has ended, so that a late frame cannot write into another request's tokens.

Invariants, checked by `check`: no page in two hands, used + fenced + free = all.
"""

from __future__ import annotations

from collections.abc import Sequence

from flows.errors import ResourceError
from flows.serving.lamina.attention.store import page_bytes
from flows.serving.lamina.rows import PAGE_TOKENS


class OutOfPages(ResourceError):
    """No request can grow now; nothing was allocated."""


class PageAllocator:
    """
    Args:
        pages: in the pool.
        block: tokens of a super-block.
    """

    def __init__(self, pages: int, block: int = 1024) -> None:
        if pages < 1 or block % PAGE_TOKENS or block < PAGE_TOKENS:
            raise ValueError(
                f"{pages} pages in blocks of {block} tokens: at least one page, whole pages a block"
            )
        self.pages, self._arena = pages, block // PAGE_TOKENS
        self._free = [True] * pages
        self._free_count = pages
        self._held: dict[int, list[int]] = {}  # slot → pages in order of position
        self._fenced: dict[int, int] = {}  # page → last iteration that may mention it

    @classmethod
    def within(
        cls, byte_budget: int, layers: int, kv_heads: int, head_dim: int, block: int = 1024
    ) -> PageAllocator:
        """As many pages as fit the bytes of one worker, in whole arenas.

        Raises:
            ResourceError: not one arena fits.
        """
        per_arena = page_bytes(layers, kv_heads, head_dim) * (block // PAGE_TOKENS)
        if byte_budget < per_arena:
            raise ResourceError(
                f"{byte_budget} bytes for keys and values hold less than one block of {block} tokens, which "
                f"takes {per_arena}; give attention workers more memory or use more of them"
            )
        return cls(byte_budget // per_arena * (block // PAGE_TOKENS), block)

    @property
    def free(self) -> int:
        return self._free_count

    @property
    def used(self) -> int:
        return self.pages - self._free_count - len(self._fenced)  # another thread may ask at any time

    @property
    def fenced(self) -> int:
        return len(self._fenced)

    def table(self, slot: int) -> tuple[int, ...]:
        """Pages of a slot in order of position."""
        return tuple(self._held.get(slot, ()))

    def grow(self, slot: int, count: int) -> tuple[int, ...]:
        """`count` further pages for a slot, for the tokens after those it has.

        Raises:
            OutOfPages: fewer are free; the slot keeps what it has.
        """
        if count > self._free_count:
            raise OutOfPages(
                f"{count} pages for slot {slot}, but only {self._free_count} of {self.pages} are free "
                f"({len(self._fenced)} more when the iterations under way have ended)"
            )
        held = self._held.setdefault(slot, [])
        given: list[int] = []
        while len(given) < count:
            index = (len(held) + len(given)) % self._arena  # place inside the super-block
            wanted = min(count - len(given), self._arena - index)
            previous = (held + given)[-1] if index else None
            run = self._run_after(previous, wanted) or self._best_run(self._arena - index, wanted)
            for page in run:
                self._free[page] = False
            self._free_count -= len(run)
            given += run
        held += given
        return tuple(given)

    def release(self, slot: int, iteration: int) -> tuple[int, ...]:
        """Take a request's pages; they become free once `iteration`, the last to mention them, ends."""
        pages = self._held.pop(slot, [])
        for page in pages:
            self._fenced[page] = iteration
        return tuple(pages)

    def end_iteration(self, iteration: int) -> int:
        """All iterations up to this one have ended on all workers; gives how many pages became free."""
        ended = [page for page, fence in self._fenced.items() if fence <= iteration]
        for page in ended:
            del self._fenced[page]
            self._free[page] = True
        self._free_count += len(ended)
        return len(ended)

    def check(self) -> None:
        """
        Raises:
            AssertionError: an invariant is broken.
        """
        held = [page for pages in self._held.values() for page in pages]
        assert len(set(held)) == len(held), "a page is in two tables"
        assert not set(held) & self._fenced.keys(), "a fenced page is in use"
        free = {page for page, is_free in enumerate(self._free) if is_free}
        assert not free & (set(held) | self._fenced.keys()), "a page in use is free"
        assert len(free) == self._free_count
        assert len(held) + self.fenced + self.free == self.pages, "a page is lost"

    def _run_after(self, previous: int | None, wanted: int) -> list[int]:
        """Free pages directly after `previous` in its arena."""
        if previous is None:
            return []
        end = min(previous + 1 + wanted, (previous // self._arena + 1) * self._arena, self.pages)
        run: list[int] = []
        for page in range(previous + 1, end):
            if not self._free[page]:
                break
            run.append(page)
        return run

    def _best_run(self, room: int, wanted: int) -> list[int]:
        """The smallest run that can take the whole rest of the super-block; else one for what is wanted now;
        else the longest there is."""
        runs = self._runs()
        for size in (room, wanted):
            if fitting := [run for run in runs if run[1] >= size]:
                start, _ = min(fitting, key=lambda run: (run[1], run[0]))
                return list(range(start, start + wanted))
        start, length = max(runs, key=lambda run: (run[1], -run[0]))
        return list(range(start, start + min(length, wanted)))

    def _runs(self) -> Sequence[tuple[int, int]]:
        """Start and length of each run of free pages inside an arena."""
        runs: list[tuple[int, int]] = []
        start = None
        for page in range(self.pages + 1):
            is_free = page < self.pages and self._free[page]
            if start is not None and (not is_free or page % self._arena == 0):
                runs.append((start, page - start))
                start = None
            if is_free and start is None:
                start = page
        return runs
