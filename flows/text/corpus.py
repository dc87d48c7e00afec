"""artifacts/text: tokens of every document by split, a tokenizer, and a manifest whose digest names it all.

    manifest.json                       name, source, licence, sizes, sha256 of every file, digest
    tokenizer.json tokenizer_config.json
    train.tokens val.tokens test.tokens   documents one after the other, little-endian numbers, memory-mapped
    train.csv …                         a line per document: name, sha256, bytes, tokens
    quarantine.json                     what was left out, and why

Every document is begin mark, tokens, end mark. The digest is the first link of the chain of custody.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, ValidationError

from flows import files
from flows.errors import DataError

MANIFEST = "manifest.json"
QUARANTINE = "quarantine.json"
AGAIN = "run `dvc repro text` again"


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class SplitRecord(_Part):
    documents: int
    bytes: int
    """Of the texts as UTF-8."""
    tokens: int
    """Marks included."""
    tokens_file: str
    tokens_sha256: str
    index: str
    index_sha256: str


class TextManifest(_Part):
    format: Literal[1] = 1
    name: str
    source: str
    licence: str
    vocab_size: int
    token_type: Literal["<u2", "<u4"]
    tokenizer_sha256: str
    splits: dict[str, SplitRecord]
    quarantined: int
    digest: str = ""

    def compute_digest(self) -> str:
        """sha256 of the canonical JSON of everything but the digest itself."""
        content = self.model_dump(mode="json", exclude={"digest"})
        return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()

    def sealed(self) -> TextManifest:
        return self.model_copy(update={"digest": self.compute_digest()})


@dataclass(frozen=True)
class TokenizedDocument:
    name: str
    sha256: str
    bytes: int
    ids: Sequence[int]


class SplitWriter:
    """Appends documents of one split; memory does not grow with them, but for a line each."""

    def __init__(self, folder: Path, split: str, token_type: Literal["<u2", "<u4"]) -> None:
        self._folder, self._split, self._type = folder, split, token_type
        self._lines = io.StringIO()
        self._csv = csv.writer(self._lines, lineterminator="\n")
        self._csv.writerow(("name", "sha256", "bytes", "tokens"))
        self._file = open(folder / f"{split}.tokens", "wb")  # noqa: SIM115  # closed by __exit__
        self._documents = self._bytes = self._tokens = 0

    def add(self, document: TokenizedDocument) -> None:
        self._file.write(np.asarray(document.ids, self._type).tobytes())
        self._csv.writerow((document.name, document.sha256, document.bytes, len(document.ids)))
        self._documents += 1
        self._bytes += document.bytes
        self._tokens += len(document.ids)

    def __enter__(self) -> SplitWriter:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()

    def record(self) -> SplitRecord:
        """Finish the files."""
        self._file.close()
        index = self._folder / f"{self._split}.csv"
        files.write_text(index, self._lines.getvalue())
        tokens = self._folder / f"{self._split}.tokens"
        return SplitRecord(
            documents=self._documents,
            bytes=self._bytes,
            tokens=self._tokens,
            tokens_file=tokens.name,
            tokens_sha256=files.sha256_file(tokens),
            index=index.name,
            index_sha256=files.sha256_file(index),
        )


@dataclass(frozen=True)
class TokenSplit:
    """The documents of one split: document d is `ids[starts[d]:starts[d + 1]]`."""

    ids: NDArray[Any]  # (tokens,), mapped from the file
    starts: NDArray[np.int64]  # (documents + 1,)
    bytes: NDArray[np.int64]  # (documents,)
    names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.names)

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each document, marks included."""
        return np.diff(self.starts)

    def document(self, index: int) -> NDArray[np.int64]:
        return self.ids[self.starts[index] : self.starts[index + 1]].astype(np.int64)

    def documents(self) -> Iterator[NDArray[np.int64]]:
        return (self.document(index) for index in range(len(self)))


def load_manifest(folder: Path) -> TextManifest:
    """
    Raises:
        DataError: missing, unreadable, or changed after it was written.
    """
    path = folder / MANIFEST
    try:
        manifest = TextManifest.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        raise DataError(f"{path} does not exist; run `dvc repro text` first") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "content"
        raise DataError(f"{path} is not a valid manifest: {where}: {first['msg']}; {AGAIN}") from None
    if manifest.digest != manifest.compute_digest():
        raise DataError(f"{path} was changed after it was written (its digest does not match); {AGAIN}")
    return manifest


def load_split(folder: Path, manifest: TextManifest, split: str) -> TokenSplit:
    """
    Raises:
        DataError: a file is missing, truncated or damaged.
    """
    record = manifest.splits[split]
    for name, sha256 in ((record.tokens_file, record.tokens_sha256), (record.index, record.index_sha256)):
        if not (folder / name).is_file():
            raise DataError(f"{folder / name} is missing; {AGAIN}")
        if files.sha256_file(folder / name) != sha256:
            raise DataError(f"{folder / name} is damaged (its sha256 differs from the manifest's); {AGAIN}")
    with open(folder / record.index, newline="") as file:
        rows = list(csv.DictReader(file))
    starts = np.concatenate(([0], np.cumsum([int(row["tokens"]) for row in rows]))).astype(np.int64)
    return TokenSplit(
        ids=np.memmap(folder / record.tokens_file, record_type(manifest), "r"),
        starts=starts,
        bytes=np.array([int(row["bytes"]) for row in rows], np.int64),
        names=tuple(row["name"] for row in rows),
    )


def record_type(manifest: TextManifest) -> np.dtype[Any]:
    return np.dtype(manifest.token_type)
