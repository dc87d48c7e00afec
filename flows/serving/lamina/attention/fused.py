"""Attention of a worker on its processor: what the compiled kernel is called with.

What follows from the row table and the block tables alone is prepared once per iteration (`Layout`). A layer
then costs a call of the kernel when Q comes and one or two when KV does, however many requests there are.

When Q comes, rows take the pages with nothing but tokens before this iteration (a decode row all that it
has); after KV, prompt chunks take the pages with their own tokens. The order is the same as without the cut.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cache
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from flows.serving.lamina.attention.kernel import compile_kernels, state_floats
from flows.serving.lamina.attention.memory import Floats, PageMemory, Places
from flows.serving.lamina.attention.store import NO_PAGE, PageStore
from flows.serving.lamina.rows import PAGE_TOKENS, RowKind, RowTable, Span, TableDelta
from models.ops.partial_attention import AttentionRule

Ints = NDArray[np.int64]


class Ranges(NamedTuple):
    """Entries of the block table that each span takes, [from, to) in (spans, 2)."""

    early: Ints  # when its queries come
    late: Ints  # when its own keys are stored
    any_early: bool
    any_late: bool


@dataclass(frozen=True)
class Layout:
    """Rows and pages of one micro-batch as the kernel wants them."""

    spans: Ints  # first row, position, rows of each, (spans, 3)
    tables: Ints  # pages of each, (spans, entries)
    own: Ints  # of each row, which row of k and v is its own; -1: none
    places: Places  # where the rows of k and v go
    items: list[Ints]  # of each thread: the (span, head) pairs that it does
    ranges: dict[int, Ranges] = field(default_factory=dict)  # by window


class FusedAttention:
    """Attention over the pages of a store.

    Args:
        store: with pages for the kernel.
        pool: of `threads` threads, or None for one.
        partials: others hold other tokens of the same rows: log-sum-exp is wanted.
    """

    def __init__(
        self,
        store: PageStore,
        rules: list[AttentionRule],
        sizes: tuple[int, int, int],
        *,
        partials: bool = False,
        pool: ThreadPoolExecutor | None = None,
        threads: int = 1,
    ) -> None:
        assert isinstance(store.memory, PageMemory)
        self.store, self.rules, self.partials = store, rules, partials
        self.kv_heads, self.group, self.head_dim = sizes
        self._memory = store.memory
        self._kernels = compile_kernels()
        self._pool, self._threads = pool, threads
        self._sizes = np.array([*sizes, store.pages_per_block], np.int64)
        self._stride = state_floats(self.head_dim)

    def layout(self, table: RowTable, own: Ints) -> Layout:
        """
        Args:
            own: rows whose own token is stored here.

        Raises:
            DataError: a page that is needed is not here.
        """
        store = self.store
        spans = np.array([(span.position, span.length) for span in table.spans], np.int64).reshape(-1, 2)
        entries = -(-spans.sum(1) // PAGE_TOKENS)
        tables = np.full((len(spans), int(entries.max(initial=1))), NO_PAGE, np.int64)
        for index, span in enumerate(table.spans):
            if self.partials:
                for start in range(0, span.end, store.block):
                    store.holds(span.slot, start, min(start + store.block, span.end))
            else:
                store.require(span)
            pages = store.pages_of(span.slot, 0, span.end)
            tables[index, : len(pages)] = pages
        index_of_own = np.full(table.rows, -1, np.int64)
        index_of_own[own] = np.arange(len(own))
        return Layout(
            np.column_stack([table.starts[:-1], spans]),
            tables,
            index_of_own,
            store.locate(table.slots[own], table.positions[own]),
            self._share_out(entries * spans[:, 1]),
        )

    def is_late(self, layer: int, layout: Layout) -> bool:
        """Whether keys and values have to be stored before `finish`."""
        return self._ranges(layer, layout).any_late

    def begin(self, layer: int, q: Floats, layout: Layout) -> tuple[Floats, Floats]:
        """Attend with queries (R, KV, G, hd) to what is stored already."""
        queries = _flat(q)
        state = np.empty(q.size // self.head_dim * self._stride, np.float32)
        self._kernels.begin(state, self._stride)
        ranges = self._ranges(layer, layout)
        if ranges.any_early:
            self._attend(layer, state, queries, layout, ranges.early)
        return queries, state

    def write(self, layer: int, layout: Layout, k: Floats, v: Floats) -> None:
        """Keys and values (rows, KV, hd) to their pages."""
        self._kernels.write(*self._memory.flat[layer], layout.places, _flat(k), _flat(v), self._sizes)

    def finish(
        self, layer: int, layout: Layout, begun: tuple[Floats, Floats], k: Floats, v: Floats
    ) -> tuple[Floats, Floats | None]:
        """Output (R, KV, G, hd), and log-sum-exp (R, KV, G) if it is wanted, of what `begin` gave."""
        queries, state = begun
        rule, ranges = self.rules[layer], self._ranges(layer, layout)
        if ranges.any_late:
            self._attend(layer, state, queries, layout, ranges.late)
        shape = (len(layout.own), self.kv_heads, self.group)
        out = np.empty((*shape, self.head_dim), np.float32)
        log_sum = np.empty(shape if self.partials else 0, np.float32)
        self._kernels.finish(
            state, queries, layout.own, _flat(k), _flat(v), self._sizes, rule.scale, rule.soft_cap,
            out.reshape(-1), log_sum.reshape(-1),
        )  # fmt: skip
        return out, log_sum if self.partials else None

    def _attend(self, layer: int, state: Floats, queries: Floats, layout: Layout, ranges: Ints) -> None:
        rule, memory = self.rules[layer], self._memory.flat[layer]

        def run(items: Ints) -> None:
            self._kernels.attend(
                state, queries, *memory, layout.spans, ranges, layout.tables, items, self._sizes,
                rule.window, rule.scale, rule.soft_cap,
            )  # fmt: skip

        if self._pool is None or len(layout.items) == 1:
            for items in layout.items:
                run(items)
        else:
            list(self._pool.map(run, layout.items))

    def _ranges(self, layer: int, layout: Layout) -> Ranges:
        window = self.rules[layer].window
        found = layout.ranges.get(window)
        if found is None:
            _, position, length = layout.spans.T
            last = position + length - 1
            start = np.maximum(position - window + 1, 0) // PAGE_TOKENS if window else np.zeros_like(position)
            middle = np.where(length == 1, -(-position // PAGE_TOKENS), position // PAGE_TOKENS)
            middle = np.maximum(middle, start)
            end = np.maximum(-(-last // PAGE_TOKENS), middle)
            early, late = np.column_stack([start, middle]), np.column_stack([middle, end])
            found = Ranges(early, late, bool((middle > start).any()), bool((end > middle).any()))
            layout.ranges[window] = found
        return found

    def _share_out(self, costs: Ints) -> list[Ints]:
        """(span, head) pairs for each thread: the longest first, so that none is left alone at the end."""
        pairs = np.array([(span, head) for span in range(len(costs)) for head in range(self.kv_heads)])
        pairs = pairs.reshape(-1, 2).astype(np.int64)
        if self._pool is None or len(pairs) < 2:
            return [pairs]
        pairs = pairs[np.argsort(-costs[pairs[:, 0]], kind="stable")]
        return [np.ascontiguousarray(pairs[start :: self._threads]) for start in range(self._threads)]


def _flat(array: Floats) -> Floats:
    flat = array.reshape(-1)
    flat.flags.writeable = False  # the type that the kernels were compiled for
    return flat


@cache
def is_batch_invariant(group: int, head_dim: int) -> bool:
    """Whether on this machine rows and heads together give the bits of rows and heads alone."""
    generator = np.random.default_rng(0)
    length, heads, rule = 3 * PAGE_TOKENS + 5, 2, AttentionRule(head_dim**-0.5)
    q = generator.standard_normal((length, heads, group, head_dim), dtype=np.float32)
    k, v = generator.standard_normal((2, length, heads, head_dim), dtype=np.float32)

    def run(cuts: list[int], kv: slice) -> Floats:
        store = PageStore(1, 4, kv.stop - kv.start, head_dim, 4 * PAGE_TOKENS)
        store.assign(TableDelta(0, 0, (2, 0, 3, 1)))
        attention = FusedAttention(store, [rule], (kv.stop - kv.start, group, head_dim))
        outputs = []
        for start, end in pairwise(cuts):
            layout = attention.layout(
                RowTable((Span(0, start, end - start, RowKind.CHUNK),)), np.arange(end - start)
            )
            keys, values = (np.ascontiguousarray(x[start:end, kv]) for x in (k, v))
            begun = attention.begin(0, np.ascontiguousarray(q[start:end, kv]), layout)
            attention.write(0, layout, keys, values)
            outputs.append(attention.finish(0, layout, begun, keys, values)[0])
        return np.concatenate(outputs)

    both = slice(0, heads)
    whole = run([0, length], both)
    alone = run(list(range(length + 1)), both)
    apart = np.concatenate([run([0, 7, length], slice(head, head + 1)) for head in range(heads)], 1)
    return np.array_equal(whole, alone) and np.array_equal(whole, apart)
