"""Attention of a worker as matrix products of torch, on any device: the calls of `fused.py`.

One request after another (or several at the same time, by threads), super-block by super-block, with the
arithmetic of models/ops/partial_attention.py. It is what a worker on a GPU uses, and what the compiled kernel
is compared with.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flows.serving.lamina.attention.memory import Floats, Places, TensorMemory
from flows.serving.lamina.attention.store import PageStore
from flows.serving.lamina.rows import RowTable, Span
from models.ops.partial_attention import (
    AttentionRule,
    Part,
    Work,
    attend_previous,
    attend_self,
    batch_invariant,
    divide_work,
    empty_part,
    finish,
    merge,
)

T = TypeVar("T")


@dataclass(frozen=True)
class Layout:
    """Rows of one micro-batch, and where their keys and values go."""

    table: RowTable
    own: NDArray[np.int64]
    places: Places


class ProductAttention:
    """Attention over the tensors of a store; see `fused.FusedAttention` for the methods."""

    def __init__(
        self,
        store: PageStore,
        rules: list[AttentionRule],
        device: str,
        *,
        partials: bool = False,
        pool: ThreadPoolExecutor | None = None,
    ) -> None:
        assert isinstance(store.memory, TensorMemory)
        self.store, self.rules, self.device, self.partials = store, rules, device, partials
        self._memory, self._pool = store.memory, pool

    def layout(self, table: RowTable, own: NDArray[np.int64]) -> Layout:
        if not self.partials:
            for span in table.spans:
                self.store.require(span)
        return Layout(table, own, self.store.locate(table.slots[own], table.positions[own]))

    def is_late(self, layer: int, layout: Layout) -> bool:
        return any(self._work(span, layer)[1] for span in layout.table.spans)

    @torch.inference_mode()
    def begin(self, layer: int, q: Floats, layout: Layout) -> tuple[Tensor, list[Part | None]]:
        queries, table = torch.from_numpy(q).to(self.device), layout.table

        def start(index: int) -> Part | None:
            span = table.spans[index]
            work, _ = self._work(span, layer)
            rows = queries[table.starts[index] : table.starts[index + 1]]
            return self._previous(rows, span, layer, work, None) if work else None

        return queries, self._map(start, table)

    @torch.inference_mode()
    def write(self, layer: int, layout: Layout, k: Floats, v: Floats) -> None:
        keys, values = (torch.from_numpy(array).to(self.device) for array in (k, v))
        self._memory.write(layer, layout.places, keys, values)

    @torch.inference_mode()
    def finish(
        self, layer: int, layout: Layout, begun: tuple[Tensor, list[Part | None]], k: Floats, v: Floats
    ) -> tuple[Floats, Floats | None]:
        q, parts = begun
        table, rule = layout.table, self.rules[layer]
        keys, values = (torch.from_numpy(array).to(self.device) for array in (k, v))
        own = empty_part(q)
        if len(layout.own) == len(q):
            own = attend_self(q, keys, values, rule)
        elif len(layout.own):
            chosen = torch.from_numpy(layout.own)
            found = attend_self(q[chosen], keys, values, rule)
            for tensor, part_of_it in zip(own, found, strict=True):
                tensor[chosen] = part_of_it

        def end(index: int) -> Part:
            span = table.spans[index]
            _, late = self._work(span, layer)
            rows = q[table.starts[index] : table.starts[index + 1]]
            part = parts[index]
            if late:
                part = self._previous(rows, span, layer, late, part)
            return empty_part(rows) if part is None else part

        out, log_sum = q, q[..., 0]
        if table.rows:
            ended = self._map(end, table)
            previous = ended[0]
            if len(ended) > 1:
                previous = Part(*(torch.cat(tensors) for tensors in zip(*ended, strict=True)))
            out, log_sum = finish(merge(previous, own))
        return out.cpu().numpy(), log_sum.cpu().numpy() if self.partials else None

    def _work(self, span: Span, layer: int) -> tuple[tuple[Work, ...], tuple[Work, ...]]:
        """What can be done when Q comes, because it needs nothing of this iteration, and what only after."""
        work = divide_work(span.position, span.length, self.rules[layer].window, self.store.block)
        needed = (min(piece.key_end, span.position + piece.row_end - 1) for piece in work)
        early = next((index for index, end in enumerate(needed) if end > span.position), len(work))
        return work[:early], work[early:]

    def _previous(
        self, q: Tensor, span: Span, layer: int, work: Iterable[Work], before: Part | None
    ) -> Part | None:
        if self.partials:
            work = [piece for piece in work if self.store.holds(span.slot, piece.key, piece.key_end)]
            if not work:
                return before
        return attend_previous(
            q,
            span.position,
            lambda start, end: self._memory.read(layer, self.store.pages_of(span.slot, start, end)),
            self.rules[layer],
            self.store.block,
            before=before,
            work=tuple(work),
        )

    def _map(self, function: Callable[[int], T], table: RowTable) -> list[T]:
        indices = range(len(table.spans))
        if self._pool is None or len(indices) < 2:
            return [function(index) for index in indices]

        def run(index: int) -> T:
            with torch.inference_mode():  # is a property of the thread
                return function(index)

        # longest first, so that no thread is left alone with one at the end
        order = sorted(indices, key=lambda index: -table.spans[index].end * table.spans[index].length)
        futures = {index: self._pool.submit(run, index) for index in order}
        return [futures[index].result() for index in indices]


@cache
def is_batch_invariant(group: int, head_dim: int) -> bool:
    """Whether the BLAS of this process gives the same bits for rows and heads together and alone."""
    return batch_invariant(2, group, head_dim, 256)  # an engine that comes back does not wait again
