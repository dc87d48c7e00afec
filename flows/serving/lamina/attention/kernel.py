"""Attention over pages of keys and values, compiled for the processor at hand (spec sections 4 and 13).

Every query takes its tokens from left to right, page by page, with a running maximum (online softmax, arXiv
1805.02867), its own token last. A page is 16 tokens and a vector 16 numbers. Keys lie transposed: a vector
of scores adds up over the head dimension. Values lie token by token: the output adds up over the tokens.
A key or value comes from memory once for all queries of a step that see it, and pages are asked for before
they are used.

The invariant that matters: what is done with a query is one sequence of vector operations that follows from
its position alone. Loops over requests, heads and rows only say when. So the bits of a row do not depend on
the rows beside it, on chunks, workers or threads. Hence vectors are written out here, in the compiler's own
vector type, which becomes one, two or four registers: no optimiser chooses the order of rounding, and no
fast-math flag is set.

`compile_kernels` is for Python; all else can only be called from compiled functions. This is one file because
the cache of compiled functions on disk looks at the age of the file of a function, not of what it calls.

Shape legend: R rows, KV heads of keys and values, G query heads to each of them, hd head dimension. All
arrays are flat.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from typing import Any, NamedTuple

import numpy as np
from llvmlite import ir
from numba import float32, float64, int64, njit, types
from numba.core import cgutils
from numba.extending import intrinsic, models, register_model

LANES = 16
FLOAT, INT = ir.FloatType(), ir.IntType(32)
VECTOR, BITS = ir.VectorType(FLOAT, LANES), ir.VectorType(INT, LANES)


class VectorType(types.Type):  # type: ignore[misc]
    """The type of a vector, as numba sees it."""

    def __init__(self) -> None:
        super().__init__("float32x16")


@register_model(VectorType)
class _VectorModel(models.PrimitiveModel):  # type: ignore[misc]
    def __init__(self, manager: Any, kind: VectorType) -> None:
        super().__init__(manager, kind, VECTOR)


vector = VectorType()


# --- pieces of the compiler's language


def _constant(value: float) -> Any:
    return ir.Constant(VECTOR, [ir.Constant(FLOAT, value)] * LANES)


def _spread(builder: Any, value: Any) -> Any:
    kind = ir.VectorType(value.type, LANES)
    one = builder.insert_element(ir.Constant(kind, ir.Undefined), value, INT(0))
    return builder.shuffle_vector(one, one, ir.Constant(BITS, [INT(0)] * LANES))


def _multiply_add(builder: Any, a: Any, b: Any, c: Any) -> Any:
    kind = ir.FunctionType(VECTOR, [VECTOR] * 3)
    return builder.call(
        cgutils.get_or_insert_function(builder.module, kind, "llvm.fmuladd.v16f32"), [a, b, c]
    )


def _polynomial(builder: Any, x: Any, coefficients: tuple[float, ...]) -> Any:
    total = _constant(coefficients[-1])
    for coefficient in coefficients[-2::-1]:
        total = _multiply_add(builder, total, x, _constant(coefficient))
    return total


def _larger(builder: Any, a: Any, b: Any) -> Any:
    return builder.select(builder.fcmp_ordered(">", a, b), a, b)


def _data(context: Any, builder: Any, kind: Any, array: Any) -> Any:
    return context.make_array(kind)(context, builder, array).data


def _at(builder: Any, data: Any, index: Any, kind: Any) -> Any:
    return builder.bitcast(builder.gep(data, [index]), kind.as_pointer())


def _load(builder: Any, data: Any, index: Any) -> Any:
    value = builder.load(_at(builder, data, index, VECTOR))
    value.align = 4
    return value


def _store(builder: Any, data: Any, index: Any, value: Any) -> None:
    builder.store(value, _at(builder, data, index, VECTOR)).align = 4


def _prefetch(builder: Any, data: Any, index: Any) -> None:
    """To be read, into the second cache: the first has too few slots for all that is on its way."""
    pointer = _at(builder, data, index, ir.IntType(8))
    kind = ir.FunctionType(ir.VoidType(), [pointer.type, INT, INT, INT])
    function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
    builder.call(function, [pointer, INT(0), INT(2), INT(1)])


# --- memory


@intrinsic  # type: ignore[untyped-decorator]
def load(typing: Any, array: Any, index: Any) -> Any:
    """Elements index to index + 15 of a flat float32 array; nothing is checked."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return _load(builder, _data(context, builder, signature.args[0], arguments[0]), arguments[1])

    return vector(array, types.intp), generate


