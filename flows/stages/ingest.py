"""Read the source, check every image, and write WebDataset shards with a manifest.

Two passes, so that memory does not grow with the images: the first decodes every one and keeps only its hash
and a few sums, from which the splits follow; the second copies the original bytes into the shards of their
splits. Nothing is replaced in artifacts/ until everything is written.
"""

from __future__ import annotations

import hashlib
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from flows import files, imaging, paths
from flows.data import manifest as manifests
from flows.data import progress
from flows.data.inspection import Facts, inspect, mean_and_std
from flows.data.manifest import Manifest
from flows.data.readers import open_source
from flows.data.shards import SplitWriter
from flows.data.source_image import Source, SourceImage
from flows.data.splits import Candidate, assign_splits, count_duplicates, refuse_leaks
from flows.errors import DataError, Interrupted
from flows.params import Ingest, Params
from flows.stage import Stage, run_stage

T = TypeVar("T")
BYTES_PER_PIXEL = 8  # 16-bit RGBA without compression: a larger file cannot be a legal image of max_pixels


@dataclass(frozen=True, slots=True)
class Usable:
    """An image that passed, without its pixels."""

    image: SourceImage
    bytes_sha256: bytes
    facts: Facts


def run(params: Params, stage: Stage) -> None:
    options = params.ingest
    with open_source(options.dataset, Path(options.source)) as source:
        usable, unreadable = _inspect_all(source, options, stage)
        _limit_unreadable(unreadable, len(source.images), options.max_bad_fraction)
        candidates = [
            Candidate(u.image.name, u.image.label, u.image.split, u.facts.pixels_sha256) for u in usable
        ]
        refuse_leaks(candidates)
        members = assign_splits(
            candidates,
            source.classes,
            val_fraction=options.val_fraction,
            test_fraction=options.test_fraction,
            seed=options.split_seed,
        )
        splits = {split: [usable[index] for index in indices] for split, indices in members.items()}
        quarantined = sorted([*source.rejected, *unreadable])
        with files.replace_folder(paths.DATA) as folder:
            manifest = _write(folder, source, splits, quarantined, options, stage)

    metrics = _metrics(manifest, splits, len(unreadable))
    files.write_json(paths.METRICS / "ingest.json", metrics)
    _log(stage, manifest, metrics)
    _print_summary(source, manifest, metrics, quarantined)


def _inspect_all(source: Source, options: Ingest, stage: Stage) -> tuple[list[Usable], list[tuple[str, str]]]:
    """Decode every image: what can be used, and (name, reason) of the rest."""
    usable = []
    unreadable = []
    for image in _interruptible(progress.report(source.images, "checking", len(source.images)), stage):
        try:
            data = image.load(options.max_pixels * BYTES_PER_PIXEL)
            facts = inspect(imaging.decode(data, max_pixels=options.max_pixels))
        except imaging.ImageError as error:
            unreadable.append((image.name, str(error)))
        else:
            usable.append(Usable(image, hashlib.sha256(data).digest(), facts))
    return usable, unreadable


def _limit_unreadable(unreadable: list[tuple[str, str]], total: int, max_bad_fraction: float) -> None:
    if len(unreadable) > max_bad_fraction * total or len(unreadable) == total:
        shown = "; ".join(f"{name}: {reason}" for name, reason in unreadable[:5])
        more = f"; and {len(unreadable) - 5} more" if len(unreadable) > 5 else ""
        raise DataError(
            f"{len(unreadable)} of {total} images cannot be used, more than ingest.max_bad_fraction = "
            f"{max_bad_fraction:g} allows: {shown}{more}; repair or remove them, or raise the limit"
        )


