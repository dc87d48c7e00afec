"""Two views of every image of a batch (MoBY, arXiv 2105.04553, table 3.2), computed by kornia on any device.

Crop, colour jitter, grey, blur, solarisation, mirror image: each with the strength and probability that
`Views` says. Chance comes image by image from (seed, number), where the number is the image's place in the
training sequence, or its row when validating: the views of an image are the same after a resume and on any
number of processes, micro-steps and devices (up to rounding), and nobody else's generator is touched.

Images arrive as squares of `source_size` pixels that hold the whole picture (`Squeeze`), so a long picture is
squeezed before it is cropped; the shape of a crop is relative to that square.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import kornia
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from flows.data.augmentation import ATTEMPTS

_STREAM = 3  # flows.data.batches draws order and crops from streams 1 and 2 of the same seed
_COLOUR_OPS = 4
_FIXED_DRAWS = 16


@dataclass(frozen=True)
class Squeeze:
    """The whole image as a square, without chance: what the loader hands to `two_views`."""

    image_size: int

    def __call__(self, image: Image.Image, rng: np.random.Generator) -> NDArray[np.uint8]:
        size = (self.image_size, self.image_size)
        return np.asarray(image if image.size == size else image.resize(size, Image.Resampling.BICUBIC))


@dataclass(frozen=True)
class Views:
    """Strengths and probabilities. Pairs are of the first and second view, or a range where said."""

    image_size: int
    """Side of a view, pixels."""
    crop_scale: tuple[float, float]
    """Range of a crop's area relative to the image."""
    flip: float
    """Probability of the mirror image."""
    jitter: float
    """Probability of the four changes of colour, in random order."""
    brightness: float
    """A factor between 1 − x and 1 + x; contrast and saturation alike."""
    contrast: float
    saturation: float
    hue: float
    """Turned by up to this part of the colour circle, either way."""
    grey: float
    """Probability of losing the colours."""
    blur: tuple[float, float]
    """Probability of a Gaussian blur."""
    blur_sigma: tuple[float, float]
    """Range of its standard deviation, pixels."""
    solarize: tuple[float, float]
    """Probability of inverting all values from `solarize_threshold` on."""
    solarize_threshold: float
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Range of a crop's width over height."""


def two_views(images: Tensor, numbers: Tensor, seed: int, views: Views) -> tuple[Tensor, Tensor]:
    """uint8 (B, 3, S, S) to two float batches (B, 3, image_size, image_size) with values 0-1.

    Args:
        numbers: int64 (B,); with `seed` it says which views an image gets.
    """
    draws = np.stack([_draw(seed, number) for number in numbers.tolist()])  # (B, 2, draws)
    pixels = images.float() / 255.0
    first, second = (_view(pixels, draws[:, index], views, index) for index in (0, 1))
    return first, second


def _draw(seed: int, number: int) -> NDArray[np.float64]:
    key = np.array([seed, number], np.uint64)
    philox = np.random.Philox(key=key, counter=[0, 0, 0, _STREAM])
    return np.random.Generator(philox).random((2, _FIXED_DRAWS + _COLOUR_OPS + 2 * ATTEMPTS))


def _view(pixels: Tensor, draws: NDArray[np.float64], views: Views, index: int) -> Tensor:
    """Stages in the order of the table; every draw has its place, so that no switch shifts the others."""
    fixed, order, attempts = np.split(draws, [_FIXED_DRAWS, _FIXED_DRAWS + _COLOUR_OPS], axis=1)
    boxes = _boxes(attempts.reshape(len(draws), ATTEMPTS, 2), fixed[:, 0:2], pixels.shape[-1], views)
    x = _crop(pixels, boxes, fixed[:, 7] < views.flip, views.image_size)
    x = _where(
        x, fixed[:, 2] < views.jitter, lambda part, rows: _jitter(part, fixed[rows], order[rows], views)
    )
    x = _where(x, fixed[:, 3] < views.grey, lambda part, rows: _grey(part))
    x = _where(x, fixed[:, 4] < views.blur[index], lambda part, rows: _blur(part, fixed[rows, 5], views))
    return _where(
        x,
        fixed[:, 6] < views.solarize[index],
        lambda part, rows: kornia.enhance.solarize(part, views.solarize_threshold),
    )


