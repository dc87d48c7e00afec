"""Batches: exact resume, independence of workers and ranks, augmentation, evaluation, mixing."""

from __future__ import annotations

import pickle
import shutil
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from flows import imaging, params
from flows.data import (
    Augmentation,
    Batch,
    ImageDataset,
    eval_batches,
    mix,
    preprocessing_for,
    to_model_input,
    train_batches,
)
from flows.errors import DataError
from flows.imaging import Preprocessing

REPOSITORY = Path(__file__).parents[3]
AUGMENTATION = Augmentation(image_size=16, crop_scale=(0.5, 1.0), flip=True)


@pytest.fixture(scope="module")
def dataset(digits_root: Path) -> ImageDataset:
    return ImageDataset(digits_root, "train", rows=range(3, 53), cache_mb=8, max_pixels=64)  # an epoch of 50


def batches(dataset: ImageDataset, **changes: int) -> list[Batch]:
    """Six steps of 24 images (nearly three epochs) unless `changes` says otherwise."""
    defaults = {
        "start_step": 0,
        "steps": 6,
        "rank": 0,
        "world_size": 1,
        "accumulation": 1,
        "workers": 0,
        "seed": 7,
    }
    options = defaults | changes
    size = 24 // (options["world_size"] * options["accumulation"])
    return list(train_batches(dataset, AUGMENTATION, batch_size=size, global_batch=24, **options))


def assert_equal(first: list[Batch], second: list[Batch]) -> None:
    assert len(first) == len(second) > 0
    for a, b in zip(first, second, strict=True):
        for name in ("images", "labels", "positions", "rows"):
            assert torch.equal(getattr(a, name), getattr(b, name)), name


def by_position(found: list[Batch]) -> dict[int, tuple[int, int, bytes]]:
    return {
        int(batch.positions[i]): (int(batch.rows[i]), int(batch.labels[i]), batch.images[i].numpy().tobytes())
        for batch in found
        for i in range(len(batch.labels))
    }


# ------------------------------------------------------------ dataset


def test_a_dataset_gives_bytes_pictures_and_labels(digits_root: Path) -> None:
    everything = ImageDataset(digits_root, "val", cache_mb=1, max_pixels=64)
    some = ImageDataset(digits_root, "val", rows=[5, 2], cache_mb=0, max_pixels=64)
    assert len(everything) == 270
    assert len(some) == 2
    assert some.keys == [everything.keys[5], everything.keys[2]]
    assert some.labels.tolist() == everything.labels[[5, 2]].tolist()
    assert some.rows.tolist() == [5, 2]
    assert some.encoded(0) == everything.encoded(5)
    for _ in range(2):  # the second time from the cache
        assert everything.image(5).mode == "RGB"
        assert everything.image(5).tobytes() == some.image(0).tobytes()


def test_the_cache_saves_decoding_up_to_its_size(digits_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded = []
    decode = imaging.decode
    monkeypatch.setattr(
        imaging, "decode", lambda data, max_pixels: decoded.append(1) or decode(data, max_pixels=max_pixels)
    )
    for cache_mb, expected in ((1, 10), (0, 20)):
        decoded.clear()
        images = ImageDataset(digits_root, "val", cache_mb=cache_mb, max_pixels=64)
        for i in [*range(10), *range(10)]:
            images.image(i)
        assert len(decoded) == expected


def test_wrong_requests_are_refused(digits_root: Path) -> None:
    with pytest.raises(DataError, match="has no holdout split, only train, val, test"):
        ImageDataset(digits_root, "holdout", cache_mb=1, max_pixels=64)
    with pytest.raises(DataError, match="rows up to 270 are asked for, but val has 270"):
        ImageDataset(digits_root, "val", rows=[270], cache_mb=1, max_pixels=64)
    with pytest.raises(DataError, match="can no longer be decoded"):
        ImageDataset(digits_root, "val", cache_mb=1, max_pixels=63).image(0)


def test_a_damaged_shard_stops_reading(digits_root: Path, tmp_path: Path) -> None:
    root = tmp_path / "data"
    shutil.copytree(digits_root, root)
    content = bytearray((root / "val-000000.tar").read_bytes())
    content[512 + 50] ^= 1
    (root / "val-000000.tar").write_bytes(content)
    images = ImageDataset(root, "val", cache_mb=1, max_pixels=64)
    images.image(1)
    with pytest.raises(DataError, match="is damaged at"):
        images.image(0)
    (root / "val-000000.tar").write_bytes(content[:-1])
    with pytest.raises(DataError, match="is damaged"):
        ImageDataset(root, "val", cache_mb=1, max_pixels=64)


def test_a_dataset_can_be_sent_to_another_process(dataset: ImageDataset) -> None:
    expected = dataset.encoded(0)  # opens the shard
    assert pickle.loads(pickle.dumps(dataset)).encoded(0) == expected


# ------------------------------------------------------------ the sequence


def test_each_epoch_shows_every_image_once_in_another_order(dataset: ImageDataset) -> None:
    rows = [row for _, (row, _, _) in sorted(by_position(batches(dataset, steps=7)).items())]
    epochs = [rows[start : start + 50] for start in (0, 50, 100)]
    for epoch in epochs:
        assert sorted(epoch) == list(range(3, 53))
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]


