"""A seeded sample of a split, preprocessed as the server does: for calibrating int8 and for parity."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from flows.data import ImageDataset
from flows.imaging import Preprocessing, preprocess


def draw_samples(
    root: Path, split: str, count: int, *, seed: int, preprocessing: Preprocessing, max_pixels: int
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """At most `count` images of a split, in the split's order: (n, 3, S, S) and labels (n,).

    Raises:
        DataError: no such split, or damaged data.
    """
    dataset = ImageDataset(root, split, cache_mb=0, max_pixels=max_pixels)
    chosen = np.random.default_rng(seed).choice(len(dataset), min(count, len(dataset)), replace=False)
    rows = [int(row) for row in np.sort(chosen)]
    images = [preprocess(dataset.image(row), preprocessing) for row in rows]
    return np.stack(images), np.asarray(dataset.labels, dtype=np.int64)[rows]