@intrinsic  # type: ignore[untyped-decorator]
def store(typing: Any, array: Any, index: Any, value: Any) -> Any:
    """The reverse of `load`."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        _store(builder, _data(context, builder, signature.args[0], arguments[0]), arguments[1], arguments[2])
        return context.get_dummy_value()

    return types.void(array, types.intp, vector), generate


@intrinsic  # type: ignore[untyped-decorator]
def broadcast(typing: Any, array: Any, index: Any) -> Any:
    """16 times one element of a flat float32 array."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        data = _data(context, builder, signature.args[0], arguments[0])
        return _spread(builder, builder.load(builder.gep(data, [arguments[1]])))

    return vector(array, types.intp), generate


@intrinsic  # type: ignore[untyped-decorator]
def prefetch(typing: Any, array: Any, index: Any) -> Any:
    """Ask for the cache line of an element; it need not exist."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        _prefetch(builder, _data(context, builder, signature.args[0], arguments[0]), arguments[1])
        return context.get_dummy_value()

    return types.void(array, types.intp), generate


@intrinsic  # type: ignore[untyped-decorator]
def accumulate(
    typing: Any,
    totals: Any,
    at: Any,
    weights: Any,
    values: Any,
    first: Any,
    width: Any,
    ahead: Any,
    lines: Any,
) -> Any:
    """totals[at : at + width] += weights · values, which are (16, width) at `first`, one row after another.

    For each 16 columns, `lines` cache lines of `values` from `ahead` on are asked for.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        totals, at, weights, values, first, width, ahead, lines = arguments
        totals = _data(context, builder, signature.args[0], totals)
        values = _data(context, builder, signature.args[3], values)
        spreads = [
            builder.shuffle_vector(weights, weights, ir.Constant(BITS, [INT(n)] * LANES))
            for n in range(LANES)
        ]
        intp, step = at.type, at.type(LANES)
        with cgutils.for_range_slice(builder, intp(0), width, step, intp) as (column, _):
            total = _load(builder, totals, builder.add(at, column))
            offset = builder.add(first, column)
            for spread in spreads:
                total = _multiply_add(builder, spread, _load(builder, values, offset), total)
                offset = builder.add(offset, width)
            _store(builder, totals, builder.add(at, column), total)
            asked = builder.add(ahead, builder.mul(column, lines))
            with cgutils.for_range(builder, lines) as loop:
                _prefetch(builder, values, builder.add(asked, builder.mul(loop.index, step)))
        return context.get_dummy_value()

    integers = [types.intp] * 2
    return types.void(totals, types.intp, vector, values, *integers, *integers), generate


# --- lane by lane


@intrinsic  # type: ignore[untyped-decorator]
def splat(typing: Any, value: Any) -> Any:
    """16 times the same number."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return _spread(builder, arguments[0])

    return vector(types.float32), generate


@intrinsic  # type: ignore[untyped-decorator]
def multiply_add(typing: Any, a: Any, b: Any, c: Any) -> Any:
    """a · b + c, with one rounding where the processor can."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return _multiply_add(builder, *arguments)

    return vector(vector, vector, vector), generate


