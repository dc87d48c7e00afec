"""Published checkpoints ↔ ours: the layouts of the authors' releases, timm, transformers and torchvision.

``load`` puts a checkpoint into a model; ``describe`` says what model it is of; ``convert`` brings it into
another layout. All of them refuse by name what does not fit, and report what became of every tensor. How a
checkpoint flows: ``reading`` (file → tensors) → ``layouts`` (→ our names) → ``description`` (→ sizes) →
``fitting`` (→ exactly the model's parameters) → ``loading`` or ``exporting``.

This package and nothing else in ``models`` reads files.
"""

from models.checkpoints.conversion import Converted, Geometry, convert
from models.checkpoints.description import Description
from models.checkpoints.errors import CheckpointError
from models.checkpoints.exporting import TARGETS
from models.checkpoints.loading import infer_model, load
from models.checkpoints.reading import Weights, read
from models.checkpoints.report import Report

__all__ = [
    "TARGETS",
    "CheckpointError",
    "Converted",
    "Description",
    "Geometry",
    "Report",
    "Weights",
    "convert",
    "infer_model",
    "load",
    "read",
]
