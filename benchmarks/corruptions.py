"""Common corruptions of images, after Hendrycks and Dietterich, "Benchmarking Neural Network Robustness to
Common Corruptions and Perturbations" (ICLR 2019), written from their descriptions for 32-pixel images.

Each takes a batch in 0-1, float32 (n, S, S, 3), a severity from 1 to 5 and a generator, and gives the batch
corrupted, clipped to 0-1 and rounded to 8 bits, as any camera or file would. The strengths are our own: their
published constants belong to larger images. `darker` and `grey` are no part of that benchmark; they are what
a changed camera setting does.
"""

from __future__ import annotations

import io
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

Images = NDArray[np.float32]
SEVERITIES = (1, 2, 3, 4, 5)


def corrupt(name: str, images: Images, severity: int, seed: int) -> Images:
    """The batch corrupted by `name` of `CORRUPTIONS`."""
    if severity not in SEVERITIES:
        raise ValueError(f"severity must be 1 to 5, got {severity}")
    changed = CORRUPTIONS[name](images, severity - 1, np.random.default_rng(seed))
    return (np.round(255 * np.clip(changed, 0, 1)) / 255).astype(np.float32)


def gaussian_noise(images: Images, level: int, generator: np.random.Generator) -> Images:
    sigma = (0.02, 0.04, 0.06, 0.09, 0.13)[level]
    return images + sigma * generator.standard_normal(images.shape, dtype=np.float32)


def shot_noise(images: Images, level: int, generator: np.random.Generator) -> Images:
    photons = (500, 200, 100, 50, 25)[level]  # at full brightness
    return (generator.poisson(photons * images) / photons).astype(np.float32)


def impulse_noise(images: Images, level: int, generator: np.random.Generator) -> Images:
    share = (0.005, 0.01, 0.03, 0.06, 0.1)[level]
    hit = generator.random(images.shape[:3]) < share
    salt = generator.random(images.shape[:3]) < 0.5
    return np.where(hit[..., None], salt[..., None].astype(np.float32), images)


def gaussian_blur(images: Images, level: int, generator: np.random.Generator) -> Images:
    radius = (0.3, 0.4, 0.6, 0.9, 1.3)[level]  # standard deviation, pixels
    return _each(images, lambda image: image.filter(ImageFilter.GaussianBlur(radius)))


def pixelate(images: Images, level: int, generator: np.random.Generator) -> Images:
    side = images.shape[1]
    small = max(1, round(side * (0.95, 0.85, 0.7, 0.55, 0.4)[level]))

    def shrink(image: Image.Image) -> Image.Image:
        return image.resize((small, small), Image.Resampling.BOX).resize(
            (side, side), Image.Resampling.NEAREST
        )

    return _each(images, shrink)


def jpeg(images: Images, level: int, generator: np.random.Generator) -> Images:
    quality = (90, 75, 50, 30, 15)[level]

    def compress(image: Image.Image) -> Image.Image:
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=quality)
        return Image.open(buffer).convert("RGB")

    return _each(images, compress)


def brightness(images: Images, level: int, generator: np.random.Generator) -> Images:
    return images + (0.03, 0.06, 0.1, 0.2, 0.3)[level]


def darker(images: Images, level: int, generator: np.random.Generator) -> Images:
    return images ** (1.1, 1.2, 1.4, 1.8, 2.5)[level]


def contrast(images: Images, level: int, generator: np.random.Generator) -> Images:
    factor = (0.9, 0.8, 0.65, 0.45, 0.25)[level]
    mean = images.mean(axis=(1, 2), keepdims=True)
    return (images - mean) * factor + mean


def fog(images: Images, level: int, generator: np.random.Generator) -> Images:
    """Clouds with a 1/f spectrum (theirs come from the diamond-square algorithm), blended over the image."""
    amount = (0.1, 0.2, 0.3, 0.45, 0.6)[level]
    side = images.shape[1]
    frequency = np.hypot(np.fft.fftfreq(side)[:, None], np.fft.rfftfreq(side)[None, :])
    frequency[0, 0] = 1.0 / side
    noise = np.fft.rfft2(generator.standard_normal((len(images), side, side)))
    clouds = np.fft.irfft2(noise / frequency, s=(side, side))
    low, high = clouds.min(axis=(1, 2), keepdims=True), clouds.max(axis=(1, 2), keepdims=True)
    clouds = 0.5 + 0.5 * (clouds - low) / (high - low)  # 0.5-1: fog is bright
    return ((1 - amount) * images + amount * clouds[..., None]).astype(np.float32)


def grey(images: Images, level: int, generator: np.random.Generator) -> Images:
    amount = (0.2, 0.4, 0.6, 0.8, 1.0)[level]
    luminance = images @ np.asarray([0.299, 0.587, 0.114], dtype=np.float32)
    return (1 - amount) * images + amount * luminance[..., None]


def _each(images: Images, change: Callable[[Image.Image], Image.Image]) -> Images:
    pixels = np.round(255 * images).astype(np.uint8)
    return np.stack([np.asarray(change(Image.fromarray(image))) for image in pixels]).astype(np.float32) / 255


CORRUPTIONS: dict[str, Callable[[Images, int, np.random.Generator], Images]] = {
    "gaussian noise": gaussian_noise,
    "shot noise": shot_noise,
    "impulse noise": impulse_noise,
    "gaussian blur": gaussian_blur,
    "pixelate": pixelate,
    "jpeg": jpeg,
    "brightness": brightness,
    "darker": darker,
    "contrast": contrast,
    "fog": fog,
    "grey": grey,
}
