"""Shards: deterministic bytes, random access, a foreign reader, damage; the manifest and its digest."""

from __future__ import annotations

import json
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest

from flows import files, imaging
from flows.data import manifest as manifests
from flows.data.manifest import Manifest, Split
from flows.data.shards import ShardReader, SplitWriter, make_key, read_index
from flows.errors import DataError


def write(folder: Path, count: int = 40, size: int = 60_000, labelled: bool = True) -> Split:
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    with SplitWriter(folder, "train", shard_mb=1, num_classes=2 if labelled else 0) as writer:
        for number in range(count):
            writer.add(
                f"cat/{number}.png", rng.bytes(size), number % 2 if labelled else None, f"{number:064x}"
            )
    return writer.split()


def test_shards_are_begun_at_their_size(tmp_path: Path) -> None:
    split = write(tmp_path)
    assert [shard.file for shard in split.shards] == [f"train-{number:06d}.tar" for number in range(3)]
    assert sum(shard.samples for shard in split.shards) == split.count == 40
    assert split.per_class == [20, 20]
    for shard in split.shards:
        assert shard.bytes == (tmp_path / shard.file).stat().st_size < 1_100_000
        assert shard.sha256 == files.sha256_file(tmp_path / shard.file)


def test_equal_input_gives_equal_bytes(tmp_path: Path) -> None:
    assert write(tmp_path / "a") == write(tmp_path / "b")
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()


def test_the_index_finds_every_image(tmp_path: Path) -> None:
    split = write(tmp_path)
    rng = np.random.default_rng(0)
    reader = ShardReader(tmp_path, split)
    rows = read_index(tmp_path, split)
    assert [row.label for row in rows] == [0, 1] * 20
    assert [reader.read(row) for row in rows] == [rng.bytes(60_000) for _ in rows]


def test_unlabelled_shards_have_no_labels(tmp_path: Path) -> None:
    split = write(tmp_path, count=3, size=10, labelled=False)
    assert split.per_class == []
    assert {row.label for row in read_index(tmp_path, split)} == {-1}
    with tarfile.open(tmp_path / "train-000000.tar") as archive:
        assert all(name.endswith(".png") for name in archive.getnames())


def test_keys_are_unique_and_safe() -> None:
    names = [
        "cat/1.png", "cat/1.jpg", "cat.1.png", "cat/1.v2.png", "cat-1.png", "dog/1.png", "grün/ä.png",
        "犬/犬.png",
        "a b/c d.png", "x" * 300 + ".png", "-.png", "../up.png",
    ]  # fmt: skip
    keys = [make_key(name) for name in names]
    assert len(set(keys)) == len(names)
    for key in keys:
        assert key.isascii()
        assert len(key) <= 60
        assert not set(key) & set("./ \\")
        assert not key.startswith("-")


def test_a_damaged_shard_is_named(tmp_path: Path) -> None:
    split = write(tmp_path, count=3, size=1000)
    shard = tmp_path / "train-000000.tar"
    good = shard.read_bytes()
    rows = read_index(tmp_path, split)

    flipped = bytearray(good)
    flipped[rows[1].offset + 500] ^= 1
    shard.write_bytes(flipped)
    reader = ShardReader(tmp_path, split)
    assert len(reader.read(rows[0])) == 1000
    with pytest.raises(DataError, match=rf"train-000000.tar is damaged at {rows[1].key}"):
        reader.read(rows[1])

    shard.write_bytes(good[:-512])
    with pytest.raises(DataError, match=r"train-000000.tar is damaged: \d+ bytes instead of \d+"):
        ShardReader(tmp_path, split)
    shard.unlink()
    with pytest.raises(DataError, match=r"train-000000.tar is missing"):
        ShardReader(tmp_path, split)


def test_a_damaged_index_is_named(tmp_path: Path) -> None:
    split = write(tmp_path, count=3, size=10)
    index = tmp_path / "train.csv"
    index.write_bytes(index.read_bytes().replace(b"cat-1", b"cat-7"))
    with pytest.raises(DataError, match=r"train.csv is damaged"):
        read_index(tmp_path, split)
    index.unlink()
    with pytest.raises(DataError, match=r"train.csv is missing"):
        read_index(tmp_path, split)


