"""What ingest learns from one look at each image: hash of the pixels, size, sums for mean and deviation."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Triple = tuple[float, float, float]
STD_FLOOR = 1e-3


@dataclass(frozen=True, slots=True)
class Facts:
    pixels_sha256: str
    """Of width, height and RGB values: equal only for identical pictures, however they are encoded."""
    short_side: int
    pixels: int
    sums: NDArray[np.int64]
    """(2, 3): of the values 0–255 and of their squares, per channel. Integers: exact in any order."""


def inspect(image: Image.Image) -> Facts:
    """Facts of a decoded RGB image."""
    width, height = image.size
    digest = hashlib.sha256(f"{width}x{height}:".encode())
    digest.update(image.tobytes())
    counts = np.asarray(image.histogram(), dtype=np.int64).reshape(3, 256)
    values = np.arange(256, dtype=np.int64)
    sums = np.stack([counts @ values, counts @ values**2])
    return Facts(digest.hexdigest(), min(width, height), width * height, sums)


def mean_and_std(facts: Iterable[Facts]) -> tuple[Triple, Triple]:
    """Per channel over all pixels, in 0–1; the deviation is at least 1e-3 so that one may divide by it."""
    pixels = 0
    sums = [[0, 0, 0], [0, 0, 0]]  # Python integers: no overflow, however large the data set
    for fact in facts:
        pixels += fact.pixels
        sums = [
            [a + b for a, b in zip(*pair, strict=True)] for pair in zip(sums, fact.sums.tolist(), strict=True)
        ]
    means = [total / pixels / 255 for total in sums[0]]
    variances = [
        (pixels * square - total**2) / pixels**2 / 255**2 for total, square in zip(*sums, strict=True)
    ]
    stds = [max(variance**0.5, STD_FLOOR) for variance in variances]
    return (means[0], means[1], means[2]), (stds[0], stds[1], stds[2])
