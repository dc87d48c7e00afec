"""The ingest stage from source to manifest, and everything a user can put in its way."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from flows import params
from flows.data import ImageDataset
from flows.data import manifest as manifests
from flows.data.manifest import Manifest
from flows.data.shards import SplitWriter
from flows.errors import DataError, Interrupted
from flows.stage import Stage
from flows.stages import ingest

REPOSITORY = Path(__file__).parents[3]


@pytest.fixture(autouse=True)
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "workspace"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Two classes of 20 different images, 6×5 pixels."""
    folder = tmp_path / "My Images"
    rng = np.random.default_rng(0)
    for name in ("cat", "dog"):
        for number in range(20):
            save(folder / name / f"{number:02d}.png", rng.integers(0, 256, (5, 6, 3), dtype=np.uint8))
    return folder


def save(path: Path, pixels: np.ndarray, **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **options)
    return path


def run(
    dataset: str = "folder",
    path: Path | str = "constraints.txt",
    stage: Stage | None = None,
    **changes: object,
) -> Manifest:
    values = params.read(REPOSITORY / "params.yaml")
    change = {"ingest": {"dataset": dataset, "source": str(path), **changes}}
    ingest.run(params.check(params.overlay(values, change, "test"), "test"), stage or Stage("ingest"))
    return manifests.load(Path("artifacts/data"))


