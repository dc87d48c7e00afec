"""Who goes where: stratified train/val/test splits without leaks, and the arithmetic of proportional shares.

Every choice is a sha256 of seed and name, so it is the same on every machine.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

from flows.errors import DataError

SPLITS = ("train", "val", "test")


@dataclass(frozen=True, slots=True)
class Candidate:
    """What splitting needs to know of an image."""

    name: str
    label: int | None
    split: str | None
    """The source's own split, if it has any."""
    pixels_sha256: str


def rank(seed: int, purpose: str, *parts: str) -> bytes:
    """A uniform pseudo-random sort key."""
    return hashlib.sha256("\0".join((str(seed), purpose, *parts)).encode()).digest()


def apportion(counts: Sequence[int], total: int) -> list[int]:
    """Shares of `total` in proportion to `counts`, by largest remainder; they sum to it.

    Ties go to the earlier entry.

    Raises:
        ValueError: `total` is negative or above the sum of the counts.
    """
    available = sum(counts)
    if not 0 <= total <= available:
        raise ValueError(f"cannot share {total} among {available}")
    if available == 0:
        return [0] * len(counts)
    shares = [count * total // available for count in counts]
    remainders = [count * total % available for count in counts]
    by_remainder = sorted(range(len(counts)), key=lambda i: (-remainders[i], i))
    for i in by_remainder[: total - sum(shares)]:
        shares[i] += 1
    return shares


def refuse_leaks(images: Sequence[Candidate]) -> None:
    """
    Raises:
        DataError: identical pixels in two splits of the source; lists the first ten pairs.
    """
    first: dict[str, Candidate] = {}
    pairs = []
    for image in images:
        earlier = first.setdefault(image.pixels_sha256, image)
        if image.split != earlier.split:
            pairs.append(f"{earlier.name} = {image.name}")
    if pairs:
        more = f" and {len(pairs) - 10} more" if len(pairs) > 10 else ""
        what = "1 image has" if len(pairs) == 1 else f"{len(pairs)} images have"
        raise DataError(
            f"{what} identical pixels in two splits, remove one of each: {'; '.join(pairs[:10])}{more}"
        )


def assign_splits(
    images: Sequence[Candidate],
    classes: Sequence[str],
    *,
    val_fraction: float,
    test_fraction: float,
    seed: int,
) -> dict[str, list[int]]:
    """Indices into `images` for each split, in a seeded random order (the first n are a fair sample).

    Splits the source has are kept; a missing one is drawn from its training images, class by class, as a
    fraction of all images. Images with identical pixels stay together. `test` is absent if the fraction is 0.

    Raises:
        DataError: a class is too small to give every split an image, or a source split lacks a class.
    """
    names: list[str | None] = list(classes) or [None]
    has = {image.split for image in images}
    wanted = {"val": val_fraction, "test": test_fraction}
    drawn = [split for split, fraction in wanted.items() if split not in has and fraction > 0]
    result: dict[str, list[int]] = {s: [] for s in SPLITS if s == "train" or s in drawn or s in has}
    pool: list[dict[str, list[int]]] = [defaultdict(list) for _ in names]  # per class: pixels → images
    class_of: dict[str, int] = {}
    for index, image in enumerate(images):
        if image.split in ("val", "test"):
            result[image.split].append(index)
        else:  # identical images with different labels count for the class of the first
            label = class_of.setdefault(image.pixels_sha256, image.label or 0)
            pool[label][image.pixels_sha256].append(index)

    available = [sum(map(len, groups.values())) for groups in pool]
    targets = {split: _shares(available, round(wanted[split] * len(images)), split) for split in drawn}
    for label, groups in enumerate(pool):
        ranked = sorted(groups.values(), key=lambda group: rank(seed, "split", images[group[0]].name))
        if len(ranked) < 1 + len(drawn):
            what = "the source" if names[label] is None else f"class {names[label]}"
            needed = ", ".join(("train", *drawn))
            raise DataError(
                f"{what} has too few different usable images ({len(ranked)}) to give {needed} one each; "
                "add images or remove the class"
            )
        for split, members in _divide(ranked, {split: targets[split][label] for split in drawn}).items():
            result[split].extend(members)
    for split, members in result.items():
        present = {images[index].label for index in members}
        missing = [name for label, name in enumerate(classes) if label not in present]
        if missing or not members:
            raise DataError(
                f"the {split} split has no usable images{' of class ' + missing[0] if missing else ''}"
            )
        members.sort(key=lambda index: rank(seed, "order", images[index].name))
    return result


def _shares(available: Sequence[int], total: int, split: str) -> list[int]:
    if total >= sum(available):
        raise DataError(
            f"ingest.{split}_fraction asks for {total} images of {sum(available)} to divide; lower it"
        )
    return apportion(available, total)


def _divide(groups: list[list[int]], targets: dict[str, int]) -> dict[str, list[int]]:
    """Give every split one of the smallest groups, then fill each up to its target; the rest is train."""
    taken: dict[str, list[int]] = {"train": [], **{split: [] for split in targets}}
    waiting = list(groups)
    for members in taken.values():
        smallest = min(waiting, key=len)  # min is stable: the first by rank
        waiting.remove(smallest)
        members.extend(smallest)
    for group in waiting:
        fits = (split for split, target in targets.items() if len(taken[split]) + len(group) <= target)
        taken[next(fits, "train")].extend(group)
    return taken


def count_duplicates(hashes: Sequence[Hashable]) -> int:
    """How many entries repeat an earlier one."""
    return len(hashes) - len(set(hashes))
