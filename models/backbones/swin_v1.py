"""Swin Transformer (arXiv 2103.14030): pre-norm blocks with a table of relative position biases per block.

The released classification model; the frame is in ``swin.py``. A table has one row per relative position in
its window, so that other windows need another table: ``bias_tables.resize_bias_table`` makes it.

Shape legend: M window side, N = M·M, h heads, d channels per head.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from models.backbones.layers import PatchMerging
from models.backbones.swin import BlockPlace, MlpNorm, Swin, SwinBlock, SwinSize
from models.backbones.window_attention import BiasedWindowAttention
from models.backbones.windows import WindowGeometry
from models.batch_norm import TokenBatchNorm


@dataclass(frozen=True)
class SwinV1Size(SwinSize):
    """One of the architecture variants of section 3.3."""


class SwinV1(Swin):
    """Swin Transformer backbone; the arguments and attributes are those of ``Swin``."""

    def _make_block(self, size: SwinSize, place: BlockPlace) -> PreNormBlock:
        if place.windows.pretrained_window != place.windows.window:
            raise ValueError(
                "pretrained_windows are for Swin V2: V1 has a table per window, which loading a checkpoint "
                "resizes."
            )
        return PreNormBlock(
            place.dim,
            place.num_heads,
            place.windows.window,
            shifted=place.shifted,
            drop_path=place.drop_path,
            attention_chunk=place.attention_chunk,
            mlp_norm=place.mlp_norm,
        )

    def _make_merging(self, dim: int) -> PatchMerging:
        return PatchMerging(dim, norm_first=True)


class PreNormBlock(SwinBlock):
    """x + DropPath(attention(norm1(x))), then x + DropPath(mlp(norm2(x))) (section 3.2).

    With ``mlp_norm="batch"`` norm2 is a batch norm, which MoBY found to help (arXiv 2105.04553, section 4).
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        window: int,
        *,
        shifted: bool,
        drop_path: float,
        attention_chunk: int = 0,
        mlp_norm: MlpNorm = "layer",
    ) -> None:
        attention = TableWindowAttention(dim, num_heads, window, attention_chunk)
        super().__init__(attention, dim, shifted=shifted, drop_path=drop_path)
        if mlp_norm == "batch":
            self.norm2 = TokenBatchNorm(dim)

    def forward(self, x: Tensor, windows: WindowGeometry, shift_mask: Tensor | None) -> Tensor:
        x = x + self.drop_path(self.attn(self.norm1(x), windows, shift_mask if self.shifted else None))
        return cast(Tensor, x + self.drop_path(self.mlp(self.norm2(x))))


class TableWindowAttention(BiasedWindowAttention):
    """Dot-product attention within windows, with a table of position biases ((2M-1)², h)."""

    def __init__(self, dim: int, num_heads: int, window: int, attention_chunk: int = 0) -> None:
        super().__init__(num_heads, attention_chunk)
        self.scale = (dim // num_heads) ** -0.5
        self.relative_position_bias_table = nn.Parameter(torch.empty((2 * window - 1) ** 2, num_heads))
        nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def qkv_bias(self) -> Tensor:
        return cast(Tensor, self.qkv.bias)

    def scale_queries_and_keys(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        return q * self.scale, k

    def bias_weights(self) -> tuple[Tensor, ...]:
        return (self.relative_position_bias_table,)

    def bias_table(self, windows: WindowGeometry) -> Tensor:
        return self.relative_position_bias_table
