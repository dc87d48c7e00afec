"""From untrusted bytes to the network's input: the one decoder and the one evaluation preprocessing.

Ingest, evaluation, export parity and the server all go through here, so that a served answer cannot differ
from an evaluated one. Training uses `decode` too and then its own random crops (flows/data).
"""

from __future__ import annotations

import io
import warnings
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
"""What is decoded. Pillow knows more, some of it by starting other programs (EPS)."""


class ImageError(ValueError):
    """The bytes are not an image that can be used; the message is a short reason."""


@dataclass(frozen=True)
class Preprocessing:
    """Short side to `resize_to`, centre crop to `image_size`, scale to 0-1, normalise per channel."""

    image_size: int  # pixels
    resize_to: int  # pixels, >= image_size
    mean: tuple[float, float, float]  # of RGB in 0-1
    std: tuple[float, float, float]
    interpolation: Literal["bicubic"] = "bicubic"

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, value: dict[str, Any]) -> Preprocessing:
        return cls(**{**value, "mean": tuple(value["mean"]), "std": tuple(value["std"])})


def decode(data: bytes, *, max_pixels: int) -> Image.Image:
    """Decode one image to RGB, upright, first frame.

    Sixteen-bit and floating-point grey images are scaled to eight bits; transparency is laid on white.

    Raises:
        ImageError: empty, truncated, not an image, or more than `max_pixels` (read from the header,
            before decoding).
    """
    if not data:
        raise ImageError("empty file")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(data), formats=FORMATS)
            width, height = image.size
            if width * height > max_pixels:
                raise ImageError(f"{width}x{height} pixels, more than the limit of {max_pixels}")
            image.load()
    except ImageError:
        raise
    except UnidentifiedImageError as error:
        # Pillow's own words name a memory address: another one, and so another output of ingest, each time
        raise ImageError("not a readable image: no known format") from error
    except Exception as error:  # Pillow's plugins raise nearly anything on damaged input
        raise ImageError(f"not a readable image: {str(error) or type(error).__name__}"[:200]) from error
    return _to_rgb(ImageOps.exif_transpose(image))


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":  # convert("RGB") would clip everything above 255
        grey = np.asarray(image, dtype=np.float64)
        if not np.isfinite(grey).all():
            raise ImageError("contains values that are not finite")
        top = 65535.0 if image.mode.startswith("I") else max(float(grey.max()), 1.0)
        image = Image.fromarray(np.clip(grey * (255.0 / top), 0, 255).round().astype(np.uint8))
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer)
    return image.convert("RGB")


def resize_and_crop(image: Image.Image, preprocessing: Preprocessing) -> NDArray[np.uint8]:
    """The geometry of `preprocess`: uint8 array of shape (image_size, image_size, 3).

    The centre square is cut and scaled in one step, so that a thin strip never becomes a huge image in
    between.
    """
    size = preprocessing.image_size
    width, height = image.size
    side = min(width, height) * size / preprocessing.resize_to  # of the centre square, in source pixels
    if (width, height, side) == (size, size, size):
        return np.asarray(image)
    left, top = (width - side) / 2, (height - side) / 2
    box = (left, top, left + side, top + side)
    return np.asarray(image.resize((size, size), Image.Resampling.BICUBIC, box=box))


def normalize(pixels: NDArray[np.uint8], preprocessing: Preprocessing) -> NDArray[np.float32]:
    """uint8 (…, S, S, 3) to float32 (…, 3, S, S)."""
    mean = np.asarray(preprocessing.mean, dtype=np.float32)
    std = np.asarray(preprocessing.std, dtype=np.float32)
    scaled = (pixels.astype(np.float32) / np.float32(255.0) - mean) / std
    return np.ascontiguousarray(np.moveaxis(scaled, -1, -3))


def preprocess(image: Image.Image, preprocessing: Preprocessing) -> NDArray[np.float32]:
    """RGB image to the network's input, float32 of shape (3, image_size, image_size)."""
    return normalize(resize_and_crop(image, preprocessing), preprocessing)
