"""Position tables for other grids than those they were learnt on: relative biases (Swin V1, ViT) and absolute
embeddings (DeiT).

Swin V2 needs none of this: its biases are a function of continuous coordinates. Two ways to resize a table of
relative biases are published: ``bicubic`` (the Swin release) stretches the picture of the table to its new
size; ``geometric`` (the SimMIM release) leaves near positions nearly where they are and spreads the far ones.
The one invariant: a table that has the wanted size comes back with the same values.

Shape legend: M window side, h heads, S = 2M−1 relative positions per axis.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

TableMethod = Literal["bicubic", "geometric"]
TABLE_METHODS: tuple[str, ...] = get_args(TableMethod)
CLASS_TOKEN_ROWS = 3  # class token to tokens, tokens to class token, class token to itself


def resize_bias_table(table: Tensor, window: int, method: TableMethod = "bicubic") -> Tensor:
    """A table ((2M−1)², h) → ((2·window−1)², h), of the same type.

    The three rows of a class token, at the end of the tables of a ViT, are kept as they are.

    Raises:
        ValueError: the table is not that of a square window, or the window or the method does not exist.
    """
    if method not in TABLE_METHODS:
        raise ValueError(f"method is {method!r}, but must be one of {', '.join(TABLE_METHODS)}.")
    if window < 1:
        raise ValueError(f"window is {window}, but must be at least 1 token.")
    old, extra = _table_window(table), 0
    if old is None:
        old, extra = _table_window(table[:-CLASS_TOKEN_ROWS]), CLASS_TOKEN_ROWS
    if old is None:
        raise ValueError(
            f"a table of shape {tuple(table.shape)} is not one of relative positions: it needs (2M-1)² rows "
            f"for a window of M tokens, or {CLASS_TOKEN_ROWS} more with a class token."
        )
    if old == window:
        return table.clone()
    rows = table[: len(table) - extra].double().reshape(2 * old - 1, 2 * old - 1, -1)
    if method == "bicubic":
        rows = _bicubic(rows, (2 * window - 1, 2 * window - 1))
    else:
        weights = _spline_weights(_geometric_knots(old - 1, window - 1), _offsets(window).double())
        weights = weights.to(rows.device)
        rows = torch.einsum("ij,jkh,lk->ilh", weights, rows, weights)
    return torch.cat((rows.flatten(0, 1).to(table.dtype), table[len(table) - extra :]))


def resize_position_embedding(embedding: Tensor, grid: tuple[int, int], tokens_before: int = 1) -> Tensor:
    """Absolute positions (1, tokens_before + G², C) → (1, tokens_before + rows·columns, C), bicubic.

    Raises:
        ValueError: the embedding is not that of a square grid.
    """
    positions = embedding.shape[1] - tokens_before
    side = math.isqrt(max(positions, 0))
    if side < 1 or side * side != positions:
        raise ValueError(
            f"a position embedding of shape {tuple(embedding.shape)} is not that of a square grid and "
            f"{tokens_before} tokens before it."
        )
    if grid == (side, side):
        return embedding
    before, patches = embedding[:, :tokens_before], embedding[:, tokens_before:]
    patches = _bicubic(patches.float().reshape(side, side, -1), grid).flatten(0, 1).unsqueeze(0)
    return torch.cat((before, patches.to(embedding.dtype)), dim=1)


def _table_window(table: Tensor) -> int | None:
    """M of a table with (2M−1)² rows."""
    side = math.isqrt(len(table))
    return (side + 1) // 2 if table.ndim == 2 and side * side == len(table) and side % 2 else None


def _bicubic(rows: Tensor, size: tuple[int, int]) -> Tensor:
    """(S, S, C) → (*size, C)."""
    image = rows.permute(2, 0, 1).unsqueeze(0)
    resized: Tensor = F.interpolate(image, size=size, mode="bicubic", align_corners=False)
    return resized[0].permute(1, 2, 0)


def _offsets(window: int) -> Tensor:
    return torch.arange(-(window - 1), window)


def _geometric_knots(old: int, new: int) -> Tensor:
    """Where offsets −old … old come to lie on an axis of offsets −new … new: 0, ±1, ±(1+q), ±(1+q+q²), …

    q makes the last one ``new``, so that the far offsets are spread and the near ones stay. For a smaller
    window q is 1: each offset keeps its bias, and those that no longer occur fall away. (The release searches
    q between 1.01 and 1.5 alone, which misses small and large changes.)
    """
    low, high = 1.0, 2.0
    while _reach(high, old) < new and old > 1:
        high *= 2.0
    while high - low > 1e-12 and new > old:
        middle = (low + high) / 2
        low, high = (low, middle) if _reach(middle, old) > new else (middle, high)
    side = torch.tensor([_reach(low, count) for count in range(1, old + 1)], dtype=torch.float64)
    return torch.cat((-side.flip(0), torch.zeros(1, dtype=torch.float64), side))


def _reach(ratio: float, count: int) -> float:
    return math.fsum(ratio**power for power in range(count))


def _spline_weights(knots: Tensor, at: Tensor) -> Tensor:
    """(len(at), len(knots)): the cubic spline through values at ``knots``, read at ``at``, is linear in them.

    Of the splines with continuous second derivatives the one whose third derivative is continuous at the
    second and the last but one knot, too. Three knots give a parabola, one a constant.
    """
    count = len(knots)
    if count == 1:
        return torch.ones(len(at), 1, dtype=knots.dtype)
    step = knots.diff()
    # Second derivatives m from values y: matrix · m = right · y.
    matrix = torch.zeros(count, count, dtype=knots.dtype)
    right = torch.zeros(count, count, dtype=knots.dtype)
    for i in range(1, count - 1):
        before, after = step[i - 1], step[i]
        matrix[i, i - 1], matrix[i, i], matrix[i, i + 1] = before, 2 * (before + after), after
        right[i, i - 1], right[i, i + 1] = 6 / before, 6 / after
        right[i, i] = -6 / before - 6 / after
    if count == 3:
        matrix[0, :2] = matrix[2, 1:] = torch.tensor([1.0, -1.0])
    else:
        matrix[0, :3] = torch.stack((step[1], -(step[0] + step[1]), step[0]))
        matrix[-1, -3:] = torch.stack((step[-1], -(step[-2] + step[-1]), step[-2]))
    second = torch.linalg.solve(matrix, right)

    left = (torch.searchsorted(knots, at, right=True) - 1).clamp(0, count - 2)
    h = step[left][:, None]
    a, b = (knots[left + 1] - at)[:, None], (at - knots[left])[:, None]
    values = torch.eye(count, dtype=knots.dtype)
    cubic = (a**3 / h - a * h) / 6 * second[left] + (b**3 / h - b * h) / 6 * second[left + 1]
    weights: Tensor = cubic + a / h * values[left] + b / h * values[left + 1]
    return weights
