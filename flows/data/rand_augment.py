"""RandAugment (arXiv 1909.13719), colour jitter and random erasing (arXiv 1708.04896), on Pillow images.

The operations, ranges and probabilities are those of the published fine-tuning recipes of Swin and SimMIM
(`rand-m9-mstd0.5-inc1`: two operations, magnitude 9 of 10 with deviation 0.5, each growing with its
magnitude). Chance comes from the caller's generator alone, so that an image's augmentation is a pure function
of the seed and its position; a package that draws from global generators could not promise that.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageEnhance, ImageOps

RGB = tuple[int, int, int]
TOP = 10.0
"""Largest magnitude; the ranges below are reached there."""
ERASED_AREA = (0.02, 1 / 3)
ERASED_RATIO = (0.3, 1 / 0.3)
ATTEMPTS = 10


@dataclass(frozen=True)
class RandAugment:
    """Some operations per image, drawn with repetition from `OPERATIONS`."""

    operations: int
    """Per image."""
    magnitude: float
    """0 to 10."""
    magnitude_std: float
    """Standard deviation of the magnitude of each operation; the result is clipped to 0-10."""
    probability: float
    """Of each drawn operation to happen."""

    def __call__(self, image: Image.Image, rng: np.random.Generator, fill: RGB) -> Image.Image:
        """`fill` is the colour of what moves in from outside the image."""
        names = list(OPERATIONS)
        for _ in range(self.operations):
            name = names[int(rng.integers(len(names)))]
            happens, strength, sign = rng.random(), rng.standard_normal(), rng.random()
            if happens < self.probability:
                magnitude = min(max(self.magnitude + self.magnitude_std * strength, 0.0), TOP)
                image = OPERATIONS[name](image, magnitude / TOP, -1.0 if sign < 0.5 else 1.0, fill)
        return image


def jitter_colors(image: Image.Image, strength: float, rng: np.random.Generator) -> Image.Image:
    """Brightness, contrast and saturation, each times 1 − strength … 1 + strength, in random order."""
    enhancers = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)
    factors = rng.uniform(max(0.0, 1.0 - strength), 1.0 + strength, len(enhancers))
    for index in rng.permutation(len(enhancers)):
        image = enhancers[index](image).enhance(float(factors[index]))
    return image


def erase(
    pixels: NDArray[np.uint8],
    rng: np.random.Generator,
    mean: tuple[float, float, float],
    std: tuple[float, float, float],
) -> NDArray[np.uint8]:
    """A copy of (S, S, 3) with one random rectangle replaced by noise of the data set's mean and deviation.

    The published noise is normal after normalisation; here it is cut at the darkest and brightest pixel.
    """
    height, width = pixels.shape[:2]
    low, high = math.log(ERASED_RATIO[0]), math.log(ERASED_RATIO[1])
    for _ in range(ATTEMPTS):
        area = height * width * rng.uniform(*ERASED_AREA)
        ratio = math.exp(rng.uniform(low, high))
        h, w = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < h < height and 0 < w < width:
            break
    else:
        return pixels
    top, left = int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1))
    noise = rng.standard_normal((h, w, 3), dtype=np.float32)
    noise = (noise * np.asarray(std, np.float32) + np.asarray(mean, np.float32)) * np.float32(255)
    erased = pixels.copy()
    erased[top : top + h, left : left + w] = np.clip(noise, 0, 255).round().astype(np.uint8)
    return erased


# ---- operations: (image, level 0-1, sign, fill) → image ----------------------------------------------------

Operation = Callable[[Image.Image, float, float, RGB], Image.Image]


def _affine(image: Image.Image, matrix: tuple[float, ...], fill: RGB) -> Image.Image:
    return image.transform(
        image.size, Image.Transform.AFFINE, matrix, Image.Resampling.BICUBIC, fillcolor=fill
    )


def _enhance(enhancer: Callable[[Image.Image], ImageEnhance._Enhance]) -> Operation:
    def operation(image: Image.Image, level: float, sign: float, fill: RGB) -> Image.Image:
        return enhancer(image).enhance(max(0.1, 1.0 + sign * 0.9 * level))

    return operation


def _solarize_add(image: Image.Image, level: float) -> Image.Image:
    table = [min(255, value + int(level * 110)) if value < 128 else value for value in range(256)]
    return image.point(table * 3)


OPERATIONS: dict[str, Operation] = {
    "auto_contrast": lambda image, level, sign, fill: ImageOps.autocontrast(image),
    "equalize": lambda image, level, sign, fill: ImageOps.equalize(image),
    "invert": lambda image, level, sign, fill: ImageOps.invert(image),
    "rotate": lambda image, level, sign, fill: image.rotate(
        sign * 30.0 * level, Image.Resampling.BICUBIC, fillcolor=fill
    ),
    # at level 1 the published code keeps 0 bits: a black image, which today's Pillow refuses to make
    "posterize": lambda image, level, sign, fill: ImageOps.posterize(image, max(1, 4 - int(4 * level))),
    "solarize": lambda image, level, sign, fill: ImageOps.solarize(image, 256 - int(256 * level)),
    "solarize_add": lambda image, level, sign, fill: _solarize_add(image, level),
    "color": _enhance(ImageEnhance.Color),
    "contrast": _enhance(ImageEnhance.Contrast),
    "brightness": _enhance(ImageEnhance.Brightness),
    "sharpness": _enhance(ImageEnhance.Sharpness),
    "shear_x": lambda image, level, sign, fill: _affine(image, (1, sign * 0.3 * level, 0, 0, 1, 0), fill),
    "shear_y": lambda image, level, sign, fill: _affine(image, (1, 0, 0, sign * 0.3 * level, 1, 0), fill),
    "translate_x": lambda image, level, sign, fill: _affine(
        image, (1, 0, sign * 0.45 * level * image.width, 0, 1, 0), fill
    ),
    "translate_y": lambda image, level, sign, fill: _affine(
        image, (1, 0, 0, 0, 1, sign * 0.45 * level * image.height), fill
    ),
}
