"""How good a classifier is, and how far its word can be trusted. Pure functions of logits and labels.

Calibration follows Guo et al., "On Calibration of Modern Neural Networks" (ICML 2017), sections 2 and 3:
equal-width bins of the largest softmax probability, closed on the right. Intervals: Wilson (1927) for one
accuracy, Agresti and Min (2005) for the difference of two classifiers on the same images.

Legend: N images, C classes. Probabilities are computed in float64: sums over many images lose nothing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

Z_95 = 1.959963984540054
"""Two-sided 95 % quantile of the normal distribution."""


@dataclass(frozen=True)
class ClassScores:
    """Per-class scores, each of shape (C,); precision and recall are 0 where they are undefined."""

    precision: Tensor
    recall: Tensor
    f1: Tensor
    support: Tensor  # int64, images whose label is the class


@dataclass(frozen=True)
class ReliabilityBin:
    """One confidence bin `(lower, upper]`; an empty one has confidence and accuracy 0."""

    lower: float
    upper: float
    count: int
    confidence: float  # mean over the bin's images
    accuracy: float


@dataclass(frozen=True)
class Interval:
    """A value with its 95 % confidence limits."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Summary:
    """The scalars of one evaluation; all fractions, except `nll` in nats and `brier` in 0-2."""

    top1: float
    top5: float
    nll: float
    ece: float
    brier: float
    top1_low: float
    top1_high: float
    images: int


def check_batch(logits: Tensor, labels: Tensor) -> None:
    """Check logits (N, C) against labels (N,).

    Raises:
        ValueError: wrong shapes, no image, no class, a label outside 0…C-1, or logits that are not finite.
    """
    if logits.ndim != 2 or labels.shape != logits.shape[:1]:
        raise ValueError(
            f"need logits (N, C) and labels (N,), got {tuple(logits.shape)} and {tuple(labels.shape)}"
        )
    count, classes = logits.shape
    if count == 0 or classes == 0:
        raise ValueError(f"need at least one image and one class, got logits of shape {tuple(logits.shape)}")
    if int(labels.min()) < 0 or int(labels.max()) >= classes:
        raise ValueError(f"labels must lie in 0…{classes - 1}, got {int(labels.min())}…{int(labels.max())}")
    if not bool(torch.isfinite(logits).all()):
        raise ValueError("logits contain values that are not finite")


def probabilities(logits: Tensor) -> Tensor:
    """Softmax of logits (N, C) in float64."""
    return logits.double().softmax(dim=1)


def topk_accuracy(logits: Tensor, labels: Tensor, k: int) -> float:
    """Fraction of images (N, C) whose label (N,) is among the `k` largest logits; `k` above C counts as C.

    The rank of a label is the number of larger logits plus the equal ones before it, as with a stable
    descending sort: ties (a constant model, say) cannot count in favour of every class at once.
    """
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    check_batch(logits, labels)
    own = logits.gather(1, labels[:, None])  # (N, 1)
    earlier = torch.arange(logits.shape[1], device=logits.device) < labels[:, None]  # (N, C)
    rank = ((logits > own) | ((logits == own) & earlier)).sum(dim=1)
    return float((rank < k).double().mean())


