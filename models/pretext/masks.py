"""Random masks of SimMIM (arXiv 2111.09886, section 3.2): squares of an image, hidden at a fixed ratio.

Every mask hides exactly ⌈ratio · squares⌉ squares. Training draws from a generator; validation derives the
mask of an image from its id alone, so that every model, batch size and worker sees the same one.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_WORD = 0xFFFFFFFF


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


def masks_from_ids(ids: Tensor, grid: int, ratio: float) -> Tensor:
    """(B, grid, grid) bool for image ids (B,) int64, on their device: a pure function of each id."""
    units = torch.arange(grid * grid, dtype=torch.int64, device=ids.device)
    image = _mix(_mix(ids & _WORD) + ((ids >> 32) & _WORD))
    return _hide_smallest(_mix(image[:, None] + _mix(units + 1)[None, :]), grid, ratio)


def upsample_masks(masks: Tensor, factor: int) -> Tensor:
    """(B, g, g) → (B, g·factor, g·factor), every entry repeated along both axes."""
    return masks.repeat_interleave(factor, dim=1).repeat_interleave(factor, dim=2)


def _hide_smallest(keys: Tensor, grid: int, ratio: float) -> Tensor:
    order = keys.argsort(dim=1, stable=True)[:, : masked_count(grid * grid, ratio)]
    hidden = torch.zeros(keys.shape, dtype=torch.bool, device=keys.device)
    return hidden.scatter_(1, order, True).view(-1, grid, grid)


def _mix(x: Tensor) -> Tensor:
    """A 32-bit integer hash in int64; the factors lie below 2³¹, so that no product overflows."""
    x = x & _WORD
    x = ((x ^ (x >> 15)) * 0x2C1B3C6D) & _WORD
    x = ((x ^ (x >> 12)) * 0x297A2D39) & _WORD
    return x ^ (x >> 15)
