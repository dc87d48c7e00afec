"""Untrusted request bodies and images: sizes are checked while they stream in and before anything is
decoded."""

from __future__ import annotations

import io
from collections.abc import AsyncGenerator

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import Request

from flows.imaging import ImageError, Preprocessing, decode, preprocess
from flows.serving.bodies import RequestError

MULTIPART_FIELDS = 8
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF", "JPEG2000")
"""What strangers may send. Pillow reads more, and hands some of it (PostScript) to other programs."""
RAW_TYPES = ("image/", "application/octet-stream", "application/x-www-form-urlencoded")
"""Content types of a bare image; the last is what `curl --data-binary` says when it is told nothing."""


async def extract_image(request: Request, body: bytes) -> bytes:
    """The encoded image in a body: multipart field `file`, or the body itself.

    Raises:
        RequestError: 415 another content type, 400 a form without that field or a damaged one.
    """
    content_type = request.headers.get("content-type", "application/octet-stream").lower()
    if content_type.startswith(RAW_TYPES):
        return body
    if not content_type.startswith("multipart/form-data"):
        raise RequestError(415, "send an image as the body, or a form with the file field `file`")

    async def stream() -> AsyncGenerator[bytes, None]:
        yield body

    parser = MultiPartParser(request.headers, stream(), max_files=1, max_fields=MULTIPART_FIELDS)
    parser.spool_max_size = len(body) + 1  # already in memory: never a copy on the disk
    try:
        form = await parser.parse()
    except (MultiPartException, KeyError) as error:  # KeyError: no boundary
        detail = (
            error.message if isinstance(error, MultiPartException) else "the content type names no boundary"
        )
        raise RequestError(400, f"the form cannot be read: {detail}") from None
    try:
        upload = form.get("file")
        if not isinstance(upload, UploadFile):
            raise RequestError(400, "the form has no file field named `file`, as in curl -F file=@image.png")
        return await upload.read()
    finally:
        await form.close()


def prepare_image(data: bytes, preprocessing: Preprocessing, max_pixels: int) -> NDArray[np.float32]:
    """Encoded bytes to the network's input, float32 (3, S, S).

    Raises:
        RequestError: 415 not an image, 422 truncated, empty, or larger than `max_pixels` (as sent or once
        resized).
    """
    if data and not _has_known_format(data):
        raise RequestError(415, f"not an image in a known format ({', '.join(FORMATS)})")
    try:
        image = decode(data, max_pixels=max_pixels)
    except ImageError as error:
        raise RequestError(422, str(error)) from None
    _check_resized(image, preprocessing, max_pixels)
    return preprocess(image, preprocessing)


def _has_known_format(data: bytes) -> bool:
    """Whether the header is of one of `FORMATS`; nothing is decoded."""
    try:
        Image.open(io.BytesIO(data), formats=FORMATS).close()
    except UnidentifiedImageError:
        return False
    except Exception:  # a known header with something wrong after it: decoding will say what
        return True
    return True


def _check_resized(image: Image.Image, preprocessing: Preprocessing, max_pixels: int) -> None:
    """A strip of 1x100000 pixels is small, but not once its short side is scaled up."""
    short, long = sorted(image.size)
    if preprocessing.resize_to * preprocessing.resize_to * long > max_pixels * short:
        raise RequestError(422, f"{image.width}x{image.height} pixels: the sides differ too much to resize")
