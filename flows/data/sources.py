"""The user's word for a data set (`make run DATASET=…`) made what ingest reads; fetches what is missing."""

from __future__ import annotations

import hashlib
import http.client
import os
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from flows import files, paths
from flows.data import progress
from flows.data.readers import CIFAR10_ARCHIVE
from flows.errors import DataError

CHUNK_BYTES = 1 << 18
TIMEOUT_S = 30.0
DIGITS_SOURCE = "constraints.txt"  # pins scikit-learn, which bundles the digits; relative, as in params.yaml


@dataclass(frozen=True)
class Download:
    """A file at a public address whose content is known beforehand."""

    url: str
    sha256: str
    size: int
    """Bytes; nothing beyond is read."""


CIFAR10 = Download(
    url="https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",
    sha256="c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",
    size=170_052_171,
)


def resolve(dataset: str, root: Path, *, cifar10: Download = CIFAR10) -> tuple[str, str]:
    """The values of ingest.dataset and ingest.source for `dataset`: digits, cifar10, or the path of a folder.

    CIFAR-10 comes from `$TRUNKLINE_DATA/cifar10` (default: `../shared/data/cifar10` beside the clone, `root`)
    if that exists, else from its official address. Paths are absolute.

    Raises:
        DataError: no such folder, or CIFAR-10 can neither be found nor fetched.
    """
    if dataset == "digits":
        return "digits", DIGITS_SOURCE
    if dataset == "cifar10":
        local = Path(os.environ.get("TRUNKLINE_DATA") or root / "../shared/data") / "cifar10"
        if local.is_dir():
            return "cifar10", os.path.abspath(local)
        folder = paths.downloads() / "cifar10"
        fetch(cifar10, folder / CIFAR10_ARCHIVE)
        return "cifar10", os.path.abspath(folder)
    folder = Path(dataset).expanduser()
    if not folder.is_dir():
        raise DataError(f"DATASET={dataset} is neither digits, nor cifar10, nor an existing folder")
    return "folder", os.path.abspath(folder)


def fetch(download: Download, path: Path) -> None:
    """Make sure that `path` holds the file; an earlier download, or a file put there by hand, is kept.

    Raises:
        DataError: the address cannot be reached or answers with something else, or an existing file differs.
    """
    by_hand = f"fetch it by other means and save it as {path}"
    if path.is_file():
        if files.sha256_file(path) != download.sha256:
            raise DataError(
                f"{path} is not the file published at {download.url} (its sha256 differs); delete it"
            )
        return
    print(f"fetching {download.url} ({download.size / 1e6:.0f} MB) to {path}", flush=True)
    digest = hashlib.sha256()
    received = 0
    with files.replace_file(path) as temporary:
        with open(temporary, "wb") as file:
            chunks = progress.report(
                _read(download, by_hand), "fetching", download.size // CHUNK_BYTES, "MB", 1e6 / CHUNK_BYTES
            )
            for chunk in chunks:
                received += len(chunk)
                if received > download.size:
                    break
                digest.update(chunk)
                file.write(chunk)
        if received != download.size:
            sent = (
                f"more than {download.size}" if received > download.size else f"{received} of {download.size}"
            )
            raise DataError(f"{download.url} sent {sent} bytes; try again, or {by_hand}")
        if digest.hexdigest() != download.sha256:
            raise DataError(
                f"{download.url} sent a file with another sha256 than the published one; {by_hand}"
            )


def _read(download: Download, by_hand: str) -> Iterator[bytes]:
    # only reading is guarded: a full disk, also an OSError, must not be blamed on the network
    try:
        response = urllib.request.urlopen(download.url, timeout=TIMEOUT_S)
    except (OSError, http.client.HTTPException) as error:
        raise _unreachable(download, error, by_hand) from None
    with response:
        while True:
            try:
                chunk = response.read(CHUNK_BYTES)
            except (OSError, http.client.HTTPException) as error:
                raise _unreachable(download, error, by_hand) from None
            if not chunk:
                return
            yield chunk


def _unreachable(download: Download, error: Exception, by_hand: str) -> DataError:
    if isinstance(error, urllib.error.HTTPError):
        reason = f"the server answered {error.code} {error.reason}"
    elif isinstance(error, urllib.error.URLError):
        reason = str(error.reason)
    else:
        reason = str(error) or type(error).__name__
    return DataError(f"cannot fetch {download.url}: {reason}; check the connection, or {by_hand}")
