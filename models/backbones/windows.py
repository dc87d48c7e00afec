"""Window geometry of one Swin stage: sizes, shift masks and the coordinates of the position bias.

Implements the window rules of "Swin Transformer V2" (arXiv 2111.09883, section 3.3) in two named versions:

- ``shrink`` (classification): where the token grid is not larger than the window, the window becomes the grid
  and nothing is shifted; every other grid must be a multiple of the window.
- ``pad`` (dense prediction): the window keeps its size, maps are padded with zeros at the right and the
  bottom to a multiple of it before they are shifted, and every odd block shifts.

A ``WindowGeometry`` owns the tables that all blocks of a stage share. They are non-persistent buffers, so no
checkpoint ever contains them, and they are rebuilt from Python integers whenever the module moves or changes
its type: half-precision weights keep exact fp32 coordinates, and a model that was made on the meta device
gets real tables when it is materialised.

Shape legend: B batch, H×W tokens, M window side, N = M·M, nW windows per image.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from models.backbones.fused_attention import WindowOrders, window_orders

WindowRule = Literal["shrink", "pad"]
WINDOW_RULES: tuple[str, ...] = get_args(WindowRule)

# Added to the logits of token pairs from different regions. Cosine logits reach ±100 and the position bias
# adds up to 16, so the customary -100 is not a mask; at -1000 the softmax weight is exactly zero in fp32.
# Give -100 to reproduce the released models at temperatures near their lower bound.
MASKED_LOGIT = -1000.0
KEPT_ORDERS = 8  # sizes of a batch whose orders are kept, shifted and not


class WindowGeometry(nn.Module):
    """How one stage cuts its token map into windows.

    Attributes:
        grid: tokens per side of the map at the nominal image size.
        window_size: window side that was asked for.
        window: window side M in tokens, after the rule.
        shift: shift of the odd blocks in tokens; 0 where nothing shifts.
        pretrained_window: side P whose range normalises the coordinates (M unless a pretraining window is
            given).
        relative_coords: ((2M-1)², 2) fp32, log-spaced relative coordinates, row offset first.
        relative_index: (N·N,) int64, the row of ``relative_coords`` for each pair (query, key).
        shift_mask: (nW, 1, N, N) fp32, 0 or ``masked_logit``; None where nothing shifts.

    Raises:
        ValueError: the window does not fit the grid.
    """

    relative_coords: Tensor
    relative_index: Tensor
    shift_mask: Tensor | None

    def __init__(
        self,
        grid: int,
        window: int,
        rule: WindowRule,
        pretrained_window: int = 0,
        masked_logit: float = MASKED_LOGIT,
    ) -> None:
        super().__init__()
        if rule not in WINDOW_RULES:
            raise ValueError(f"window_rule is {rule!r}, but must be one of {', '.join(WINDOW_RULES)}.")
        if window < 1:
            raise ValueError(f"window_size is {window}, but must be at least 1 token.")
        if pretrained_window < 0:
            raise ValueError(f"a pretrained window is {pretrained_window}, but must be 0 (same) or positive.")
        if not masked_logit < 0:
            raise ValueError(f"masked_logit is {masked_logit}, but must be negative.")
        self.grid = grid
        self.masked_logit = masked_logit
        self.rule: WindowRule = rule
        self.window_size = window
        self.window, self.shift = self._fit(grid)
        if rule == "shrink" and grid % self.window:
            raise ValueError(
                f"a map of {grid}x{grid} tokens cannot be cut into windows of {window}x{window}: choose a "
                f"window_size that divides {grid} or is larger, or window_rule 'pad'."
            )
        self.pretrained_window = pretrained_window or self.window
        for name in ("relative_coords", "relative_index", "shift_mask"):
            self.register_buffer(name, None, persistent=False)
        self._orders: dict[tuple[object, ...], WindowOrders] = {}
        self._build_tables(device=None)

    def accepts(self, height: int, width: int) -> bool:
        """Whether a map of height × width tokens is cut into the same windows as the nominal one."""
        if self.rule == "pad":
            return True
        same = self._fit(min(height, width)) == (self.window, self.shift)
        return same and height % self.window == 0 and width % self.window == 0

    def padding(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of zeros to add at the bottom and the right of a map of this size."""
        return -height % self.window, -width % self.window

    def mask_for(self, height: int, width: int) -> Tensor | None:
        """The shift mask (nW, 1, N, N) of a map of height × width tokens; None where nothing shifts."""
        if self.shift_mask is None or (height, width) == (self.grid, self.grid):
            return self.shift_mask
        rows, columns = self.padding(height, width)
        return self._make_mask(height + rows, width + columns, self.shift_mask.device)

    def orders(self, qkv: Tensor, heads: int, is_shifted: bool) -> WindowOrders:
        """How to gather windows and heads from a padded map (B, H, W, …) of this stage; made once a size."""
        size = (*qkv.shape[:3], heads, self.window, self.shift if is_shifted else 0, qkv.device)
        if size not in self._orders:
            if len(self._orders) >= KEPT_ORDERS:
                self._orders.clear()
            self._orders[size] = window_orders(*size)
        return self._orders[size]

    def extra_repr(self) -> str:
        return (
            f"grid={self.grid}, window={self.window}, shift={self.shift}, rule={self.rule}, "
            f"pretrained_window={self.pretrained_window}"
        )

    def _fit(self, side: int) -> tuple[int, int]:
        """Window and shift of a map whose shorter side has so many tokens."""
        if self.rule == "shrink" and side <= self.window_size:
            return side, 0
        return self.window_size, self.window_size // 2

    def _build_tables(self, device: torch.device | None) -> None:
        self._orders.clear()
        self.relative_coords = relative_coords(self.window, self.pretrained_window, device)
        self.relative_index = relative_index(self.window, device)
        if self.shift:
            rows, columns = self.padding(self.grid, self.grid)
            self.shift_mask = self._make_mask(self.grid + rows, self.grid + columns, device)

    def _make_mask(self, height: int, width: int, device: torch.device | None) -> Tensor:
        return shift_mask(height, width, self.window, self.shift, device, self.masked_logit)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> WindowGeometry:
        # Every .to(), .half(), .cuda() and .to_empty() comes through here; only the device is taken over.
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # torch's
        self._build_tables(self.relative_coords.device)
        return self


