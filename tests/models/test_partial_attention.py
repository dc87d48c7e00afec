"""Partial attention against float64, and that a row's bits depend on nothing but its past."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from models.ops.partial_attention import (
    AttentionRule,
    Part,
    attend_previous,
    attend_self,
    batch_invariant,
    divide_work,
    empty_part,
    finish,
    merge,
    reopen,
)


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def draw(rows, kv, group, head_dim, seed=0, size=1.0):
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(rows, kv, group, head_dim, generator=generator) * size
    k, v = torch.randn(2, rows, kv, head_dim, generator=generator)
    return q, k, v


def attention(q, k, v, rule, block, rows=slice(None), rubbish=0.0):
    start, end, _ = rows.indices(len(q))
    padded = [torch.full((k.shape[1], -(-len(k) // 16) * 16, k.shape[2]), rubbish) for _ in range(2)]
    for store, tensor in zip(padded, (k, v), strict=True):
        store[:, : len(k)] = tensor.transpose(0, 1)
    read = lambda lo, hi: tuple(store[:, lo:hi] for store in padded)  # noqa: E731
    previous = attend_previous(q[start:end], start, read, rule, block)
    return finish(merge(previous, attend_self(q[start:end], k[start:end], v[start:end], rule)))


def exact(q, k, v, rule):
    q, k, v = q.double(), k.double(), v.double()
    scores = torch.einsum("rkgd,tkd->rkgt", q, k) * rule.scale
    if rule.soft_cap:
        scores = rule.soft_cap * torch.tanh(scores / rule.soft_cap)
    at = torch.arange(len(q))
    hidden = at[None] > at[:, None]
    if rule.window:
        hidden |= at[None] <= at[:, None] - rule.window
    scores = scores.masked_fill(hidden[:, None, None], -math.inf)
    return torch.einsum("rkgt,tkd->rkgd", scores.softmax(-1), v), scores.logsumexp(-1)


@settings(max_examples=25, deadline=None)
@given(
    rows=st.integers(1, 90),
    kv=st.integers(1, 3),
    group=st.sampled_from([1, 2, 3, 8]),
    head_dim=st.sampled_from([4, 8, 16, 64]),
    window=st.sampled_from([0, 1, 5, 16, 33]),
    soft_cap=st.sampled_from([0.0, 2.0]),
    block=st.sampled_from([16, 32, 64]),
    seed=st.integers(0, 1000),
    data=st.data(),
)
def test_exact_and_bit_for_bit_however_it_is_cut(
    rows, kv, group, head_dim, window, soft_cap, block, seed, data
):
    rule = AttentionRule(head_dim**-0.5, window, soft_cap)
    q, k, v = draw(rows, kv, group, head_dim, seed)
    out, log_sum = attention(q, k, v, rule, block)
    expected, expected_sum = exact(q, k, v, rule)
    torch.testing.assert_close(out.double(), expected, atol=2e-6, rtol=0)
    torch.testing.assert_close(log_sum.double(), expected_sum, atol=5e-6, rtol=1e-6)

    cuts = sorted({0, rows, *data.draw(st.lists(st.integers(0, rows), max_size=4))})
    chunks = [attention(q, k, v, rule, block, slice(a, b))[0] for a, b in pairwise(cuts)]
    assert torch.equal(torch.cat(chunks), out)
    for row in {0, rows // 2, rows - 1}:
        assert torch.equal(attention(q, k, v, rule, block, slice(row, row + 1), 7.0)[0][0], out[row])
    for head in range(kv):
        one = slice(head, head + 1)
        assert torch.equal(attention(q[:, one], k[:, one], v[:, one], rule, block)[0], out[:, one])


@pytest.mark.parametrize(("group", "head_dim"), [(1, 128), (4, 64), (8, 128), (7, 80)])
def test_bits_at_the_real_block_size(group, head_dim):
    rule = AttentionRule(head_dim**-0.5)
    q, k, v = draw(1100, 2, group, head_dim)
    rows = slice(1040, 1100)
    together = attention(q, k, v, rule, 1024, rows)[0]
    for row in (1040, 1047, 1048, 1099):
        assert torch.equal(attention(q, k, v, rule, 1024, slice(row, row + 1))[0][0], together[row - 1040])
    torch.testing.assert_close(together.double(), exact(q, k, v, rule)[0][rows], atol=2e-6, rtol=0)
    assert batch_invariant(2, group, head_dim)


def test_huge_scores_neither_overflow_nor_vanish():
    q, k, v = draw(70, 2, 2, 16, size=1e4)
    out, log_sum = attention(q, k, v, AttentionRule(1.0), 32)
    assert out.isfinite().all()
    assert log_sum.isfinite().all()
    # one key wins: float32 decides between near equals, so compare where float64 sees no tie
    expected, _ = exact(q, k, v, AttentionRule(1.0))
    assert (out - expected).abs().amax(-1).median() < 1e-6


def test_empty_parts_change_no_bit():
    q, k, v = draw(5, 2, 2, 8)
    part = attend_self(q, k, v, AttentionRule(1.0))
    for merged in (merge(part, empty_part(q)), merge(empty_part(q), part)):
        assert all(torch.equal(a, b) for a, b in zip(merged, part, strict=True))
    out, log_sum = finish(merge(empty_part(q), empty_part(q)))
    assert torch.equal(out, torch.zeros_like(q))
    assert (log_sum == -math.inf).all()
    assert torch.equal(reopen(out, log_sum).weight, torch.zeros_like(log_sum))


@settings(max_examples=25, deadline=None)
@given(order=st.permutations(range(6)), seed=st.integers(0, 100))
def test_parts_merge_in_any_order_within_rounding(order, seed):
    q, k, v = draw(6, 1, 1, 8, seed, size=5.0)
    query = q[:1].expand(6, 1, 1, 8)
    each = attend_self(query, k, v, AttentionRule(1.0))
    parts = [Part(*(tensor[i : i + 1] for tensor in each)) for i in order]
    whole = parts[0]
    for part in parts[1:]:
        whole = merge(whole, reopen(*finish(part)))
    weights = torch.softmax((q[0, 0, 0].double() * k[:, 0].double()).sum(-1), 0)
    expected = (weights[:, None] * v[:, 0].double()).sum(0)
    torch.testing.assert_close(finish(whole)[0][0, 0, 0].double(), expected, atol=2e-6, rtol=0)


def test_each_key_is_read_once_and_a_window_reads_no_more_than_it_sees():
    assert [piece[2:] for piece in divide_work(4096, 1, 0)] == [(s, s + 1024) for s in range(0, 4096, 1024)]
    assert [piece[2:] for piece in divide_work(4096, 1, 100)] == [(3984, 4096)]
    assert divide_work(0, 1, 0) == ()
    assert divide_work(50, 1, 1) == ()  # sees itself alone


@pytest.mark.parametrize("wrong", [{"scale": 0.0}, {"scale": math.nan}, {"scale": 1.0, "window": -1}])
def test_a_rule_without_meaning_is_refused(wrong):
    with pytest.raises(ValueError, match="must"):
        AttentionRule(**wrong)