def test_webdataset_reads_the_same_samples(digits_root: Path) -> None:
    import webdataset

    manifest = manifests.load(digits_root)
    split = manifest.splits["val"]
    rows = read_index(digits_root, split)
    reader = ShardReader(digits_root, split)
    urls = [str(digits_root / shard.file) for shard in split.shards]
    samples = list(webdataset.WebDataset(urls, shardshuffle=False, empty_check=False))
    assert [sample["__key__"] for sample in samples] == [row.key for row in rows]
    assert [int(sample["cls"]) for sample in samples] == [row.label for row in rows]
    assert [sample["png"] for sample in samples] == [reader.read(row) for row in rows]


# ------------------------------------------------------------ manifest


def test_the_manifest_describes_the_digits(digits_root: Path) -> None:
    manifest = manifests.load(digits_root)
    assert (manifest.name, len(manifest.classes), manifest.median_short_side) == ("digits", 10, 8)
    assert {split: part.count for split, part in manifest.splits.items()} == {
        "train": 1168,
        "val": 270,
        "test": 359,
    }
    assert all(sum(part.per_class) == part.count for part in manifest.splits.values())
    manifests.verify_shards(digits_root, manifest)


def test_mean_and_deviation_are_those_of_all_training_pixels(digits_root: Path) -> None:
    manifest = manifests.load(digits_root)
    split = manifest.splits["train"]
    reader = ShardReader(digits_root, split)
    images = [imaging.decode(reader.read(row), max_pixels=64) for row in read_index(digits_root, split)]
    pixels = np.stack([np.asarray(image) for image in images]) / 255.0
    np.testing.assert_allclose(manifest.mean, pixels.mean(axis=(0, 1, 2)), rtol=1e-12)
    np.testing.assert_allclose(manifest.std, pixels.std(axis=(0, 1, 2)), rtol=1e-12)


def test_a_changed_manifest_is_refused(digits_root: Path, tmp_path: Path) -> None:
    content = json.loads((digits_root / "manifest.json").read_text())
    for change, message in (
        ({"licence": "mine"}, "was changed after it was written"),
        ({"format": 2}, "is not a valid manifest: format"),
        ({"surprise": 1}, "is not a valid manifest: surprise"),
    ):
        (tmp_path / "manifest.json").write_text(json.dumps(content | change))
        with pytest.raises(DataError, match=message):
            manifests.load(tmp_path)
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(DataError, match="is not a valid manifest"):
        manifests.load(tmp_path)
    (tmp_path / "manifest.json").unlink()
    with pytest.raises(DataError, match="run `dvc repro ingest` first"):
        manifests.load(tmp_path)


def test_the_digest_covers_everything_and_survives_a_round_trip(digits_root: Path, tmp_path: Path) -> None:
    manifest = manifests.load(digits_root)
    manifests.save(manifest, tmp_path)
    assert manifests.load(tmp_path) == manifest
    changes: dict[str, object] = {
        "name": "other",
        "source": "other",
        "licence": "other",
        "classes": [*manifest.classes, "ten"],
        "mean": (0.0, 0.0, 0.0),
        "std": (1.0, 1.0, 1.0),
        "median_short_side": 9,
        "splits": {"train": manifest.splits["train"]},
        "quarantined": 1,
    }
    assert {*changes, "format", "digest"} == set(Manifest.model_fields)
    digests = {manifest.model_copy(update={name: value}).compute_digest() for name, value in changes.items()}
    assert len(digests | {manifest.digest}) == len(changes) + 1


def test_verify_finds_a_changed_shard(digits_root: Path, tmp_path: Path) -> None:
    shutil.copytree(digits_root, tmp_path / "data")
    shard = tmp_path / "data" / "test-000000.tar"
    content = bytearray(shard.read_bytes())
    content[-1] = 1
    shard.write_bytes(content)
    manifest = manifests.load(tmp_path / "data")
    with pytest.raises(DataError, match=r"test-000000.tar is damaged \(its sha256 differs"):
        manifests.verify_shards(tmp_path / "data", manifest)
    shard.unlink()
    with pytest.raises(DataError, match=r"test-000000.tar is missing"):
        manifests.verify_shards(tmp_path / "data", manifest)
