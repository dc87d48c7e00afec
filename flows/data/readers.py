"""One reader per data set: whatever lies on disk becomes a `Source`, a list of images with labels and splits.

Readers only list; bytes are fetched image by image through `SourceImage.load`, so a source of any size needs
little memory (the binary CIFAR-10 release, 184 MB, is the one exception: its archive has no random access).
To add a data set, write a function with the signature of `read_digits` and name it in `READERS`.
"""

from __future__ import annotations

import io
import os
import re
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from flows.errors import DataError
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
SPLIT_FOLDERS = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}


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


# ------------------------------------------------------------ folder


def read_folder(path: Path, resources: ExitStack) -> Source:
    """A folder of one's own images, in one of three layouts:

    - one sub-folder per class, each read recursively;
    - `train/`, and optionally `val/` and `test/`, each laid out like the first or the third;
    - images directly in it, or in a single sub-folder: unlabelled, for pretraining only.

    Names are sorted, hidden files are ignored, links are followed once (loops end). Files without an image's
    extension are reported as rejected.
    """
    if not path.is_dir():
        raise DataError(f"{path} {'is not a folder' if path.exists() else 'does not exist'}")
    rejected: list[tuple[str, str]] = []
    folders = _split_folders(path)
    if None not in folders:
        rejected.extend((_shown(file, path), "lies beside the split folders") for file in _children(path)[1])
    parts = {split: _read_part(folder, path, rejected) for split, folder in folders.items()}
    labelled = {split: None not in classes for split, classes in parts.items()}
    if len(set(labelled.values())) > 1:
        raise DataError(
            f"{path}: {_names(split for split in parts if labelled[split])} has class folders, "
            f"{_names(split for split in parts if not labelled[split])} has none; lay all splits out alike"
        )
    class_names = sorted(name for name in next(iter(parts.values())) if name is not None)
    for split, classes in parts.items():
        differing = set(class_names) ^ {name for name in classes if name is not None}
        if differing:
            raise DataError(
                f"{path}: class {_names(differing)} is in only one of {next(iter(parts))} and {split}; "
                "every split needs images of every class"
            )
    notes = []
    labels: dict[str | None, int] = {}
    if len(class_names) == 1:
        notes.append(
            f"all images lie in one folder, {_names(class_names)}: taken as unlabelled, for pretraining only"
        )
    else:
        labels.update((name, label) for label, name in enumerate(class_names))
    images = [
        SourceImage(
            _shown(file, path),
            file.stat().st_size,
            file.read_bytes,
            labels.get(name),
            split,
        )
        for split, classes in parts.items()
        for name, found in sorted(classes.items(), key=lambda item: item[0] or "")
        for file in found
    ]
    name = re.sub(r"[^a-z0-9]+", "-", path.resolve().name.lower()).strip("-") or "folder"
    return Source(
        name=name,
        origin=f"folder {_printable(path.resolve().name)}",
        licence="not stated",
        classes=[_printable(name) for name in class_names] if labels else [],
        images=images,
        rejected=sorted(rejected),
        notes=notes,
    )


def _split_folders(root: Path) -> dict[str | None, Path]:
    """`{"train": …, "val": …}` if the folder has split folders, else `{None: root}`."""
    folders, _ = _children(root)
    found: dict[str | None, Path] = {}
    for folder in folders:
        split = SPLIT_FOLDERS.get(folder.name.lower())
        if split in found:
            raise DataError(
                f"{root}: {found[split].name} and {folder.name} both mean the {split} split; keep one"
            )
        if split:
            found[split] = folder
    if not found:
        return {None: root}
    others = [folder.name for folder in folders if folder not in found.values()]
    if others:
        raise DataError(
            f"{root} holds split folders ({_names(f.name for f in found.values())}) beside others "
            f"({_names(others)}); move the class folders into the split folders, or rename the split folders"
        )
    if "train" not in found:
        raise DataError(f"{root} has {_names(f.name for f in found.values())} but no train folder")
    return {split: found[split] for split in ("train", "val", "test") if split in found}


def _read_part(folder: Path, root: Path, rejected: list[tuple[str, str]]) -> dict[str | None, list[Path]]:
    """Images by class folder, or all under None if there are no class folders."""
    folders, files = _children(folder)
    loose = _keep_images(files, root, rejected)
    by_class: dict[str | None, list[Path]] = {}
    enclosing = frozenset({os.path.realpath(root), os.path.realpath(folder)})
    for child in folders:
        by_class[child.name] = _keep_images(list(_walk(child, enclosing)), root, rejected)
    filled = [name for name, found in by_class.items() if found]
    if loose and filled:
        raise DataError(
            f"{folder} holds both loose images ({_printable(loose[0].name)}) and folders of images "
            f"({_names(filled)}); move every image into a class folder, or, to train without labels, "
            "everything into a single folder"
        )
    if loose:
        return {None: loose}
    if not filled:
        raise DataError(f"{folder} has no images (looked for {', '.join(sorted(EXTENSIONS))})")
    empty = [name for name in by_class if name not in filled]
    if empty:
        raise DataError(f"{folder}: class {_names(empty)} has no images; add some or remove the folder")
    return by_class


def _children(folder: Path) -> tuple[list[Path], list[Path]]:
    """Visible sub-folders and everything else, each sorted by name."""
    try:
        children = sorted(
            (child for child in folder.iterdir() if not child.name.startswith(".")), key=os.fsencode
        )
    except OSError as error:
        raise DataError(f"{folder} cannot be listed: {error.strerror}") from None
    folders = [child for child in children if os.path.isdir(child)]
    return folders, [child for child in children if not os.path.isdir(child)]


def _walk(folder: Path, ancestors: frozenset[str]) -> Iterator[Path]:
    """All visible files below `folder`; a link back to an enclosing folder is not entered."""
    real = os.path.realpath(folder)
    if real in ancestors:
        return
    folders, files = _children(folder)
    yield from files
    for child in folders:
        yield from _walk(child, ancestors | {real})


def _keep_images(files: list[Path], root: Path, rejected: list[tuple[str, str]]) -> list[Path]:
    kept = []
    for file in files:
        if file.suffix.lower() not in EXTENSIONS:
            rejected.append((_shown(file, root), f"not an image file ({file.suffix or 'no extension'})"))
        elif not os.path.isfile(file):
            rejected.append(
                (_shown(file, root), "broken link" if file.is_symlink() else "not a regular file")
            )
        else:
            kept.append(file)
    return kept


def _shown(file: Path, root: Path) -> str:
    return _printable(file.relative_to(root).as_posix())


def _printable(text: str) -> str:
    """File names are bytes; those that are not UTF-8 would not survive being written to JSON."""
    return os.fsencode(text).decode("utf-8", "backslashreplace")


def _names(values: Iterable[str | None]) -> str:
    names = sorted(_printable(str(value)) for value in values)
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


READERS: dict[str, Callable[[Path, ExitStack], Source]] = {
    "digits": read_digits,
    "cifar10": read_cifar10,
    "folder": read_folder,
}
