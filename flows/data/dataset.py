"""The images of one split, by position: encoded bytes, decoded pictures, labels."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from flows import imaging
from flows.data import manifest as manifests
from flows.data.shards import ShardReader, read_index
from flows.errors import DataError


class ImageDataset:
    """Random access to a split of an ingested data set, or to some of its rows.

    Decoded images stay in memory up to `cache_mb`; later ones are decoded again each time. (Evicting older
    ones would not help: training visits all images once per epoch, in a new order each time.)
    """

    def __init__(
        self, root: Path, split: str, *, rows: Sequence[int] | None = None, cache_mb: int, max_pixels: int
    ) -> None:
        """
        Args:
            root: folder that ingest wrote.
            split: train, val or test.
            rows: row numbers of the split's index; default all.

        Raises:
            DataError: no such split, a row beyond its end, or a file that is missing or damaged.
        """
        self.manifest = manifests.load(root)
        if split not in self.manifest.splits:
            raise DataError(f"{root} has no {split} split, only {', '.join(self.manifest.splits)}")
        described = self.manifest.splits[split]
        index = read_index(root, described)
        if rows is not None and len(rows) and (min(rows) < 0 or max(rows) >= len(index)):
            raise DataError(
                f"{root}: rows up to {max(rows)} are asked for, but {split} has {len(index)}; run scale again"
            )
        self.split = split
        self.rows: NDArray[np.int64] = np.asarray(range(len(index)) if rows is None else rows, dtype=np.int64)
        self._index = [index[row] for row in self.rows]
        self.labels: NDArray[np.int64] = np.asarray([row.label for row in self._index], dtype=np.int64)
        self.keys: list[str] = [row.key for row in self._index]
        self._reader = ShardReader(root, described)
        self._max_pixels = max_pixels
        self._cache: dict[int, NDArray[np.uint8]] = {}
        self._cache_left = cache_mb * 1_000_000

    def __len__(self) -> int:
        return len(self._index)

    def encoded(self, i: int) -> bytes:
        """The original file of image `i`.

        Raises:
            DataError: the shard is damaged there.
        """
        return self._reader.read(self._index[i])

    def image(self, i: int) -> Image.Image:
        """Image `i`, RGB at native size.

        Raises:
            DataError: the shard is damaged there.
        """
        cached = self._cache.get(i)
        if cached is not None:
            return Image.fromarray(cached)
        try:
            image = imaging.decode(self.encoded(i), max_pixels=self._max_pixels)
        except imaging.ImageError as error:
            # ingest decoded these very bytes, so the limit or Pillow has changed
            raise DataError(
                f"image {self.keys[i]} can no longer be decoded ({error}); run ingest again"
            ) from None
        pixels = np.asarray(image)
        if pixels.nbytes <= self._cache_left:
            self._cache_left -= pixels.nbytes
            self._cache[i] = pixels
        return image
