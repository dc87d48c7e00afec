"""Image classification: the head on a backbone."""

from models.classification.classifier import Classifier, WithFeatures
from models.classification.linear_probe import LinearProbe, classifier_weights

__all__ = ["Classifier", "LinearProbe", "WithFeatures", "classifier_weights"]