def contents(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def quarantine() -> dict[str, str]:
    return {
        item["path"]: item["reason"]
        for item in json.loads(Path("artifacts/data/quarantine.json").read_text())
    }


def metrics() -> dict[str, int]:
    found: dict[str, int] = json.loads(Path("artifacts/metrics/ingest.json").read_text())
    return found


def test_digits_twice_give_the_same_bytes() -> None:
    first = run("digits")
    before = contents(Path("artifacts/data"))
    assert run("digits") == first
    assert contents(Path("artifacts/data")) == before
    assert metrics()["images"] == 1797
    assert run("digits", split_seed=1).digest != first.digest


def test_a_folder_keeps_its_original_files(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    manifest = run(path=source)
    assert (manifest.name, manifest.source) == ("my-images", "folder My Images")
    assert manifest.classes == ["cat", "dog"]
    assert manifest.median_short_side == 5
    originals = {path.read_bytes() for path in source.rglob("*.png")}
    stored = set()
    for split in manifest.splits:
        images = ImageDataset(Path("artifacts/data"), split, cache_mb=0, max_pixels=100)
        stored |= {images.encoded(i) for i in range(len(images))}
    assert stored == originals
    assert {split: metrics()[split] for split in manifest.splits} == {"train": 26, "val": 6, "test": 8}
    assert "my-images: 40 images, 2 classes: train 26, val 6, test 8" in capsys.readouterr().out


def test_the_place_of_the_source_does_not_change_the_data(source: Path, tmp_path: Path) -> None:
    digest = run(path=source).digest
    moved = tmp_path / "elsewhere" / source.name
    moved.parent.mkdir()
    source.rename(moved)
    assert run(path=moved).digest == digest


def bomb(side: int) -> bytes:
    """A valid header of side × side pixels, with next to no data."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


def truncated_jpeg() -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(
        buffer, "JPEG"
    )
    return buffer.getvalue()[: buffer.tell() // 2]


def float_tiff() -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.full((4, 4), np.nan, dtype=np.float32)).save(buffer, "TIFF")
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("name", "data", "reason"),
    [
        ("bad.png", b"", "empty file"),
        ("bad.jpg", truncated_jpeg(), "truncated"),
        ("bad.png", bomb(10_000), "10000x10000 pixels, more than the limit of 50000000"),
        ("bad.png", bomb(40_000), "decompression bomb"),
        ("bad.png", b"just some words\n" * 9, "not a readable image"),
        ("bad.tif", float_tiff(), "not finite"),
        ("bad.jpg", os.urandom(512), "not a readable image"),
        ("bad.txt", b"notes", "not an image file"),
    ],
    ids=["empty", "truncated", "bomb", "huge bomb", "text", "nan", "noise", "other"],
)
def test_bad_files_are_quarantined(source: Path, name: str, data: bytes, reason: str) -> None:
    (source / "cat" / name).write_bytes(data)
    manifest = run(path=source, max_bad_fraction=0.05)
    assert list(quarantine()) == [f"cat/{name}"]
    assert reason in quarantine()[f"cat/{name}"]
    assert manifest.quarantined == metrics()["quarantined"] == 1
    assert metrics()["images"] == 40
    assert metrics()["unreadable"] == (name != "bad.txt")


def test_a_wrong_extension_is_no_harm(source: Path) -> None:
    Image.new("RGB", (6, 5)).save(source / "cat" / "really_a.jpg", format="PNG")
    run(path=source)
    assert quarantine() == {}
    assert metrics()["images"] == 41


def test_too_many_bad_images_stop_the_stage_and_keep_the_earlier_data(source: Path) -> None:
    run("digits")
    before = contents(Path("artifacts/data"))
    for number in range(7):
        (source / "cat" / f"bad{number}.png").write_bytes(b"")
    with pytest.raises(
        DataError, match=r"7 of 47 images cannot be used.*cat/bad0.png: empty file.*and 2 more"
    ) as caught:
        run(path=source)
    assert "\n" not in str(caught.value)
    assert contents(Path("artifacts/data")) == before
    assert sorted(os.listdir("artifacts")) == ["data", "metrics"]


def test_files_that_are_no_images_do_not_count_as_bad(source: Path) -> None:
    for number in range(30):
        (source / "cat" / f"{number}.json").write_text("{}")
    assert run(path=source, max_bad_fraction=0.0).quarantined == 30


def test_a_class_of_bad_images_only_is_named(source: Path) -> None:
    (source / "fox").mkdir()
    (source / "fox" / "a.png").write_bytes(b"")
    with pytest.raises(DataError, match="class fox has too few different usable images"):
        run(path=source, max_bad_fraction=1.0)


def test_no_usable_image_at_all(tmp_path: Path) -> None:
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "a.png").write_bytes(b"")
    with pytest.raises(DataError, match="1 of 1 images cannot be used"):
        run(path=tmp_path / "s", max_bad_fraction=1.0)


def test_equal_pixels_in_two_splits_of_the_source_are_refused(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    pixels = rng.integers(0, 256, (30, 5, 6, 3), dtype=np.uint8)
    for number in range(20):
        save(tmp_path / "s" / "train" / "ab"[number % 2] / f"{number}.png", pixels[number])
    for number in range(18, 28):  # 18 and 19 once more, stored differently
        save(tmp_path / "s" / "test" / "ab"[number % 2] / f"{number}.bmp", pixels[number])
    with pytest.raises(DataError, match="2 images have identical pixels") as caught:
        run(path=tmp_path / "s")
    assert "train/a/18.png = test/a/18.bmp" in str(caught.value)
    assert not Path("artifacts/data").exists()


def test_equal_pixels_are_kept_together_and_counted(source: Path) -> None:
    for number in range(10):
        for copy in range(2):
            (source / "cat" / f"copy{copy}-{number}.png").write_bytes(
                (source / "cat" / f"{number:02d}.png").read_bytes()
            )
    (source / "dog" / "a-cat.png").write_bytes((source / "cat" / "00.png").read_bytes())
    manifest = run(path=source)
    homes: dict[str, set[str]] = {}
    for split in manifest.splits:
        for line in Path(f"artifacts/data/{split}.csv").read_text().splitlines()[1:]:
            homes.setdefault(line.split(",")[5], set()).add(split)
    assert len(homes) == 40
    assert all(len(found) == 1 for found in homes.values())
    assert metrics()["duplicates"] == 21
    assert metrics()["contradictions"] == 1


def test_unlabelled_images(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for number in range(20):
        save(tmp_path / "s" / f"{number}.png", rng.integers(0, 256, (5, 6), dtype=np.uint8))
    manifest = run(path=tmp_path / "s")
    assert manifest.classes == []
    assert [split.per_class for split in manifest.splits.values()] == [[], [], []]
    assert set(ImageDataset(Path("artifacts/data"), "train", cache_mb=1, max_pixels=100).labels.tolist()) == {
        -1
    }


@pytest.mark.parametrize("fits", [0, 10, 39])
def test_a_full_disk_keeps_the_earlier_data(source: Path, monkeypatch: pytest.MonkeyPatch, fits: int) -> None:
    run("digits")
    before = contents(Path("artifacts/data"))
    written = []
    add = SplitWriter.add

    def fail_when_full(self: SplitWriter, *args: Any) -> None:
        written.append(args[0])
        if len(written) > fits:
            raise OSError(errno.ENOSPC, "No space left on device")
        add(self, *args)

    monkeypatch.setattr(SplitWriter, "add", fail_when_full)
    with pytest.raises(OSError, match="No space left"):
        run(path=source)
    assert len(written) == fits + 1
    assert contents(Path("artifacts/data")) == before
    assert sorted(os.listdir("artifacts")) == ["data", "metrics"]


def test_a_full_disk_is_one_line_for_the_user(
    workspace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(self: SplitWriter, *args: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    (workspace / "params.yaml").write_text((REPOSITORY / "params.yaml").read_text())
    monkeypatch.setattr(SplitWriter, "add", full)
    assert ingest.main([]) == 74
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: ingest: the disk is full")


def test_a_source_that_changes_meanwhile_is_refused(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def touch(images: object) -> None:
        save(source / "cat" / "00.png", np.zeros((5, 6, 3), dtype=np.uint8))

    monkeypatch.setattr(ingest, "refuse_leaks", touch)
    with pytest.raises(DataError, match=r"cat/00.png changed while it was read"):
        run(path=source)
    monkeypatch.setattr(ingest, "refuse_leaks", lambda images: (source / "dog" / "03.png").unlink())
    with pytest.raises(DataError, match=r"dog/03.png was readable a moment ago"):
        run(path=source)
    assert not Path("artifacts/data").exists()


def test_a_stop_leaves_nothing_behind(source: Path) -> None:
    stage = Stage("ingest")
    stage.request_stop()
    with pytest.raises(Interrupted):
        run(path=source, stage=stage)
    assert not Path("artifacts").exists()


@pytest.mark.parametrize("name", ["cifar10", "folder"])
def test_recipes_are_valid(name: str) -> None:
    values = params.read(REPOSITORY / "params.yaml")
    recipe = params.read(REPOSITORY / "recipes" / f"{name}.yaml")
    checked = params.check(params.overlay(values, recipe, name), name)
    assert checked.ingest.dataset == name
    assert checked.finetune.flip
    assert checked.pretrain.flip
