"""Swin Transformer V2 (arXiv 2111.09883): an image → a normalised map of tokens, and one map per stage.

The released classification model (section 3) with its names of parameters, so that official state dicts fit:
patch embedding, stages of res-post-norm blocks with scaled cosine attention and a continuous log-spaced
position bias, patch merging that reduces before it normalises, a final norm. Heads, pooling and losses live
elsewhere.

Maps travel as (B, H, W, C): every Linear and LayerNorm works on the last axis, and cutting windows, splitting
heads and separating q, k, v is one single permutation. The batch is never read as a number, only inferred, so
an exported graph is exact for any batch; the height and the width are Python integers.

Shape legend: B batch, H×W tokens, C channels, h heads, d = C/h, M window side, N = M·M, nW windows per image.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from models.backbones.window_attention import WindowAttention
from models.backbones.windows import WindowGeometry, WindowRule


@dataclass(frozen=True)
class SwinV2Size:
    """One row of table 1 of the paper: widths double from stage to stage, heads are given for each."""

    embed_dim: int
    depths: tuple[int, ...]
    num_heads: tuple[int, ...]
    extra_norm_period: int = 0  # a norm on the main branch after every so many blocks of a stage; 0 = none


class SwinV2(nn.Module):
    """Swin Transformer V2 backbone.

    Args:
        size: widths, depths and heads.
        image_size: side of the square input in pixels; only the nominal size under ``window_rule="pad"``.
        window_size: side M of the attention windows in tokens.
        patch_size: side of a token in pixels.
        drop_path: stochastic depth rate of the last block; the rates rise linearly from 0.
        activation_checkpointing: recompute each block in the backward pass; same results, less memory.
        window_rule: ``shrink`` (classification) or ``pad`` (dense prediction), explained in ``windows.py``.
        pretrained_windows: ``window_sizes`` of the model these weights were pretrained in; 0 = same as here.

    Attributes:
        num_features: channels of the final map.
        stride: pixels per token of the final map.
        embed_dim: channels of the first stage, where mask tokens enter.
        patch_size, image_size, depths: as given.
        num_layers: blocks in total.
        window_sizes: window side per stage after the rule.

    Raises:
        ValueError: the sizes do not fit one another.
    """

    def __init__(
        self,
        size: SwinV2Size,
        *,
        image_size: int,
        window_size: int,
        patch_size: int = 4,
        drop_path: float = 0.0,
        activation_checkpointing: bool = False,
        window_rule: WindowRule = "shrink",
        pretrained_windows: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        stages = len(size.depths)
        pretrained = tuple(pretrained_windows) if pretrained_windows is not None else (0,) * stages
        _check_geometry(size, image_size, patch_size, drop_path, window_rule, pretrained)
        self.image_size = image_size
        self.patch_size = patch_size
        self.window_rule = window_rule
        self.embed_dim = size.embed_dim
        self.depths = size.depths
        self.num_layers = sum(size.depths)
        self.num_features = size.embed_dim * 2 ** (stages - 1)
        self.stride = patch_size * 2 ** (stages - 1)

        self.patch_embed = PatchEmbed(patch_size, size.embed_dim)
        rates = [drop_path * i / max(self.num_layers - 1, 1) for i in range(self.num_layers)]
        layers: list[Stage] = []
        grid = -(-image_size // patch_size)
        for stage, depth in enumerate(size.depths):
            first = sum(size.depths[:stage])
            layers.append(
                Stage(
                    dim=size.embed_dim * 2**stage,
                    num_heads=size.num_heads[stage],
                    windows=WindowGeometry(grid, window_size, window_rule, pretrained[stage]),
                    drop_path=rates[first : first + depth],
                    extra_norm_period=size.extra_norm_period,
                    merge=stage < stages - 1,
                    activation_checkpointing=activation_checkpointing,
                )
            )
            grid = -(-grid // 2)
        self.layers = nn.ModuleList(layers)
        self.norm = nn.LayerNorm(self.num_features)
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

    def feature_maps(self, images: Tensor) -> list[Tensor]:
        """One map (B, C·2^i, H_i, W_i) per stage, before merging and without a norm, for dense prediction."""
        x = self._embed(images)
        maps = []
        for layer in self._stages():
            x, before_merging = layer(x)
            maps.append(before_merging.permute(0, 3, 1, 2))
        return maps

    def _stages(self) -> list[Stage]:
        return cast("list[Stage]", list(self.layers))

    def _embed(self, images: Tensor) -> Tensor:
        height, width = images.shape[-2:]
        if self.window_rule == "shrink" and (height, width) != (self.image_size, self.image_size):
            raise ValueError(
                f"the images are {height}x{width} pixels, but this backbone was built for "
                f"{self.image_size}x{self.image_size}: resize them, or build it with window_rule 'pad'."
            )
        return cast(Tensor, self.patch_embed(images))

    def _init_weights(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        # Each block starts as the identity: its branches end in a norm that yields zero.
        for module in self.modules():
            if isinstance(module, Block):
                for norm in (module.norm1, module.norm2):
                    nn.init.zeros_(norm.weight)
                    nn.init.zeros_(norm.bias)


@contextmanager
def constant_position_bias(model: nn.Module) -> Iterator[None]:
    """Within this context the position biases inside ``model`` are constants of the present weights.

    Wrap an export in it: the graph then holds the biases themselves and not the small networks that yield
    them, which a quantiser would otherwise quantise.
    """
    stages = [module for module in model.modules() if isinstance(module, Stage)]
    attentions = [(stage.windows, cast(Block, block).attn) for stage in stages for block in stage.blocks]
    try:
        with torch.no_grad():
            for windows, attention in attentions:
                attention.constant_bias = attention.compute_position_bias(windows)
        yield
    finally:
        for _, attention in attentions:
            attention.constant_bias = None


# ------------------------------------------------------------------------------------------------------------
# Parts
# ------------------------------------------------------------------------------------------------------------


class PatchEmbed(nn.Module):
    """Non-overlapping patches, projected and normalised: (B, 3, S, S) → (B, S/p, S/p, C)."""

    def __init__(self, patch_size: int, dim: int) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.proj = nn.Conv2d(3, dim, kernel_size=patch_size, stride=patch_size)
        self.norm = nn.LayerNorm(dim)

    def forward(self, images: Tensor) -> Tensor:
        p = self.patch_size
        height, width = images.shape[-2:]
        x = F.pad(images, (0, -width % p, 0, -height % p)) if height % p or width % p else images
        rows, columns = -(-height // p), -(-width // p)
        # A convolution whose stride is its kernel is a matrix product over patches, and faster as one.
        x = x.to(self.proj.weight.dtype).reshape(-1, 3, rows, p, columns, p).permute(0, 2, 4, 1, 3, 5)
        x = F.linear(x.reshape(-1, rows, columns, 3 * p * p), self.proj.weight.flatten(1), self.proj.bias)
        return cast(Tensor, self.norm(x))


class Stage(nn.Module):
    """Blocks of one width on one grid, then patch merging (all stages but the last)."""

    def __init__(
        self,
        *,
        dim: int,
        num_heads: int,
        windows: WindowGeometry,
        drop_path: Sequence[float],
        extra_norm_period: int,
        merge: bool,
        activation_checkpointing: bool,
    ) -> None:
        super().__init__()
        self.windows = windows
        self.activation_checkpointing = activation_checkpointing
        self.blocks = nn.ModuleList(
            Block(
                dim,
                num_heads,
                shifted=index % 2 == 1,
                drop_path=rate,
                extra_norm=extra_norm_period > 0 and (index + 1) % extra_norm_period == 0,
            )
            for index, rate in enumerate(drop_path)
        )
        self.downsample = PatchMerging(dim) if merge else None

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(B, H, W, C) → what the next stage reads, and the map before merging."""
        mask = self.windows.mask_for(x.shape[1], x.shape[2])
        for block in self.blocks:
            if self.activation_checkpointing and self.training and torch.is_grad_enabled():
                x = cast(Tensor, checkpoint(block, x, self.windows, mask, use_reentrant=False))
            else:
                x = block(x, self.windows, mask)
        return (x if self.downsample is None else self.downsample(x)), x