def _where(
    x: Tensor, chosen: NDArray[np.bool_], change: Callable[[Tensor, NDArray[np.int64]], Tensor]
) -> Tensor:
    """`change` applied to the chosen images; it is told which they are."""
    rows = np.flatnonzero(chosen)
    if len(rows) == 0:
        return x
    if len(rows) == len(x):
        return change(x, rows)
    index = torch.from_numpy(rows).to(x.device)
    return x.index_copy_(0, index, change(x.index_select(0, index), rows))  # `_crop` has made x afresh


def _boxes(
    attempts: NDArray[np.float64], place: NDArray[np.float64], size: int, views: Views
) -> NDArray[np.float64]:
    """(B, 4): left, upper, width, height of a random crop of each image, in fractions of pixels."""
    low, high = views.crop_scale
    area = (low + attempts[..., 0] * (high - low)) * size * size
    log_low, log_high = (math.log(value) for value in views.ratio)
    ratio = np.exp(log_low + attempts[..., 1] * (log_high - log_low))
    width, height = np.sqrt(area * ratio), np.sqrt(area / ratio)  # (B, attempts)
    fits = (width <= size) & (height <= size)
    first = fits.argmax(axis=1)  # 0 if none does
    rows = np.arange(len(first))
    found = fits[rows, first]
    sides = np.stack([width[rows, first], height[rows, first]], axis=1)
    sides = np.where(found[:, None], sides, size)  # the whole image
    return np.concatenate([place * (size - sides), sides], axis=1)


def _crop(pixels: Tensor, boxes: NDArray[np.float64], mirrored: NDArray[np.bool_], size: int) -> Tensor:
    """Bilinear; boxes are (B, 4). A mirror image is the same crop, read from right to left."""
    left, upper, width, height = boxes.T
    # pixels are squares around their coordinates: the first of a row lies half a new pixel inside the box
    x0, x1 = (left + width * (part / size) - 0.5 for part in (0.5, size - 0.5))
    y0, y1 = (upper + height * (part / size) - 0.5 for part in (0.5, size - 0.5))
    x0, x1 = np.where(mirrored, x1, x0), np.where(mirrored, x0, x1)
    matrix = np.zeros((len(boxes), 2, 3), np.float32)  # from the image's coordinates to the view's
    matrix[:, 0, 0], matrix[:, 1, 1] = (size - 1) / (x1 - x0), (size - 1) / (y1 - y0)
    matrix[:, 0, 2], matrix[:, 1, 2] = -matrix[:, 0, 0] * x0, -matrix[:, 1, 1] * y0
    return kornia.geometry.transform.warp_affine(
        pixels, torch.from_numpy(matrix).to(pixels.device), (size, size), padding_mode="border"
    )


def _jitter(x: Tensor, draws: NDArray[np.float64], order: NDArray[np.float64], views: Views) -> Tensor:
    """Brightness, contrast, saturation and hue of each image, in an order of its own."""

    def factor(column: int, strength: float) -> NDArray[np.float64]:
        low = max(0.0, 1.0 - strength)
        return low + draws[:, column] * (1.0 + strength - low)

    operations = (
        (kornia.enhance.adjust_brightness_accumulative, factor(8, views.brightness), views.brightness),
        (kornia.enhance.adjust_contrast_with_mean_subtraction, factor(9, views.contrast), views.contrast),
        (
            kornia.enhance.adjust_saturation_with_gray_subtraction,
            factor(10, views.saturation),
            views.saturation,
        ),
        (kornia.enhance.adjust_hue, 2 * math.pi * views.hue * (2 * draws[:, 11] - 1), views.hue),
    )
    places = order.argsort(axis=1)
    for place in range(_COLOUR_OPS):
        for number, (operation, factors, strength) in enumerate(operations):
            if strength == 0:
                continue

            def change(part: Tensor, rows: NDArray[np.int64]) -> Tensor:
                return operation(part, _like(part, factors[rows]))  # noqa: B023  # called before the loop goes on

            x = _where(x, places[:, place] == number, change)
    return x


def _grey(x: Tensor) -> Tensor:
    return kornia.color.rgb_to_grayscale(x).expand(-1, 3, -1, -1)


def _blur(x: Tensor, draws: NDArray[np.float64], views: Views) -> Tensor:
    low, high = views.blur_sigma
    # three standard deviations on either side, as far as the image can be mirrored at its border
    reach = min(math.ceil(3 * high), x.shape[-1] - 1)
    sigma = _like(x, low + draws * (high - low))
    return kornia.filters.gaussian_blur2d(x, 2 * reach + 1, sigma[:, None].expand(-1, 2))


def _like(x: Tensor, values: NDArray[np.float64]) -> Tensor:
    return torch.from_numpy(values).to(x)
