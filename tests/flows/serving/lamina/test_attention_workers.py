"""Attention workers behind real sockets: every split gives the numbers of the whole."""

import numpy as np
import pytest
from attention_servers import BLOCK, KV_HEADS, LAYERS, Requests, connect, run, serving

from flows.serving.lamina.attention.partition import HeadPartition, RequestPartition, SequencePartition

LENGTHS = {3: 75, 0: 40, 7: 17}
TABLES = {3: (2, 3, 9, 4, 10), 0: (7, 5, 6), 7: (20, 21)}  # runs, and pages that have to be gathered
ALONE = [[(slot, 0, length)] for slot, length in LENGTHS.items()]
MIXED = [
    [(3, 0, 30), (7, 0, 1)],
    [(7, 1, 16), (0, 0, 7), (3, 30, 1)],
    [(3, 31, 40)],
    *([(0, at, 1), (3, 64 + at, 1)] for at in range(7, 11)),
    [(0, 11, 29)],
]


@pytest.fixture(scope="module")
def workers():
    with serving(3) as (_, addresses):
        yield addresses


@pytest.fixture(scope="module")
def requests():
    return Requests(LENGTHS)


_epochs = iter(range(1, 1000))


@pytest.fixture(scope="module")
def one_worker(workers, requests):
    with connect(workers[:1], HeadPartition(KV_HEADS, [1]), epoch=next(_epochs)) as pool:
        return run(pool, requests, ALONE, TABLES)


def assert_same_bits(found, expected):
    for slot in LENGTHS:
        for layer in range(len(LAYERS)):
            np.testing.assert_array_equal(found[slot][layer], expected[slot][layer])


def test_one_worker_is_exact(one_worker, requests):
    for slot in LENGTHS:
        for layer in range(len(LAYERS)):
            np.testing.assert_allclose(
                one_worker[slot][layer], requests.expected(slot, layer), atol=2e-6, rtol=0
            )


@pytest.mark.parametrize("weights", [[1], [1, 1], [3, 1], [1, 1, 1], [1, 2, 1]])
def test_head_level_splits_batches_and_chunks_change_no_bit(weights, workers, requests, one_worker):
    partition = HeadPartition(KV_HEADS, weights)
    with connect(workers[: len(weights)], partition, epoch=next(_epochs)) as pool:
        assert_same_bits(run(pool, requests, MIXED, TABLES), one_worker)


def test_request_level_changes_no_bit(workers, requests, one_worker):
    partition = RequestPartition(KV_HEADS, 3)
    for slot, worker in ((3, 2), (0, 0), (7, 2)):
        partition.place(slot, worker)
    with connect(workers, partition, epoch=next(_epochs)) as pool:
        assert_same_bits(run(pool, requests, MIXED, TABLES), one_worker)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_sequence_level_agrees_within_rounding(count, workers, requests, one_worker):
    partition = SequencePartition(KV_HEADS, count, BLOCK)
    with connect(workers[:count], partition, epoch=next(_epochs)) as pool:
        found = run(pool, requests, MIXED, TABLES)
    for slot in LENGTHS:
        for layer in range(len(LAYERS)):
            np.testing.assert_allclose(found[slot][layer], one_worker[slot][layer], atol=2e-6, rtol=0)
