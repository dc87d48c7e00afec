"""WebDataset tar shards that also allow random access: `<key>.<ext>` holds the image, `<key>.cls` its label.

Writing is byte-deterministic (fixed owner, mode and time). Beside the shards of a split lies an index, a CSV
with one row per image and the place of its bytes, so that training reads any image with one `pread` and
readers that know only WebDataset can stream the same files.
"""

from __future__ import annotations

import csv
import hashlib
import io
import os
import re
import tarfile
import zlib
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import Self

from flows import files
from flows.data.manifest import Shard, Split
from flows.errors import DataError

COLUMNS = ("key", "label", "shard", "offset", "size", "sha256", "pixels_sha256", "crc32")
UNLABELLED = -1


@dataclass(frozen=True, slots=True)
class IndexRow:
    key: str
    label: int
    """-1 if unlabelled."""
    shard: str
    offset: int
    """Of the image's bytes inside the shard."""
    size: int
    """Of the image's bytes."""
    sha256: str
    """Of the image's bytes, those of the raw file: the end of the chain of custody."""
    pixels_sha256: str
    crc32: str
    """Of the image's bytes, 8 hexadecimal digits: checked at every read, which sha256 would slow down."""


def make_key(name: str) -> str:
    """A WebDataset key for an image called `name` in its source: readable, unique, without dots and slashes.

    A dot would end the key, and two files that differ in their extension only would become one sample.
    """
    readable = re.sub(r"[^A-Za-z0-9_-]+", "-", str(PurePosixPath(name).with_suffix(""))).strip("-")[-40:]
    return f"{readable}-{hashlib.sha256(name.encode()).hexdigest()[:12]}".lstrip("-")


class SplitWriter:
    """Writes one split: shards of about `shard_mb` megabytes and the index. A context manager; then `split`.

    An image is never divided; the shard that reaches the size is the last to get an image.
    """

    def __init__(self, folder: Path, name: str, *, shard_mb: int, num_classes: int) -> None:
        self._folder = folder
        self._name = name
        self._limit = shard_mb * 1_000_000
        self._per_class = [0] * num_classes
        self._rows: list[IndexRow] = []
        self._shards: list[Shard] = []
        self._tar: tarfile.TarFile | None = None
        self._samples = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self._finish_shard()
        elif self._tar is not None and self._tar.fileobj is not None:
            self._tar.fileobj.close()  # without the end-of-archive blocks: writing them could fail once more

    def add(self, name: str, data: bytes, label: int | None, pixels_sha256: str) -> None:
        """Append one image; `name` is its path in the source and gives key and extension."""
        if self._tar is not None and self._tar.offset >= self._limit:
            self._finish_shard()
        if self._tar is None:
            path = self._folder / self._shard_name()
            self._tar = tarfile.open(path, "w", format=tarfile.USTAR_FORMAT)  # noqa: SIM115 – closed by _finish_shard
        key = make_key(name)
        offset = self._append(f"{key}{PurePosixPath(name).suffix.lower()}", data)
        if label is not None:
            self._append(f"{key}.cls", str(label).encode())
            self._per_class[label] += 1
        self._samples += 1
        row = IndexRow(
            key=key,
            label=UNLABELLED if label is None else label,
            shard=self._shard_name(),
            offset=offset,
            size=len(data),
            sha256=hashlib.sha256(data).hexdigest(),
            pixels_sha256=pixels_sha256,
            crc32=_crc32(data),
        )
        self._rows.append(row)

    def split(self) -> Split:
        """Write the index and describe the split for the manifest."""
        index = self._folder / f"{self._name}.csv"
        with open(index, "w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(COLUMNS)
            writer.writerows([getattr(row, column) for column in COLUMNS] for row in self._rows)
        return Split(
            count=len(self._rows),
            per_class=self._per_class,
            index=index.name,
            index_sha256=files.sha256_file(index),
            shards=self._shards,
        )

    def _shard_name(self) -> str:
        return f"{self._name}-{len(self._shards):06d}.tar"

    def _append(self, name: str, data: bytes) -> int:
        assert self._tar is not None
        info = tarfile.TarInfo(name)  # owner 0, mode 0644 and time 0 by default
        info.size = len(data)
        offset = self._tar.offset + tarfile.BLOCKSIZE  # keys are short enough for a single header block
        self._tar.addfile(info, io.BytesIO(data))
        return offset

    def _finish_shard(self) -> None:
        if self._tar is None:
            return
        self._tar.close()
        path = self._folder / self._shard_name()
        shard = Shard(
            file=path.name, sha256=files.sha256_file(path), samples=self._samples, bytes=path.stat().st_size
        )
        self._shards.append(shard)
        self._tar, self._samples = None, 0


def read_index(folder: Path, split: Split) -> list[IndexRow]:
    """All rows of a split's index, in order.

    Raises:
        DataError: the file is missing or its hash is not the manifest's.
    """
    path = folder / split.index
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise DataError(f"{path} is missing; run ingest again") from None
    if hashlib.sha256(content).hexdigest() != split.index_sha256:
        raise DataError(f"{path} is damaged (its sha256 differs from the manifest's); run ingest again")
    return [
        IndexRow(
            key=row["key"],
            label=int(row["label"]),
            shard=row["shard"],
            offset=int(row["offset"]),
            size=int(row["size"]),
            sha256=row["sha256"],
            pixels_sha256=row["pixels_sha256"],
            crc32=row["crc32"],
        )
        for row in csv.DictReader(io.StringIO(content.decode()))
    ]


class ShardReader:
    """Random access to the images of one split; safe to use after a fork and to send to another process."""

    def __init__(self, folder: Path, split: Split) -> None:
        """
        Raises:
            DataError: a shard is missing or does not have the manifest's size.
        """
        self._folder = folder
        self._files: dict[str, io.FileIO] = {}
        for shard in split.shards:
            path = folder / shard.file
            if not path.is_file():
                raise DataError(f"{path} is missing; run ingest again")
            size = path.stat().st_size
            if size != shard.bytes:
                raise DataError(f"{path} is damaged: {size} bytes instead of {shard.bytes}; run ingest again")

    def read(self, row: IndexRow) -> bytes:
        """The encoded image.

        Raises:
            DataError: the bytes are not those that ingest wrote.
        """
        file = self._files.get(row.shard)
        if file is None:
            file = self._files[row.shard] = io.FileIO(self._folder / row.shard)
        # no shared file position: forked workers may read too
        data = os.pread(file.fileno(), row.size, row.offset)
        if len(data) != row.size or _crc32(data) != row.crc32:
            raise DataError(f"{self._folder / row.shard} is damaged at {row.key}; run ingest again")
        return data

    def __getstate__(self) -> dict[str, object]:
        return {"_folder": self._folder, "_files": {}}


def _crc32(data: bytes) -> str:
    return f"{zlib.crc32(data):08x}"