def _lane_by_lane(count: int, operation: Callable[..., Any]) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return operation(builder, *arguments)

    result = vector(*[vector] * count)
    if count == 1:

        @intrinsic  # type: ignore[untyped-decorator]
        def one(typing: Any, a: Any) -> Any:
            return result, generate

        return one

    @intrinsic  # type: ignore[untyped-decorator]
    def two(typing: Any, a: Any, b: Any) -> Any:
        return result, generate

    return two


@intrinsic  # type: ignore[untyped-decorator]
def hide_outside(typing: Any, value: Any, first: Any, end: Any) -> Any:
    """-inf in the lanes outside of [first, end)."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        value, first, end = arguments
        lanes = ir.Constant(BITS, [INT(lane) for lane in range(LANES)])
        first, end = (_spread(builder, builder.trunc(bound, INT)) for bound in (first, end))
        inside = builder.and_(builder.icmp_signed(">=", lanes, first), builder.icmp_signed("<", lanes, end))
        return builder.select(inside, value, _constant(float("-inf")))

    return vector(vector, types.int64, types.int64), generate


# exp(x) = 2^n · exp(r) with r = x - n · ln 2 within ± ln 2 / 2, and exp(r) = 1 + r + r² · polynomial(r), a
# minimax fit with a relative error of 3e-9. ln 2 is in two parts, so that n times the first is exact.
_EXP = (
    0.49999993346399724,
    0.16666519129339538,
    0.04166840572729394,
    0.008368898766095811,
    0.001381422196084798,
)
_LOG2_E, _LN2_HIGH, _LN2_LOW = 1.4426950408889634, 0.693359375, -2.12194440054690e-4
_LOWEST = -87.0  # exp of less, below 1.6e-38, counts as 0: no number that is not normal
_ROUND = 12582912.0  # 1.5 · 2^23: n + f plus this is rounded to a whole n, which then is in the lowest bits


def _exp(builder: Any, x: Any) -> Any:
    vanishes = builder.fcmp_ordered("<", x, _constant(_LOWEST))
    x = builder.select(vanishes, _constant(_LOWEST), x)
    shifted = builder.fadd(builder.fmul(x, _constant(_LOG2_E)), _constant(_ROUND))
    n = builder.fsub(shifted, _constant(_ROUND))
    r = _multiply_add(builder, n, _constant(-_LN2_HIGH), x)
    r = _multiply_add(builder, n, _constant(-_LN2_LOW), r)
    power = _multiply_add(builder, builder.fmul(r, r), _polynomial(builder, r, _EXP), r)
    power = builder.fadd(power, _constant(1.0))
    exponent = builder.shl(builder.bitcast(shifted, BITS), ir.Constant(BITS, [INT(23)] * LANES))
    scaled = builder.bitcast(builder.add(builder.bitcast(power, BITS), exponent), VECTOR)
    return builder.select(vanishes, _constant(0.0), scaled)


# tanh(y) = y + y · z · polynomial(z) with z = y², relative error 4e-9, up to 0.625;
# 1 - 2 / (exp(2 |y|) + 1) beyond.
_TANH = (
    -0.33333283925128465,
    0.13331491282045127,
    -0.05374349762784509,
    0.020650585715436168,
    -0.005717043193329314,
)
_TANH_SPLIT, _TANH_IS_ONE = 0.625, 10.0


def _tanh(builder: Any, y: Any) -> Any:
    z, one, two = builder.fmul(y, y), _constant(1.0), _constant(2.0)
    small = _multiply_add(builder, builder.fmul(y, z), _polynomial(builder, z, _TANH), y)
    negative = builder.fcmp_ordered("<", y, _constant(0.0))
    size = builder.select(negative, builder.fneg(y), y)
    beyond = builder.fcmp_ordered(">", size, _constant(_TANH_IS_ONE))
    power = _exp(builder, builder.fmul(two, builder.select(beyond, _constant(_TANH_IS_ONE), size)))
    large = builder.fsub(one, builder.fdiv(two, builder.fadd(power, one)))
    large = builder.select(negative, builder.fneg(large), large)
    return builder.select(builder.fcmp_ordered("<", size, _constant(_TANH_SPLIT)), small, large)


add = _lane_by_lane(2, lambda builder, a, b: builder.fadd(a, b))
multiply = _lane_by_lane(2, lambda builder, a, b: builder.fmul(a, b))
divide = _lane_by_lane(2, lambda builder, a, b: builder.fdiv(a, b))
exp = _lane_by_lane(1, _exp)  # of at most 80; 0 for -inf, NaN for NaN
tanh = _lane_by_lane(1, _tanh)


# --- all lanes to one number


def _reduction(combine: Callable[[Any, Any, Any], Any]) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        found, width = arguments[0], LANES
        while width > 1:  # one half with the other: this tree is the order of rounding
            width //= 2
            halves = [
                builder.shuffle_vector(
                    found,
                    found,
                    ir.Constant(ir.VectorType(INT, width), [INT(start + lane) for lane in range(width)]),
                )
                for start in (0, width)
            ]
            found = combine(builder, *halves)
        return builder.extract_element(found, INT(0))

    @intrinsic  # type: ignore[untyped-decorator]
    def reduce(typing: Any, value: Any) -> Any:
        return types.float32(vector), generate

    return reduce


largest_of = _reduction(_larger)
sum_of = _reduction(lambda builder, a, b: builder.fadd(a, b))


@intrinsic  # type: ignore[untyped-decorator]
def first_of(typing: Any, value: Any) -> Any:
    """The number in lane 0."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.extract_element(arguments[0], INT(0))

    return types.float32(vector), generate