def relative_coords(window: int, pretrained_window: int, device: torch.device | None = None) -> Tensor:
    """Log-spaced relative coordinates ((2M-1)², 2) fp32, (row, column).

    Offsets −(M−1)…M−1 are scaled so that the pretraining window spans ±8, then Δ =
    sign(δ)·log2(1+|δ|)/log2(8) (section 3.3 as released: the paper's formula has neither the scale nor the
    base).
    """
    offsets = torch.arange(-(window - 1), window, dtype=torch.float32, device=device)
    # A window of one token has the single offset 0, whose range 0 must not divide.
    offsets = offsets * (8.0 / max(pretrained_window - 1, 1))
    offsets = torch.sign(offsets) * torch.log2(1.0 + offsets.abs()) / math.log2(8.0)
    rows, columns = torch.meshgrid(offsets, offsets, indexing="ij")
    return torch.stack((rows, columns), dim=-1).reshape(-1, 2)


def relative_index(window: int, device: torch.device | None = None) -> Tensor:
    """(N·N,) int64: the row of the coordinate table for every pair of a query and a key, queries first."""
    axis = torch.arange(window, device=device)
    rows = axis.repeat_interleave(window)
    columns = axis.repeat(window)
    row_offset = rows[:, None] - rows[None, :] + window - 1
    column_offset = columns[:, None] - columns[None, :] + window - 1
    return (row_offset * (2 * window - 1) + column_offset).reshape(-1)


def shift_mask(
    height: int,
    width: int,
    window: int,
    shift: int,
    device: torch.device | None = None,
    masked_logit: float = MASKED_LOGIT,
) -> Tensor:
    """Additive mask (nW, 1, N, N) fp32 of a map that was rolled by ``-shift`` along both axes.

    After the roll the last windows hold tokens from opposite borders; pairs of tokens that were not
    neighbours get ``masked_logit``. Both sides must be multiples of the window.
    """

    def band(size: int) -> Tensor:  # 0, 1, 2: the slices (0, −M), (−M, −s), (−s, end) of one axis
        position = torch.arange(size, device=device)
        return (position >= size - window).long() + (position >= size - shift).long()

    region = 3 * band(height)[:, None] + band(width)[None, :]
    region = region.view(height // window, window, width // window, window).permute(0, 2, 1, 3)
    region = region.reshape(-1, window * window)
    other = region[:, :, None] != region[:, None, :]
    return (other.float() * masked_logit).unsqueeze(1)
