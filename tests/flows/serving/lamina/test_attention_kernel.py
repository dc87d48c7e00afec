"""The compiled kernel against float64, and that a row's bits depend on nothing but its past."""

from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import numpy as np
import pytest
from attention_servers import BLOCK, KV_HEADS, Requests, connect, run, serving
from hypothesis import given, settings
from hypothesis import strategies as st
from numba import njit

from flows.serving.lamina.attention import fused, kernel
from flows.serving.lamina.attention.fused import FusedAttention, is_batch_invariant
from flows.serving.lamina.attention.partition import HeadPartition, SequencePartition
from flows.serving.lamina.attention.store import PageStore
from flows.serving.lamina.rows import PAGE_TOKENS, RowKind, RowTable, Span, TableDelta
from models.ops.partial_attention import AttentionRule


def draw(rows, kv, group, head_dim, seed=0, size=1.0):
    generator = np.random.default_rng(seed)
    q = generator.standard_normal((rows, kv, group, head_dim), dtype=np.float32) * np.float32(size)
    k, v = generator.standard_normal((2, rows, kv, head_dim), dtype=np.float32)
    return q, k, v


def attention(q, k, v, rule, cuts=None, *, seed=0, rubbish=0.0, beside=(), pool=None, store=None):
    """Outputs of one request whose rows come in the chunks between `cuts`, with other requests beside it."""
    rows, kv, group, head_dim = q.shape
    requests = [(q, k, v), *beside]
    pages = -(-rows // PAGE_TOKENS)
    if store is None:
        store = PageStore(1, 2 * len(requests) * pages, kv, head_dim, 2 * PAGE_TOKENS)
    order = np.random.default_rng(seed).permutation(len(requests) * pages).tolist()
    for slot in range(len(requests)):
        store.assign(TableDelta(slot, 0, tuple(order[slot * pages : (slot + 1) * pages])))
    for page in order:
        store.memory.fill(page, rubbish)  # of tokens that no row may see
    computing = FusedAttention(store, [rule], (kv, group, head_dim), pool=pool, threads=2)
    outputs = []
    for start, end in pairwise(cuts or [0, rows]):
        spans = tuple(Span(slot, start, end - start, RowKind.CHUNK) for slot in range(len(requests)))
        layout = computing.layout(RowTable(spans), np.arange(len(spans) * (end - start)))
        queries, keys, values = (
            np.concatenate([request[i][start:end] for request in requests]) for i in range(3)
        )
        begun = computing.begin(0, queries, layout)
        computing.write(0, layout, keys, values)
        outputs.append(computing.finish(0, layout, begun, keys, values)[0][: end - start])
    return np.concatenate(outputs)


def exact(q, k, v, rule, start=0):
    """Of rows from `start` on."""
    q, k, v = (tensor.astype(np.float64) for tensor in (q[start:], k, v))
    scores = np.einsum("rkgd,tkd->rkgt", q, k) * rule.scale
    if rule.soft_cap:
        scores = rule.soft_cap * np.tanh(scores / rule.soft_cap)
    at, keys = np.arange(start, len(k))[:, None], np.arange(len(k))
    hidden = keys > at
    if rule.window:
        hidden |= keys <= at - rule.window
    scores = np.where(hidden[:, None, None], -np.inf, scores)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return np.einsum("rkgt,tkd->rkgd", weights / weights.sum(-1, keepdims=True), v)


@settings(max_examples=25, deadline=None)
@given(
    rows=st.integers(1, 90),
    kv=st.integers(1, 3),
    group=st.sampled_from([1, 2, 3, 4, 5, 8, 16]),
    head_dim=st.sampled_from([1, 7, 8, 16, 40, 64]),
    window=st.sampled_from([0, 1, 5, 16, 33]),
    soft_cap=st.sampled_from([0.0, 2.0]),
    seed=st.integers(0, 1000),
    data=st.data(),
)
def test_exact_and_bit_for_bit_however_it_is_cut(rows, kv, group, head_dim, window, soft_cap, seed, data):
    rule = AttentionRule(head_dim**-0.5, window, soft_cap)
    q, k, v = draw(rows, kv, group, head_dim, seed)
    out = attention(q, k, v, rule)
    np.testing.assert_allclose(out, exact(q, k, v, rule), atol=2e-6, rtol=0)

    cuts = sorted({0, rows, *data.draw(st.lists(st.integers(0, rows), max_size=4))})
    other = draw(rows, kv, group, head_dim, seed + 1)
    for found in (
        attention(q, k, v, rule, list(range(rows + 1)), rubbish=np.nan),
        attention(q, k, v, rule, cuts, seed=seed, beside=[other], rubbish=np.nan),
    ):
        np.testing.assert_array_equal(found.view(np.int32), out.view(np.int32))
    for head in range(kv):
        one = slice(head, head + 1)
        alone = attention(*(np.ascontiguousarray(x[:, one]) for x in (q, k, v)), rule, cuts)
        np.testing.assert_array_equal(alone.view(np.int32), out[:, one].view(np.int32))


@pytest.mark.parametrize(("group", "head_dim"), [(1, 128), (4, 64), (8, 128), (3, 80)])
def test_bits_of_long_contexts(group, head_dim):
    rule = AttentionRule(head_dim**-0.5)
    q, k, v = draw(1100, 2, group, head_dim)
    together = attention(q, k, v, rule)
    parts = attention(q, k, v, rule, [0, 500, 1040, 1041, 1047, *range(1090, 1101)])
    np.testing.assert_array_equal(together.view(np.int32), parts.view(np.int32))
    np.testing.assert_allclose(together[1080:], exact(q, k, v, rule, 1080), atol=2e-6, rtol=0)
    assert is_batch_invariant(group, head_dim)


def test_threads_and_requests_beside_change_no_bit():
    rule = AttentionRule(0.3, window=40)
    q, k, v = draw(70, 3, 4, 16)
    with ThreadPoolExecutor(2) as pool:
        beside = [draw(70, 3, 4, 16, seed) for seed in (1, 2)]
        found = attention(q, k, v, rule, [0, 33, 69, 70], beside=beside, pool=pool)
    np.testing.assert_array_equal(found.view(np.int32), attention(q, k, v, rule).view(np.int32))


def test_huge_scores_neither_overflow_nor_vanish():
    q, k, v = draw(70, 2, 2, 16, size=1e4)
    out = attention(q, k, v, AttentionRule(1.0))
    assert np.isfinite(out).all()
    # one key wins: float32 decides between near equals, so compare where float64 sees no tie
    assert np.median(np.abs(out - exact(q, k, v, AttentionRule(1.0))).max(-1)) < 1e-6


@pytest.mark.parametrize("which", [0, 1, 2], ids=["query", "key", "value"])
def test_nan_is_told_by_those_who_saw_it_and_by_nobody_else(which):
    tensors, rule = draw(40, 1, 4, 8), AttentionRule(0.5, window=10)
    whole = attention(*tensors, rule)
    tensors[which][17] = np.nan
    told = np.isnan(attention(*tensors, rule, [0, 20, 40])).any((1, 2, 3))
    seen = np.arange(40) == 17 if which == 0 else (np.arange(40) >= 17) & (np.arange(40) < 27)
    np.testing.assert_array_equal(told, seen)
    rest = attention(*tensors, rule)[~seen]
    np.testing.assert_array_equal(rest.view(np.int32), whole[~seen].view(np.int32))


@njit
def _apply_exp(x, out):
    for i in range(0, len(x), 16):
        kernel.store(out, i, kernel.exp(kernel.load(x, i)))


@njit
def _apply_tanh(x, out):
    for i in range(0, len(x), 16):
        kernel.store(out, i, kernel.tanh(kernel.load(x, i)))


@pytest.mark.parametrize(
    ("apply", "reference", "low", "high"),
    [(_apply_exp, np.exp, -87, 1), (_apply_tanh, np.tanh, -12, 12)],
    ids=["exp", "tanh"],
)
def test_exp_and_tanh_are_right_to_two_units_in_the_last_place(apply, reference, low, high):
    x = np.concatenate([np.linspace(low, high, 1 << 16), np.linspace(-0.7, 0.7, 1 << 14)]).astype(np.float32)
    found, expected = np.empty_like(x), reference(x.astype(np.float64))
    apply(x, found)
    assert (np.abs(found - expected) <= 2 * np.spacing(np.abs(expected).astype(np.float32))).all()
    odd = np.array([-np.inf, -1e30, np.nan, 0.0] * 4, np.float32)
    found = np.empty_like(odd)
    apply(odd, found)
    np.testing.assert_array_equal(found[:4], reference(odd[:4]))


@pytest.mark.parametrize("workers", [1, 3])
def test_both_ways_of_computing_agree(workers):
    requests, tables = Requests({0: 75, 1: 40}), {0: (2, 3, 9, 4, 10), 1: (7, 5, 6)}
    plans = [[(0, 0, 30), (1, 0, 1)], [(1, 1, 38), (0, 30, 44)], [(0, 74, 1), (1, 39, 1)]]
    partition = SequencePartition(KV_HEADS, workers, BLOCK) if workers > 1 else HeadPartition(KV_HEADS, [1])
    found = []
    for way in ("torch", "fused"):
        with serving(workers, kernel=way) as (_, addresses), connect(addresses, partition) as pool:
            assert pool.batch_invariant
            found.append(run(pool, requests, plans, tables))
    for slot in tables:
        for one, other in zip(found[0][slot], found[1][slot], strict=True):
            np.testing.assert_allclose(one, other, atol=2e-6, rtol=0)


def test_the_self_check_notices_a_kernel_that_looks_at_its_neighbours(monkeypatch):
    kernels = kernel.compile_kernels()

    def finish(*arguments):
        kernels.finish(*arguments)
        arguments[-2][:] *= np.float32(
            1 + 1e-7 * (len(arguments[2]) > 1)
        )  # the output, by the number of rows

    monkeypatch.setattr(fused, "compile_kernels", lambda: kernels._replace(finish=finish))
    assert is_batch_invariant.__wrapped__(2, 8) is False


def test_without_a_folder_for_the_cache_it_is_compiled_all_the_same(monkeypatch):
    def refuse(signature, *, nogil, cache=False):
        if cache:
            raise RuntimeError("cannot cache function: no locator available")
        return njit(signature, nogil=nogil)

    monkeypatch.setattr(kernel, "njit", refuse)
    twice = kernel._compile("int64(int64)", lambda x: 2 * x)
    assert twice(21) == 42
