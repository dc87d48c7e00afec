"""Random masks of SimMIM (arXiv 2111.09886, section 3.2): squares of an image, hidden at a fixed ratio.

Every mask hides exactly ⌈ratio · squares⌉ squares, whatever its kind. Training draws from a generator;
validation derives the mask of an image from its id alone, so that every model, batch size and worker sees the
same one.

Shape legend: B images, g squares along one side, S = g · unit pixels along one side.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import Tensor

MaskKind = Literal["random", "block", "square"]
"""``random``: squares anywhere. ``block``: overlapping rectangles as in BEiT (arXiv 2106.08254, algorithm 1).
``square``: one square region somewhere (context encoders, arXiv 1604.07379)."""
MASK_KINDS: tuple[str, ...] = get_args(MaskKind)

_WORD = 0xFFFFFFFF
_BLOCKS = 64  # rectangles drawn per mask; they cover any grid many times over
_SMALLEST_BLOCK = 16 / 14**2  # share of the grid: BEiT draws at least 16 of 14×14 patches
_WIDEST_BLOCK = 1 / 0.3  # height over width lies between this and its inverse


def masked_count(units: int, ratio: float) -> int:
    """How many of ``units`` squares are hidden: ⌈ratio · units⌉, untouched by rounding errors of the product.

    Raises:
        ValueError: no square or every square would be hidden.
    """
    count = math.ceil(round(ratio * units, 9))
    if not 0 < count < units:
        raise ValueError(
            f"mask_ratio {ratio} hides {count} of {units} squares: choose a ratio or a mask_unit that hides "
            "some and leaves some."
        )
    return count


def random_masks(batch: int, grid: int, ratio: float, generator: torch.Generator | None = None) -> Tensor:
    """(batch, grid, grid) bool, on the generator's device; uniform among the masks of the exact count."""
    device = generator.device if generator is not None else None
    keys = torch.rand(batch, grid * grid, generator=generator, device=device)
    return _hide_smallest(keys, grid, ratio)


def masks_from_ids(ids: Tensor, grid: int, ratio: float, kind: MaskKind = "random") -> Tensor:
    """(B, grid, grid) bool for image ids (B,) int64, on their device: a pure function of each id.

    Raises:
        ValueError: the kind is unknown, or the ratio hides no square or every one.
    """
    if kind == "random":
        keys = _draws(ids, grid * grid)
    elif kind == "block":
        keys = _block_keys(ids, grid, masked_count(grid * grid, ratio))
    elif kind == "square":
        keys = _square_keys(ids, grid, masked_count(grid * grid, ratio))
    else:
        raise ValueError(f"mask_kind is {kind!r}, but must be one of {', '.join(MASK_KINDS)}.")
    return _hide_smallest(keys, grid, ratio)


def upsample_masks(masks: Tensor, factor: int) -> Tensor:
    """(B, g, g) → (B, g·factor, g·factor), every entry repeated along both axes."""
    return masks.repeat_interleave(factor, dim=1).repeat_interleave(factor, dim=2)


def average_distance(masks: Tensor, unit: int) -> Tensor:
    """AvgDist (section 4.1.2): (B, g, g) bool → (B,), how far hidden pixels lie from the nearest visible one.

    The mean over the hidden pixels of a mask, between pixel centres, in pixels; ``unit`` is the side of a
    square. Exact: the nearest visible pixel within each row of squares, then the best row.
    """
    grid = masks.shape[-1]
    place = torch.arange(grid * unit, dtype=torch.float32, device=masks.device)
    hidden = masks.repeat_interleave(unit, dim=2)  # (B, g, S)
    left = torch.where(hidden, -math.inf, place).cummax(dim=2).values
    right = torch.where(hidden, math.inf, place).flip(2).cummin(dim=2).values.flip(2)
    within = torch.minimum(place - left, right - place).square()  # inf where a row hides all
    nearest = torch.full((len(masks), len(place), len(place)), math.inf, device=masks.device)
    for row in range(grid):
        away = torch.maximum(row * unit - place, place - (row * unit + unit - 1)).clamp_min(0.0)
        nearest = torch.minimum(nearest, away.square()[:, None] + within[:, row, None, :])
    return nearest.sqrt().sum(dim=(1, 2)) / (masks.sum(dim=(1, 2)) * unit**2)  # visible ones add 0


