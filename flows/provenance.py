"""Where the pieces of the chain of custody lie: registered folders, workspaces, DVC's cache.

A `Subject` is one model with whatever of it can be found. Its lock says which bytes every output must have;
bytes are taken from the workspace while its own lock claims them (so that damage there is seen), else from
DVC's cache, where a retrained workspace still has what it made before.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flows import files, paths, registry
from flows.classifiers import CONFIG, WEIGHTS
from flows.data import manifest as manifests
from flows.data.shards import read_index
from flows.errors import DataError
from flows.params import Params
from flows.registration import LOCK, RECEIPTS, locked_md5, read_lock, read_receipts
from flows.registry import CHAMPION, Version

CHECKPOINT = paths.FINETUNE / "pretrained"
"""What is exported."""
CACHE = Path(".dvc/cache/files/md5")


@dataclass(frozen=True)
class Subject:
    """One model: registered, or only exported in a workspace."""

    version: Version | None
    folder: Path | None
    """The registered folder, downloaded; None when it cannot be fetched."""
    root: Path | None
    """The workspace that made it or holds its data; None when there is none here."""
    lock: dict[str, Any]
    """Stages of the dvc.lock of the time of registration; for an unregistered export the workspace's."""
    receipts: dict[str, dict[str, Any]]
    scratch: Path
    """A folder for what is taken from DVC's cache."""
    _found: dict[Path, Path | None] = field(default_factory=dict)

    def find(self, output: Path) -> Path | None:
        """Where the bytes of a stage's output lie now, unverified; None when nobody here has them."""
        if output not in self._found:
            self._found[output] = self._find(output)
        return self._found[output]

    def _find(self, output: Path) -> Path | None:
        expected = locked_md5(self.lock, output)
        if self.root is not None and (self.root / output).exists():
            claimed = locked_md5(workspace_lock(self.root), output)
            if not expected or claimed == expected:
                return self.root / output
        target = self.scratch / output
        return target if expected and restore(paths.home() / CACHE, expected, target) else None


def workspace_lock(root: Path) -> dict[str, Any]:
    return read_lock(root / "dvc.lock") if (root / "dvc.lock").is_file() else {}


def restore(cache: Path, md5: str, target: Path) -> bool:
    """Link the file or folder that DVC's cache holds under `md5` to `target`; False when it is not all
    there."""

    def cached(text: str) -> Path:
        return cache / text[:2] / text[2:]

    if not cached(md5).is_file():
        return False
    if not md5.endswith(".dir"):
        target.parent.mkdir(parents=True, exist_ok=True)
        target.symlink_to(cached(md5))
        return True
    listing = json.loads(cached(md5).read_text())
    if not all(cached(entry["md5"]).is_file() for entry in listing):
        return False
    for entry in listing:
        file = target / entry["relpath"]
        file.parent.mkdir(parents=True, exist_ok=True)
        file.symlink_to(cached(entry["md5"]))
    return True


# ---- finding the subject of a digest -----------------------------------------------------------------------


def known_workspaces() -> list[Path]:
    """The current folder, the clone and the workspaces of recipes, without repetition."""
    places = [Path.cwd(), paths.home(), *sorted(paths.workspaces().glob("*"))]
    return [root for root in dict.fromkeys(places) if (root / "params.yaml").is_file()]


def registered_versions(params: Params) -> list[Version]:
    """All versions of all models: champions first, then the newest."""
    found = [version for name in registry.model_names(params) for version in registry.versions(params, name)]
    return sorted(found, key=lambda version: (CHAMPION not in version.aliases, -int(version.version)))


def home_of(version: Version, workspaces: list[Path]) -> Path | None:
    """The workspace that holds this export; else one that holds its data."""
    export, data = version.tags.get("onnx.digest"), version.tags.get("data.digest")
    by_export = [root for root in workspaces if export in (export_digest(root), bundle_digest(root))]
    by_data = [root for root in workspaces if data in (data_digest(root), data_digest(root, paths.TEXT))]
    return next(iter([*by_export, *by_data]), None)


def export_digest(root: Path) -> str | None:
    return _quietly(
        lambda: files.read_json(root / paths.EXPORT / "manifest.json")["variants"]["fp32"]["digest"]
    )


def bundle_digest(root: Path) -> str | None:
    """Of a workspace's language model."""
    return _quietly(lambda: files.sha256_file(root / paths.LANGUAGE_EXPORT / "manifest.json"))


