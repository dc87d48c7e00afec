"""The MD5 that dvc.lock holds for a file or a folder, computed from bytes: links of the chain of custody.

DVC 3 hashes a folder through the list of its files: MD5 of a JSON array of `{"md5", "relpath"}` in the order
of the paths, with `.dir` appended.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path


def file_md5(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()


def tree_md5(md5s: Mapping[str, str]) -> str:
    """Of a folder whose files, by path relative to it, have these MD5s."""
    entries = [
        {"md5": md5s[path], "relpath": path} for path in sorted(md5s, key=lambda text: text.split("/"))
    ]
    return (
        hashlib.md5(json.dumps(entries, sort_keys=True).encode(), usedforsecurity=False).hexdigest() + ".dir"
    )


def folder_md5(folder: Path) -> str:
    return tree_md5(
        {path.relative_to(folder).as_posix(): file_md5(path) for path in folder.rglob("*") if path.is_file()}
    )


def md5_of(path: Path) -> str:
    """Of a file or a folder."""
    return folder_md5(path) if path.is_dir() else file_md5(path)