def _hide_smallest(keys: Tensor, grid: int, ratio: float) -> Tensor:
    order = keys.argsort(dim=1, stable=True)[:, : masked_count(grid * grid, ratio)]
    hidden = torch.zeros(keys.shape, dtype=torch.bool, device=keys.device)
    return hidden.scatter_(1, order, True).view(-1, grid, grid)


def _block_keys(ids: Tensor, grid: int, count: int) -> Tensor:
    """(B, g²): ordered by the first rectangle that covers a square. Hiding the smallest keys adds rectangles
    until the count is reached and cuts the last one off."""
    draws = _fractions(ids, 4 * _BLOCKS + 1)
    size, shape, *corner = draws[:, 1:].view(-1, 4, _BLOCKS).unbind(1)
    smallest = max(_SMALLEST_BLOCK * grid**2, 1.0)
    area = smallest + size * max(count - smallest, 0.0)
    aspect = torch.exp((2.0 * shape - 1.0) * math.log(_WIDEST_BLOCK))
    place = torch.arange(grid, device=ids.device)
    inside = []  # per axis (B, blocks, g)
    for length, start in zip(((area * aspect).sqrt(), (area / aspect).sqrt()), corner, strict=True):
        side = length.round().clamp(1, grid)
        first = (start * (grid - side + 1)).floor()
        inside.append((place >= first[..., None]) & (place < (first + side)[..., None]))
    covered = inside[0][..., :, None] & inside[1][..., None, :]  # (B, blocks, g, g)
    number = torch.arange(_BLOCKS, device=ids.device)[:, None, None]
    return _cut_off(torch.where(covered, number, _BLOCKS).amin(dim=1).flatten(1), draws[:, :1])


def _square_keys(ids: Tensor, grid: int, count: int) -> Tensor:
    """(B, g²): smaller inside the smallest square that holds ``count`` than outside."""
    side = math.isqrt(count - 1) + 1
    draws = _fractions(ids, 3)
    first = (draws[:, 1:] * (grid - side + 1)).floor()[..., None]  # (B, 2, 1)
    place = torch.arange(grid, device=ids.device)
    inside = (place >= first) & (place < first + side)  # (B, 2, g)
    return _cut_off((~(inside[:, 0, :, None] & inside[:, 1, None, :])).long().flatten(1), draws[:, :1])


def _cut_off(keys: Tensor, side: Tensor) -> Tensor:
    """Order equal keys by rows, from the top or from the bottom as ``side`` (B, 1) falls: always from the top
    would hide lower rows less often."""
    squares = keys.shape[1]
    place = torch.arange(squares, device=keys.device)
    return keys * squares + torch.where(side < 0.5, place, squares - 1 - place)


def _fractions(ids: Tensor, number: int) -> Tensor:
    """(B, number) float64, uniform in [0, 1)."""
    return _draws(ids, number).double() / (_WORD + 1)


def _draws(ids: Tensor, number: int) -> Tensor:
    """(B, number) int64, uniform in [0, 2³²): a pure function of each id and of the place."""
    places = torch.arange(number, dtype=torch.int64, device=ids.device)
    image = _mix(_mix(ids & _WORD) + ((ids >> 32) & _WORD))
    return _mix(image[:, None] + _mix(places + 1)[None, :])


def _mix(x: Tensor) -> Tensor:
    """A 32-bit integer hash in int64; the factors lie below 2³¹, so that no product overflows."""
    x = x & _WORD
    x = ((x ^ (x >> 15)) * 0x2C1B3C6D) & _WORD
    x = ((x ^ (x >> 12)) * 0x297A2D39) & _WORD
    return x ^ (x >> 15)
