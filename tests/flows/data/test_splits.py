"""Proportional shares, stratified splits without leaks, nested subsets."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flows.data.splits import Candidate, apportion, assign_splits, refuse_leaks
from flows.data.subsets import draw_subsets, load_subset, save_subsets
from flows.errors import DataError

ROOT = Path(__file__).resolve().parents[3]


def candidates(counts: list[int], repeat: int = 1, split: str | None = None) -> list[Candidate]:
    """`counts[label]` images of each class; every `repeat` consecutive ones of a class look the same."""
    return [
        Candidate(f"{split}/{label}/{number}.png", label, split, f"{split}-{label}-{number // repeat}")
        for label, count in enumerate(counts)
        for number in range(count)
    ]


def assign(
    images: list[Candidate], classes: int, val: float = 0.15, test: float = 0.2, seed: int = 0
) -> dict[str, list[int]]:
    names = [f"class{label}" for label in range(classes)]
    return assign_splits(images, names, val_fraction=val, test_fraction=test, seed=seed)


# ------------------------------------------------------------ shares


@given(st.lists(st.integers(0, 50), min_size=1, max_size=12), st.floats(0, 1))
def test_shares_sum_to_the_total_and_stay_within_one_of_their_quota(
    counts: list[int], fraction: float
) -> None:
    total = round(fraction * sum(counts))
    shares = apportion(counts, total)
    assert sum(shares) == total
    for count, share in zip(counts, shares, strict=True):
        assert 0 <= share <= count
        assert abs(share - count * total / max(sum(counts), 1)) < 1


def test_the_largest_remainders_round_up() -> None:
    assert apportion([10, 10, 13], 10) == [3, 3, 4]
    assert apportion([1, 1, 1], 2) == [1, 1, 0]
    with pytest.raises(ValueError, match="cannot share 4 among 3"):
        apportion([1, 1, 1], 4)


# ------------------------------------------------------------ splits


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(12, 40), min_size=1, max_size=5), st.integers(1, 3), st.integers(0, 5))
def test_splits_partition_the_images_and_never_separate_equal_pixels(
    counts: list[int], repeat: int, seed: int
) -> None:
    images = candidates(counts, repeat)
    splits = assign(images, len(counts), seed=seed)
    assert sorted(index for members in splits.values() for index in members) == list(range(len(images)))
    homes: dict[str, set[str]] = {}
    for split, members in splits.items():
        assert {images[index].label for index in members} == set(range(len(counts)))
        for index in members:
            homes.setdefault(images[index].pixels_sha256, set()).add(split)
    assert all(len(found) == 1 for found in homes.values())


@given(st.lists(st.integers(12, 60), min_size=1, max_size=5))
def test_splits_are_stratified_and_of_the_asked_size(counts: list[int]) -> None:
    images = candidates(counts)
    splits = assign(images, len(counts))
    assert len(splits["val"]) == round(0.15 * len(images))
    assert len(splits["test"]) == round(0.2 * len(images))
    for split, fraction in (("val", 0.15), ("test", 0.2)):
        found = Counter(images[index].label for index in splits[split])
        for label, count in enumerate(counts):
            assert abs(found[label] - fraction * count) <= 1.1  # 1 by remainder, 0.1 as the total is rounded


def test_the_seed_alone_decides() -> None:
    images = candidates([30, 30])
    assert assign(images, 2, seed=1) == assign(images, 2, seed=1)
    assert assign(images, 2, seed=1) != assign(images, 2, seed=2)


def test_a_split_begins_with_a_mixture_of_classes() -> None:
    images = candidates([100, 100])
    first = [images[index].label for index in assign(images, 2)["val"][:12]]
    assert set(first) == {0, 1}


def test_splits_of_the_source_are_kept_and_the_missing_one_comes_from_train() -> None:
    images = candidates([50, 50], split="train") + candidates([10, 10], split="test")
    splits = assign(images, 2)
    assert sorted(splits["test"]) == list(range(100, 120))
    assert len(splits["val"]) == round(0.15 * 120)
    assert all(images[index].split == "train" for index in splits["val"] + splits["train"])


def test_no_test_split_without_a_test_fraction() -> None:
    assert list(assign(candidates([20]), 1, test=0.0)) == ["train", "val"]


def test_unlabelled_images_are_split() -> None:
    images = [Candidate(f"{number}.png", None, None, str(number)) for number in range(40)]
    splits = assign(images, 0)
    assert {split: len(members) for split, members in splits.items()} == {"train": 26, "val": 6, "test": 8}


def test_a_class_too_small_for_its_splits_is_named() -> None:
    with pytest.raises(DataError, match=r"class class1 has too few different usable images \(2\)"):
        assign(candidates([30, 2]), 2)
    with pytest.raises(DataError, match=r"class class1 has too few different usable images \(2\)"):
        assign(candidates([30, 6], repeat=3), 2)
    assert len(assign(candidates([30, 3]), 2)["train"]) >= 20


def test_a_source_split_without_a_class_is_named() -> None:
    images = candidates([30, 30], split="train") + candidates([5], split="test")
    with pytest.raises(DataError, match="the test split has no usable images of class class1"):
        assign(images, 2)


def test_a_fraction_beyond_the_training_images_is_refused() -> None:
    images = candidates([10], split="train") + candidates([90], split="test")
    with pytest.raises(DataError, match=r"ingest.val_fraction asks for 15 images of 10 to divide"):
        assign(images, 1)


def test_leaks_are_listed_ten_at_most() -> None:
    images = [
        Candidate(f"{split}/{number}.png", 0, split, str(number))
        for split in ("train", "test")
        for number in range(12)
    ]
    with pytest.raises(DataError, match="12 images have identical pixels in two splits") as caught:
        refuse_leaks(images)
    assert "train/0.png = test/0.png" in str(caught.value)
    assert "train/9.png = test/9.png and 2 more" in str(caught.value)
    assert "train/10.png" not in str(caught.value)
    refuse_leaks(images[:12])


# ------------------------------------------------------------ subsets


@settings(deadline=None)
@given(
    st.lists(st.integers(1, 60), min_size=1, max_size=6),
    st.lists(st.integers(1, 99), min_size=1, max_size=5, unique=True),
    st.integers(0, 3),
)
def test_subsets_are_nested_stratified_and_of_the_asked_size(
    counts: list[int], percentages: list[int], seed: int
) -> None:
    labels = [label for label, count in enumerate(counts) for _ in range(count)]
    keys = [f"key{row}" for row in range(len(labels))]
    percentages = sorted(p for p in [*percentages, 100] if round(p * len(labels) / 100) > 0)
    subsets = draw_subsets(keys, labels, percentages, seed)
    assert list(subsets) == percentages
    assert subsets[100] == list(range(len(labels)))
    larger: set[int] = set(subsets[100])
    for level, percentage in enumerate(reversed(percentages)):
        rows = subsets[percentage]
        assert rows == sorted(set(rows))
        assert len(rows) == round(percentage * len(labels) / 100)
        assert set(rows) <= larger
        larger = set(rows)
        found = Counter(labels[row] for row in rows)
        for label, count in enumerate(counts):
            quota = count * len(rows) / len(labels)
            assert abs(found[label] - quota) < level + 1  # less than one is rounded at each level


def test_an_image_keeps_its_rank_when_others_are_added() -> None:
    keys = [f"key{row}" for row in range(100)]
    few = {keys[row] for row in draw_subsets(keys, [0] * 100, [20], 0)[20]}
    keys.append("new")
    more = {keys[row] for row in draw_subsets(keys, [0] * 101, [20], 0)[20]}
    assert len(few - more) <= 1


def test_a_percentage_of_nothing_is_refused() -> None:
    with pytest.raises(DataError, match="10 % of 4 training images is none"):
        draw_subsets(["a", "b", "c", "d"], [0, 0, 1, 1], [10, 100], 0)


def test_saved_subsets_are_checked_when_loaded(tmp_path: Path) -> None:
    labels = [row % 2 for row in range(40)]
    subsets = draw_subsets([str(row) for row in range(40)], labels, [10, 100], 0)
    summary = save_subsets(subsets, labels, 2, 0, "digest", tmp_path)
    assert [(s.percentage, s.count, s.per_class) for s in summary.subsets] == [
        (10, 4, [2, 2]),
        (100, 40, [20, 20]),
    ]
    assert load_subset(tmp_path, 10) == subsets[10]
    content = (tmp_path / "train-010.txt").read_bytes()
    assert summary.subsets[0].sha256 == hashlib.sha256(content).hexdigest()
    with pytest.raises(DataError, match=r"no subset of 20 %, only \[10, 100\]"):
        load_subset(tmp_path, 20)
    (tmp_path / "train-010.txt").write_bytes(content[:-2])
    with pytest.raises(DataError, match=r"train-010.txt is damaged"):
        load_subset(tmp_path, 10)
    (tmp_path / "train-010.txt").unlink()
    with pytest.raises(DataError, match=r"train-010.txt is missing"):
        load_subset(tmp_path, 10)
    (tmp_path / "subsets.json").write_text("{}")
    with pytest.raises(DataError, match=r"subsets.json is damaged"):
        load_subset(tmp_path, 10)
    with pytest.raises(DataError, match="run `dvc repro scale` first"):
        load_subset(tmp_path / "elsewhere", 10)


def test_subsets_are_pinned_and_owe_nothing_to_order_locale_or_hash_seed() -> None:
    """Names of other scripts, classes of unequal size and not in order: the same rows on every machine."""
    code = (
        "from flows.data.subsets import draw_subsets; import hashlib, json;"
        "keys = [f'{name}/{n:03d}.png' for n in range(40) for name in ('Zebra', '\\u00e4pfel', '\\u732b')];"
        "labels = [(7, 0, 3)[n % 3] if n < 90 else 3 for n in range(120)];"
        "found = draw_subsets(keys, labels, [100, 5, 50, 20], 3);"
        "print(hashlib.sha256(json.dumps(found).encode()).hexdigest()[:16])"
    )
    answers = {
        subprocess.run(
            [sys.executable, "-X", "utf8=0" if locale == "C" else "utf8=1", "-c", code],
            env={**os.environ, "PYTHONHASHSEED": seed, "LC_ALL": locale, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
        for seed, locale in (("0", "C"), ("1", "C.UTF-8"))
    }
    assert answers == {"0a7c0919555ed966"}
