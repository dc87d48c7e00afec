"""A registered version on trial: what every gate gets, what it answers, and the checks that all kinds of
model share.

The gates of classifiers stand in `flows.gates`, those of language models in `flows.language_gates`.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flows import files, registry
from flows.params import Params
from flows.registry import Version


@dataclass(frozen=True)
class Gate:
    """One condition on the way to `champion`."""

    name: str
    passed: bool
    reason: str
    figures: Mapping[str, Any] = field(default_factory=dict)

    @property
    def verdict(self) -> str:
        return f"{'passed' if self.passed else 'failed'}: {self.reason}"


@dataclass(frozen=True)
class Candidate:
    """A version on trial: its registered folder, fetched afresh, and the workspace whose data judge it."""

    params: Params
    root: Path
    version: Version
    folder: Path


class Failed(Exception):
    """A gate's condition is not met; figures as far as they are known."""

    def __init__(self, reason: str, figures: Mapping[str, Any] | None = None) -> None:
        super().__init__(reason)
        self.figures = figures or {}


Check = Callable[[Candidate, Version | None], tuple[str, dict[str, Any]]]
"""From candidate and present champion to reason and figures; raises `Failed`."""


@contextlib.contextmanager
def fetched(params: Params, root: Path, version: Version) -> Iterator[Candidate]:
    """The candidate with its folder, which is empty when it cannot be downloaded: then every gate says so."""
    with tempfile.TemporaryDirectory() as temporary:
        with contextlib.suppress(Exception):  # `integrity` tells what is missing
            registry.download_version(params, version, Path(temporary))
        yield Candidate(params, root, version, Path(temporary))


# ---- parts of the gate `integrity` -------------------------------------------------------------------------


def registered_digest(version: Version) -> str:
    """The content digest that the version was registered under."""
    if digest := version.tags.get("onnx.digest"):
        return digest
    raise Failed("the version has no tag onnx.digest; register it again with `make run`")


def check_seals(candidate: Candidate, seals: Mapping[str, str]) -> None:
    """Every file has the sha256 that its tag says; `seals` maps tags to files."""
    tags, folder = candidate.version.tags, candidate.folder
    for tag, file in seals.items():
        found = files.sha256_file(folder / file) if (folder / file).is_file() else "nothing"
        if found != tags.get(tag, "nothing"):
            raise Failed(f"{file} has sha256 {found[:12]}, tag {tag} says {tags.get(tag, 'nothing')[:12]}")


def check_claims(candidate: Candidate, claims: Mapping[str, str]) -> dict[str, Any]:
    """Tags say of the registered files what is true, and the tree they were made from was clean if it has to
    be; the figures of the gate."""
    tags = candidate.version.tags
    for tag, found in claims.items():
        if found != tags.get(tag):
            raise Failed(f"tag {tag} is {tags.get(tag)!r}, the registered files say {found!r}")
    commit, dirty = tags.get("git.commit", "unknown"), tags.get("git.dirty") != "false"
    if candidate.params.promotion.require_clean_tree and (dirty or commit == "unknown"):
        raise Failed(
            f"made from {'a modified clone at' if dirty else ''} commit {commit[:12]}, "
            "and promotion.require_clean_tree is true"
        )
    return {"digest": tags["onnx.digest"], "commit": commit, "dirty": dirty, **claims}
