"""One reader per data set: whatever lies on disk becomes a `Source`, a list of images with labels and splits.

Readers only list; bytes are fetched image by image through `SourceImage.load`, so a source of any size needs
little memory (the binary CIFAR-10 release, 184 MB, is the one exception: its archive has no random access).
To add a data set, write a function with the signature of `read_digits` and name it in `READERS`.
"""

from __future__ import annotations

import io
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path, PurePosixPath

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from flows.data.folder import read_folder
from flows.data.source_image import EXTENSIONS, Source, SourceImage
from flows.errors import DataError


@contextmanager
def open_source(dataset: str, path: Path) -> Iterator[Source]:
    """List the images of `path`, read as data set `dataset` (a key of READERS); archives stay open meanwhile.

    Raises:
        DataError: the source is missing, empty, or not laid out as the reader expects.
    """
    with ExitStack() as resources:
        yield READERS[dataset](path, resources)


def encode_png(pixels: NDArray[np.uint8]) -> bytes:
    """(H, W) grey or (H, W, 3) RGB to a PNG file."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return buffer.getvalue()


# ------------------------------------------------------------ digits


def read_digits(path: Path, resources: ExitStack) -> Source:
    """scikit-learn's bundled digits: 1,797 grey images of 8×8 pixels. `path` is not read."""
    from sklearn.datasets import load_digits  # slow to import, and needed by this reader alone

    digits = load_digits()
    grey = np.rint(digits.images * (255.0 / 16.0)).astype(np.uint8)  # 0..16 to 0..255
    images = []
    for number, (pixels, label) in enumerate(zip(grey, digits.target.tolist(), strict=True)):
        data = encode_png(pixels)
        images.append(SourceImage(f"{label}/{number:04d}.png", len(data), partial(bytes, data), label))
    return Source(
        name="digits",
        origin="Optical Recognition of Handwritten Digits (UCI), test part, as bundled with scikit-learn",
        licence="CC BY 4.0",
        classes=[str(name) for name in digits.target_names],
        images=images,
        rejected=[],
        notes=[],
    )


# ------------------------------------------------------------ cifar10

CIFAR10_ARCHIVE = "cifar-10-binary.tar.gz"
_CIFAR10_RECORD = 1 + 3 * 32 * 32  # label byte, then the red, green and blue planes
_CIFAR10_PARTS = {f"data_batch_{number}.bin": "train" for number in range(1, 6)} | {"test_batch.bin": "test"}


def read_cifar10(path: Path, resources: ExitStack) -> Source:
    """CIFAR-10 from a folder that holds train.zip, test.zip and classes.txt, or the official binary archive.

    Both have a train and a test split; validation images are taken from train by ingest.
    """
    if (path / "train.zip").is_file():
        classes, images, rejected = _cifar10_zips(path, resources)
    elif (path / CIFAR10_ARCHIVE).is_file():
        (classes, images), rejected = _cifar10_binary(path / CIFAR10_ARCHIVE), []
    else:
        raise DataError(
            f"{path} holds neither train.zip nor {CIFAR10_ARCHIVE}; `make run DATASET=cifar10` fetches it"
        )
    return Source(
        name="cifar10",
        origin="CIFAR-10, https://www.cs.toronto.edu/~kriz/cifar.html",
        licence="none stated; for research, citing Krizhevsky, Learning Multiple Layers of Features, 2009",
        classes=classes,
        images=images,
        rejected=rejected,
        notes=[],
    )


def _cifar10_zips(
    folder: Path, resources: ExitStack
) -> tuple[list[str], list[SourceImage], list[tuple[str, str]]]:
    try:
        classes = (folder / "classes.txt").read_text(errors="replace").split()
    except OSError:
        raise DataError(
            f"{folder} has train.zip but no readable classes.txt (one class name a line)"
        ) from None
    images: list[SourceImage] = []
    rejected: list[tuple[str, str]] = []
    for split in ("train", "test"):
        archive = folder / f"{split}.zip"
        try:
            opened = resources.enter_context(zipfile.ZipFile(archive))
        except (OSError, zipfile.BadZipFile) as error:
            raise DataError(f"{archive} cannot be read as a zip archive: {error}") from None
        for member in sorted(opened.infolist(), key=lambda member: member.filename):
            inner = PurePosixPath(member.filename)
            if member.is_dir():
                continue
            if inner.suffix.lower() not in EXTENSIONS:
                rejected.append((f"{split}/{inner}", "not an image file"))
                continue
            if inner.parts[0] not in classes:
                raise DataError(f"{archive}: {inner} lies in no folder that classes.txt names")
            images.append(
                SourceImage(
                    f"{split}/{inner}",
                    member.file_size,
                    partial(opened.read, member),
                    classes.index(inner.parts[0]),
                    split,
                )
            )
    return classes, images, rejected


def _cifar10_binary(archive: Path) -> tuple[list[str], list[SourceImage]]:
    parts: dict[str, bytes] = {}
    try:
        with tarfile.open(archive, "r:gz") as opened:
            for member in opened:
                name = PurePosixPath(member.name).name
                if not member.isfile() or (name not in _CIFAR10_PARTS and name != "batches.meta.txt"):
                    continue
                if member.size > 10_000 * _CIFAR10_RECORD:
                    raise DataError(f"{archive}: {member.name} is larger than 10,000 images")
                stream = opened.extractfile(member)
                parts[name] = stream.read() if stream else b""
    except (OSError, tarfile.TarError, EOFError, zlib.error) as error:
        raise DataError(f"{archive} cannot be read as a tar.gz archive: {error}") from None
    missing = sorted({*_CIFAR10_PARTS, "batches.meta.txt"} - parts.keys())
    if missing:
        raise DataError(f"{archive} lacks {', '.join(missing)}; it is not the binary version of CIFAR-10")
    classes = parts["batches.meta.txt"].decode("utf-8", "replace").split()
    images = []
    for name, split in sorted(_CIFAR10_PARTS.items()):
        if len(parts[name]) % _CIFAR10_RECORD:
            raise DataError(f"{archive}: {name} is not a whole number of {_CIFAR10_RECORD}-byte records")
        records = np.frombuffer(parts[name], dtype=np.uint8).reshape(-1, _CIFAR10_RECORD)
        if len(records) and int(records[:, 0].max()) >= len(classes):
            raise DataError(
                f"{archive}: {name} has label {records[:, 0].max()}, but there are {len(classes)} classes"
            )
        stem = name.removesuffix(".bin")
        for number, record in enumerate(records):
            label = int(record[0])
            path = f"{split}/{classes[label]}/{stem}-{number:05d}.png"
            images.append(SourceImage(path, _CIFAR10_RECORD, partial(_cifar10_png, record), label, split))
    return classes, images


def _cifar10_png(record: NDArray[np.uint8]) -> bytes:
    return encode_png(np.ascontiguousarray(record[1:].reshape(3, 32, 32).transpose(1, 2, 0)))


READERS: dict[str, Callable[[Path, ExitStack], Source]] = {
    "digits": read_digits,
    "cifar10": read_cifar10,
    "folder": read_folder,
}
