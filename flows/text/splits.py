"""Which documents train, validate and test: whole ones, by a hash of seed and name, in shares of bytes."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

from flows.errors import DataError

SPLITS = ("train", "val", "test")


def assign_splits(
    sizes: Sequence[tuple[str, int]], fractions: Mapping[str, float], seed: int
) -> dict[str, list[int]]:
    """Indices into `sizes` (name, bytes) for each split, in a seeded order.

    Val and test get one of the smaller documents each and are then filled up to their share of all bytes, so
    that a document larger than a share goes to train.

    Raises:
        DataError: fewer documents than splits.
    """
    if len(sizes) < len(SPLITS):
        raise DataError(
            f"the source has {len(sizes)} usable documents; at least {len(SPLITS)} are needed, one for each "
            f"of {', '.join(SPLITS)}"
        )

    def rank(index: int) -> bytes:
        return hashlib.sha256(f"{seed}\0{sizes[index][0]}".encode()).digest()

    total = sum(size for _, size in sizes)
    room = {split: fractions[split] * total for split in ("val", "test")}
    members: dict[str, list[int]] = {split: [] for split in SPLITS}
    waiting = sorted(range(len(sizes)), key=rank)
    for split in room:
        small = next((i for i in waiting if sizes[i][1] <= room[split]), None)
        first = small if small is not None else min(waiting, key=lambda i: sizes[i][1])
        waiting.remove(first)
        members[split].append(first)
        room[split] -= sizes[first][1]
    for index in waiting:
        size = sizes[index][1]
        split = next((split for split, left in room.items() if size <= left), "train")
        members[split].append(index)
        if split in room:
            room[split] -= size
    for found in members.values():
        found.sort(key=rank)
    return members
