"""Image classification: one Linear on the backbone's embedding of an image."""

from __future__ import annotations

from typing import cast

from torch import Tensor, nn

from models.backbones.interface import Backbone


class Classifier(nn.Module):
    """A backbone with a linear classification head.

    Args:
        feature: what the head reads: 0 the backbone's embedding; n the mean over the map after stage n, or
            after block n where there are no stages (masked image modelling keeps its best features below
            the top).
    """

    def __init__(self, backbone: Backbone, num_classes: int, feature: int = 0) -> None:
        super().__init__()
        if num_classes < 1:
            raise ValueError(f"num_classes is {num_classes}, but must be at least 1.")
        self.backbone = backbone
        self.num_classes = num_classes
        self.feature = feature
        self.head = nn.Linear(feature_width(backbone, feature), num_classes)
        nn.init.trunc_normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, S, S) → logits (B, num_classes)."""
        return cast(Tensor, self.head(self.features(images)))

    def features(self, images: Tensor) -> Tensor:
        """(B, 3, S, S) → what the head reads, (B, in_features of the head)."""
        return pooled_features(self.backbone, images, self.feature)


def pooled_features(backbone: Backbone, images: Tensor, feature: int) -> Tensor:
    """One vector per image (B, C), as ``Classifier`` says of ``feature``."""
    if feature == 0:
        return backbone.embedding(images)
    (features,) = backbone.feature_maps(images, [feature - 1])
    return features.mean(dim=(2, 3))


def feature_width(backbone: Backbone, feature: int) -> int:
    """Channels of ``pooled_features``.

    Raises:
        ValueError: there is no such map.
    """
    last = len(backbone.feature_channels)
    if not 0 <= feature <= last:
        raise ValueError(f"feature is {feature}, but must be 0 or a stage or block from 1 to {last}.")
    return backbone.feature_channels[feature - 1] if feature else backbone.num_features


class WithFeatures(nn.Module):
    """A classifier that also answers with its embedding: the form that is exported."""

    def __init__(self, classifier: Classifier) -> None:
        super().__init__()
        self.classifier = classifier

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """(B, 3, S, S) → logits (B, num_classes), features (B, num_features)."""
        features = self.classifier.features(images)
        return self.classifier.head(features), features
