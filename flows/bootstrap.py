"""Bootstrap intervals of an accuracy and of the difference of two accuracies on the same images; likewise of
bits per byte on the same documents.

Paired: an image is drawn together with both models' verdicts on it, so that what is hard for both cancels.
Stratified: every class keeps its number of images. Intervals are percentiles (Efron and Tibshirani 1993,
chapter 13).

A resample of n right-or-wrong verdicts is known from how often each kind was drawn, and drawing n images with
replacement makes these counts multinomial. So counts are drawn instead of images: the same distribution, and
memory that does not grow with the number of images.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Interval:
    """A measured value and its bootstrap interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.4f} ({self.low:.4f} to {self.high:.4f})"


@dataclass(frozen=True)
class PairedAccuracy:
    """Two models on the same images; fractions."""

    first: Interval
    second: Interval
    gain: Interval
    """`second` minus `first`."""


def compare_accuracy(
    first: NDArray[np.bool_],
    second: NDArray[np.bool_],
    labels: NDArray[np.int64],
    *,
    resamples: int,
    confidence: float,
    seed: int,
) -> PairedAccuracy:
    """Intervals for two models.

    Args:
        first, second: whether each image was answered correctly, (n,).
        labels: the strata, (n,).

    Raises:
        ValueError: no images, or arrays of different lengths.
    """
    if not len(labels) or not len(first) == len(second) == len(labels):
        raise ValueError(f"{len(first)} and {len(second)} verdicts on {len(labels)} images")
    kinds = 2 * first.astype(np.int64) + second  # 0 both wrong, 1 only second right, 2 only first, 3 both
    counts = np.zeros((len(np.unique(labels)), 4), dtype=np.int64)  # (classes, kinds)
    np.add.at(counts, (np.unique(labels, return_inverse=True)[1], kinds), 1)

    generator = np.random.default_rng(seed)
    drawn = np.zeros((resamples, 4), dtype=np.int64)  # (resamples, kinds), summed over classes
    for row in counts:
        drawn += generator.multinomial(row.sum(), row / row.sum(), size=resamples)

    total = len(labels)
    tails = [50.0 * (1.0 - confidence), 50.0 * (1.0 + confidence)]

    def interval(weights: list[int]) -> Interval:
        # one division of whole numbers: 353/360 - 350/360 must not depend on rounding
        value = int(counts.sum(axis=0) @ weights) / total
        low, high = np.percentile(drawn @ np.asarray(weights) / total, tails)
        return Interval(value, float(low), float(high))

    return PairedAccuracy(interval([0, 0, 1, 1]), interval([0, 1, 0, 1]), interval([0, 1, -1, 0]))


@dataclass(frozen=True)
class PairedRate:
    """Two models on the same documents: a sum per unit of size, smaller is better."""

    first: Interval
    second: Interval
    gain: Interval
    """`first` minus `second`."""


def compare_rates(
    first: NDArray[np.float64],
    second: NDArray[np.float64],
    sizes: NDArray[np.int64],
    *,
    resamples: int,
    confidence: float,
    seed: int,
) -> PairedRate:
    """Intervals for sum(cost) / sum(size) of two models, by drawing whole documents with both models' costs.

    Args:
        first, second: cost of each document, (n,).
        sizes: of each document, (n,), positive.

    Raises:
        ValueError: no documents, or arrays of different lengths.
    """
    if not len(sizes) or not len(first) == len(second) == len(sizes):
        raise ValueError(f"{len(first)} and {len(second)} costs of {len(sizes)} documents")
    generator = np.random.default_rng(seed)
    chance = np.full(len(sizes), 1 / len(sizes))
    drawn = generator.multinomial(len(sizes), chance, size=resamples)  # (resamples, n): how often each
    total = drawn @ sizes
    tails = [50.0 * (1.0 - confidence), 50.0 * (1.0 + confidence)]

    def interval(costs: NDArray[np.float64]) -> Interval:
        low, high = np.percentile(drawn @ costs / total, tails)
        return Interval(float(costs.sum() / sizes.sum()), float(low), float(high))

    return PairedRate(interval(first), interval(second), interval(first - second))


def recall_by_class(
    correct: NDArray[np.bool_], labels: NDArray[np.int64], num_classes: int
) -> NDArray[np.float64]:
    """Fraction of each class's images that were answered correctly, (num_classes,); NaN for a class without
    images."""
    images = np.bincount(labels, minlength=num_classes)
    hits = np.bincount(labels[correct], minlength=num_classes)
    recalls = np.full(num_classes, np.nan)
    np.divide(hits, images, out=recalls, where=images > 0)
    return recalls
