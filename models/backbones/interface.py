"""What every backbone offers to the heads and the pretext tasks, whichever network it is.

Heads and pretext tasks are written against this protocol alone: a new backbone needs nothing of them, and
they need nothing of it. The one invariant: all sizes are Python integers that are known before the first
forward pass.

Shape legend: B batch, H×W the image in pixels, C channels.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol, Self

from torch import Tensor, nn


class Backbone(Protocol):
    """An ``nn.Module`` that turns images into a map of tokens.

    Attributes:
        image_size: nominal side of the square input in pixels.
        patch_size: side of a token in pixels where mask tokens enter.
        stride: pixels per token of the final map.
        num_features: channels of the final map and of the embedding.
        embed_dim: channels of a token where mask tokens enter.
        depths: blocks per stage; one number where there are no stages.
        num_layers: blocks in total.
        feature_channels: channels of each of the ``feature_maps``.
    """

    image_size: int
    patch_size: int
    stride: int
    num_features: int
    embed_dim: int
    depths: tuple[int, ...]
    num_layers: int
    feature_channels: tuple[int, ...]

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) → the normalised map (B, num_features, H/stride, W/stride)."""
        ...

    def __call__(self, images: Tensor) -> Tensor:
        """``forward``, with the hooks of the module."""
        ...

    def forward_features(
        self, images: Tensor, mask: Tensor | None = None, mask_token: Tensor | None = None
    ) -> Tensor:
        """As ``forward``, with ``mask_token`` in place of the tokens where ``mask`` is set.

        ``mask`` is (B, H/patch, W/patch) bool, ``mask_token`` (1, 1, embed_dim). Give both or neither.
        """
        ...

    def embedding(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) → one vector per image (B, num_features), what a classification head reads."""
        ...

    def feature_maps(self, images: Tensor, indices: Sequence[int] | None = None) -> list[Tensor]:
        """(B, C, H', W') after each stage, or after each block where there are no stages.

        For dense prediction and for probing inside; the last norm is not applied. ``indices`` chooses some,
        from 0; what lies above the last of them is not computed.
        """
        ...

    # What users of a backbone need of nn.Module; every backbone is one.

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        """Those of ``nn.Module``."""
        ...

    def modules(self) -> Iterator[nn.Module]:
        """Those of ``nn.Module``."""
        ...

    def train(self, mode: bool = True) -> Self:
        """That of ``nn.Module``."""
        ...

    def eval(self) -> Self:
        """That of ``nn.Module``."""
        ...
