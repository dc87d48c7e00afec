"""Image classification: one Linear on the backbone's embedding of an image."""

from __future__ import annotations

from typing import cast

from torch import Tensor, nn

from models.backbones.interface import Backbone


class Classifier(nn.Module):
    """A backbone with a linear classification head."""

    def __init__(self, backbone: Backbone, num_classes: int) -> None:
        super().__init__()
        if num_classes < 1:
            raise ValueError(f"num_classes is {num_classes}, but must be at least 1.")
        self.backbone = backbone
        self.num_classes = num_classes
        self.head = nn.Linear(backbone.num_features, num_classes)
        nn.init.trunc_normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, S, S) → logits (B, num_classes)."""
        return cast(Tensor, self.head(self.features(images)))

    def features(self, images: Tensor) -> Tensor:
        """(B, 3, S, S) → the embedding that the head reads, (B, num_features)."""
        return self.backbone.embedding(images)


class WithFeatures(nn.Module):
    """A classifier that also answers with its embedding: the form that is exported."""

    def __init__(self, classifier: Classifier) -> None:
        super().__init__()
        self.classifier = classifier

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """(B, 3, S, S) → logits (B, num_classes), features (B, num_features)."""
        features = self.classifier.features(images)
        return self.classifier.head(features), features
