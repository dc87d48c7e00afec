"""Real files of every odd kind: the colours that reach the network are those that a person would see."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Iterator

import numpy as np
import pytest
from fastapi.testclient import TestClient
from PIL import Image
from served_digits import LIMITS, loaded
from serving_workspace import Exported

from flows.imaging import Preprocessing
from flows.serving.session import Session
from flows.serving.vision.app import create_app
from flows.serving.vision.uploads import prepare_image

PLAIN = Preprocessing(8, 8, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
ORANGE, TEAL = (230, 120, 20), (20, 130, 140)


def seen(data: bytes) -> np.ndarray:
    """What the network gets, as (8, 8, 3) in 0-255."""
    return 255 * prepare_image(data, PLAIN, 10**6).transpose(1, 2, 0)


def encode(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def halves(mode: str = "RGB") -> Image.Image:
    """Orange on the left, teal on the right."""
    image = Image.new("RGB", (8, 8), ORANGE)
    image.paste(TEAL, (4, 0, 8, 8))
    return image.convert(mode)


def png16(pixels: np.ndarray, colour_type: int) -> bytes:
    """A 16-bit PNG, which Pillow cannot write in colour."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    height, width = pixels.shape[:2]
    header = struct.pack(">IIBBBBB", width, height, 16, colour_type, 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    signature = b"\x89PNG\r\n\x1a\n"
    return signature + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("name", "data", "tolerance"),
    [
        ("RGB PNG", encode(halves(), "PNG"), 0.01),
        ("palette PNG", encode(halves().quantize(4), "PNG"), 3),
        ("palette GIF", encode(halves(), "GIF"), 3),
        ("CMYK JPEG", encode(halves("CMYK"), "JPEG", quality=98, subsampling=0), 6),
        ("CMYK TIFF", encode(halves("CMYK"), "TIFF"), 3),
        ("YCbCr TIFF", encode(halves("YCbCr"), "TIFF"), 4),
        ("JPEG", encode(halves(), "JPEG", quality=98, subsampling=0), 6),
        ("WebP", encode(halves(), "WEBP", lossless=True), 0.01),
        ("RGBA PNG, opaque", encode(halves("RGBA"), "PNG"), 0.01),
        ("16-bit RGB PNG", png16(np.asarray(halves()).astype(np.uint16) * 257, 2), 1),
        ("BMP", encode(halves(), "BMP"), 0.01),
    ],
)
def test_colours_survive(name: str, data: bytes, tolerance: float) -> None:
    found = seen(data)
    np.testing.assert_allclose(found[:, 1], np.tile(ORANGE, (8, 1)), atol=tolerance)
    np.testing.assert_allclose(found[:, 6], np.tile(TEAL, (8, 1)), atol=tolerance)


RAMP = np.tile(np.linspace(0, 65535, 8).round().astype(np.uint16), (8, 1))


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("16-bit grey PNG", encode(Image.fromarray(RAMP), "PNG")),
        ("16-bit grey TIFF", encode(Image.fromarray(RAMP), "TIFF")),
        ("16-bit grey PGM", b"P5 8 8 65535\n" + RAMP.astype(">u2").tobytes()),
        ("16-bit grey and alpha PNG", png16(np.stack([RAMP, np.full_like(RAMP, 65535)], axis=-1), 4)),
        ("8-bit grey PNG", encode(Image.fromarray((RAMP // 257).astype(np.uint8)), "PNG")),
        ("floating-point TIFF", encode(Image.fromarray((RAMP / 65535).astype(np.float32)), "TIFF")),
    ],
)
def test_greys_are_scaled_not_clipped(name: str, data: bytes) -> None:
    for channel in range(3):
        np.testing.assert_allclose(seen(data)[..., channel], RAMP / 257, atol=1)


def test_one_bit_is_black_and_white() -> None:
    image = Image.new("1", (8, 8), 0)
    image.paste(1, (4, 0, 8, 8))
    for kind in ("PNG", "TIFF", "BMP", "PPM"):
        found = seen(encode(image, kind))
        assert (found[:, :4] == 0).all(), kind
        assert (found[:, 4:] == 255).all(), kind


def test_transparency_lies_on_white_in_every_form() -> None:
    layer = halves("RGBA")
    layer.putalpha(Image.new("L", (8, 8), 0))
    palette = halves().quantize(4)
    for data in (
        encode(layer, "PNG"),
        encode(layer, "WEBP", lossless=True),
        encode(Image.new("LA", (8, 8), (0, 0)), "PNG"),
        encode(palette, "PNG", transparency=bytes(256)),
    ):
        assert (seen(data) == 255).all()


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_all_eight_orientations_come_upright(kind: str) -> None:
    quadrants = Image.new("RGB", (8, 8), "black")
    quadrants.paste("red", (0, 0, 4, 4))
    quadrants.paste("blue", (4, 0, 8, 4))
    undo = {
        1: None, 2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM, 5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE, 8: Image.Transpose.ROTATE_270,
    }  # fmt: skip
    for orientation, operation in undo.items():
        stored = quadrants.transpose(operation) if operation is not None else quadrants
        exif = Image.Exif()
        exif[0x0112] = orientation
        options = {"JPEG": {"quality": 98, "subsampling": 0}, "WEBP": {"lossless": True}}.get(kind, {})
        found = seen(encode(stored, kind, exif=exif, **options))
        assert found[1, 1].argmax() == 0, (kind, orientation)
        assert found[1, 1, 0] > 200
        assert found[1, 6].argmax() == 2, (kind, orientation)
        assert found[6].max() < 60, (kind, orientation)


def test_only_the_first_frame_counts() -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in (ORANGE, TEAL)]
    for kind, options in (("GIF", {}), ("WEBP", {"lossless": True}), ("PNG", {}), ("TIFF", {})):
        data = encode(frames[0], kind, save_all=True, append_images=frames[1:], **options)
        np.testing.assert_allclose(seen(data)[4, 4], ORANGE, atol=3, err_msg=kind)


# ---- refused with 4xx, and said why ----


@pytest.fixture(scope="module")
def client(exported: Exported, session: Session) -> Iterator[TestClient]:
    with TestClient(create_app(loaded(exported, session), LIMITS)) as client:
        yield client


@pytest.mark.parametrize(
    ("data", "status", "word"),
    [
        (b"", 422, "empty"),
        (b"%PDF-1.7 not a picture", 415, "not an image"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", 415, "not an image"),
        (encode(halves(), "PNG")[:60], 422, "not a readable image"),
        (encode(halves(), "JPEG")[:300], 422, "not a readable image"),
        (encode(halves(), "TIFF")[:200], 422, "not a readable image"),
        (encode(Image.new("1", (500, 500)), "PNG"), 422, "limit of 40000"),
        (encode(Image.new("1", (500, 500)), "TIFF", compression="group4"), 422, "limit of 40000"),
        (b"P5 60000 60000 255\n", 422, "exceeds limit of"),
        (encode(Image.fromarray(np.full((4, 4), np.nan, np.float32)), "TIFF"), 422, "not finite"),
        (b"x" * 200_001, 413, "larger than the limit"),
    ],
)
def test_what_cannot_be_used_is_refused(client: TestClient, data: bytes, status: int, word: str) -> None:
    answer = client.post("/v1/classify", content=data)
    assert (answer.status_code, word in answer.json()["error"]) == (status, True), answer.text