def test_labels_belong_to_their_rows(dataset: ImageDataset, digits_root: Path) -> None:
    labels = ImageDataset(digits_root, "train", cache_mb=0, max_pixels=64).labels
    for batch in batches(dataset):
        assert batch.labels.tolist() == labels[batch.rows.numpy()].tolist()
        assert batch.images.shape == (24, 3, 16, 16)
        assert batch.images.dtype == torch.uint8
        assert batch.images.is_contiguous()


@pytest.mark.parametrize("start", [1, 2, 5])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_resumed_run_sees_the_same_data(dataset: ImageDataset, start: int, accumulation: int) -> None:
    whole = batches(dataset, accumulation=accumulation)
    resumed = batches(dataset, accumulation=accumulation, start_step=start, steps=6 - start)
    assert_equal(whole[start * accumulation :], resumed)


@pytest.mark.parametrize(("world_size", "accumulation"), [(2, 1), (1, 2), (2, 3), (4, 2)])
def test_processes_and_accumulation_divide_each_step(
    dataset: ImageDataset, world_size: int, accumulation: int
) -> None:
    alone = batches(dataset)
    ranks = [
        batches(dataset, rank=rank, world_size=world_size, accumulation=accumulation)
        for rank in range(world_size)
    ]
    for step, expected in enumerate(alone):
        parts = [batch for rank in ranks for batch in rank[step * accumulation : (step + 1) * accumulation]]
        assert by_position(parts) == by_position([expected])
        assert sum(len(part.labels) for part in parts) == 24


def test_workers_change_nothing(dataset: ImageDataset) -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    assert_equal(batches(dataset), batches(dataset, workers=2))
    assert torch.equal(before, torch.get_rng_state())


def test_an_error_in_a_worker_keeps_its_kind(digits_root: Path) -> None:
    images = ImageDataset(digits_root, "val", cache_mb=1, max_pixels=1)
    loading = train_batches(
        images, AUGMENTATION, batch_size=2, global_batch=2, seed=0, start_step=0, steps=2, rank=0,
        world_size=1, accumulation=1, workers=1,
    )  # fmt: skip
    with pytest.raises(DataError, match="can no longer be decoded") as caught:
        next(loading)
    assert "\n" not in str(caught.value)


def test_seeds_differ_and_epochs_are_augmented_anew(dataset: ImageDataset) -> None:
    one, other = by_position(batches(dataset)), by_position(batches(dataset, seed=8))
    assert [one[p][0] for p in range(50)] != [other[p][0] for p in range(50)]
    pictures: dict[int, set[bytes]] = {}
    for row, _, picture in by_position(batches(dataset)).values():
        pictures.setdefault(row, set()).add(picture)
    assert sum(len(found) for found in pictures.values()) == 6 * 24


def test_disagreeing_batch_sizes_are_refused(dataset: ImageDataset) -> None:
    options = {"seed": 0, "start_step": 0, "steps": 1, "rank": 0, "workers": 0}
    with pytest.raises(ValueError, match="global batch 9 is not 4 images x 2 processes x 1 micro-steps"):
        train_batches(
            dataset, AUGMENTATION, batch_size=4, global_batch=9, world_size=2, accumulation=1, **options
        )


# ------------------------------------------------------------ augmentation


