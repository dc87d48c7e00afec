"""Nested stratified subsets of the training split: 10 % ⊂ 20 % ⊂ 50 % ⊂ 100 % (arXiv 2206.04664, section 3).

The paper's own subsets are not public. Ours: within a class, images are ranked by a seeded hash; a subset
takes the first k of every class, k in proportion to the class. A subset is a text file of row numbers of
train.csv.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from flows import files
from flows.data.splits import apportion, rank
from flows.errors import DataError

FILE_NAME = "subsets.json"


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Subset(_Part):
    percentage: int
    file: str
    count: int
    per_class: list[int]
    """Images of each class; empty if unlabelled."""
    sha256: str


class Subsets(_Part):
    seed: int
    of: int
    """Images in the training split."""
    data_digest: str
    """Digest of the manifest the rows refer to."""
    subsets: list[Subset]


def draw_subsets(
    keys: Sequence[str], labels: Sequence[int], percentages: Sequence[int], seed: int
) -> dict[int, list[int]]:
    """Ascending row numbers for each percentage; every subset contains all smaller ones.

    A subset of p % has round(p·n/100) images. From the largest down, each shares its total among the classes
    in proportion to what the next larger one has of them (largest remainder): shares of the whole would not
    always nest.

    Raises:
        DataError: a percentage of so few images is none.
    """
    ranked: dict[int, list[int]] = {label: [] for label in sorted(set(labels))}
    for row, label in enumerate(labels):
        ranked[label].append(row)
    for label, rows in ranked.items():
        rows.sort(key=lambda row: rank(seed, "subset", str(label), keys[row]))

    subsets: dict[int, list[int]] = {}
    shares = [len(rows) for rows in ranked.values()]
    for percentage in sorted(percentages, reverse=True):
        total = round(percentage * len(labels) / 100)
        if total == 0:
            raise DataError(
                f"{percentage} % of {len(labels)} training images is none; remove it from scale.percentages"
            )
        shares = apportion(shares, total)
        chosen = (row for rows, share in zip(ranked.values(), shares, strict=True) for row in rows[:share])
        subsets[percentage] = sorted(chosen)
    return dict(sorted(subsets.items()))


def save_subsets(
    subsets: dict[int, list[int]],
    labels: Sequence[int],
    num_classes: int,
    seed: int,
    data_digest: str,
    folder: Path,
) -> Subsets:
    """Write one index file per subset and subsets.json into `folder`."""
    described = []
    for percentage, rows in subsets.items():
        content = "".join(f"{row}\n" for row in rows).encode()
        name = f"train-{percentage:03d}.txt"
        files.write_bytes(folder / name, content)
        per_class = [0] * num_classes
        for row in rows if num_classes else ():
            per_class[labels[row]] += 1
        described.append(
            Subset(
                percentage=percentage,
                file=name,
                count=len(rows),
                per_class=per_class,
                sha256=hashlib.sha256(content).hexdigest(),
            )
        )
    summary = Subsets(seed=seed, of=len(labels), data_digest=data_digest, subsets=described)
    files.write_json(folder / FILE_NAME, summary.model_dump(mode="json"))
    return summary


def load_subset(folder: Path, percentage: int) -> list[int]:
    """Row numbers of train.csv, ascending.

    Raises:
        DataError: the subset does not exist or its file does not have the recorded hash.
    """
    path = folder / FILE_NAME
    found = {subset.percentage: subset for subset in read_summary(folder).subsets}
    if percentage not in found:
        raise DataError(
            f"{path} has no subset of {percentage} %, only {sorted(found)}; see scale.percentages"
        )
    file = folder / found[percentage].file
    try:
        content = file.read_bytes()
    except FileNotFoundError:
        raise DataError(f"{file} is missing; run scale again") from None
    if hashlib.sha256(content).hexdigest() != found[percentage].sha256:
        raise DataError(f"{file} is damaged (its sha256 differs from {FILE_NAME}); run scale again")
    return [int(line) for line in content.split()]


def load_smallest_subset(folder: Path) -> list[int]:
    """The images that are in every subset.

    Raises:
        DataError: as `load_subset`.
    """
    return load_subset(folder, min(subset.percentage for subset in read_summary(folder).subsets))


def read_summary(folder: Path) -> Subsets:
    """
    Raises:
        DataError: there is none, or it is damaged.
    """
    path = folder / FILE_NAME
    try:
        return Subsets.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        raise DataError(f"{path} does not exist; run `dvc repro scale` first") from None
    except ValidationError as error:
        raise DataError(f"{path} is damaged: {error.errors()[0]['msg']}; run scale again") from None
