"""From files on disk to validated samples to batches.

ingest: readers → inspection → splits → shards, manifest
scale: subsets
training and evaluation: dataset → augmentation → batches → mixing, or views (kornia, imported only there)
"""

from flows.data.augmentation import Augmentation, ImageTransform
from flows.data.batches import (
    Batch,
    eval_batches,
    even_eval_batches,
    preprocessing_for,
    to_model_input,
    train_batches,
)
from flows.data.dataset import ImageDataset
from flows.data.manifest import Manifest
from flows.data.manifest import load as load_manifest
from flows.data.mixing import mix
from flows.data.rand_augment import RandAugment
from flows.data.subsets import load_smallest_subset, load_subset

__all__ = [
    "Augmentation",
    "Batch",
    "ImageDataset",
    "ImageTransform",
    "Manifest",
    "RandAugment",
    "eval_batches",
    "even_eval_batches",
    "load_manifest",
    "load_smallest_subset",
    "load_subset",
    "mix",
    "preprocessing_for",
    "to_model_input",
    "train_batches",
]
