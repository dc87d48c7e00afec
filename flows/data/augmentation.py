"""Training augmentation: random resized crop and mirror image (SimMIM section 3.4; Swin V2 fine-tuning), and
what the published fine-tuning recipes add to them (`rand_augment.py`), all off unless asked for."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from flows.data.rand_augment import RGB, RandAugment, erase, jitter_colors

ATTEMPTS = 10


class ImageTransform(Protocol):
    """From a decoded image to the pixels of a batch."""

    @property
    def image_size(self) -> int:
        """Side of the result, pixels."""
        ...

    def __call__(self, image: Image.Image, rng: np.random.Generator) -> NDArray[np.uint8]:
        """RGB image to a uint8 array of shape (image_size, image_size, 3); all chance comes from `rng`."""
        ...


@dataclass(frozen=True)
class Augmentation:
    """Crop a random part of the image, scale it to a square, and mirror it half of the time."""

    image_size: int
    """Side of the result, pixels."""
    crop_scale: tuple[float, float]
    """Area of the crop relative to the image."""
    flip: bool
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Width over height of the crop."""
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"
    rand_augment: RandAugment | None = None
    color_jitter: float = 0.0
    """Strength of `jitter_colors`; 0 = off."""
    erasing: float = 0.0
    """Probability of `erase`."""
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    """Of the data set's RGB in 0-1: the colour of what moves in, and of what is erased."""
    std: tuple[float, float, float] = (0.25, 0.25, 0.25)

    def __call__(self, image: Image.Image, rng: np.random.Generator) -> NDArray[np.uint8]:
        """RGB image to a uint8 array of shape (image_size, image_size, 3); all chance comes from `rng`."""
        size = (self.image_size, self.image_size)
        box = self._random_box(*image.size, rng)
        image = image.resize(size, Image.Resampling[self.interpolation.upper()], box=box)
        pixels = np.asarray(image)
        if self.flip and rng.random() < 0.5:
            pixels = pixels[:, ::-1]
        if self.rand_augment is None and not self.color_jitter and not self.erasing:
            return pixels
        if self.rand_augment is not None or self.color_jitter:
            pixels = self._recolor(Image.fromarray(np.ascontiguousarray(pixels)), rng)
        return erase(pixels, rng, self.mean, self.std) if rng.random() < self.erasing else pixels

    def _recolor(self, image: Image.Image, rng: np.random.Generator) -> NDArray[np.uint8]:
        fill: RGB = (round(255 * self.mean[0]), round(255 * self.mean[1]), round(255 * self.mean[2]))
        if self.rand_augment is not None:
            image = self.rand_augment(image, rng, fill)
        if self.color_jitter:
            image = jitter_colors(image, self.color_jitter, rng)
        return np.asarray(image)

    def _random_box(
        self, width: int, height: int, rng: np.random.Generator
    ) -> tuple[float, float, float, float]:
        """(left, upper, right, lower), with fractions of pixels: in whole ones tiny images have few crops."""
        draws = rng.random((ATTEMPTS, 2)).tolist()
        log_ratio = math.log(self.ratio[0]), math.log(self.ratio[1])
        for area_draw, ratio_draw in draws:
            area = (
                width * height * (self.crop_scale[0] + area_draw * (self.crop_scale[1] - self.crop_scale[0]))
            )
            ratio = math.exp(log_ratio[0] + ratio_draw * (log_ratio[1] - log_ratio[0]))
            w, h = math.sqrt(area * ratio), math.sqrt(area / ratio)
            if w <= width and h <= height:
                break
        else:  # a very long image: the largest central crop whose shape is allowed
            w = min(width, height * self.ratio[1])
            h = min(height, width / self.ratio[0])
            left, upper = (width - w) / 2, (height - h) / 2
            return left, upper, left + w, upper + h
        left, upper = rng.random() * (width - w), rng.random() * (height - h)
        return left, upper, min(left + w, width), min(upper + h, height)
