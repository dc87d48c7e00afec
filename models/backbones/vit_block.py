"""Blocks of Vision Transformers (arXiv 2010.11929): global attention over patches and a class token.

Shape legend: B batch, G patches per side, L = G² + 1 tokens with the class token first, C channels, h heads,
d = C/h.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.backbones.bias_tables import CLASS_TOKEN_ROWS
from models.backbones.layers import DropPath, Mlp
from models.backbones.windows import relative_index

NORM_EPS = 1e-6


class Block(nn.Module):
    """x + DropPath(γ₁·attention(norm1(x))), then x + DropPath(γ₂·mlp(norm2(x))); γ only with layer scale."""

    def __init__(self, dim: int, attn: Attention, drop_path: float, layer_scale: float | None) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=NORM_EPS)
        self.attn = attn
        self.norm2 = nn.LayerNorm(dim, eps=NORM_EPS)
        self.mlp = Mlp(dim, 4 * dim)
        self.drop_path = DropPath(drop_path)
        self.gamma_1 = nn.Parameter(torch.full((dim,), layer_scale)) if layer_scale is not None else None
        self.gamma_2 = nn.Parameter(torch.full((dim,), layer_scale)) if layer_scale is not None else None

    def forward(self, x: Tensor, bias: Tensor | None) -> Tensor:
        attended = self.attn(self.norm1(x), bias)
        x = x + self.drop_path(attended if self.gamma_1 is None else self.gamma_1 * attended)
        mixed = self.mlp(self.norm2(x))
        return cast(Tensor, x + self.drop_path(mixed if self.gamma_2 is None else self.gamma_2 * mixed))


class Attention(nn.Module):
    """Softmax attention over all tokens; keys with a bias (DeiT) or without one (BEiT)."""

    relative_position_bias_table: nn.Parameter | None

    def __init__(self, dim: int, num_heads: int, key_bias: bool) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=key_bias)
        self.q_bias = None if key_bias else nn.Parameter(torch.zeros(dim))
        self.v_bias = None if key_bias else nn.Parameter(torch.zeros(dim))
        self.relative_position_bias_table = None
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """(B, L, C) → (B, L, C); ``bias`` (h, L, L) is added to the logits."""
        tokens, dim = x.shape[1:]
        qkv_bias: Tensor | None = self.qkv.bias
        if self.q_bias is not None and self.v_bias is not None:
            qkv_bias = torch.cat((self.q_bias, torch.zeros_like(self.q_bias), self.v_bias))
        qkv = F.linear(x, self.qkv.weight, qkv_bias)
        qkv = qkv.reshape(-1, tokens, 3, self.num_heads, dim // self.num_heads).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)  # each (B, h, L, d)
        x = F.scaled_dot_product_attention(q, k, v, None if bias is None else bias.to(q.dtype))
        return cast(Tensor, self.proj(x.transpose(1, 2).reshape(-1, tokens, dim)))


class SharedTable(nn.Module):
    """One table of relative position biases for all blocks, under its official name."""

    def __init__(self, grid: int, num_heads: int) -> None:
        super().__init__()
        self.relative_position_bias_table = make_table(grid, num_heads)


class RelativePositions(nn.Module):
    """Which row of a table belongs to each pair of tokens: (2G−1)² relative positions of patches, then the
    class token to patches, patches to the class token, and the class token to itself.

    The index is no part of any checkpoint; it is rebuilt whenever the module moves (see ``windows.py``).
    """

    index: Tensor  # (L·L,) int64

    def __init__(self, grid: int) -> None:
        super().__init__()
        self.grid = grid
        self.register_buffer("index", self._make_index(None), persistent=False)

    def bias(self, table: Tensor) -> Tensor:
        """A table (rows, h) → (h, L, L)."""
        tokens = self.grid**2 + 1
        return F.embedding(self.index, table).t().reshape(-1, tokens, tokens)

    def _make_index(self, device: torch.device | None) -> Tensor:
        patches, rows = self.grid**2, (2 * self.grid - 1) ** 2
        index = F.pad(relative_index(self.grid, device).view(patches, patches), (1, 0, 1, 0), value=rows)
        index[1:, 0] = rows + 1
        index[0, 0] = rows + 2
        return index.reshape(-1)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> RelativePositions:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # torch's
        self.index = self._make_index(self.index.device)
        return self


def make_table(grid: int, num_heads: int) -> nn.Parameter:
    """Biases of zero for a grid of patches and a class token."""
    return nn.Parameter(torch.zeros((2 * grid - 1) ** 2 + CLASS_TOKEN_ROWS, num_heads))
