"""Measure a registered model now, on the present evaluation split.

Accuracies that were recorded on different images say nothing about each other. When the data has changed,
champion and challenger are both run through the code that serves them, each with its own preprocessing.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np

from flows import paths, registry
from flows.data import ImageDataset
from flows.errors import DataError
from flows.imaging import preprocess
from flows.params import Params
from flows.registry import Version
from flows.serving.package import ModelPackage
from flows.serving.session import open_session


def measure_version(params: Params, root: Path, version: Version) -> float:
    """Top-1 of the registered `version` on the images of `root`; see `measure_folder`."""
    with tempfile.TemporaryDirectory() as temporary:
        registry.download_version(params, version, Path(temporary))
        return measure_folder(params, root, Path(temporary), version.tags.get("onnx.digest"))


def measure_folder(params: Params, root: Path, folder: Path, digest: str | None = None) -> float:
    """Top-1 (fraction) of the fp32 model in `folder` on the split `evaluate.split` of `root`/artifacts/data.

    The model's classes are matched by name: the order of labels may differ between two states of a data set.

    Raises:
        DataError: the files are not those that were exported, or the class names are not the same set.
    """
    package = ModelPackage.open(folder, variants=("fp32",), digest=digest)
    dataset = ImageDataset(
        root / paths.DATA, params.evaluate.split, cache_mb=0, max_pixels=params.ingest.max_pixels
    )
    labels, classes = package.manifest.labels, dataset.manifest.classes
    if set(labels) != set(classes):
        odd = ", ".join(sorted(set(labels) ^ set(classes))[:5])
        raise DataError(f"it knows other classes than the data has ({odd})")
    to_class = np.asarray([classes.index(label) for label in labels])
    session = open_session(package.path("fp32"), params.serve.providers, params.serve.threads)
    batch = min(params.evaluate.batch_size, package.manifest.max_batch)
    correct = 0
    for start in range(0, len(dataset), batch):
        rows = range(start, min(start + batch, len(dataset)))
        images = np.stack([preprocess(dataset.image(row), package.manifest.preprocessing) for row in rows])
        answers = to_class[session.run(images).argmax(axis=1)]
        correct += int((answers == dataset.labels[rows.start : rows.stop]).sum())
    return correct / len(dataset)
