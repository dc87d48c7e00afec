"""What the monitor remembers of a served image: a few dozen numbers, never the image.

The same function describes the reference images at export and the served ones in production, so that a
difference between the two is a difference of the images. All of it is NumPy on what the server holds anyway:
the preprocessed batch and the network's two outputs.

Legend: n images, S pixels per side, C features, D embedding dimensions, K classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray

PIXEL_STATISTICS = (
    *("mean_r", "mean_g", "mean_b", "std_r", "std_g", "std_b"),
    *("saturation", "sharpness", "flatness"),
)
"""Columns of `Records.pixels`. Images are normalised by the training images' mean and standard deviation, so
the unit is one such standard deviation, and a usual image has means near 0 and deviations near 1. Flatness is
a fraction."""
FLAT = 0.02  # neighbours that differ less are the same colour: about one 8-bit step


@dataclass(frozen=True)
class Projection:
    """Random directions on which features are remembered: D numbers instead of C.

    A Gaussian projection keeps distances up to a known error (Johnson and Lindenstrauss, 1984), and a shift
    of the features that all of its directions miss is improbable. Seed and sizes define it: nothing is
    stored.
    """

    seed: int
    features: int  # C
    dims: int  # D; C or more keeps the features as they are

    def matrix(self) -> NDArray[np.float32]:
        """(C, D), or the identity."""
        if self.dims >= self.features:
            return np.eye(self.features, dtype=np.float32)
        # RandomState, because NumPy promises that its stream never changes; that of Generator may, and then a
        # server with another NumPy than the export's would see drift in every image
        directions = np.random.RandomState(self.seed).standard_normal((self.features, self.dims))
        return np.asarray(directions / np.sqrt(self.features), dtype=np.float32)


@dataclass(frozen=True)
class Records:
    """Statistics of n images, one row each."""

    pixels: NDArray[np.float32]  # (n, 9), see PIXEL_STATISTICS
    embedding: NDArray[np.float32]  # (n, D), projected features
    predicted: NDArray[np.int32]  # (n,), class index
    confidence: NDArray[np.float32]  # (n,), largest softmax probability, 0-1
    entropy: NDArray[np.float32]  # (n,), of the softmax probabilities, nats

    def __len__(self) -> int:
        return len(self.predicted)

    def __getitem__(self, rows: slice | NDArray[np.int64]) -> Records:
        return Records(**{field.name: getattr(self, field.name)[rows] for field in fields(self)})

    @classmethod
    def concatenate(cls, parts: list[Records]) -> Records:
        return cls(
            **{
                field.name: np.concatenate([getattr(part, field.name) for part in parts])
                for field in fields(cls)
            }
        )


def describe(
    images: NDArray[np.float32],
    logits: NDArray[np.float32],
    features: NDArray[np.float32],
    matrix: NDArray[np.float32],
) -> Records:
    """Statistics of a batch: images (n, 3, S, S), logits (n, K), features (n, C), projection (C, D)."""
    confidence, entropy = confidences(logits)
    return Records(
        pixels=pixel_statistics(images),
        embedding=(features @ matrix).astype(np.float32),
        predicted=logits.argmax(axis=1).astype(np.int32),
        confidence=confidence,
        entropy=entropy,
    )


def pixel_statistics(images: NDArray[np.float32]) -> NDArray[np.float32]:
    """(n, 3, S, S) → (n, 9): mean and standard deviation per channel, then three of the whole image.

    Saturation is the mean distance of the largest from the smallest channel. Sharpness is the mean absolute
    Laplacian (four neighbours) over the inner pixels of all channels: noise raises it, blur lowers it; it is
    0 for images without inner pixels. Flatness is the share of horizontal neighbours that are equal up to
    `FLAT`: pixelation and compression raise it, and so does an exposure that clips.
    """
    inner = images[:, :, 1:-1, 1:-1]
    if inner.size:
        laplacian = 4.0 * inner
        laplacian -= images[:, :, :-2, 1:-1]
        laplacian -= images[:, :, 2:, 1:-1]
        laplacian -= images[:, :, 1:-1, :-2]
        laplacian -= images[:, :, 1:-1, 2:]
        sharpness = np.abs(laplacian).mean(axis=(1, 2, 3))
    else:
        sharpness = np.zeros(len(images))
    steps = np.abs(np.diff(images, axis=3))
    flatness = (steps < FLAT).mean(axis=(1, 2, 3)) if steps.size else np.zeros(len(images))
    saturation = (images.max(axis=1) - images.min(axis=1)).mean(axis=(1, 2))
    whole = np.stack([saturation, sharpness, flatness], axis=1)
    return np.concatenate(
        [images.mean(axis=(2, 3)), images.std(axis=(2, 3)), whole],
        axis=1,
        dtype=np.float32,
        casting="same_kind",
    )


def confidences(logits: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Largest softmax probability and entropy (nats) of each row of (n, K)."""
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    log_total = np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    log_probabilities = shifted - log_total
    probabilities = np.exp(log_probabilities)
    # where p is 0, log p is finite (the shifted logit), so p log p is 0 as it should be
    entropy = -(probabilities * log_probabilities).sum(axis=1)
    return probabilities.max(axis=1).astype(np.float32), entropy.astype(np.float32)


def is_finite(records: Records) -> bool:
    """False when any number is NaN or infinite: such an image cannot be compared."""
    return all(np.isfinite(getattr(records, field.name)).all() for field in fields(Records))


def to_tensors(records: Records, prefix: str) -> dict[str, NDArray[np.generic]]:
    """Arrays by name, for a file of several records."""
    return {f"{prefix}.{field.name}": getattr(records, field.name) for field in fields(Records)}


def from_tensors(tensors: Mapping[str, NDArray[np.generic]], prefix: str) -> Records:
    """Inverse of `to_tensors`.

    Raises:
        KeyError: an array is absent.
    """
    return Records(**{field.name: tensors[f"{prefix}.{field.name}"] for field in fields(Records)})  # type: ignore[arg-type]
