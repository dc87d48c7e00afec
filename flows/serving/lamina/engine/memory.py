"""Whose keys and values lie where: block tables over the page numbers of the attention workers.

Under head-level partition all workers share their page numbers, otherwise each has its own
(`Partition.pools`); an entry of a block table belongs to one pool. The engine runs one iteration at a time,
so pages that were released are free as soon as the workers have forgotten their slot.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence

from flows.serving.lamina.attention.allocator import PageAllocator
from flows.serving.lamina.attention.partition import Partition, RequestPartition
from flows.serving.lamina.engine.sequence import NO_SLOT
from flows.serving.lamina.engine.sequence import Sequence as Request
from flows.serving.lamina.rows import PAGE_TOKENS, TableDelta
from models.ops.partial_attention import BLOCK_TOKENS


def pages_for(tokens: int) -> int:
    return -(-tokens // PAGE_TOKENS)


def pages_that_fit(partition: Partition, layers: int, head_dim: int, worker_bytes: int) -> int:
    """Pages of each worker: as many as the worker with the most heads can hold.

    Raises:
        ResourceError: not one block fits.
    """
    counts = []
    for worker in range(partition.workers):
        heads = partition.kv_heads(worker)
        counts.append(PageAllocator.within(worker_bytes, layers, heads.stop - heads.start, head_dim).pages)
    return min(counts)


class KvMemory:
    """Slots and pages of the running requests.

    Args:
        pages: of each pool.
        slots: requests that may run at once.
    """

    def __init__(self, partition: Partition, pages: int, slots: int) -> None:
        self.partition, self.pages = partition, pages
        self._allocators = [PageAllocator(pages) for _ in range(partition.pools)]
        self._slots = list(range(slots))
        self._tables: dict[int, list[int]] = {}  # slot → page of each entry
        self._released: list[int] = []
        self._loads = [0.0] * partition.workers  # pages promised to each worker, request-level
        self.down: set[int] = set()  # workers that take no requests now, request-level

    @property
    def total(self) -> int:
        return self.pages * len(self._allocators)

    @property
    def used(self) -> int:
        return sum(allocator.used for allocator in self._allocators)

    @property
    def released(self) -> Sequence[int]:
        """Slots that the workers have to forget before anything else is given out."""
        return self._released

    def ever_fits(self, tokens: int) -> bool:
        """Whether a request of so many positions has room on workers that hold nothing else."""
        entries = pages_for(tokens)
        if self.partition.pools == 1 or isinstance(self.partition, RequestPartition):
            return entries <= self.pages
        blocks = -(-entries // (BLOCK_TOKENS // PAGE_TOKENS))
        return -(-blocks // self.partition.pools) * (BLOCK_TOKENS // PAGE_TOKENS) <= self.pages or (
            entries <= self.pages
        )

    def admit(self, request: Request, tokens: int, spare: int = 0) -> bool:
        """Give a request a slot and pages for its first `tokens` positions; false if there is no room.

        Args:
            spare: pages that have to stay free in each pool, for those that run to grow into.
        """
        if not self._slots or self._released:
            return False
        if spare and min(allocator.free for allocator in self._allocators) < pages_for(tokens) + spare:
            return False
        slot = self._slots[0]
        if isinstance(self.partition, RequestPartition):
            self.partition.place(slot, self._least_loaded(pages_for(tokens)))
        request.slot = heapq.heappop(self._slots)
        request.computed = request.table_sent = 0
        self._tables[slot] = []
        if not self.grow(request, tokens):
            self._forget(slot)
            request.slot = NO_SLOT
            return False
        return True

    def grow(self, request: Request, tokens: int) -> bool:
        """Pages for the first `tokens` positions of a running request; false if too few are free."""
        table = self._tables[request.slot]
        wanted: dict[int, int] = {}
        entries = range(len(table), pages_for(tokens))
        pools = [self.partition.pool_of(request.slot, entry) for entry in entries]
        for pool in pools:
            wanted[pool] = wanted.get(pool, 0) + 1
        if any(self._allocators[pool].free < count for pool, count in wanted.items()):
            return False
        given = {
            pool: iter(self._allocators[pool].grow(request.slot, count)) for pool, count in wanted.items()
        }
        table += [next(given[pool]) for pool in pools]
        if isinstance(self.partition, RequestPartition):
            self._loads[pools[0] if pools else 0] += len(pools)
        return True

    def release(self, request: Request) -> None:
        """Take slot and pages of a request; they are used again after `forgotten`."""
        if request.slot == NO_SLOT:
            return
        for allocator in self._allocators:
            allocator.release(request.slot, 0)
        if isinstance(self.partition, RequestPartition):
            self._loads[self.partition.pool_of(request.slot, 0)] -= len(self._tables[request.slot])
        self._released.append(request.slot)
        self._tables.pop(request.slot)
        request.slot = NO_SLOT

    def forgotten(self) -> None:
        """The workers have forgotten all released slots."""
        for allocator in self._allocators:
            allocator.end_iteration(0)
        for slot in self._released:
            self._forget(slot)
        self._released = []

    def deltas(self, request: Request) -> TableDelta | None:
        """What the workers do not know yet of a request's block table."""
        table = self._tables[request.slot]
        new = table[request.table_sent :]
        return TableDelta(request.slot, request.table_sent, tuple(new)) if new else None

    def entries(self, request: Request) -> int:
        return len(self._tables[request.slot])

    def check(self, running: Mapping[int, Request]) -> None:
        """
        Raises:
            AssertionError: a page is lost, or in two hands.
        """
        for allocator in self._allocators:
            allocator.check()
        assert self._tables.keys() == running.keys(), "a slot without a request, or the reverse"
        for slot, request in running.items():
            room = len(self._tables[slot]) * PAGE_TOKENS
            assert request.computed <= room, f"{request.id} has {request.computed} positions in {room}"

    def lost_by(self, request: Request, workers: set[int]) -> bool:
        """Whether these workers hold something of a running request."""
        if self.partition.pools == 1:
            return bool(workers)
        entries = range(len(self._tables[request.slot]))
        return any(self.partition.pool_of(request.slot, entry) in workers for entry in entries)

    def _least_loaded(self, entries: int) -> int:
        def key(worker: int) -> tuple[bool, float, int]:
            return self._allocators[worker].free < entries, self._loads[worker], worker

        return min((worker for worker in range(self.partition.workers) if worker not in self.down), key=key)

    def _forget(self, slot: int) -> None:
        self._tables.pop(slot, None)
        if isinstance(self.partition, RequestPartition):
            self.partition.forget(slot)
        heapq.heappush(self._slots, slot)