class Block(nn.Module):
    """Res-post-norm (section 3.2): x + DropPath(norm1(attention(x))), then x + DropPath(norm2(mlp(x)))."""

    def __init__(
        self, dim: int, num_heads: int, *, shifted: bool, drop_path: float, extra_norm: bool
    ) -> None:
        super().__init__()
        self.shifted = shifted
        self.attn = WindowAttention(dim, num_heads)
        self.norm1 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, 4 * dim)
        self.norm2 = nn.LayerNorm(dim)
        self.drop_path = DropPath(drop_path)
        # The huge models normalise the main branch itself "every 6 layers", counted within the stage.
        self.norm3 = nn.LayerNorm(dim) if extra_norm else None

    def forward(self, x: Tensor, windows: WindowGeometry, shift_mask: Tensor | None) -> Tensor:
        x = x + self.drop_path(self.norm1(self.attn(x, windows, shift_mask if self.shifted else None)))
        x = x + self.drop_path(self.norm2(self.mlp(x)))
        return x if self.norm3 is None else cast(Tensor, self.norm3(x))


class Mlp(nn.Module):
    """Linear, GELU, Linear."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.fc2(F.gelu(self.fc1(x))))


class PatchMerging(nn.Module):
    """Four neighbours → one token of twice the width: (B, H, W, C) → (B, ⌈H/2⌉, ⌈W/2⌉, 2C).

    V2 reduces first and normalises the 2C channels afterwards. Odd maps get one row or column of zeros.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False)
        self.norm = nn.LayerNorm(2 * dim)

    def forward(self, x: Tensor) -> Tensor:
        height, width, dim = x.shape[1:]
        if height % 2 or width % 2:
            x = F.pad(x, (0, 0, 0, width % 2, 0, height % 2))
        rows, columns = -(-height // 2), -(-width // 2)
        # Channel order (row, column): (0,0), (1,0), (0,1), (1,1).
        x = x.reshape(-1, rows, 2, columns, 2, dim).permute(0, 1, 3, 4, 2, 5)
        return cast(Tensor, self.norm(self.reduction(x.reshape(-1, rows, columns, 4 * dim))))


class DropPath(nn.Module):
    """Stochastic depth (arXiv 1603.09382): drops a residual branch per sample, keeps its expectation."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        if self.rate == 0.0 or not self.training:
            return x
        keep = 1.0 - self.rate
        return x * x.new_empty((x.shape[0], 1, 1, 1)).bernoulli_(keep).div_(keep)

    def extra_repr(self) -> str:
        return f"rate={self.rate:.3f}"


def _check_geometry(
    size: SwinV2Size,
    image_size: int,
    patch_size: int,
    drop_path: float,
    rule: WindowRule,
    pretrained_windows: tuple[int, ...],
) -> None:
    stages = len(size.depths)
    if len(size.num_heads) != stages:
        raise ValueError(f"{stages} stages need as many head counts, but num_heads is {size.num_heads}.")
    for stage, heads in enumerate(size.num_heads):
        if size.embed_dim * 2**stage % heads:
            raise ValueError(
                f"{heads} heads do not divide the {size.embed_dim * 2**stage} channels of stage {stage}."
            )
    if len(pretrained_windows) != stages:
        raise ValueError(
            f"pretrained_windows has {len(pretrained_windows)} entries, but this backbone has {stages} "
            "stages: give one window per stage."
        )
    if not 0.0 <= drop_path < 1.0:
        raise ValueError(f"drop_path is {drop_path}, but must lie in 0 <= x < 1.")
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