def gradient(width: int, height: int) -> Image.Image:
    """Red grows to the right, green downwards."""
    x, y = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return Image.fromarray(np.stack([x, y, np.zeros_like(x)], axis=-1).round().astype(np.uint8))


def test_the_whole_image_is_kept_if_crops_are_not_asked_for() -> None:
    augmentation = Augmentation(image_size=32, crop_scale=(1.0, 1.0), flip=False, ratio=(1.0, 1.0))
    image = gradient(32, 32)
    np.testing.assert_array_equal(augmentation(image, np.random.default_rng(0)), np.asarray(image))


def test_crops_cover_the_asked_area_and_move() -> None:
    augmentation = Augmentation(image_size=64, crop_scale=(0.25, 0.5), flip=False)
    areas, lefts = [], []
    for seed in range(200):
        pixels = augmentation(gradient(64, 64), np.random.default_rng(seed)).astype(float)
        width = (pixels[:, -1, 0].mean() - pixels[:, 0, 0].mean()) / 255
        height = (pixels[-1, :, 1].mean() - pixels[0, :, 1].mean()) / 255
        areas.append(width * height)
        lefts.append(pixels[:, 0, 0].mean())
        assert 0.7 < width / height < 1.4
    assert 0.22 < min(areas) < 0.28
    assert 0.45 < max(areas) < 0.52
    assert max(lefts) - min(lefts) > 80


@pytest.mark.parametrize("flip", [True, False])
def test_half_of_the_images_are_mirrored_if_asked(flip: bool) -> None:
    augmentation = Augmentation(image_size=16, crop_scale=(0.5, 1.0), flip=flip)
    mirrored = 0
    for seed in range(200):
        pixels = augmentation(gradient(16, 16), np.random.default_rng(seed)).astype(float)
        assert pixels[0, 0, 1] < pixels[-1, 0, 1]
        mirrored += pixels[0, 0, 0] > pixels[0, -1, 0]
    assert (70 < mirrored < 130) if flip else mirrored == 0


@pytest.mark.parametrize(("width", "height"), [(400, 8), (8, 400), (1, 1)])
def test_extreme_shapes_are_cropped(width: int, height: int) -> None:
    augmentation = Augmentation(image_size=16, crop_scale=(0.9, 1.0), flip=True)
    for seed in range(20):
        assert augmentation(gradient(width, height), np.random.default_rng(seed)).shape == (16, 16, 3)


# ------------------------------------------------------------ evaluation


def test_preprocessing_crops_only_images_larger_than_the_input(digits_root: Path) -> None:
    loaded = params.load(REPOSITORY / "params.yaml").model
    manifest = ImageDataset(digits_root, "val", cache_mb=0, max_pixels=64).manifest
    small = preprocessing_for(manifest, loaded)
    assert (small.image_size, small.resize_to) == (32, 32)
    assert (small.mean, small.std) == (manifest.mean, manifest.std)
    assert preprocessing_for(manifest.model_copy(update={"median_short_side": 32}), loaded).resize_to == 32
    assert preprocessing_for(manifest.model_copy(update={"median_short_side": 33}), loaded).resize_to == 37


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_evaluation_sees_every_image_once(digits_root: Path, world_size: int) -> None:
    images = ImageDataset(digits_root, "val", rows=range(10, 31), cache_mb=1, max_pixels=64)
    preprocessing = Preprocessing(16, 18, (0.5, 0.5, 0.5), (0.2, 0.2, 0.2))
    parts = [list(eval_batches(images, preprocessing, 4, rank, world_size)) for rank in range(world_size)]
    assert max(len(batch.labels) for part in parts for batch in part) == 4
    found = by_position([batch for part in parts for batch in part])
    assert sum(len(batch.labels) for part in parts for batch in part) == len(found) == 21
    for position, (row, label, picture) in found.items():
        expected = imaging.resize_and_crop(images.image(position), preprocessing)
        assert row == position + 10
        assert label == images.labels[position]
        assert picture == expected.transpose(2, 0, 1).tobytes()


