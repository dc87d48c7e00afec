"""The common type of all readers: a `Source` is a list of images that can be fetched one by one."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass

from flows.imaging import ImageError

EXTENSIONS = frozenset(
    f".{extension}"
    for extension in (
        "png",
        "jpg",
        "jpeg",
        "jfif",
        "bmp",
        "gif",
        "webp",
        "tif",
        "tiff",
        "ppm",
        "pgm",
        "pbm",
        "pnm",
        "avif",
    )
)


@dataclass(frozen=True, slots=True)
class SourceImage:
    """One image before it is decoded."""

    name: str
    """Path inside the source with `/`, unique; for messages and for the sample's key."""
    size: int
    """Bytes that `read` will return, known without reading."""
    read: Callable[[], bytes]
    label: int | None = None
    """Index into the source's classes; None if unlabelled."""
    split: str | None = None
    """train, val or test if the source says so."""

    def load(self, max_bytes: int) -> bytes:
        """The encoded bytes.

        Raises:
            ImageError: larger than `max_bytes`, or the file or archive cannot be read.
        """
        if self.size > max_bytes:
            raise ImageError(f"{self.size} bytes, more than the limit of {max_bytes}")
        try:
            return self.read()
        except (
            OSError,
            zipfile.BadZipFile,
            zlib.error,
            EOFError,
            NotImplementedError,
            RuntimeError,
        ) as error:
            reason = error.strerror if isinstance(error, OSError) else str(error)
            raise ImageError(f"cannot be read: {reason or type(error).__name__}") from error


@dataclass(frozen=True)
class Source:
    """A data set as it was found."""

    name: str
    origin: str
    """Where it comes from, in words or as an address; never a path of this machine."""
    licence: str
    classes: list[str]
    """Empty if unlabelled."""
    images: list[SourceImage]
    rejected: list[tuple[str, str]]
    """Files that are no images: (path inside the source, reason)."""
    notes: list[str]
    """Decisions the user should know of."""