# --- attention

# The state of a query: sums of weighted values (hd, in whole vectors) | sums of weights, one per lane |
# its largest score | room for 16 scores.
_TOGETHER = 4  # queries that share a load of keys
_TILE = 64  # queries of a prompt chunk that use a page while it is in a near cache


def state_floats(head_dim: int) -> int:
    """Of one query."""
    return -(-head_dim // LANES) * LANES + 3 * LANES


@njit(forceinline=True)
def _capped(scores, soft_cap):  # type: ignore[no-untyped-def]
    if soft_cap > 0:
        return multiply(tanh(multiply(scores, splat(float32(1.0) / soft_cap))), splat(soft_cap))
    return scores


@njit(forceinline=True)
def _weigh(state, at, padded, scale, soft_cap, first, end):  # type: ignore[no-untyped-def]
    """Make weights of the products of a query with the keys of a page; tokens outside [first, end) get 0."""
    w_at = at + padded
    scores = _capped(multiply(load(state, w_at + 2 * LANES), splat(scale)), soft_cap)
    if end - first < LANES:
        scores = hide_outside(scores, first, end)
    before, largest = state[w_at + LANES], largest_of(scores)
    if largest > before:
        fade = exp(splat(before - largest))  # 0 for the first page; otherwise skipping it would be times 1
        for column in range(0, padded, LANES):
            store(state, at + column, multiply(load(state, at + column), fade))
        store(state, w_at, multiply(load(state, w_at), fade))
        state[w_at + LANES] = largest
    else:
        largest = before
    weights = exp(add(scores, splat(-largest)))
    store(state, w_at, add(load(state, w_at), weights))
    store(state, w_at + 2 * LANES, weights)


@njit(forceinline=True)
def _take(state, at, padded, first, end, values, v_at, head_dim, ahead, lines):  # type: ignore[no-untyped-def]
    """Add the values of tokens [first, end) of a page to a query, by the weights in its state."""
    w_at = at + padded + 2 * LANES
    if end - first == LANES:
        accumulate(state, at, load(state, w_at), values, v_at, head_dim, ahead, lines)
        return
    for column in range(0, padded, LANES):  # in the same order; hidden values are not touched, not even by 0
        total = load(state, at + column)
        for token in range(first, end):
            value = load(values, v_at + token * head_dim + column)
            total = multiply_add(broadcast(state, w_at + token), value, total)
        store(state, at + column, total)


@njit(forceinline=True)
def _score(q, a, b, c, d, keys, k_at, head_dim, state, s_a, s_b, s_c, s_d, ahead, lines):  # type: ignore[no-untyped-def]
    """Products of queries a to d with the 16 keys (hd, 16) at `k_at`; even and odd dimensions add up apart.

    For each two dimensions, `lines` cache lines of keys from `ahead` on are asked for.
    """
    a0 = b0 = c0 = d0 = a1 = b1 = c1 = d1 = splat(float32(0.0))
    for i in range(0, head_dim - 1, 2):
        even, odd = load(keys, k_at + i * LANES), load(keys, k_at + (i + 1) * LANES)
        for _ in range(lines):
            prefetch(keys, ahead)
            ahead += LANES
        a0, a1 = multiply_add(broadcast(q, a + i), even, a0), multiply_add(broadcast(q, a + i + 1), odd, a1)
        b0, b1 = multiply_add(broadcast(q, b + i), even, b0), multiply_add(broadcast(q, b + i + 1), odd, b1)
        c0, c1 = multiply_add(broadcast(q, c + i), even, c0), multiply_add(broadcast(q, c + i + 1), odd, c1)
        d0, d1 = multiply_add(broadcast(q, d + i), even, d0), multiply_add(broadcast(q, d + i + 1), odd, d1)
    if head_dim % 2:
        even, i = load(keys, k_at + (head_dim - 1) * LANES), head_dim - 1
        a0, b0 = multiply_add(broadcast(q, a + i), even, a0), multiply_add(broadcast(q, b + i), even, b0)
        c0, d0 = multiply_add(broadcast(q, c + i), even, c0), multiply_add(broadcast(q, d + i), even, d0)
    store(state, s_a, add(a0, a1))
    store(state, s_b, add(b0, b1))
    store(state, s_c, add(c0, c1))
    store(state, s_d, add(d0, d1))


@njit(forceinline=True)
def _score_one(q, a, keys, k_at, head_dim, state, s_a, ahead, lines):  # type: ignore[no-untyped-def]
    """`_score` of one query: the same operations."""
    a0 = a1 = splat(float32(0.0))
    for i in range(0, head_dim - 1, 2):
        for _ in range(lines):
            prefetch(keys, ahead)
            ahead += LANES
        a0 = multiply_add(broadcast(q, a + i), load(keys, k_at + i * LANES), a0)
        a1 = multiply_add(broadcast(q, a + i + 1), load(keys, k_at + (i + 1) * LANES), a1)
    if head_dim % 2:
        a0 = multiply_add(broadcast(q, a + head_dim - 1), load(keys, k_at + (head_dim - 1) * LANES), a0)
    store(state, s_a, add(a0, a1))


@njit(forceinline=True)
def _visible(position, entry, window):  # type: ignore[no-untyped-def]
    """Tokens [first, end) of a page that a row sees."""
    first = max(0, position - window + 1 - entry * LANES) if window else 0
    return first, min(LANES, position - entry * LANES)


def _attend(state, q, keys, values, spans, ranges, tables, items, sizes, window, scale, soft_cap):  # type: ignore[no-untyped-def]
    """Take the pages [ranges[i, 0], ranges[i, 1]) of span i into the states of its queries.

    Args:
        state: of all queries (R, KV, G), see above.
        q: (R, KV, G, hd).
        keys, values: of one layer, (arenas, KV, pages of an arena, hd, 16) and (…, 16, hd), each with 16
            further numbers at the end that may be read.
        spans: first row, position, rows, each (spans, 3).
        tables: pages of each span, (spans, entries); a negative one is not here.
        items: (span, head) pairs to do, in this order.
        sizes: KV, G, hd, pages of an arena.
    """
    KV, G, head_dim, per_arena = sizes[0], sizes[1], sizes[2], sizes[3]
    scale, soft_cap = float32(scale), float32(soft_cap)
    padded = (head_dim + LANES - 1) // LANES * LANES
    stride, columns, page_floats = padded + 3 * LANES, padded // LANES, LANES * head_dim
    room = padded + 2 * LANES
    tile = max(1, _TILE // G)
    for item in range(len(items)):
        span, head = items[item, 0], items[item, 1]
        row0, position, rows = spans[span, 0], spans[span, 1], spans[span, 2]
        first_page, end_page = ranges[span, 0], ranges[span, 1]
        for tile_start in range(0, rows, tile):
            tile_end = min(rows, tile_start + tile)
            for entry in range(first_page, end_page):
                page = tables[span, entry]
                row = max(tile_start, entry * LANES + 1 - position)
                row_end = tile_end
                if window:
                    row_end = min(row_end, entry * LANES + LANES - 1 + window - position)
                if page < 0 or row >= row_end:
                    continue
                at = ((page // per_arena * KV + head) * per_arena + page % per_arena) * page_floats
                following = max(tables[span, min(entry + 2, end_page - 1)], 0)
                ahead = (
                    (following // per_arena * KV + head) * per_arena + following % per_arena
                ) * page_floats
                # the page after the next is asked for bit by bit, shared among the queries of this one
                query, last = row * G, row_end * G
                k_lines = 2 if last - query <= _TOGETHER else 1
                v_lines = max(1, LANES // (last - query))
                k_ahead = v_ahead = ahead
                while query < last:
                    together = _TOGETHER if query + _TOGETHER <= last else 1
                    a = ((row0 + query // G) * KV + head) * G + query % G
                    b = c = d = a
                    if together == 1:
                        _score_one(
                            q, a * head_dim, keys, at, head_dim, state, a * stride + room, k_ahead, k_lines
                        )
                    else:
                        b = ((row0 + (query + 1) // G) * KV + head) * G + (query + 1) % G
                        c = ((row0 + (query + 2) // G) * KV + head) * G + (query + 2) % G
                        d = ((row0 + (query + 3) // G) * KV + head) * G + (query + 3) % G
                        _score(
                            q, a * head_dim, b * head_dim, c * head_dim, d * head_dim, keys, at, head_dim,
                            state, a * stride + room, b * stride + room, c * stride + room, d * stride + room,
                            k_ahead, k_lines,
                        )  # fmt: skip
                    k_ahead += head_dim // 2 * k_lines * LANES
                    if k_ahead >= ahead + page_floats:
                        k_lines = 0
                    for j in range(together):  # apart from the next loop, so that these can overlap
                        chosen = a if j == 0 else b if j == 1 else c if j == 2 else d
                        first, end = _visible(position + (query + j) // G, entry, window)
                        if first < end:  # a window of one token is its own
                            _weigh(state, chosen * stride, padded, scale, soft_cap, first, end)
                    for j in range(together):
                        chosen = a if j == 0 else b if j == 1 else c if j == 2 else d
                        first, end = _visible(position + (query + j) // G, entry, window)
                        _take(
                            state, chosen * stride, padded, first, end, values, at, head_dim, v_ahead, v_lines
                        )
                        v_ahead += columns * v_lines * LANES
                        if v_ahead >= ahead + page_floats:
                            v_lines = 0
                    query += together


def _begin(state, stride):  # type: ignore[no-untyped-def]
    """States of queries that have seen nothing."""
    for at in range(0, len(state), stride):
        for i in range(stride):
            state[at + i] = 0.0
        state[at + stride - 2 * LANES] = -np.inf


def _finish(state, q, own, k, v, sizes, scale, soft_cap, out, log_sums):  # type: ignore[no-untyped-def]
    """Add the own token of each row, and divide.

    Args:
        own: of each row, which row of k and v is its own; negative if that is on another worker.
        k, v: (rows, KV, hd).
        out: (R, KV, G, hd).
        log_sums: log-sum-exp of the scores, (R, KV, G), or empty if nobody wants it.
    """
    KV, G, head_dim = sizes[0], sizes[1], sizes[2]
    scale, soft_cap = float32(scale), float32(soft_cap)
    padded = (head_dim + LANES - 1) // LANES * LANES
    stride, vectors = padded + 3 * LANES, head_dim // LANES * LANES
    for query in range(len(own) * KV * G):
        row, head = query // (KV * G), query // G % KV
        q_at, at = query * head_dim, query * stride
        weight, largest = sum_of(load(state, at + padded)), state[at + padded + LANES]
        fade = own_weight = float32(0.0)
        kv_at = (own[row] * KV + head) * head_dim
        if own[row] >= 0:
            products = splat(float32(0.0))
            for i in range(0, vectors, LANES):
                products = multiply_add(load(q, q_at + i), load(k, kv_at + i), products)
            score = sum_of(products)
            for i in range(vectors, head_dim):
                score += q[q_at + i] * k[kv_at + i]
            score = first_of(_capped(splat(score * scale), soft_cap))
            top = score if score > largest else largest
            fade, own_weight = first_of(exp(splat(largest - top))), first_of(exp(splat(score - top)))
            weight, largest = weight * fade + own_weight, top
            for i in range(0, vectors, LANES):
                total = multiply_add(
                    load(v, kv_at + i), splat(own_weight), multiply(load(state, at + i), splat(fade))
                )
                store(out, q_at + i, divide(total, splat(weight)))
            for i in range(vectors, head_dim):
                out[q_at + i] = (state[at + i] * fade + v[kv_at + i] * own_weight) / weight
        else:
            divisor = float32(1.0) if weight == 0 else weight  # nothing seen is 0
            for i in range(head_dim):
                out[q_at + i] = state[at + i] / divisor
        if len(log_sums):
            log_sums[query] = largest + math.log(weight) if weight > 0 or weight != weight else -np.inf


def _write(keys, values, places, k, v, sizes):  # type: ignore[no-untyped-def]
    """Keys and values (rows, KV, hd) to their pages; places: page and token in it, (rows, 2)."""
    KV, head_dim, per_arena = sizes[0], sizes[2], sizes[3]
    for row in range(len(places)):
        page, token = places[row, 0], places[row, 1]
        for head in range(KV):
            at = ((page // per_arena * KV + head) * per_arena + page % per_arena) * LANES * head_dim
            first = (row * KV + head) * head_dim
            for i in range(head_dim):
                keys[at + i * LANES + token] = k[first + i]
                values[at + token * head_dim + i] = v[first + i]


# --- for Python


class Kernels(NamedTuple):
    """The compiled functions; while one runs, other threads may."""

    begin: Callable[..., None]
    attend: Callable[..., None]
    finish: Callable[..., None]
    write: Callable[..., None]


@cache
def compile_kernels() -> Kernels:
    """Compile, which takes seconds once on a machine, or load what was compiled.

    The cache is beside this file or in the user's cache folder (or NUMBA_CACHE_DIR); without one that can be
    written to, every process compiles.
    """
    numbers = types.Array(float32, 1, "C", readonly=True)
    memory, table, flat = float32[::1], int64[:, ::1], int64[::1]
    return Kernels(
        _compile(types.void(memory, int64), _begin),
        _compile(
            types.void(
                memory, numbers, memory, memory, table, table, table, table, flat, int64, float64, float64
            ),
            _attend,
        ),
        _compile(
            types.void(memory, numbers, flat, numbers, numbers, flat, float64, float64, memory, memory),
            _finish,
        ),
        _compile(types.void(memory, memory, table, numbers, numbers, flat), _write),
    )


def _compile(signature: Any, function: Callable[..., None]) -> Callable[..., None]:
    with suppress(RuntimeError, OSError):  # no folder for the cache, or it is full
        return njit(signature, nogil=True, cache=True)(function)  # type: ignore[no-any-return]
    return njit(signature, nogil=True)(function)  # type: ignore[no-any-return]
