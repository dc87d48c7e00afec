"""`trunkline trace DIGEST`: the chain of custody of one model, every link verified now.

    health page → registry tag → export manifest → dvc.lock → checkpoint → pretrained weights → data manifest
    → shards → a raw file

For a language model: registry tag → bundle → dvc.lock → checkpoint → text manifest → tokens.

Beside each link stands the MLflow run that really made the bytes, from the receipt that travels with them:
stages that were skipped or restored lead to the run that executed.
"""

from __future__ import annotations

import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from flows import files
from flows import provenance as places
from flows.custody_links import Link, verify_chain
from flows.errors import ConfigError, DataError
from flows.language_custody import is_language_subject, verify_language_chain
from flows.params import Params
from flows.serving.package import MANIFEST

MIN_LETTERS = 6


@dataclass
class Trace:
    """The chain from what is served down to one raw file."""

    digest: str  # in full
    found_as: str  # what it is of
    model: str
    version: str  # empty: exported, not registered
    workspace: str  # empty: only the registry is here
    links: list[Link]

    @property
    def broken(self) -> list[Link]:
        return [link for link in self.links if link.state == "broken"]

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "links": [{**asdict(link), "state": link.state} for link in self.links]}


def trace(params: Params, prefix: str) -> Trace:
    """Find what `prefix` is the digest of and verify the whole chain it belongs to.

    Raises:
        ConfigError: not at least 6 hexadecimal digits, or the beginning of several digests.
        DataError: nothing here has such a digest.
    """
    wanted = prefix.strip().lower()
    if len(wanted) < MIN_LETTERS or set(wanted.removesuffix(".dir")) - set("0123456789abcdef"):
        raise ConfigError(f"a digest is at least {MIN_LETTERS} hexadecimal digits, got {prefix!r}")
    with tempfile.TemporaryDirectory() as scratch:
        return _trace(params, wanted, Path(scratch))


def _trace(params: Params, wanted: str, scratch: Path) -> Trace:
    workspaces = places.known_workspaces()
    versions = places.registered_versions(params)
    homes = {(entry.name, entry.version): places.home_of(entry, workspaces) for entry in versions}
    matches: dict[str, str] = {}  # digest to what it is of
    image: tuple[str, str] | None = None
    chosen: tuple[Any, Path | None] | None = None

    def take(digests: dict[str, str], version: Any, root: Path | None) -> None:
        nonlocal chosen
        for label, digest in digests.items():
            if digest.startswith(wanted):
                matches.setdefault(digest, label)
                chosen = chosen or (version, root)

    digests_of = {root: places.workspace_digests(root) for root in workspaces}
    for version in versions:
        take(places.tag_digests(version), version, homes[version.name, version.version])
    for root in workspaces:
        owner = _owner(versions, homes, root)
        take(digests_of[root], owner, root)
        for digest, where in places.find_images(root, wanted).items():
            take({f"image {where[1]} of {where[0]}": digest}, owner, root)
            image = image or where
    if chosen is None:  # deeper, and slower: inside the registered folders
        for number, version in enumerate(versions):
            with places.opened(params, version, None, scratch / f"look-{number}") as looked:
                if looked.folder and (looked.folder / MANIFEST).is_file():
                    found = places.export_digests(files.read_json(looked.folder / MANIFEST))
                    take(
                        {**found, **places.lock_digests(looked.lock)},
                        version,
                        homes[version.name, version.version],
                    )
            if chosen:
                break
    if chosen is None:
        raise DataError(
            f"nothing here has a digest that begins with {wanted}: neither the registry "
            f"({len(versions)} versions) nor {len(workspaces)} workspaces"
        )
    if len(matches) > 1:
        listed = "; ".join(f"{digest[:16]} ({label})" for digest, label in sorted(matches.items())[:5])
        raise ConfigError(f"{wanted} is the beginning of {len(matches)} digests: {listed}; give more digits")
    digest, label = next(iter(matches.items()))
    with places.opened(params, chosen[0], chosen[1], scratch / "subject") as subject:
        return Trace(
            digest=digest,
            found_as=label,
            model=subject.version.name if subject.version else "",
            version=subject.version.version if subject.version else "",
            workspace=str(subject.root or ""),
            links=(
                verify_language_chain(params, subject)
                if is_language_subject(subject)
                else verify_chain(params, subject, image)
            ),
        )


def _owner(versions: list[Any], homes: dict[tuple[str, str], Path | None], root: Path) -> Any:
    """The version that is the export of `root`, if it is registered."""
    digests = {places.export_digest(root), places.bundle_digest(root)} - {None}
    return next((entry for entry in versions if entry.tags.get("onnx.digest") in digests), None)
