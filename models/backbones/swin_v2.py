"""Swin Transformer V2 (arXiv 2111.09883, section 3): res-post-norm blocks with scaled cosine attention.

The released classification model: stages of blocks whose branches end in a norm, a continuous log-spaced
position bias, and patch merging that reduces before it normalises. The frame is in ``swin.py``, the attention
in ``window_attention.py``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

from torch import Tensor, nn

from models.backbones.layers import DropPath, Mlp, PatchEmbed, PatchMerging
from models.backbones.swin import BlockPlace, Stage, Swin, SwinBlock, SwinSize, constant_position_bias
from models.backbones.window_attention import WindowAttention
from models.backbones.windows import WindowGeometry


@dataclass(frozen=True)
class SwinV2Size(SwinSize):
    """One row of table 1 of the paper."""

    extra_norm_period: int = 0  # a norm on the main branch after every so many blocks of a stage; 0 = none


class SwinV2(Swin):
    """Swin Transformer V2 backbone; the arguments and attributes are those of ``Swin``."""

    def _make_block(self, size: SwinSize, place: BlockPlace) -> Block:
        if place.mlp_norm != "layer":
            raise ValueError("mlp_norm is for Swin V1: V2 has its norms after the MLPs.")
        period = size.extra_norm_period if isinstance(size, SwinV2Size) else 0
        return Block(
            place.dim,
            place.num_heads,
            shifted=place.shifted,
            drop_path=place.drop_path,
            extra_norm=period > 0 and (place.index + 1) % period == 0,
            attention_chunk=place.attention_chunk,
        )

    def _make_merging(self, dim: int) -> PatchMerging:
        return PatchMerging(dim, norm_first=False)

    def _init_weights(self) -> None:
        super()._init_weights()
        # Each block starts as the identity: its branches end in a norm that yields zero.
        for module in self.modules():
            if isinstance(module, Block):
                for norm in (module.norm1, module.norm2):
                    nn.init.zeros_(norm.weight)
                    nn.init.zeros_(norm.bias)


class Block(SwinBlock):
    """Res-post-norm (section 3.2): x + DropPath(norm1(attention(x))), then x + DropPath(norm2(mlp(x)))."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        shifted: bool,
        drop_path: float,
        extra_norm: bool = False,
        attention_chunk: int = 0,
    ) -> None:
        super().__init__(
            WindowAttention(dim, num_heads, attention_chunk), dim, shifted=shifted, drop_path=drop_path
        )
        # The huge models normalise the main branch itself "every 6 layers", counted within the stage.
        self.norm3 = nn.LayerNorm(dim) if extra_norm else None

    def forward(self, x: Tensor, windows: WindowGeometry, shift_mask: Tensor | None) -> Tensor:
        x = x + self.drop_path(self.norm1(self.attn(x, windows, shift_mask if self.shifted else None)))
        x = x + self.drop_path(self.norm2(self.mlp(x)))
        return x if self.norm3 is None else cast(Tensor, self.norm3(x))


__all__ = [
    "Block",
    "DropPath",
    "Mlp",
    "PatchEmbed",
    "PatchMerging",
    "Stage",
    "SwinV2",
    "SwinV2Size",
    "constant_position_bias",
]