def _write(
    folder: Path,
    source: Source,
    splits: dict[str, list[Usable]],
    quarantined: list[tuple[str, str]],
    options: Ingest,
    stage: Stage,
) -> Manifest:
    described = {}
    for split, images in splits.items():
        with SplitWriter(folder, split, shard_mb=options.shard_mb, num_classes=len(source.classes)) as writer:
            for item in _interruptible(progress.report(images, f"writing {split}", len(images)), stage):
                data = _read_again(item, options.max_pixels * BYTES_PER_PIXEL)
                writer.add(item.image.name, data, item.image.label, item.facts.pixels_sha256)
        described[split] = writer.split()
    mean, std = mean_and_std(item.facts for item in splits["train"])
    manifest = Manifest(
        name=source.name,
        source=source.origin,
        licence=source.licence,
        classes=source.classes,
        mean=mean,
        std=std,
        median_short_side=statistics.median_low(item.facts.short_side for item in splits["train"]),
        splits=described,
        quarantined=len(quarantined),
    ).sealed()
    manifests.save(manifest, folder)
    files.write_json(
        folder / "quarantine.json", [{"path": path, "reason": reason} for path, reason in quarantined]
    )
    return manifest


def _read_again(item: Usable, max_bytes: int) -> bytes:
    try:
        data = item.image.load(max_bytes)
    except imaging.ImageError as error:
        raise DataError(f"{item.image.name} was readable a moment ago: {error}") from None
    if hashlib.sha256(data).digest() != item.bytes_sha256:
        raise DataError(
            f"{item.image.name} changed while it was read; run the stage again when the source is at rest"
        )
    return data


def _interruptible(items: Iterator[T], stage: Stage) -> Iterator[T]:
    for item in items:
        if stage.stop_requested():
            raise Interrupted("stopped; the same command starts this stage again")
        yield item


def _metrics(manifest: Manifest, splits: dict[str, list[Usable]], unreadable: int) -> dict[str, int]:
    hashes = {split: [item.facts.pixels_sha256 for item in images] for split, images in splits.items()}
    labels: dict[str, set[int | None]] = {}
    for item in (item for images in splits.values() for item in images):
        labels.setdefault(item.facts.pixels_sha256, set()).add(item.image.label)
    return {
        "images": sum(split.count for split in manifest.splits.values()),
        **{split: described.count for split, described in manifest.splits.items()},
        "classes": len(manifest.classes),
        "quarantined": manifest.quarantined,
        "unreadable": unreadable,
        "duplicates": sum(count_duplicates(found) for found in hashes.values()),
        "contradictions": sum(len(found) > 1 for found in labels.values()),
        "bytes": sum(shard.bytes for split in manifest.splits.values() for shard in split.shards),
    }


def _log(stage: Stage, manifest: Manifest, metrics: dict[str, int]) -> None:
    stage.run.log_metrics(metrics)
    stage.run.log_artifact(paths.DATA / manifests.FILE_NAME)
    stage.run.log_artifact(paths.DATA / "quarantine.json")
    stage.run.set_tags({"data_digest": manifest.digest, "dataset": manifest.name})


def _print_summary(
    source: Source, manifest: Manifest, metrics: dict[str, int], quarantined: list[tuple[str, str]]
) -> None:
    counts = ", ".join(f"{split} {described.count}" for split, described in manifest.splits.items())
    classes = f"{len(manifest.classes)} classes" if manifest.classes else "unlabelled"
    print(f"{manifest.name}: {metrics['images']} images, {classes}: {counts}; digest {manifest.digest[:12]}")
    for note in source.notes:
        print(f"  note: {note}")
    if metrics["duplicates"]:
        print(f"  {metrics['duplicates']} images repeat another of their split")
    if metrics["contradictions"]:
        print(f"  {metrics['contradictions']} pictures occur under more than one class")
    for path, reason in quarantined[:5]:
        print(f"  left out: {path}: {reason}")
    if len(quarantined) > 5:
        print(f"  left out: {len(quarantined) - 5} more, see {paths.DATA / 'quarantine.json'}")


def main(argv: list[str] | None = None) -> int:
    return run_stage("ingest", run, argv, stops_itself=True)


if __name__ == "__main__":
    raise SystemExit(main())
