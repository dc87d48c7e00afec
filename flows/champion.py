"""Judge a registered model now, image by image, on the present evaluation split.

Accuracies that were recorded on different images, or by different code, say nothing about each other.
Champion and challenger are both run through the code that serves them, each with its own preprocessing.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from flows import paths, registry
from flows.data import ImageDataset
from flows.errors import DataError
from flows.imaging import preprocess
from flows.params import Params
from flows.registry import Version
from flows.serving.package import ModelPackage
from flows.serving.session import open_session


@dataclass(frozen=True)
class Verdicts:
    """One model on one split, in the split's order."""

    correct: NDArray[np.bool_]  # (n,)
    labels: NDArray[np.int64]  # (n,), positions in `classes`
    classes: tuple[str, ...]  # of the data set

    @property
    def top1(self) -> float:
        return float(self.correct.mean())


def judge_version(params: Params, root: Path, version: Version) -> Verdicts:
    """The registered `version` on the images of `root`; see `judge_folder`."""
    with tempfile.TemporaryDirectory() as temporary:
        registry.download_version(params, version, Path(temporary))
        return judge_folder(params, root, Path(temporary), version.tags.get("onnx.digest"))


def judge_folder(params: Params, root: Path, folder: Path, digest: str | None = None) -> Verdicts:
    """The fp32 model in `folder` on the split `evaluate.split` of `root`/artifacts/data.

    The model's classes are matched by name: the order of labels may differ between two states of a data set.

    Raises:
        DataError: the files are not those that were exported, or the class names are not the same set.
    """
    package = ModelPackage.open(folder, variants=("fp32",), digest=digest)
    dataset = ImageDataset(
        root / paths.DATA, params.evaluate.split, cache_mb=0, max_pixels=params.ingest.max_pixels
    )
    if not len(dataset):
        raise DataError(f"the {params.evaluate.split} split has no images to judge a model on")
    labels, classes = package.manifest.labels, dataset.manifest.classes
    if set(labels) != set(classes):
        odd = ", ".join(sorted(set(labels) ^ set(classes))[:5])
        raise DataError(f"it knows other classes than the data has ({odd})")
    to_class = np.asarray([classes.index(label) for label in labels])
    session = open_session(package.path("fp32"), params.serve.providers, params.serve.threads)
    batch = min(params.evaluate.batch_size, package.manifest.max_batch)
    answers = []
    for start in range(0, len(dataset), batch):
        rows = range(start, min(start + batch, len(dataset)))
        images = np.stack([preprocess(dataset.image(row), package.manifest.preprocessing) for row in rows])
        answers.append(to_class[session.run(images).argmax(axis=1)])
    return Verdicts(np.concatenate(answers) == dataset.labels, dataset.labels, tuple(classes))
