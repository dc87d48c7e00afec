"""The links of a language model's chain of custody, as `flows.custody_links` has them for classifiers.

registry tag → bundle → dvc.lock → checkpoint → text manifest → tokens
"""

from __future__ import annotations

from pathlib import Path

from flows import files, language_champion, paths
from flows.custody_links import Link, compare_locked, locate_output, name_run
from flows.decoders import WEIGHTS, load_decoder
from flows.errors import DataError
from flows.language_registration import LANGUAGE_SEALED, bundle_md5, is_language_model
from flows.params import Params
from flows.provenance import Subject
from flows.registration import LOCK, locked_md5
from flows.serving.lamina.slices.bundle import MANIFEST, Bundle, read_bundle
from flows.serving.lamina.slices.loading import hash_weights
from flows.text.corpus import load_manifest, load_split


def is_language_subject(subject: Subject) -> bool:
    """Also of a bundle that is not registered."""
    if subject.version is not None:
        return is_language_model(subject.version)
    root = subject.root
    return root is not None and not (root / paths.EXPORT).exists() and (root / paths.LANGUAGE_EXPORT).exists()


def verify_language_chain(params: Params, subject: Subject) -> list[Link]:
    """All links, from what is served down to the tokens that were trained on."""
    registry, bundle = _registry_link(subject)
    links = [
        registry,
        _lock_link(subject, bundle),
        _checkpoint_link(subject, bundle),
        *_text_links(subject),
    ]
    for link in links:
        name_run(params, subject, link)
    return links


def _registry_link(subject: Subject) -> tuple[Link, Bundle | None]:
    link = Link("registry", stage="language_export")
    folder = subject.folder or subject.find(paths.LANGUAGE_EXPORT)
    if folder is None:
        link.leave_open("neither the registered files nor the exported ones are here")
        return link, None
    digest = subject.version.tags.get("onnx.digest", "") if subject.version else None
    link.digest = digest or files.sha256_file(folder / MANIFEST)
    link.verify(
        "sha256 of the bundle's manifest is the tag onnx.digest, every file is as it lists them",
        lambda: language_champion.open_registered(folder, digest),
    )
    if subject.version and subject.folder:
        for tag, file in LANGUAGE_SEALED.items():
            found = files.sha256_file(folder / file) if (folder / file).is_file() else "nothing"
            link.same(f"sha256 of {file} is the tag {tag}", found, subject.version.tags.get(tag))
    try:
        return link, read_bundle(folder)
    except DataError:
        return link, None


def _lock_link(subject: Subject, bundle: Bundle | None) -> Link:
    link = Link("dvc.lock", locked_md5(subject.lock, paths.LANGUAGE_EXPORT))
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
            "MD5 of the bundle in dvc.lock is the tag dvc.out_md5", link.digest, tags.get("dvc.out_md5")
        )
    if bundle is not None:
        link.same("MD5 of the bundle's files is the one in dvc.lock", bundle_md5(bundle), link.digest)
    for stage, output in (("language_export", paths.LANGUAGE_PRETRAIN), ("language_pretrain", paths.TEXT)):
        compare_locked(subject, link, stage, output)
    return link


def _checkpoint_link(subject: Subject, bundle: Bundle | None) -> Link:
    link = Link("checkpoint", bundle.manifest.source_sha256 if bundle else "", stage="language_pretrain")
    if (folder := locate_output(subject, link, paths.LANGUAGE_PRETRAIN)) is not None:
        if (folder / WEIGHTS).is_file():
            link.same(
                "digest of its weights is the bundle manifest's source_sha256",
                hash_weights(folder),
                link.digest,
            )
        else:
            link.leave_open(f"{folder / WEIGHTS} is missing")
    return link


def _text_links(subject: Subject) -> list[Link]:
    text, tokens = Link("text manifest", stage="text"), Link("tokens")
    folder = locate_output(subject, text, paths.TEXT)
    if folder is None:
        tokens.leave_open(f"{paths.TEXT} is not here")
        return [text, tokens]
    try:
        manifest = load_manifest(folder)
    except DataError as error:
        text.fail(str(error))
        tokens.leave_open("the manifest that lists them cannot be read")
        return [text, tokens]
    text.digest = manifest.digest
    if subject.version:
        tag = subject.version.tags.get("data.digest")
        text.same("digest of its content is the tag data.digest", manifest.digest, tag)
    if (checkpoint := subject.find(paths.LANGUAGE_PRETRAIN)) is not None:
        text.verify("the checkpoint was trained on it", lambda: _trained_on(checkpoint, manifest.digest))
    for split in manifest.splits:
        tokens.verify(
            f"sha256 of the {split} tokens and their index are the manifest's",
            lambda split=split: load_split(folder, manifest, split),  # type: ignore[misc]
        )
    return [text, tokens]


def _trained_on(checkpoint: Path, digest: str) -> None:
    found = load_decoder(checkpoint)[1].data_digest
    if found != digest:
        raise DataError(f"the checkpoint's training.json names {found[:12]}")
