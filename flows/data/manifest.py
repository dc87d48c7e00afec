"""manifest.json: what a data set contains, with a hash of every file, so that one digest names the whole.

The digest is the first link of the chain of custody: training, the registry and the server carry it along.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from flows import files
from flows.errors import DataError

FILE_NAME = "manifest.json"


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class Shard(_Part):
    file: str
    sha256: str
    samples: int
    bytes: int


class Split(_Part):
    count: int
    per_class: list[int]
    """Images of each class; empty if unlabelled."""
    index: str
    """CSV file beside the manifest, one row per image."""
    index_sha256: str
    shards: list[Shard]


class Manifest(_Part):
    format: Literal[1] = 1
    name: str
    source: str
    licence: str
    classes: list[str]
    mean: tuple[float, float, float]
    """Of RGB in 0–1 over all pixels of the train split at native size."""
    std: tuple[float, float, float]
    median_short_side: int
    """Pixels, over the train split."""
    splits: dict[str, Split]
    quarantined: int
    digest: str = ""

    def compute_digest(self) -> str:
        """sha256 of the canonical JSON of everything but the digest itself."""
        content = self.model_dump(mode="json", exclude={"digest"})
        return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()

    def sealed(self) -> Manifest:
        """The same manifest with its digest filled in."""
        return self.model_copy(update={"digest": self.compute_digest()})


def save(manifest: Manifest, folder: Path) -> None:
    files.write_json(folder / FILE_NAME, manifest.model_dump(mode="json"))


def load(folder: Path) -> Manifest:
    """Read and check `folder`/manifest.json.

    Raises:
        DataError: missing, unreadable, of another format, or its digest does not match its content.
    """
    path = folder / FILE_NAME
    try:
        manifest = Manifest.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        raise DataError(f"{path} does not exist; run `dvc repro ingest` first") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "content"
        raise DataError(
            f"{path} is not a valid manifest: {where}: {first['msg']}; run ingest again"
        ) from None
    if manifest.digest != manifest.compute_digest():
        raise DataError(
            f"{path} was changed after it was written (its digest does not match); run ingest again"
        )
    return manifest


def verify_shards(folder: Path, manifest: Manifest) -> None:
    """Hash every shard and index.

    Raises:
        DataError: the first file that is missing or differs.
    """
    for split in manifest.splits.values():
        for name, sha256 in [(split.index, split.index_sha256), *((s.file, s.sha256) for s in split.shards)]:
            path = folder / name
            if not path.is_file():
                raise DataError(f"{path} is missing; run ingest again")
            if files.sha256_file(path) != sha256:
                raise DataError(
                    f"{path} is damaged (its sha256 differs from the manifest's); run ingest again"
                )
