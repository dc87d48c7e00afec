"""The links of the chain of custody and how each is verified; `flows.custody` finds whose chain it is.

A link compares what one place says with what the bytes of the next one are. It is ok, broken (with the
reason), or open: what it needs is not on this machine, which is said and is no fault.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from flows import dvc_hash, files, imaging, paths, tracking
from flows import params as parameters
from flows.classifiers import WEIGHTS, load_config
from flows.data import manifest as manifests
from flows.data.inspection import inspect
from flows.data.readers import open_source
from flows.data.shards import ShardReader, make_key, read_index
from flows.errors import DataError, TrunklineError
from flows.params import Params
from flows.provenance import CHECKPOINT, Subject
from flows.registration import LOCK, locked_md5
from flows.serving.package import MANIFEST, ModelPackage

ANY_SIZE = 2**62  # ingest has read these bytes before
State = Literal["ok", "broken", "open"]


@dataclass(frozen=True)
class Check:
    """One comparison."""

    text: str
    state: State


@dataclass
class Link:
    """One place of the chain."""

    name: str
    digest: str = ""
    checks: list[Check] = field(default_factory=list)
    stage: str = ""
    run_id: str = ""

    @property
    def state(self) -> State:
        """Broken if anything is, ok if something was verified."""
        states = {check.state for check in self.checks}
        return "broken" if "broken" in states else "ok" if "ok" in states else "open"

    def same(self, text: str, found: str | None, expected: str | None) -> None:
        """Compare two digests; None is one that is not known here."""
        if not found or not expected:
            self.checks.append(Check(f"{text}: not known here", "open"))
        elif found == expected:
            self.checks.append(Check(text, "ok"))
        else:
            self.checks.append(Check(f"{text}: {found[:12]} is not {expected[:12]}", "broken"))

    def verify(self, text: str, action: Callable[[], object]) -> None:
        """Run a check that raises."""
        try:
            action()
        except TrunklineError as error:
            self.checks.append(Check(f"{text}: {' '.join(str(error).split())}", "broken"))
        else:
            self.checks.append(Check(text, "ok"))

    def fail(self, text: str) -> None:
        self.checks.append(Check(text, "broken"))

    def leave_open(self, text: str) -> None:
        self.checks.append(Check(text, "open"))


def verify_chain(params: Params, subject: Subject, image: tuple[str, str] | None = None) -> list[Link]:
    """All links, from what is served down to one raw file: `image` (split, key), else the first test
    image."""
    manifest = _export_manifest(subject)
    links = [
        _registry_link(subject),
        _export_link(subject, manifest),
        _lock_link(subject),
        _checkpoint_link(subject, manifest),
        _pretrain_link(subject),
        _data_link(subject, manifest),
        _shards_link(subject),
        _raw_link(subject, image),
    ]
    for link in links:
        name_run(params, subject, link)
    return links


def _export_folder(subject: Subject) -> Path | None:
    return subject.folder or subject.find(paths.EXPORT)


def _export_manifest(subject: Subject) -> dict[str, Any]:
    folder = _export_folder(subject)
    try:
        return dict(files.read_json(folder / MANIFEST)) if folder else {}
    except (OSError, ValueError):
        return {}


# ---- links -------------------------------------------------------------------------------------------------


def _registry_link(subject: Subject) -> Link:
    link = Link("registry")
    if subject.version is None:
        link.leave_open("the export of this workspace is not registered")
        return link
    link.digest = subject.version.tags.get("onnx.digest", "")
    if subject.folder is None:
        link.leave_open("the registered files cannot be fetched")
        return link
    folder = subject.folder
    link.verify(
        "content digest of the registered network is the tag onnx.digest (and what /healthz shows)",
        lambda: ModelPackage.open(folder, digest=link.digest),
    )
    return link


def _export_link(subject: Subject, manifest: dict[str, Any]) -> Link:
    link = Link("export manifest", stage="export")
    folder = _export_folder(subject)
    if folder is None or not manifest:
        link.leave_open(f"{paths.EXPORT}/{MANIFEST} is not here")
        return link
    link.digest = files.sha256_file(folder / MANIFEST)
    link.verify(
        "sha256 and content digest of every variant are the manifest's", lambda: ModelPackage.open(folder)
    )
    if subject.version:
        link.same(
            "its data digest is the tag data.digest",
            manifest["data_digest"],
            subject.version.tags.get("data.digest"),
        )
    return link


def _lock_link(subject: Subject) -> Link:
    """The lock belongs to the version, and its stages belong together."""
    link = Link("dvc.lock", locked_md5(subject.lock, paths.EXPORT))
    if not subject.lock:
        link.leave_open("no dvc.lock is here")
        return link
    if subject.version and subject.folder:
        tags = subject.version.tags
        link.same(
            "dvc.lock in the registered folder is the tag dvc.lock_sha256",
            files.sha256_file(subject.folder / LOCK),
            tags.get("dvc.lock_sha256"),
        )
        link.same(
            "MD5 of the export in dvc.lock is the tag dvc.out_md5", link.digest, tags.get("dvc.out_md5")
        )
    folder = _export_folder(subject)
    if folder is not None:
        try:
            found = _export_md5(folder)
        except (OSError, TrunklineError) as error:
            link.checks.append(Check(f"MD5 of the exported files: {error}", "broken"))
        else:
            link.same("MD5 of the exported files is the one in dvc.lock", found, link.digest)
    for stage, output in (
        ("export", CHECKPOINT),
        ("export", paths.DATA),
        ("finetune@pretrained", paths.DATA),
    ):
        compare_locked(subject, link, stage, output)
    return link


def compare_locked(subject: Subject, link: Link, stage: str, output: Path) -> None:
    """Did `stage` use the `output` that the lock says was made?"""
    if used := _used_md5(subject, stage, output):
        link.same(f"{stage} used the {output} that was made", used, locked_md5(subject.lock, output))


def _used_md5(subject: Subject, stage: str, path: Path) -> str:
    """MD5 that the lock holds for an input of `stage`; empty when it is none."""
    needs = subject.lock.get(stage, {}).get("deps", [])
    return next((str(dep["md5"]) for dep in needs if dep["path"] == path.as_posix() and "md5" in dep), "")


def _export_md5(folder: Path) -> str:
    package = ModelPackage.open(folder, variants=())
    return dvc_hash.tree_md5({name: dvc_hash.file_md5(folder / name) for name in package.file_names()})


def _checkpoint_link(subject: Subject, manifest: dict[str, Any]) -> Link:
    link = Link(
        "checkpoint", manifest.get("source", {}).get("checkpoint_sha256", ""), stage="finetune@pretrained"
    )
    if (folder := locate_output(subject, link, CHECKPOINT)) is not None:
        if (folder / WEIGHTS).is_file():
            link.same(
                f"sha256 of {CHECKPOINT / WEIGHTS} is the export manifest's",
                files.sha256_file(folder / WEIGHTS),
                link.digest,
            )
        else:
            link.checks.append(Check(f"{folder / WEIGHTS} is missing", "broken"))
    return link


def _pretrain_link(subject: Subject) -> Link:
    link = Link("pretrained weights", stage="pretrain")
    folder = subject.find(CHECKPOINT)
    if folder is None:
        link.leave_open("the checkpoint's config, which names them, is not here")
    else:
        try:
            link.digest = load_config(folder).start_sha256
        except DataError as error:
            link.checks.append(Check(str(error), "broken"))
            return link
        if not link.digest:
            link.leave_open("the checkpoint was trained from random weights")
            return link
    found = locate_output(subject, link, paths.PRETRAIN)
    if found is not None and (found / WEIGHTS).is_file():
        weights = paths.PRETRAIN / WEIGHTS
        sha256 = files.sha256_file(found / WEIGHTS)
        link.same(f"sha256 of {weights} is the checkpoint config's", sha256, link.digest)
        if used := _used_md5(subject, "finetune@pretrained", weights):
            link.same(f"finetune@pretrained used this {weights}", used, dvc_hash.file_md5(found / WEIGHTS))
    return link


def _data_link(subject: Subject, manifest: dict[str, Any]) -> Link:
    link = Link("data manifest", manifest.get("data_digest", ""), stage="ingest")
    if (folder := locate_output(subject, link, paths.DATA)) is None:
        return link
    try:
        data = manifests.load(folder)
    except DataError as error:
        link.checks.append(Check(str(error), "broken"))
        return link
    link.digest = link.digest or data.digest
    link.same("digest of its content is the export manifest's", data.digest, link.digest)
    if (checkpoint := subject.find(CHECKPOINT)) is not None:
        link.verify("the checkpoint was trained on it", lambda: _trained_on(checkpoint, data.digest))
    return link


def _trained_on(checkpoint: Path, digest: str) -> None:
    found = load_config(checkpoint).data_digest
    if found != digest:
        raise DataError(f"the checkpoint's config names {found[:12]}")


def _shards_link(subject: Subject) -> Link:
    link = Link("shards")
    if (folder := subject.find(paths.DATA)) is None:
        link.leave_open(f"{paths.DATA} is not here")
        return link
    try:
        data = manifests.load(folder)
    except DataError:
        link.leave_open("the manifest that lists them cannot be read")
        return link
    for split in data.splits.values():
        for name, sha256 in [(split.index, split.index_sha256), *((s.file, s.sha256) for s in split.shards)]:
            path = folder / name
            found = files.sha256_file(path) if path.is_file() else "nothing"
            link.same(f"sha256 of {name}", found, sha256)
    return link


def _raw_link(subject: Subject, image: tuple[str, str] | None) -> Link:
    link = Link("raw file")
    if (folder := subject.find(paths.DATA)) is None:
        link.leave_open(f"{paths.DATA} is not here")
        return link
    try:
        data = manifests.load(folder)
        split = image[0] if image else ("test" if "test" in data.splits else next(iter(data.splits)))
        rows = read_index(folder, data.splits[split])
        row = next((entry for entry in rows if image is None or entry.key == image[1]), None)
        if row is None:
            raise DataError(f"the {split} split has no image {image[1] if image else ''}")
        link.digest = row.sha256
        encoded = ShardReader(folder, data.splits[split]).read(row)
    except DataError as error:
        link.checks.append(Check(str(error), "broken"))
        return link
    link.same(f"sha256 of {row.key} inside {row.shard}", hashlib.sha256(encoded).hexdigest(), row.sha256)
    pixels = inspect(imaging.decode(encoded, max_pixels=ANY_SIZE)).pixels_sha256
    link.same("its decoded pixels", pixels, row.pixels_sha256)
    _compare_source(subject, link, row.key, row.sha256)
    return link


def _compare_source(subject: Subject, link: Link, key: str, sha256: str) -> None:
    """The file that ingest read, where the workspace's params say it lies."""
    if subject.root is None:
        link.leave_open("no workspace here says where the raw files lie")
        return
    try:
        options = parameters.load(subject.root / "params.yaml").ingest
        with open_source(options.dataset, subject.root / options.source) as source:
            found = next((entry for entry in source.images if make_key(entry.name) == key), None)
            if found is None:
                link.leave_open(f"the source {options.source} has no such file any more")
                return
            raw = hashlib.sha256(found.load(ANY_SIZE)).hexdigest()
            link.same(f"sha256 of the raw file {found.name} of {source.name}", raw, sha256)
    except (TrunklineError, imaging.ImageError) as error:
        link.leave_open(f"the raw files cannot be read: {error}")


def locate_output(subject: Subject, link: Link, output: Path) -> Path | None:
    """The output's bytes, whose MD5 is compared with the lock's; None (and said) when they are not here."""
    found = subject.find(output)
    if found is None:
        where = "no workspace here" if subject.root is None else "neither the workspace nor DVC's cache"
        link.leave_open(f"{output} of that time is not here ({where} holds it)")
        return None
    if expected := locked_md5(subject.lock, output):
        link.same(f"MD5 of {output} is the one in dvc.lock", dvc_hash.md5_of(found), expected)
    return found


def name_run(params: Params, subject: Subject, link: Link) -> None:
    """The run whose receipt lies beside the bytes, and whether the tracking store has it."""
    run_id = str(subject.receipts.get(link.stage, {}).get("run_id", ""))
    if not link.stage or not run_id:
        return
    link.run_id = run_id
    found = tracking.read_run(params, run_id)
    if found is None:
        link.leave_open(f"MLflow run {run_id} that made it is not in the tracking store")
        return
    link.same(
        f"MLflow run {run_id} is of stage {link.stage}",
        found[1].get("trunkline.stage", "another"),
        link.stage,
    )
