"""Exact attention over parts of a context, and the rule that combines the parts (spec section 4; arXiv
2405.01814, section 4.2.2).

A `Part` holds, for some tokens, the largest score, the sum of exp(score - largest) and the sum of those
weights times the values. Parts combine in any number without overflow; a part without tokens has -inf as its
largest score and changes nothing, bit for bit.

The invariant that matters: the bits of a row depend on its position, its query and the keys and values before
it, on nothing else. Every row reduces the same super-blocks at the same absolute positions from left to
right, its own token last. What a row reads of a block is widened to whole pages, so the shape of each matrix
product follows from the position alone, and products of several rows or heads are batches of that one shape,
never one larger product: BLAS chooses its kernel by the shape. This holds where a batched product does not
share the work of one item among threads, which one torch thread guarantees; `batch_invariant` tries it out.

Shape legend: R rows at consecutive positions, KV heads of keys and values, G query heads to each of them,
T tokens, hd head dimension.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

BLOCK_TOKENS = 1024
PAGE_TOKENS = 16
"""Reading is widened to this many tokens; also keeps rows of scores at multiples of a vector register."""

Read = Callable[[int, int], tuple[Tensor, Tensor]]
"""Keys and values, (KV, T, hd) each, of the positions from the first number up to before the second. Both
numbers are multiples of `PAGE_TOKENS` in one block. What lies beyond the written tokens must be finite."""


@dataclass(frozen=True)
class AttentionRule:
    """How one layer attends."""

    scale: float
    window: int = 0  # tokens a row sees, itself among them; 0 = all
    soft_cap: float = 0.0  # scores become cap · tanh(score / cap); 0 = they do not

    def __post_init__(self) -> None:
        if not (math.isfinite(self.scale) and self.scale > 0):
            raise ValueError(f"scale is {self.scale}; it must be a positive number.")
        if self.window < 0 or not (math.isfinite(self.soft_cap) and self.soft_cap >= 0):
            raise ValueError(f"window {self.window} and soft_cap {self.soft_cap} must not be negative.")


class Part(NamedTuple):
    """Attention over some tokens, not yet divided by the sum of its weights."""

    largest: Tensor  # (R, KV, G), -inf without tokens
    weight: Tensor  # (R, KV, G)
    total: Tensor  # (R, KV, G, hd)


class Work(NamedTuple):
    """One product: rows [row, row_end) of a span with the keys at positions [key, key_end)."""

    row: int
    row_end: int
    key: int
    key_end: int


def empty_part(q: Tensor) -> Part:
    """The part of no tokens for queries (R, KV, G, hd)."""
    largest = torch.full(q.shape[:-1], -math.inf, dtype=q.dtype, device=q.device)
    return Part(largest, torch.zeros_like(largest), torch.zeros_like(q))


def merge(first: Part, second: Part) -> Part:
    """Both parts as one; the order is the order of rounding."""
    largest = torch.maximum(first.largest, second.largest)
    anchor = largest.clamp_min(torch.finfo(largest.dtype).min)  # two empty parts: no inf - inf
    one, two = (first.largest - anchor).exp_(), (second.largest - anchor).exp_()
    weight = (first.weight * one).addcmul_(second.weight, two)
    total = (first.total * one.unsqueeze(-1)).addcmul_(second.total, two.unsqueeze(-1))
    return Part(largest, weight, total)


def finish(part: Part) -> tuple[Tensor, Tensor]:
    """Attention output (R, KV, G, hd) and log-sum-exp of the scores (R, KV, G); 0 and -inf without tokens."""
    weight = part.weight.clamp_min(torch.finfo(part.weight.dtype).tiny)
    return part.total / weight.unsqueeze(-1), part.largest + part.weight.log()


def reopen(out: Tensor, log_sum: Tensor) -> Part:
    """The part that `finish` gave, for merging with parts computed elsewhere."""
    return Part(log_sum, (log_sum > -math.inf).to(out.dtype), out)


@lru_cache(maxsize=4096)
def divide_work(position: int, rows: int, window: int, block: int = BLOCK_TOKENS) -> tuple[Work, ...]:
    """Products that rows at `position` and after need for the tokens before them, ordered by block.

    Rows share a product only if each of them alone would read the same keys.
    """
    if block % PAGE_TOKENS or block <= 0:
        raise ValueError(f"a block of {block} tokens is not a multiple of {PAGE_TOKENS}.")
    last = position + rows - 1
    work: list[Work] = []
    lowest = max(0, position - window + 1) if window else 0
    for start in range(lowest - lowest % block, last, block):
        group: Work | None = None
        for row in range(rows):
            at = position + row
            seen = max(start, at - window + 1) if window else start
            end = min(at, start + block)
            if seen >= end:
                continue
            key, key_end = seen - seen % PAGE_TOKENS, end + -end % PAGE_TOKENS
            if group and group[1:] == (row, key, key_end):
                group = Work(group.row, row + 1, key, key_end)
                work[-1] = group
            else:
                group = Work(row, row + 1, key, key_end)
                work.append(group)
    return tuple(work)


def attend(q: Tensor, k: Tensor, v: Tensor, work: Work, position: int, rule: AttentionRule) -> Part:
    """One piece of work.

    Args:
        q: queries of its rows, already times the scale, (R, KV, G, hd).
        k, v: (KV, T, hd) of its keys.
        position: of row 0 of the span.
    """
    R, KV, G, hd = q.shape
    T = k.shape[1]
    scores = _scores(q, k)  # (KV, R, G, T)
    if rule.soft_cap:
        scores.div_(rule.soft_cap).tanh_().mul_(rule.soft_cap)
    first, last = position + work.row, position + work.row_end - 1
    if R == 1:  # the usual case, without a mask
        if first < work.key_end:
            scores[..., first - work.key :] = -math.inf
        if rule.window and first - rule.window + 1 > work.key:
            scores[..., : first - rule.window + 1 - work.key] = -math.inf
    elif first < work.key_end or (rule.window and last - rule.window + 1 > work.key):
        at = torch.arange(first, last + 1, device=q.device).unsqueeze(1)
        keys = torch.arange(work.key, work.key_end, device=q.device)
        hidden = keys >= at
        if rule.window:
            hidden |= keys <= at - rule.window
        scores.masked_fill_(hidden.unsqueeze(1), -math.inf)
    largest = scores.amax(-1)
    weights = scores.sub_(largest.unsqueeze(-1)).exp_()
    weight = weights.sum(-1)
    if R == 1:
        total = torch.bmm(weights.view(KV, G, T), v).view(1, KV, G, hd)
        return Part(largest.view(1, KV, G), weight.view(1, KV, G), total)
    total = torch.stack([torch.bmm(weights[h], v[h].expand(R, T, hd)) for h in range(KV)], 1)
    return Part(largest.transpose(0, 1), weight.transpose(0, 1), total)


def attend_previous(
    q: Tensor,
    position: int,
    read: Read,
    rule: AttentionRule,
    block: int = BLOCK_TOKENS,
    *,
    before: Part | None = None,
    work: tuple[Work, ...] | None = None,
) -> Part:
    """Attention of each row over the tokens before it, its own not among them.

    Args:
        q: (R, KV, G, hd) of rows at `position` and after.
        before: what `work` done earlier gave; together with `work`, a later part of `divide_work`.
    """
    scaled = q * rule.scale
    work = divide_work(position, len(q), rule.window, block) if work is None else work
    part = before
    for piece in work:
        k, v = read(piece.key, piece.key_end)
        found = attend(scaled[piece.row : piece.row_end], k, v, piece, position, rule)
        if part is None and len(q) == len(found.total):
            part = found
            continue
        part = empty_part(q) if part is None else part
        if len(found.total) == len(q):
            part = merge(part, found)
        else:
            rows = slice(piece.row, piece.row_end)
            merged = merge(Part(*(tensor[rows] for tensor in part)), found)
            part = Part(*(tensor.clone() for tensor in part)) if part is before else part
            for tensor, values in zip(part, merged, strict=True):
                tensor[rows] = values
    return empty_part(q) if part is None else part


def attend_self(q: Tensor, k: Tensor, v: Tensor, rule: AttentionRule) -> Part:
    """Attention of each row over its own token: k and v are (R, KV, hd)."""
    R, KV, G, hd = q.shape
    # not a batched product: one of a single column goes another way in BLAS when the batch is one
    scores = (q * rule.scale * k.unsqueeze(2)).sum(-1)
    if rule.soft_cap:
        scores.div_(rule.soft_cap).tanh_().mul_(rule.soft_cap)
    return Part(scores, torch.ones_like(scores), v.unsqueeze(2).expand(R, KV, G, hd))


def batch_invariant(heads: int, group: int, head_dim: int, block: int = BLOCK_TOKENS) -> bool:
    """Whether on this machine, with the threads torch has now, rows together give the bits of rows alone."""
    generator = torch.Generator().manual_seed(0)
    rule = AttentionRule(head_dim**-0.5)
    k, v = torch.randn(2, heads, block + PAGE_TOKENS, head_dim, generator=generator)
    q = torch.randn(3, heads, group, head_dim, generator=generator)
    position = block + 2

    def run(rows: slice, kv: slice) -> Tensor:
        part = attend_previous(
            q[rows, kv], position + rows.start, lambda lo, hi: (k[kv, lo:hi], v[kv, lo:hi]), rule, block
        )
        return finish(merge(part, attend_self(q[rows, kv], own[rows, kv], own[rows, kv], rule)))[0]

    own = k[:, position : position + 3].transpose(0, 1)
    whole = run(slice(0, 3), slice(0, heads))
    alone = torch.cat([run(slice(row, row + 1), slice(0, heads)) for row in range(3)])
    apart = torch.cat([run(slice(0, 3), slice(head, head + 1)) for head in range(heads)], 1)
    return torch.equal(whole, alone) and torch.equal(whole, apart)


def _scores(q: Tensor, k: Tensor) -> Tensor:
    """(KV, R, G, T): always products of (G, hd) with (hd, T), however many rows and heads there are."""
    R, KV, _, hd = q.shape
    k_t = k.transpose(1, 2)
    if R == 1:
        return torch.bmm(q[0], k_t).unsqueeze(1)
    return torch.stack([torch.bmm(q[:, h], k_t[h].expand(R, hd, -1)) for h in range(KV)])
