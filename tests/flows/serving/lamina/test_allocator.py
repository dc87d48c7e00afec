"""Pages are never lost and never in two hands, whatever is asked; runs where there are any."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flows.errors import ConfigError, DataError, ResourceError
from flows.serving.lamina.attention.allocator import OutOfPages, PageAllocator
from flows.serving.lamina.attention.partition import (
    HeadPartition,
    SequencePartition,
    imbalance,
    share_heads,
    slowdown,
    spread_requests,
)
from flows.serving.lamina.attention.store import PageStore
from flows.serving.lamina.rows import RowKind, RowTable, Span, TableDelta


@settings(max_examples=60, deadline=None)
@given(
    pages=st.integers(1, 40), steps=st.lists(st.tuples(st.integers(0, 4), st.integers(0, 12)), max_size=40)
)
def test_invariants_hold_and_the_store_agrees(pages, steps):
    allocator, store = PageAllocator(pages, 64), PageStore(1, pages, 1, 1, 64, debug=True)
    for iteration, (slot, count) in enumerate(steps):
        before = allocator.table(slot)
        if count == 0:
            released = allocator.release(slot, iteration)
            assert released == before
            store.free(slot)
        else:
            try:
                given_pages = allocator.grow(slot, count)
            except OutOfPages:
                assert count > allocator.free
                assert allocator.table(slot) == before
            else:
                assert len(given_pages) == count
                assert allocator.table(slot) == before + given_pages
                store.assign(TableDelta(slot, len(before), given_pages))
                store.assign(TableDelta(slot, len(before), given_pages))
        allocator.check()
        store.check()
        assert len(store.owners) == allocator.used
        allocator.end_iteration(iteration - 2)
    for slot in range(5):
        allocator.release(slot, 10**6)
    allocator.end_iteration(10**6)
    allocator.check()
    assert allocator.free == pages


def test_a_freed_page_waits_for_the_iterations_that_mention_it():
    allocator = PageAllocator(4, 64)
    allocator.grow(1, 4)
    allocator.release(1, iteration=7)
    assert (allocator.free, allocator.fenced) == (0, 4)
    assert allocator.end_iteration(6) == 0
    with pytest.raises(OutOfPages, match="4 more when the iterations under way have ended"):
        allocator.grow(2, 1)
    assert allocator.end_iteration(7) == 4
    assert len(allocator.grow(2, 1)) == 1


def test_blocks_are_runs_and_growth_continues_them():
    allocator = PageAllocator(16, 64)  # four arenas of four pages
    assert allocator.grow(1, 6) == (0, 1, 2, 3, 4, 5)
    assert allocator.grow(2, 2) == (8, 9)  # an arena of its own, so that it can grow
    assert allocator.grow(1, 2) == (6, 7)
    assert allocator.grow(2, 2) == (10, 11)
    allocator.release(1, 0)
    allocator.end_iteration(0)
    assert allocator.grow(3, 4) == (0, 1, 2, 3)


def test_a_byte_budget_is_kept():
    allocator = PageAllocator.within(1_000_000, layers=2, kv_heads=2, head_dim=8, block=64)
    store = PageStore(2, allocator.pages, 2, 8, 64)
    assert 900_000 < store.bytes <= 1_000_000
    with pytest.raises(ResourceError, match="less than one block"):
        PageAllocator.within(1000, 2, 2, 8)


def test_heads_follow_the_weights():
    assert share_heads(8, [1, 1, 1, 1]) == [2, 2, 2, 2]
    assert share_heads(8, [3, 1]) == [6, 2]
    assert share_heads(5, [100, 1, 1]) == [3, 1, 1]
    assert slowdown([6, 2], [3, 1]) == 1
    assert slowdown([4, 4], [3, 1]) == 2
    partition = HeadPartition(8, [2, 1, 1])
    assert [partition.kv_heads(j) for j in range(3)] == [slice(0, 4), slice(4, 6), slice(6, 8)]
    with pytest.raises(ConfigError, match="cannot be shared among 3"):
        HeadPartition(2, [1, 1, 1])
    with pytest.raises(ConfigError, match="positive"):
        HeadPartition(8, [1, float("nan")])


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(1, 1e9), min_size=1, max_size=12), st.integers(1, 4))
def test_greedy_placement_stays_within_its_bound(costs, workers):
    costs = dict(enumerate(costs))
    placed = spread_requests(costs, [1.0] * workers)
    assert placed.keys() == costs.keys()
    loads = [sum(costs[slot] for slot in costs if placed[slot] == j) for j in range(workers)]
    best = max(max(costs.values()), sum(costs.values()) / workers)
    assert max(loads) <= (4 / 3 + 1) * best  # LPT: 4/3 of the optimum, which is at least `best`
    assert imbalance(costs, placed, [1.0] * workers) >= 1 - 1e-9


def test_every_token_of_a_sequence_has_one_owner():
    partition = SequencePartition(2, 3, block=32)
    table = RowTable((Span(1, 20, 60, RowKind.CHUNK),), (TableDelta(1, 1, (9, 0, 1, 5)),))
    shares = partition.split(table)
    assert sorted(row for share in shares for row in share.kv_rows.tolist()) == list(range(60))
    entries = sorted((delta.first, delta.pages) for share in shares for delta in share.table.deltas)
    assert entries == [(1, (9,)), (2, (0, 1)), (4, (5,))]


def test_half_a_block_is_not_silently_left_out():
    store = PageStore(1, 8, 1, 1, 64)
    store.assign(TableDelta(1, 4, (0, 1)))
    assert store.holds(1, 64, 96)
    assert not store.holds(1, 0, 64)
    with pytest.raises(DataError, match="2 of 4 pages for positions 64 to 127"):
        store.holds(1, 64, 128)
