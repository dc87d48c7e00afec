"""One decoder for everything: odd images are handled, bad bytes are refused with a reason."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from flows.imaging import ImageError, Preprocessing, decode, normalize, preprocess, resize_and_crop

PREPROCESSING = Preprocessing(8, 8, (0.5, 0.4, 0.3), (0.2, 0.25, 0.5))


def encode(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("mode", "kind"),
    [
        ("L", "PNG"),
        ("1", "PNG"),
        ("P", "PNG"),
        ("LA", "PNG"),
        ("RGBA", "PNG"),
        ("CMYK", "JPEG"),
        ("RGB", "WEBP"),
        ("I;16", "PNG"),
    ],
)
def test_every_mode_becomes_rgb(mode: str, kind: str) -> None:
    image = decode(encode(Image.new(mode, (5, 7)), kind), max_pixels=100)
    assert image.mode == "RGB"
    assert image.size == (5, 7)


def test_sixteen_bits_are_scaled_not_clipped() -> None:
    grey = Image.fromarray(np.array([[0, 32768, 65535]], dtype=np.uint16))
    values = np.asarray(decode(encode(grey), max_pixels=10))[0, :, 0]
    assert values.tolist() == [0, 128, 255]


def test_transparency_is_laid_on_white() -> None:
    image = decode(encode(Image.new("RGBA", (2, 2), (10, 20, 30, 0))), max_pixels=10)
    assert image.getpixel((0, 0)) == (255, 255, 255)


def test_exif_rotation_is_applied() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees
    assert decode(encode(Image.new("RGB", (4, 2)), "JPEG", exif=exif), max_pixels=10).size == (2, 4)


def test_first_frame_of_an_animation() -> None:
    frames = [Image.new("RGB", (2, 2), color) for color in ("red", "blue")]
    data = encode(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert decode(data, max_pixels=10).getpixel((0, 0)) == (255, 0, 0)


@pytest.mark.parametrize(
    "data", [b"", b"hello", b"\x89PNG\r\n\x1a\n", encode(Image.new("RGB", (64, 64), "red"), "JPEG")[:-200]]
)
def test_bad_bytes_are_refused(data: bytes) -> None:
    with pytest.raises(ImageError):
        decode(data, max_pixels=10_000)


def test_a_bomb_is_refused_from_its_header() -> None:
    data = encode(Image.new("1", (4000, 4000)))
    with pytest.raises(ImageError, match="4000x4000"):
        decode(data, max_pixels=1_000_000)


def test_preprocess_is_the_formula() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    found = preprocess(Image.fromarray(pixels), PREPROCESSING)
    expected = (pixels / 255.0 - np.array(PREPROCESSING.mean)) / np.array(PREPROCESSING.std)
    np.testing.assert_allclose(found, expected.transpose(2, 0, 1), atol=1e-6)
    np.testing.assert_array_equal(normalize(np.stack([pixels, pixels]), PREPROCESSING)[1], found)


@pytest.mark.parametrize("size", [(3, 9), (9, 3), (100, 17), (8, 8), (1, 1)])
def test_any_shape_becomes_the_square(size: tuple[int, int]) -> None:
    preprocessing = Preprocessing(8, 9, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    assert resize_and_crop(Image.new("RGB", size), preprocessing).shape == (8, 8, 3)


def test_preprocessing_survives_json() -> None:
    assert Preprocessing.from_dict(PREPROCESSING.to_dict()) == PREPROCESSING


def test_the_same_damage_has_the_same_reason() -> None:
    """The reason is part of ingest's output: an address in it would change the data with every run."""
    caught = []
    for _ in range(3):  # the errors are kept, so that no address is used twice
        with pytest.raises(ImageError) as found:
            decode(b"not an image", max_pixels=100)
        caught.append(found)
    assert {str(found.value) for found in caught} == {"not a readable image: no known format"}