def predict(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Predicted class (N,) int64, the first of several maxima, and its probability (N,) float64."""
    predicted = logits.argmax(dim=1)
    confidence = probabilities(logits).gather(1, predicted[:, None])[:, 0]
    return predicted, confidence


def negative_log_likelihood(logits: Tensor, labels: Tensor) -> float:
    """Mean of -log p(label), nats."""
    check_batch(logits, labels)
    return float(-logits.double().log_softmax(dim=1).gather(1, labels[:, None]).mean())


def brier_score(logits: Tensor, labels: Tensor) -> float:
    """Mean squared distance between probabilities and one-hot label; 0 is perfect, 2 the worst."""
    check_batch(logits, labels)
    distance = probabilities(logits)
    distance[torch.arange(len(labels), device=labels.device), labels] -= 1.0
    return float(distance.square().sum(dim=1).mean())


def confusion_matrix(labels: Tensor, predicted: Tensor, classes: int) -> Tensor:
    """Counts (C, C) int64: row = label, column = prediction."""
    if labels.shape != predicted.shape or labels.ndim != 1:
        raise ValueError(
            f"need two vectors of one length, got {tuple(labels.shape)} and {tuple(predicted.shape)}"
        )
    for name, values in (("labels", labels), ("predictions", predicted)):
        if len(values) and (int(values.min()) < 0 or int(values.max()) >= classes):
            raise ValueError(
                f"{name} must lie in 0…{classes - 1}, got {int(values.min())}…{int(values.max())}"
            )
    return torch.bincount(labels * classes + predicted, minlength=classes * classes).view(classes, classes)


def class_scores(confusion: Tensor) -> ClassScores:
    """Precision, recall, F1 and support from a confusion matrix (C, C) with labels in rows."""
    hits = confusion.diagonal().double()
    support, predicted = confusion.sum(dim=1), confusion.sum(dim=0)
    return ClassScores(
        precision=hits / predicted.clamp(min=1),
        recall=hits / support.clamp(min=1),
        f1=2.0 * hits / (support + predicted).clamp(min=1),  # = harmonic mean, and 0 instead of 0/0
        support=support,
    )


def reliability_table(confidence: Tensor, correct: Tensor, bins: int) -> list[ReliabilityBin]:
    """Confidence (N,) against accuracy in equal-width bins ((m-1)/M, m/M]; confidence 0 joins the first.

    Raises:
        ValueError: `bins` below 1, unequal lengths or a confidence outside 0-1.
    """
    if bins < 1:
        raise ValueError(f"bins must be at least 1, got {bins}")
    if confidence.ndim != 1 or confidence.shape != correct.shape:
        raise ValueError(
            f"need two vectors of one length, got {tuple(confidence.shape)}, {tuple(correct.shape)}"
        )
    confidence, hits = confidence.double(), correct.double()
    if len(confidence) and not 0.0 <= float(confidence.min()) <= float(confidence.max()) <= 1.0 + 1e-9:
        raise ValueError("confidences must lie in 0…1")
    edges = torch.arange(1, bins, dtype=torch.float64, device=confidence.device) / bins
    index = torch.bucketize(confidence, edges)  # right=False: edges[i-1] < value <= edges[i]
    counts = torch.bincount(index, minlength=bins)
    mean_confidence = torch.bincount(index, weights=confidence, minlength=bins) / counts.clamp(min=1)
    accuracy = torch.bincount(index, weights=hits, minlength=bins) / counts.clamp(min=1)
    return [
        ReliabilityBin(
            m / bins, (m + 1) / bins, int(counts[m]), float(mean_confidence[m]), float(accuracy[m])
        )
        for m in range(bins)
    ]


def expected_calibration_error(table: list[ReliabilityBin]) -> float:
    """Mean gap between accuracy and confidence, weighted by the bins' counts (Guo et al., equation 3)."""
    total = sum(row.count for row in table)
    return sum(row.count * abs(row.accuracy - row.confidence) for row in table) / total if total else 0.0


def wilson_interval(hits: int, total: int, z: float = Z_95) -> Interval:
    """Score interval of a fraction: honest near 0 and 1 and for few images, where hits/total ± z·σ is not.

    Raises:
        ValueError: `total` below 1 or `hits` outside 0…total.
    """
    if total < 1 or not 0 <= hits <= total:
        raise ValueError(f"need 0 <= hits <= total and total >= 1, got {hits} of {total}")
    fraction = hits / total
    centre = (fraction + z * z / (2 * total)) / (1 + z * z / total)
    half = (
        z * math.sqrt(fraction * (1 - fraction) / total + z * z / (4 * total * total)) / (1 + z * z / total)
    )
    # at 0 and 1 the limits are exact; rounding would leave them a hair inside
    low = 0.0 if hits == 0 else centre - half
    high = 1.0 if hits == total else centre + half
    return Interval(fraction, low, high)


def paired_difference(first: Tensor, second: Tensor, z: float = Z_95) -> Interval:
    """Accuracy of `first` minus that of `second`, each (N,) bool "answered correctly", on the same images.

    Pairing matters: both miss the same hard images, and treating the two as independent would make the
    interval too wide. Limits are those of Agresti and Min: half an image joins each cell of the 2 x 2 table.
    """
    if first.ndim != 1 or first.shape != second.shape or len(first) == 0:
        raise ValueError(
            f"need two vectors of one length above 0, got {tuple(first.shape)}, {tuple(second.shape)}"
        )
    first, second = first.bool(), second.bool()
    total = len(first)
    gained, lost = int((first & ~second).sum()), int((~first & second).sum())
    adjusted, discordant = total + 2, gained + lost + 1
    centre = (gained - lost) / adjusted
    half = z * math.sqrt(max(discordant - (gained - lost) ** 2 / adjusted, 0.0)) / adjusted
    return Interval((gained - lost) / total, max(-1.0, centre - half), min(1.0, centre + half))


def summarize(logits: Tensor, labels: Tensor, bins: int) -> Summary:
    """All scalars of one evaluation: logits (N, C), labels (N,), `bins` of the calibration error."""
    check_batch(logits, labels)
    predicted, confidence = predict(logits)
    correct = predicted == labels
    interval = wilson_interval(int(correct.sum()), len(labels))
    return Summary(
        top1=interval.value,
        top5=topk_accuracy(logits, labels, 5),
        nll=negative_log_likelihood(logits, labels),
        ece=expected_calibration_error(reliability_table(confidence, correct, bins)),
        brier=brier_score(logits, labels),
        top1_low=interval.low,
        top1_high=interval.high,
        images=len(labels),
    )
