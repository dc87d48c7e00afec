"""The frame that both Swin Transformers share: patches, stages of window attention, merging, a final norm.

``swin_v1.py`` (arXiv 2103.14030) and ``swin_v2.py`` (arXiv 2111.09883) supply the blocks. Names of parameters
are those of the released models, so that official state dicts fit. Heads, pooling and losses live elsewhere.

Maps travel as (B, H, W, C): every Linear and LayerNorm works on the last axis, and cutting windows, splitting
heads and separating q, k, v is one single permutation. The batch is never read as a number, only inferred, so
an exported graph is exact for any batch; the height and the width are Python integers.

Shape legend: B batch, H×W tokens, C channels, h heads, d = C/h, M window side, N = M·M, nW windows per image.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from models.backbones.layers import (
    DropPath,
    Mlp,
    PatchEmbed,
    PatchMerging,
    drop_path_rates,
    maps_chosen,
    stages_chosen,
)
from models.backbones.window_attention import BiasedWindowAttention
from models.backbones.windows import MASKED_LOGIT, WindowGeometry, WindowRule
from models.batch_norm import TokenBatchNorm

MlpNorm = Literal["layer", "batch"]
PATCH_SIZE = 4
CHUNKED_STAGES = 2  # stages whose attention may run in chunks: those with the most tokens


@dataclass(frozen=True)
class SwinSize:
    """Widths double from stage to stage, blocks and heads are given for each."""

    embed_dim: int
    depths: tuple[int, ...]
    num_heads: tuple[int, ...]


@dataclass(frozen=True)
class BlockPlace:
    """Where a block stands and what that means for it."""

    dim: int
    num_heads: int
    index: int  # within its stage
    windows: WindowGeometry
    drop_path: float
    attention_chunk: int
    mlp_norm: MlpNorm

    @property
    def shifted(self) -> bool:
        return self.index % 2 == 1


class Swin(nn.Module):
    """A Swin Transformer; make one of its two kinds.

    Args:
        size: widths, depths and heads.
        image_size: side of the square input in pixels. Under ``window_rule="shrink"`` images may have other
            sides that lead to the same windows, as a rectangle does whose shorter side this is; under
            ``"pad"`` it is the nominal size only.
        window_size: side M of the attention windows in tokens.
        patch_size: side of a token in pixels; None = the usual 4.
        in_channels: channels of the input: 3 for images, others for maps of features.
        drop_path: stochastic depth rate of the last block; the rates rise linearly from 0.
        activation_checkpointing: recompute blocks in the backward pass; same results, less memory. True or
            False, the number of first stages that do so, or one flag per stage.
        attention_chunk: windows that the first two stages attend to at a time, at most; 0 = all of them. Same
            results up to rounding; the memory of logits shrinks to that of one chunk, in the backward pass
            too, which computes them again.
        window_rule: ``shrink`` (classification) or ``pad`` (dense prediction), explained in ``windows.py``.
        masked_logit: added to pairs across the seam of shifted windows; −100 as released, see ``windows.py``.
        pretrained_windows: ``window_sizes`` of the model these weights were pretrained in; 0 = same as here.
            V2 only: V1 has a table per window, which ``resize_bias_table`` transfers.
        mlp_norm: the norm before each MLP, ``layer`` or ``batch`` (over all tokens of all processes); V1
            only, and without activation checkpointing, which would count each batch twice.
        stage_norms: give each map of ``feature_maps`` a LayerNorm of its own (``norm0``, ``norm1``, …), as
            the released detectors do.

    Attributes:
        num_features: channels of the final map.
        stride: pixels per token of the final map.
        embed_dim: channels of the first stage, where mask tokens enter.
        patch_size, image_size, depths, num_heads: as given.
        num_layers: blocks in total.
        feature_channels: channels after each stage.
        window_sizes: window side per stage after the rule.

    Raises:
        ValueError: the sizes do not fit one another.
    """

    def __init__(
        self,
        size: SwinSize,
        *,
        image_size: int,
        window_size: int,
        patch_size: int | None = None,
        in_channels: int = 3,
        drop_path: float = 0.0,
        activation_checkpointing: bool | int | Sequence[bool] = False,
        attention_chunk: int = 0,
        window_rule: WindowRule = "shrink",
        masked_logit: float = MASKED_LOGIT,
        pretrained_windows: Sequence[int] | None = None,
        mlp_norm: MlpNorm = "layer",
        stage_norms: bool = False,
    ) -> None:
        super().__init__()
        patch_size = PATCH_SIZE if patch_size is None else patch_size
        stages = len(size.depths)
        pretrained = tuple(pretrained_windows) if pretrained_windows is not None else (0,) * stages
        _check_geometry(size, image_size, patch_size, window_rule, pretrained)
        if attention_chunk < 0:
            raise ValueError(f"attention_chunk is {attention_chunk}, but must be 0 (off) or some windows.")
        self.image_size = image_size
        self.patch_size = patch_size
        self.window_rule = window_rule
        self.embed_dim = size.embed_dim
        self.depths = size.depths
        self.num_heads = size.num_heads
        self.num_layers = sum(size.depths)
        self.num_features = size.embed_dim * 2 ** (stages - 1)
        self.stride = patch_size * 2 ** (stages - 1)
        self.feature_channels = tuple(size.embed_dim * 2**stage for stage in range(stages))

        self.patch_embed = PatchEmbed(patch_size, size.embed_dim, in_channels)
        rates = iter(drop_path_rates(drop_path, self.num_layers))
        recompute = stages_chosen(activation_checkpointing, stages)
        if mlp_norm == "batch" and any(recompute):
            raise ValueError(
                "mlp_norm 'batch' and activation_checkpointing exclude each other: a recomputed batch norm "
                "would count its batch twice."
            )
        layers: list[Stage] = []
        grid = -(-image_size // patch_size)
        for stage, depth in enumerate(size.depths):
            dim = size.embed_dim * 2**stage
            windows = WindowGeometry(grid, window_size, window_rule, pretrained[stage], masked_logit)
            places = [
                BlockPlace(
                    dim=dim,
                    num_heads=size.num_heads[stage],
                    index=index,
                    windows=windows,
                    drop_path=next(rates),
                    attention_chunk=attention_chunk if stage < CHUNKED_STAGES else 0,
                    mlp_norm=mlp_norm,
                )
                for index in range(depth)
            ]
            layers.append(
                Stage(
                    [self._make_block(size, place) for place in places],
                    windows=windows,
                    downsample=self._make_merging(dim) if stage < stages - 1 else None,
                    activation_checkpointing=recompute[stage],
                )
            )
            grid = -(-grid // 2)
        self.layers = nn.ModuleList(layers)
        self.norm = nn.LayerNorm(self.num_features)
        self.stage_norms = stage_norms
        if stage_norms:
            for stage in range(stages):
                self.add_module(f"norm{stage}", nn.LayerNorm(size.embed_dim * 2**stage))
        self.window_sizes = tuple(layer.windows.window for layer in layers)
        self._init_weights()

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, S, S) → the normalised map (B, num_features, S/stride, S/stride)."""
        return self.forward_features(images)

    def forward_features(
        self, images: Tensor, mask: Tensor | None = None, mask_token: Tensor | None = None
    ) -> Tensor:
        """As ``forward``, with ``mask_token`` in place of the tokens where ``mask`` is set.

        ``mask`` is (B, S/patch, S/patch) bool. The token (1, 1, C) enters after the patch embedding and its
        norm (SimMIM, arXiv 2111.09886, section 3.2).
        """
        if (mask is None) != (mask_token is None):
            raise ValueError("mask and mask_token belong together: give both or neither.")
        x = self._embed(images)
        if mask is not None and mask_token is not None:
            x = torch.where(mask.unsqueeze(-1), mask_token.to(x.dtype), x)
        for layer in self._stages():
            x, _ = layer(x)
        return cast(Tensor, self.norm(x)).permute(0, 3, 1, 2)

    def embedding(self, images: Tensor) -> Tensor:
        """(B, 3, S, S) → (B, num_features): the mean over the final map."""
        return self.forward_features(images).mean(dim=(2, 3))

    def feature_maps(self, images: Tensor, indices: Sequence[int] | None = None) -> list[Tensor]:
        """One map (B, C·2^i, H_i, W_i) per stage i, or per stage of ``indices``, before merging.

        Each through a norm of its own with ``stage_norms``, as it is without.
        """
        wanted = maps_chosen(indices, len(self.depths))
        x = self._embed(images)
        maps = []
        for stage, layer in enumerate(self._stages()[: wanted[-1] + 1]):
            x, before_merging = layer(x)
            if stage not in wanted:
                continue
            if self.stage_norms:
                before_merging = self.get_submodule(f"norm{stage}")(before_merging)
            maps.append(before_merging.permute(0, 3, 1, 2))
        return maps

    def _make_block(self, size: SwinSize, place: BlockPlace) -> SwinBlock:
        raise NotImplementedError

    def _make_merging(self, dim: int) -> PatchMerging:
        raise NotImplementedError

    def _stages(self) -> list[Stage]:
        return cast("list[Stage]", list(self.layers))

    def _embed(self, images: Tensor) -> Tensor:
        height, width = images.shape[-2:]
        if self.window_rule == "shrink" and not self._has_same_windows(height, width):
            raise ValueError(
                f"the images are {height}x{width} pixels, but this backbone was built for "
                f"{self.image_size}x{self.image_size} and would cut them into other windows: resize them, or "
                "build it for their shorter side or with window_rule 'pad'."
            )
        return cast(Tensor, self.patch_embed(images))

    def _has_same_windows(self, height: int, width: int) -> bool:
        if height % self.stride or width % self.stride:
            return False
        grids = [
            (height // step, width // step)
            for step in (self.patch_size * 2**i for i in range(len(self.depths)))
        ]
        return all(stage.windows.accepts(*grid) for stage, grid in zip(self._stages(), grids, strict=True))

    def _init_weights(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)


@contextmanager
def constant_position_bias(model: nn.Module) -> Iterator[None]:
    """Within this context the position biases inside ``model`` are constants of the present weights.

    Wrap an export in it: the graph then holds the biases themselves and not the small networks that yield
    them, which a quantiser would otherwise quantise. Models without windows are left as they are.
    """
    stages = [module for module in model.modules() if isinstance(module, Stage)]
    attentions = [(stage.windows, cast(SwinBlock, block).attn) for stage in stages for block in stage.blocks]
    try:
        with torch.no_grad():
            for windows, attention in attentions:
                attention.constant_bias = attention.compute_position_bias(windows)
        yield
    finally:
        for _, attention in attentions:
            attention.constant_bias = None


class Stage(nn.Module):
    """Blocks of one width on one grid, then patch merging (all stages but the last)."""

    def __init__(
        self,
        blocks: Sequence[SwinBlock],
        *,
        windows: WindowGeometry,
        downsample: PatchMerging | None = None,
        activation_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        self.windows = windows
        self.activation_checkpointing = activation_checkpointing
        self.blocks = nn.ModuleList(blocks)
        self.downsample = downsample

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(B, H, W, C) → what the next stage reads, and the map before merging."""
        mask = self.windows.mask_for(x.shape[1], x.shape[2])
        for block in self.blocks:
            if self.activation_checkpointing and self.training and torch.is_grad_enabled():
                x = cast(Tensor, checkpoint(block, x, self.windows, mask, use_reentrant=False))
            else:
                x = block(x, self.windows, mask)
        return (x if self.downsample is None else self.downsample(x)), x


class SwinBlock(nn.Module):
    """What both kinds of block hold; where their norms stand is what differs."""

    attn: BiasedWindowAttention
    norm1: nn.LayerNorm
    mlp: Mlp
    norm2: nn.LayerNorm | TokenBatchNorm
    drop_path: DropPath

    def __init__(self, attn: BiasedWindowAttention, dim: int, *, shifted: bool, drop_path: float) -> None:
        super().__init__()
        self.shifted = shifted
        self.attn = attn
        self.norm1 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, 4 * dim)
        self.norm2 = nn.LayerNorm(dim)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, windows: WindowGeometry, shift_mask: Tensor | None) -> Tensor:
        """(B, H, W, C) → (B, H, W, C); only a shifted block reads ``shift_mask`` (nW, 1, N, N)."""
        raise NotImplementedError


def _check_geometry(
    size: SwinSize, image_size: int, patch_size: int, rule: WindowRule, pretrained_windows: tuple[int, ...]
) -> None:
    stages = len(size.depths)
    if len(size.num_heads) != stages:
        raise ValueError(f"{stages} stages need as many head counts, but num_heads is {size.num_heads}.")
    for stage, heads in enumerate(size.num_heads):
        if heads < 1 or size.embed_dim * 2**stage % heads:
            raise ValueError(
                f"{heads} heads do not divide the {size.embed_dim * 2**stage} channels of stage {stage}."
            )
    if len(pretrained_windows) != stages:
        raise ValueError(
            f"pretrained_windows has {len(pretrained_windows)} entries, but this backbone has {stages} "
            "stages: give one window per stage."
        )
    if patch_size < 1 or image_size < patch_size:
        raise ValueError(
            f"image_size {image_size} must be at least patch_size {patch_size}, and that at least 1 pixel."
        )
    if rule == "shrink":
        step = patch_size * 2 ** (stages - 1)
        if image_size % step:
            raise ValueError(
                f"image_size is {image_size}, but {stages} stages over patches of {patch_size} pixels need a "
                f"multiple of {step}."
            )
