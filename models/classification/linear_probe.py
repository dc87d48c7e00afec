"""Linear evaluation: linear classifiers on a frozen backbone (MoBY, arXiv 2105.04553, section 4.1).

The backbone is in eval mode, without gradient and without drop path, whatever mode the probe is in; in the
released code of MoBY it stayed in training mode by mistake. Several heads may learn beside one another, each
at its own rate: they share nothing but the features, which cost nearly all the time.

Shape legend: B batch, G heads, K classes.
"""

from __future__ import annotations

from typing import Self, cast

import torch
from torch import Tensor, nn

from models.backbones.interface import Backbone
from models.classification.classifier import Classifier, pooled_features


class LinearProbe(nn.Module):
    """``heads`` linear classifiers on what ``classifier``'s own head would read."""

    def __init__(self, classifier: Classifier, heads: int) -> None:
        super().__init__()
        self.backbone: Backbone = classifier.backbone
        self.feature = classifier.feature
        cast(nn.Module, self.backbone).requires_grad_(False)
        width = classifier.head.in_features
        self.heads = nn.ModuleList(nn.Linear(width, classifier.num_classes) for _ in range(heads))
        for head in self.heads:
            nn.init.normal_(cast(Tensor, head.weight), std=0.01)
            nn.init.zeros_(cast(Tensor, head.bias))
        self.train()

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        self.backbone.eval()
        return self

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, S, S) → logits (G, B, K)."""
        with torch.no_grad():
            features = pooled_features(self.backbone, images, self.feature)
        return torch.stack([head(features) for head in self.heads])


def classifier_weights(weights: dict[str, Tensor], head: int) -> dict[str, Tensor]:
    """State dict of a ``Classifier`` from that of a ``LinearProbe``, with one of its heads."""
    prefix = f"heads.{head}."
    return {
        name.replace(prefix, "head."): value
        for name, value in weights.items()
        if name.startswith(("backbone.", prefix))
    }