def test_model_input_equals_the_servers_bit_for_bit() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        mean, std = tuple(rng.uniform(0, 1, 3).tolist()), tuple(rng.uniform(0.001, 1, 3).tolist())
        pixels = np.tile(np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1), (2, 1, 1, 3))
        expected = imaging.normalize(pixels, Preprocessing(16, 16, mean, std))
        images = torch.from_numpy(np.ascontiguousarray(pixels.transpose(0, 3, 1, 2)))
        found = to_model_input(images, mean, std)
        assert found.dtype == torch.float32
        assert found.numpy().tobytes() == expected.tobytes()


# ------------------------------------------------------------ mixing


def mixed(
    mixup: float = 0.0, cutmix: float = 0.0, smoothing: float = 0.0, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Image i of 4 is filled with the value i and has label i."""
    images = torch.arange(4.0).view(4, 1, 1, 1).expand(4, 3, 16, 16).contiguous()
    generator = torch.Generator().manual_seed(seed)
    result = mix(
        images, torch.arange(4), 5, mixup=mixup, cutmix=cutmix, label_smoothing=smoothing, generator=generator
    )
    assert torch.equal(images[:, 0, 0, 0], torch.arange(4.0))
    return result


def test_without_mixing_only_the_labels_are_smoothed() -> None:
    images, targets = mixed(smoothing=0.1)
    assert torch.equal(images[:, 0, 0, 0], torch.arange(4.0))
    assert targets[2].tolist() == pytest.approx([0.02, 0.02, 0.92, 0.02, 0.02])


@pytest.mark.parametrize("seed", range(8))
def test_mixup_blends_images_and_targets_alike(seed: int) -> None:
    images, targets = mixed(mixup=0.8, smoothing=0.1, seed=seed)
    kept = float(targets[0, 0] - 0.02) / 0.9
    assert 0 <= kept <= 1
    assert torch.allclose(images[0], torch.full((3, 16, 16), 3 * (1 - kept)), atol=1e-5)
    assert torch.allclose(images[1], torch.full((3, 16, 16), kept + 2 * (1 - kept)), atol=1e-5)
    assert torch.allclose(targets.sum(1), torch.ones(4))


@pytest.mark.parametrize("seed", range(8))
def test_cutmix_targets_follow_the_pasted_area(seed: int) -> None:
    images, targets = mixed(cutmix=1.0, seed=seed)
    own = (images[0] == 0).float().mean()
    assert set(images[0].unique().tolist()) <= {0.0, 3.0}
    assert float(targets[0, 0]) == pytest.approx(float(own), abs=1e-6)
    assert float(targets[0, 3]) == pytest.approx(1 - float(own), abs=1e-6)
    columns = (images[0, 0] == 3).any(0)
    rectangle = (images[0, 0] == 3).any(1)[:, None] & columns
    assert torch.equal(images[0, 0] == 3, rectangle)


def test_with_both_on_each_batch_gets_one_of_them() -> None:
    kinds = {len(mixed(mixup=0.8, cutmix=1.0, seed=seed)[0][1].unique()) for seed in range(20)}
    assert kinds >= {1, 2}


def test_mixing_depends_on_the_generator_alone() -> None:
    torch.manual_seed(0)
    first = mixed(mixup=0.8, cutmix=1.0, seed=3)
    np.random.seed(1)
    torch.manual_seed(1)
    second = mixed(mixup=0.8, cutmix=1.0, seed=3)
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])
    assert not torch.equal(first[1], mixed(mixup=0.8, cutmix=1.0, seed=4)[1])


def test_mixing_refuses_whole_numbers() -> None:
    with pytest.raises(ValueError, match=r"floating-point images, got torch\.uint8"):
        mix(
            torch.zeros(2, 3, 4, 4, dtype=torch.uint8), torch.zeros(2, dtype=torch.int64), 2,
            mixup=0.0, cutmix=0.0, label_smoothing=0.0, generator=torch.Generator(),
        )  # fmt: skip


def test_a_single_step_needs_few_images(dataset: ImageDataset) -> None:
    """The stream is lazy: nothing beyond what is asked for is decoded."""
    stream = train_batches(
        dataset, AUGMENTATION, batch_size=4, global_batch=4, seed=0, start_step=10**6, steps=10**9, rank=0,
        world_size=1, accumulation=1, workers=0,
    )  # fmt: skip
    assert [int(batch.positions[0]) for batch in islice(stream, 2)] == [4 * 10**6, 4 * 10**6 + 4]