def data_digest(root: Path, data: Path = paths.DATA) -> str | None:
    return _quietly(lambda: files.read_json(root / data / "manifest.json")["digest"])


def _quietly(read: Any) -> str | None:
    try:
        return str(read())
    except (OSError, ValueError, KeyError, TypeError):
        return None


@contextlib.contextmanager
def opened(params: Params, version: Version | None, root: Path | None, scratch: Path) -> Iterator[Subject]:
    """The subject with its registered folder, lock and receipts as far as they can be had."""
    folder: Path | None = None
    if version is not None:
        folder = scratch / "registered"
        folder.mkdir(parents=True)
        with contextlib.suppress(Exception):  # the first link says that it cannot be fetched
            registry.download_version(params, version, folder)
        if not any(folder.iterdir()):
            folder = None
    lock = read_lock(folder / LOCK) if folder and (folder / LOCK).is_file() else {}
    receipts = files.read_json(folder / RECEIPTS) if folder and (folder / RECEIPTS).is_file() else {}
    if version is None and root is not None:
        lock, receipts = workspace_lock(root), read_receipts(root)
    yield Subject(version, folder, root, lock, receipts, scratch)


def tag_digests(version: Version) -> dict[str, str]:
    """Digests that the registry knows without fetching files, by what they are of."""
    names = {
        "onnx.digest": "content of fp32" if "model.kind" not in version.tags else "bundle manifest",
        "dvc.out_md5": "export in dvc.lock",
        "data.digest": "data manifest",
        "data.md5": "data in dvc.lock",
        "dvc.lock_sha256": "dvc.lock",
    }
    return {label: version.tags[tag] for tag, label in names.items() if version.tags.get(tag)}


def export_digests(manifest: dict[str, Any]) -> dict[str, str]:
    """Digests inside the manifest of an export or of a bundle."""
    if manifest.get("kind") == "lamina":
        listed = [*manifest["graphs"], *manifest["weights"], *manifest["tokenizer"]]
        files_of = {f"file {entry['file']}": entry["sha256"] for entry in listed}
        return {"checkpoint": manifest["source_sha256"], **files_of}
    found = {"checkpoint": manifest["source"]["checkpoint_sha256"], "data manifest": manifest["data_digest"]}
    if start := manifest["source"].get("start_sha256"):
        found["pretrained weights"] = start
    for name, variant in manifest["variants"].items():
        found[f"content of {name}"] = variant["digest"]
        found[f"file {variant['file']}"] = variant["sha256"]
    return found


def lock_digests(lock: dict[str, Any]) -> dict[str, str]:
    """MD5s of all outputs, by path."""
    return {
        f"{out['path']} in dvc.lock": str(out["md5"])
        for stage in lock.values()
        for out in stage.get("outs", [])
    }


def workspace_digests(root: Path) -> dict[str, str]:
    """Digests of the files in a workspace, except images."""
    found = lock_digests(workspace_lock(root))
    for folder in (paths.EXPORT, paths.LANGUAGE_EXPORT):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            for label, digest in export_digests(files.read_json(root / folder / "manifest.json")).items():
                found.setdefault(label, digest)
    for label, path in (
        ("checkpoint", CHECKPOINT / WEIGHTS),
        ("checkpoint's config", CHECKPOINT / CONFIG),
        ("pretrained weights", paths.PRETRAIN / WEIGHTS),
        ("dvc.lock", Path("dvc.lock")),
    ):
        if (root / path).is_file():
            found.setdefault(label, files.sha256_file(root / path))
    named = {
        "data manifest": data_digest(root),
        "text manifest": data_digest(root, paths.TEXT),
        "bundle manifest": bundle_digest(root),
    }
    return found | {label: digest for label, digest in named.items() if digest}


def find_images(root: Path, prefix: str) -> dict[str, tuple[str, str]]:
    """Images (and shards: then their first image) of a workspace whose sha256 begins with `prefix`: digest to
    (split, key)."""
    found: dict[str, tuple[str, str]] = {}
    try:
        manifest = manifests.load(root / paths.DATA)
    except DataError:
        return found
    for name, split in manifest.splits.items():
        try:
            rows = read_index(root / paths.DATA, split)
        except DataError:
            continue
        shards = {shard.file: shard.sha256 for shard in split.shards}
        for row in rows:
            for digest in (row.sha256, row.pixels_sha256, shards.get(row.shard, "")):
                if digest.startswith(prefix):
                    found.setdefault(digest, (name, row.key))
    return found
