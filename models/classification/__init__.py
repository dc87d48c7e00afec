"""Image classification: the head on a backbone."""

from models.classification.classifier import Classifier, WithFeatures

__all__ = ["Classifier", "WithFeatures"]
