"""Vision Transformers: the one of SimMIM (arXiv 2111.09886, after BEiT, arXiv 2106.08254) and DeiT (arXiv
2012.12877), which MoBY trains.

Both have a class token and pre-norm blocks over one grid of patches. They differ in how a token knows its
place (a table of relative biases; absolute positions) and in what stands for the image (the mean over the
patches; the class token). Names of parameters are those of the official releases.

The network of SimMIM has two forms. For pretraining all blocks share one table and a norm ends the network;
for finetuning each block has a table of its own, and the norm follows the mean. ``finetuning_weights`` leads
from the first to the second.

Shape legend: B batch, H×W patches, L = H·W + 1 tokens with the class token first, C channels, h heads.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from models.backbones.bias_tables import resize_position_embedding
from models.backbones.interface import Backbone
from models.backbones.layers import PatchEmbed, drop_path_rates, maps_chosen, stages_chosen
from models.backbones.vit_block import NORM_EPS, Attention, Block, RelativePositions, SharedTable, make_table

LAYER_SCALE = 0.1
SHARED_TABLE = "rel_pos_bias.relative_position_bias_table"


@dataclass(frozen=True)
class ViTSize:
    """Width, blocks and heads, and the side of a patch in pixels that the size is known with."""

    embed_dim: int
    depth: int
    num_heads: int
    patch_size: int = 16

    @property
    def depths(self) -> tuple[int, ...]:
        return (self.depth,)


@dataclass(frozen=True)
class DeiTSize(ViTSize):
    """The same of a DeiT."""


class VisionTransformer(nn.Module):
    """What both kinds share; make a ``ViT`` or a ``DeiT``.

    Args:
        size: width, blocks and heads.
        image_size: side of the square input in pixels.
        patch_size: side of a token in pixels; None = that of the size.
        in_channels: channels of the input: 3 for images, others for maps of features.
        drop_path: stochastic depth rate of the last block; the rates rise linearly from 0.
        activation_checkpointing: recompute each block in the backward pass; same results, less memory. The
            blocks are one stage to a sequence or a number of stages.

    Attributes:
        num_features, embed_dim: channels of a token.
        stride, patch_size: pixels per token.
        image_size, depths: as given.
        num_layers: blocks.
        feature_channels: channels after each block.

    Raises:
        ValueError: the sizes do not fit one another.
    """

    def __init__(
        self,
        size: ViTSize,
        *,
        image_size: int,
        patch_size: int | None = None,
        in_channels: int = 3,
        drop_path: float = 0.0,
        activation_checkpointing: bool | int | Sequence[bool] = False,
    ) -> None:
        super().__init__()
        patch_size = size.patch_size if patch_size is None else patch_size
        if patch_size < 1 or image_size < patch_size or image_size % patch_size:
            raise ValueError(
                f"image_size is {image_size}, but must be a positive multiple of patch_size {patch_size}."
            )
        if size.embed_dim % size.num_heads:
            raise ValueError(f"{size.num_heads} heads do not divide {size.embed_dim} channels.")
        self.image_size = image_size
        self.patch_size = patch_size
        self.stride = patch_size
        self.embed_dim = size.embed_dim
        self.num_features = size.embed_dim
        self.depths = size.depths
        self.num_layers = size.depth
        self.feature_channels = (size.embed_dim,) * size.depth
        self.grid = image_size // patch_size
        (self.activation_checkpointing,) = stages_chosen(activation_checkpointing, 1)

        self.cls_token = nn.Parameter(torch.zeros(1, 1, size.embed_dim))
        self.patch_embed = PatchEmbed(patch_size, size.embed_dim, in_channels, norm=False)
        self.blocks = nn.ModuleList(
            self._make_block(size, rate) for rate in drop_path_rates(drop_path, size.depth)
        )

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, S, S) → the normalised map of the patches (B, C, S/patch, S/patch)."""
        return self.forward_features(images)

    def forward_features(
        self, images: Tensor, mask: Tensor | None = None, mask_token: Tensor | None = None
    ) -> Tensor:
        """As ``forward``, with ``mask_token`` in place of the patches where ``mask`` is set.

        ``mask`` is (B, S/patch, S/patch) bool. The token (1, 1, C) enters after the patch embedding, before
        positions are added.
        """
        if (mask is None) != (mask_token is None):
            raise ValueError("mask and mask_token belong together: give both or neither.")
        x = self.patch_embed(images)
        grid = x.shape[1], x.shape[2]
        if mask is not None and mask_token is not None:
            x = torch.where(mask.unsqueeze(-1), mask_token.to(x.dtype), x)
        x, _ = self._run(x)
        return _to_map(self._normalize(x), grid)

    def embedding(self, images: Tensor) -> Tensor:
        """(B, 3, S, S) → (B, C), what a head reads."""
        raise NotImplementedError

    def feature_maps(self, images: Tensor, indices: Sequence[int] | None = None) -> list[Tensor]:
        """The patches (B, C, S/patch, S/patch) after each block, or those of ``indices``, without a norm."""
        wanted = maps_chosen(indices, self.num_layers)
        x = self.patch_embed(images)
        grid = x.shape[1], x.shape[2]
        _, kept = self._run(x, wanted)
        return [_to_map(x, grid) for x in kept]

    def _make_block(self, size: ViTSize, drop_path: float) -> Block:
        raise NotImplementedError

    def _add_positions(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """(B, L, C) → (B, L, C)."""
        return x

    def _position_biases(self) -> list[Tensor | None]:
        """What each block adds to its logits, (h, L, L)."""
        return [None] * self.num_layers

    def _normalize(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def _run(self, x: Tensor, keep: Sequence[int] = ()) -> tuple[Tensor, list[Tensor]]:
        """Patches (B, H, W, C) → the tokens (B, L, C) at the end, and after each of the blocks ``keep``.

        With ``keep`` the end is the last of these blocks.
        """
        grid = x.shape[1], x.shape[2]
        x = torch.cat((self.cls_token.to(x.dtype).expand(x.shape[0], -1, -1), x.flatten(1, 2)), dim=1)
        x = self._add_positions(x, grid)
        kept = []
        blocks = list(zip(self.blocks, self._position_biases(), strict=True))
        for index, (block, bias) in enumerate(blocks[: keep[-1] + 1] if keep else blocks):
            if self.activation_checkpointing and self.training and torch.is_grad_enabled():
                x = cast(Tensor, checkpoint(block, x, bias, use_reentrant=False))
            else:
                x = block(x, bias)
            if index in keep:
                kept.append(x)
        return x, kept


class ViT(VisionTransformer):
    """The ViT of SimMIM and BEiT: relative position biases, layer scale, keys without bias.

    Args:
        pretraining: the form for pretraining: one table for all blocks, and a norm at the end. The other form
            has a table per block, and its norm follows the mean over the patches.

    The other arguments and the attributes are those of ``VisionTransformer``. Images have the nominal size.
    """

    def __init__(
        self,
        size: ViTSize,
        *,
        image_size: int,
        patch_size: int | None = None,
        in_channels: int = 3,
        drop_path: float = 0.0,
        activation_checkpointing: bool | int | Sequence[bool] = False,
        pretraining: bool = False,
    ) -> None:
        super().__init__(
            size,
            image_size=image_size,
            patch_size=patch_size,
            in_channels=in_channels,
            drop_path=drop_path,
            activation_checkpointing=activation_checkpointing,
        )
        self.pretraining = pretraining
        self.positions = RelativePositions(self.grid)
        if pretraining:
            self.rel_pos_bias = SharedTable(self.grid, size.num_heads)
            self.norm = nn.LayerNorm(size.embed_dim, eps=NORM_EPS)
        else:
            for block in self.blocks:
                cast(Block, block).attn.relative_position_bias_table = make_table(self.grid, size.num_heads)
            self.fc_norm = nn.LayerNorm(size.embed_dim, eps=NORM_EPS)
        self._init_weights()

    def embedding(self, images: Tensor) -> Tensor:
        """(B, 3, S, S) → (B, C): the mean over the patches, normalised before (pretraining) or after it."""
        x = self.patch_embed(images)
        x = self._run(x)[0][:, 1:]
        return self._normalize(x).mean(dim=1) if self.pretraining else self._normalize(x.mean(dim=1))

    def _make_block(self, size: ViTSize, drop_path: float) -> Block:
        attention = Attention(size.embed_dim, size.num_heads, key_bias=False)
        return Block(size.embed_dim, attention, drop_path, LAYER_SCALE)

    def _add_positions(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        if grid != (self.grid, self.grid):
            raise ValueError(
                f"the images have {grid[0]}x{grid[1]} patches, but this backbone was built for "
                f"{self.grid}x{self.grid}: resize them, or build it for their size and resize its tables."
            )
        return x

    def _position_biases(self) -> list[Tensor | None]:
        if self.pretraining:
            return [self.positions.bias(self.rel_pos_bias.relative_position_bias_table)] * self.num_layers
        tables = (cast(Block, block).attn.relative_position_bias_table for block in self.blocks)
        return [self.positions.bias(cast(Tensor, table)) for table in tables]

    def _normalize(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.norm(x) if self.pretraining else self.fc_norm(x))

    def _init_weights(self) -> None:
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        _init_linears(self)
        for number, module in enumerate(self.blocks, start=1):
            block = cast(Block, module)
            with torch.no_grad():  # so that the variance of the main branch does not grow with depth
                block.attn.proj.weight.div_((2.0 * number) ** 0.5)
                block.mlp.fc2.weight.div_((2.0 * number) ** 0.5)


class DeiT(VisionTransformer):
    """DeiT without distillation: learnt absolute positions, and the class token stands for the image.

    Images of another size than the nominal one get interpolated positions. The arguments and attributes are
    those of ``VisionTransformer``.
    """

    def __init__(
        self,
        size: ViTSize,
        *,
        image_size: int,
        patch_size: int | None = None,
        in_channels: int = 3,
        drop_path: float = 0.0,
        activation_checkpointing: bool | int | Sequence[bool] = False,
    ) -> None:
        super().__init__(
            size,
            image_size=image_size,
            patch_size=patch_size,
            in_channels=in_channels,
            drop_path=drop_path,
            activation_checkpointing=activation_checkpointing,
        )
        self.pos_embed = nn.Parameter(torch.zeros(1, self.grid**2 + 1, size.embed_dim))
        self.norm = nn.LayerNorm(size.embed_dim, eps=NORM_EPS)
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        _init_linears(self)

    def embedding(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) → (B, C): the normalised class token."""
        x = self.patch_embed(images)
        return self._normalize(self._run(x)[0][:, 0])

    def _make_block(self, size: ViTSize, drop_path: float) -> Block:
        attention = Attention(size.embed_dim, size.num_heads, key_bias=True)
        return Block(size.embed_dim, attention, drop_path, layer_scale=None)

    def _add_positions(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        return x + resize_position_embedding(self.pos_embed, grid).to(x.dtype)

    def _normalize(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.norm(x))


def finetuning_weights(weights: Mapping[str, Tensor], backbone: Backbone) -> dict[str, Tensor]:
    """The pretraining form's state dict as that of ``backbone`` in the form for finetuning.

    Every block gets a copy of the shared table; the last norm, which normalised tokens for the decoder, makes
    way for the fresh one of ``backbone``, which normalises their mean. Weights of anything else, and for
    anything else, come back unchanged.
    """
    result = dict(weights)
    if not isinstance(backbone, ViT) or backbone.pretraining or SHARED_TABLE not in result:
        return result
    table = result.pop(SHARED_TABLE)
    for block in range(backbone.num_layers):
        result[f"blocks.{block}.attn.relative_position_bias_table"] = table.clone()
    for kind in ("weight", "bias"):
        result.pop(f"norm.{kind}", None)
        result[f"fc_norm.{kind}"] = getattr(backbone.fc_norm, kind).detach().clone()
    return result


def _to_map(x: Tensor, grid: tuple[int, int]) -> Tensor:
    """Tokens (B, L, C) → the patches as a map (B, C, H, W)."""
    return x[:, 1:].reshape(-1, *grid, x.shape[2]).permute(0, 3, 1, 2)


def _init_linears(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
