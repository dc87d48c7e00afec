"""Who holds which heads, requests or tokens, and how the answers become one (spec section 5).

The one place that knows. `HeadPartition` gives each worker some heads of every token, also unevenly;
`RequestPartition` whole requests; `SequencePartition` whole super-blocks of every request. Keys and values
travel un-repeated in all of them. A partition cuts the tensors of an iteration into `Share`s, one per worker,
and puts the workers' answers back together. Head- and request-level give the bits of a single worker;
sequence-level merges the parts of different workers and differs by rounding.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from flows.errors import ConfigError, DataError
from flows.serving.lamina.rows import PAGE_TOKENS, RowTable, TableDelta
from models.ops.partial_attention import finish, merge, reopen

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Share:
    """What one worker gets of an iteration; None for rows means all of them."""

    table: RowTable
    rows: NDArray[np.int64] | None  # whose q it gets and whose output it gives
    kv_rows: NDArray[np.int64] | None  # whose k and v it gets
    kv_heads: slice


class Partition(Protocol):
    """How attention is split over workers."""

    workers: int
    pools: int  # separate sets of page numbers: 1 if all workers share their block tables
    partials: bool  # answers carry log-sum-exp and are merged

    def kv_heads(self, worker: int) -> slice:
        """Heads of keys and values on this worker."""

    def pool_of(self, slot: int, block_entry: int) -> int:
        """Which pool entry `block_entry` of the block table of `slot` is allocated from."""

    def split(self, table: RowTable) -> list[Share]:
        """One share per worker, in worker order; one without rows takes no part in the iteration."""


class HeadPartition:
    """Each worker has some heads of every token.

    Args:
        weights: relative speed of the workers; each gets heads in proportion, at least one.
    """

    pools = 1
    partials = False

    def __init__(self, kv_heads: int, weights: Sequence[float]) -> None:
        self.workers = len(weights)
        self.counts = share_heads(kv_heads, weights)
        self._starts = np.cumsum([0, *self.counts]).tolist()

    def kv_heads(self, worker: int) -> slice:
        return slice(self._starts[worker], self._starts[worker + 1])

    def pool_of(self, slot: int, block_entry: int) -> int:
        return 0

    def split(self, table: RowTable) -> list[Share]:
        return [Share(table, None, None, self.kv_heads(worker)) for worker in range(self.workers)]


class RequestPartition:
    """Each request lives on one worker; `place` says on which, at admission."""

    partials = False

    def __init__(self, kv_heads: int, workers: int) -> None:
        self.workers = self.pools = workers
        self._heads = slice(0, kv_heads)
        self._worker_of: dict[int, int] = {}

    def place(self, slot: int, worker: int) -> None:
        """Put a request on a worker until `forget`."""
        if not 0 <= worker < self.workers:
            raise DataError(f"slot {slot} cannot live on worker {worker} of {self.workers}")
        self._worker_of[slot] = worker

    def forget(self, slot: int) -> None:
        self._worker_of.pop(slot, None)

    def kv_heads(self, worker: int) -> slice:
        return self._heads

    def pool_of(self, slot: int, block_entry: int) -> int:
        if slot not in self._worker_of:
            raise DataError(f"slot {slot} was not placed on a worker")
        return self._worker_of[slot]

    def split(self, table: RowTable) -> list[Share]:
        owned: list[list[int]] = [[] for _ in range(self.workers)]
        for slot in {span.slot for span in table.spans} | {delta.slot for delta in table.deltas}:
            owned[self.pool_of(slot, 0)].append(slot)
        shares = []
        for slots in owned:
            part, rows = table.select(slots)
            shares.append(Share(part, rows, rows, self._heads))
        return shares


class SequencePartition:
    """Super-blocks of a request go round the workers, beginning at another one for each slot."""

    partials = True

    def __init__(self, kv_heads: int, workers: int, block: int = 1024) -> None:
        self.workers = self.pools = workers
        self._heads = slice(0, kv_heads)
        self._entries = block // PAGE_TOKENS

    def kv_heads(self, worker: int) -> slice:
        return self._heads

    def pool_of(self, slot: int, block_entry: int) -> int:
        return (slot + block_entry // self._entries) % self.workers

    def split(self, table: RowTable) -> list[Share]:
        owners = (table.slots + table.positions // (self._entries * PAGE_TOKENS)) % self.workers
        shares = []
        for worker in range(self.workers):
            # every span goes to every worker: one that holds nothing of it answers with an empty part
            part = RowTable(table.spans, tuple(self._deltas_of(table, worker)))
            shares.append(Share(part, None, np.flatnonzero(owners == worker), self._heads))
        return shares

    def _deltas_of(self, table: RowTable, worker: int) -> list[TableDelta]:
        runs = []
        for delta in table.deltas:
            start = 0
            while start < len(delta.pages):
                entry = delta.first + start
                end = min(len(delta.pages), start + self._entries - entry % self._entries)
                if self.pool_of(delta.slot, entry) == worker:
                    runs.append(TableDelta(delta.slot, entry, delta.pages[start:end]))
                start = end
        return runs


def cut_queries(share: Share, q: Floats, kv_heads: int) -> Floats:
    """The queries of a share, (rows, KV_j · G, hd), of (rows, KV · G, hd)."""
    group = q.shape[1] // kv_heads
    heads = slice(share.kv_heads.start * group, share.kv_heads.stop * group)
    return q[:, heads] if share.rows is None else q[share.rows, heads]


def cut_keys(share: Share, k: Floats) -> Floats:
    """The keys (or values) of a share, (rows, KV_j, hd), of (rows, KV, hd)."""
    return k[:, share.kv_heads] if share.kv_rows is None else k[share.kv_rows, share.kv_heads]


def join(
    shares: Mapping[int, Share],
    answers: Mapping[int, Sequence[Floats]],
    shape: tuple[int, int, int],
    kv_heads: int,
) -> Floats:
    """One output (rows, H, hd) from the workers' answers: out, and log-sum-exp (rows, H_j) of partial ones.

    Parts are merged in worker order, whichever answered first.
    """
    if len(answers) == 1:
        (answer,) = answers.values()
        if answer[0].shape == shape:  # nothing to put together
            return answer[0]
    out = np.zeros(shape, np.float32)
    group = shape[1] // kv_heads
    if all(len(answer) == 1 for answer in answers.values()):
        for worker, share in shares.items():
            heads = slice(share.kv_heads.start * group, share.kv_heads.stop * group)
            rows = slice(None) if share.rows is None else share.rows
            out[rows, heads] = answers[worker][0]
        return out
    parts = [reopen(*(torch.from_numpy(array) for array in answers[worker])) for worker in sorted(answers)]
    whole = parts[0]
    for part in parts[1:]:
        whole = merge(whole, part)
    return finish(whole)[0].numpy()


def share_heads(kv_heads: int, weights: Sequence[float]) -> list[int]:
    """Heads of each worker: at least one, and the slowest worker as little behind as possible.

    Raises:
        ConfigError: more workers than heads, or weights that are not positive.
    """
    if not weights or len(weights) > kv_heads:
        raise ConfigError(
            f"{kv_heads} heads of keys and values cannot be shared among {len(weights)} attention workers; "
            f"use 1 to {kv_heads}, or partition by request or sequence"
        )
    if any(not (np.isfinite(weight) and weight > 0) for weight in weights):
        raise ConfigError(f"weights of attention workers must be positive, got {list(weights)}")
    counts = [1] * len(weights)
    for _ in range(kv_heads - len(weights)):  # each head to whom it delays least
        counts[min(range(len(weights)), key=lambda j: ((counts[j] + 1) / weights[j], j))] += 1
    return counts


def slowdown(counts: Sequence[int], weights: Sequence[float]) -> float:
    """Time of the slowest worker over that of a perfect division; 1 is perfect."""
    return max(n / w for n, w in zip(counts, weights, strict=True)) / (sum(counts) / sum(weights))


def spread_requests(costs: Mapping[int, float], weights: Sequence[float]) -> dict[int, int]:
    """Worker of each slot: the longest goes first, to whom it delays least (longest processing time).

    Args:
        costs: predicted bytes of keys and values that each slot has still to read.
    """
    loads = [(0.0, worker) for worker in range(len(weights))]
    heapq.heapify(loads)
    placed = {}
    for slot in sorted(costs, key=lambda slot: (-costs[slot], slot)):
        _, worker = min((load + costs[slot] / weights[worker], worker) for load, worker in loads)
        index = next(i for i, (_, other) in enumerate(loads) if other == worker)
        loads[index] = (loads[index][0] + costs[slot] / weights[worker], worker)
        placed[slot] = worker
    return placed


def imbalance(costs: Mapping[int, float], placed: Mapping[int, int], weights: Sequence[float]) -> float:
    """Largest load over the mean; 1 is perfect."""
    loads = np.zeros(len(weights))
    for slot, worker in placed.items():
        loads[worker] += costs[slot] / weights[worker]
    return float(loads.max() / loads.mean()) if loads.any() else 1.0
