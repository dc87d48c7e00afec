"""Heads of SimMIM (arXiv 2111.09886, section 4.1.3): from the backbone's final map to the predicted image.

The paper's point is that one linear layer suffices; the heavier heads are there to show it. All of them end
in a pixel shuffle: channel c·r² + i·r + j of a cell becomes pixel (i, j) of channel c within it.

Shape legend: B batch, F channels and G×G tokens of the backbone's final map, T side of the predicted image.
"""

from __future__ import annotations

from typing import Any, Literal, cast, get_args

import torch.nn.functional as F
from torch import Tensor, nn

from models import BACKBONES, SwinV2, create

HeadKind = Literal["linear", "mlp", "inverse_swin"]
HEAD_KINDS: tuple[str, ...] = get_args(HeadKind)


def build_head(
    kind: HeadKind,
    *,
    num_features: int,
    grid: int,
    target_size: int,
    inverse_swin: str = "",
    window_size: int = 0,
) -> nn.Module:
    """A module (B, F, G, G) → (B, 3, T, T).

    Args:
        inverse_swin: name of the Swin V2 whose stages the head of that kind runs backwards.
        window_size: of those stages, in tokens.

    Raises:
        ValueError: the kind or the name is unknown, or the sizes do not fit.
    """
    if kind == "inverse_swin":
        if not inverse_swin.startswith("swin_v2_") or inverse_swin not in BACKBONES:
            known = ", ".join(name for name in BACKBONES if name.startswith("swin_v2_"))
            raise ValueError(f"inverse_swin is {inverse_swin!r}, but the head needs one of {known}.")
        if window_size < 1:
            raise ValueError("head inverse_swin needs a window_size, in tokens, for its stages.")
        return InverseSwin(num_features, grid, target_size, inverse_swin, window_size)
    cell = pixels_per_token(grid, target_size)
    if kind == "linear":
        hidden: list[nn.Module] = []
    elif kind == "mlp":
        hidden = [nn.Conv2d(num_features, num_features, kernel_size=1), nn.GELU()]
    else:
        raise ValueError(f"head is {kind!r}, but must be one of {', '.join(HEAD_KINDS)}.")
    return nn.Sequential(*hidden, nn.Conv2d(num_features, 3 * cell**2, kernel_size=1), nn.PixelShuffle(cell))


def pixels_per_token(grid: int, target_size: int) -> int:
    """Side of a token's cell in the target.

    Raises:
        ValueError: a token has no whole number of pixels.
    """
    if target_size < 1 or target_size % grid:
        raise ValueError(
            f"target_size is {target_size}, but the head predicts from {grid}x{grid} tokens: choose a "
            f"multiple of {grid}."
        )
    return target_size // grid


class InverseSwin(nn.Module):
    """The stages of a Swin in reverse order, with patch splitting where the network merges.

    A linear layer maps the backbone's channels to those of the last stage, another one each token of the
    first stage to its pixels.
    """

    def __init__(self, num_features: int, grid: int, target_size: int, name: str, window_size: int) -> None:
        super().__init__()
        # as many doublings as the named network has halvings; its stages then stand on just these maps
        stages = len(BACKBONES[name].depths)
        side = grid * 2 ** (stages - 1)
        self.cell = pixels_per_token(side, target_size)
        forwards = create(
            name, image_size=side, patch_size=1, window_size=min(window_size, side), window_rule="pad"
        )
        if not isinstance(forwards, SwinV2):
            raise ValueError(f"inverse_swin is {name!r}, which is no Swin V2.")
        self.embed = nn.Linear(num_features, forwards.num_features)
        self.layers = nn.ModuleList(reversed(forwards.layers))
        self.splits = nn.ModuleList()
        for layer in self.layers:
            cast(Any, layer).downsample = None
        for stage in range(stages - 1, 0, -1):
            self.splits.append(_PatchSplitting(forwards.embed_dim * 2**stage))
        self.norm = nn.LayerNorm(forwards.embed_dim)
        self.pixels = nn.Linear(forwards.embed_dim, 3 * self.cell**2)
        for layer in (self.embed, self.pixels):
            nn.init.trunc_normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)

    def forward(self, features: Tensor) -> Tensor:
        """(B, F, G, G) → (B, 3, T, T)."""
        x, _ = self.layers[0](self.embed(features.permute(0, 2, 3, 1)))
        for split, layer in zip(self.splits, self.layers[1:], strict=True):
            x, _ = layer(split(x))
        return F.pixel_shuffle(self.pixels(self.norm(x)).permute(0, 3, 1, 2), self.cell)


class _PatchSplitting(nn.Module):
    """One token → four neighbours of half the width: (B, H, W, C) → (B, 2H, 2W, C/2)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.expansion = nn.Linear(dim, 2 * dim, bias=False)
        self.norm = nn.LayerNorm(dim // 2)
        nn.init.trunc_normal_(self.expansion.weight, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        x = F.pixel_shuffle(self.expansion(x).permute(0, 3, 1, 2), 2).permute(0, 2, 3, 1)
        return cast(Tensor, self.norm(x))
