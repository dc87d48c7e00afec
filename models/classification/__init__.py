"""Image classification: the head on a backbone."""

from models.classification.classifier import Classifier

__all__ = ["Classifier"]
