"""Augmentations of the published recipes: what each operation does, and that chance comes from one place."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from flows.data import Augmentation, RandAugment
from flows.data.rand_augment import OPERATIONS, erase, jitter_colors

GREY = (128, 128, 128)
PUBLISHED = RandAugment(operations=2, magnitude=9.0, magnitude_std=0.5, probability=0.5)
FULL = Augmentation(
    image_size=32,
    crop_scale=(0.08, 1.0),
    flip=True,
    interpolation="bicubic",
    rand_augment=PUBLISHED,
    color_jitter=0.4,
    erasing=0.25,
)


def picture(side: int = 32) -> Image.Image:
    """Colours that differ from place to place, under a fine pattern that can be sharpened."""
    y, x = np.mgrid[0:side, 0:side] / (side - 1)
    channels = np.stack([x, y, (1 + np.sin(5 * x * y)) / 2], axis=-1)
    pattern = 12.0 * np.random.default_rng(0).integers(-1, 2, (side, side, 1))
    return Image.fromarray((30 + 190 * channels + pattern).round().astype(np.uint8))


def pixels(image: Image.Image) -> NDArray[np.int64]:
    return np.asarray(image).astype(np.int64)


@pytest.mark.parametrize(
    "name", sorted(set(OPERATIONS) - {"auto_contrast", "equalize", "invert", "posterize"})
)
def test_operations_grow_from_nothing_with_their_level(name: str) -> None:
    plain = pixels(picture())
    changes = [
        np.abs(pixels(OPERATIONS[name](picture(), level, 1.0, GREY)) - plain).mean() for level in (0, 0.4, 1)
    ]
    assert changes[0] == 0
    assert changes[0] < changes[1] < changes[2]


@pytest.mark.parametrize(
    ("name", "level", "sign", "expected"),
    [
        ("invert", 1.0, 1.0, lambda v: 255 - v),
        ("posterize", 0.9, 1.0, lambda v: v & 0b10000000),
        ("posterize", 0.5, 1.0, lambda v: v & 0b11000000),
        ("posterize", 1.0, 1.0, lambda v: v & 0b10000000),  # never no bit at all
        ("solarize", 0.9, 1.0, lambda v: np.where(v >= 256 - 230, 255 - v, v)),
        ("solarize_add", 0.9, 1.0, lambda v: np.where(v < 128, np.minimum(v + 99, 255), v)),
        ("translate_x", 0.625, 1.0, lambda v: np.roll(v, -9, axis=1)),  # 0.45 of 32 pixels at level 1
        ("brightness", 1.0, -1.0, lambda v: (v * 0.1).astype(int)),
    ],
)
def test_operations_equal_their_definition(name: str, level: float, sign: float, expected: object) -> None:
    found = pixels(OPERATIONS[name](picture(), level, sign, GREY))
    wanted = expected(pixels(picture()))  # type: ignore[operator]
    inside = np.s_[:, :16] if name == "translate_x" else np.s_[:]
    assert np.abs(found[inside] - wanted[inside]).max() <= (1 if name == "brightness" else 0)


def test_what_moves_in_has_the_given_colour() -> None:
    red = (200, 10, 10)
    for name, place in (("translate_x", np.s_[:, -1]), ("translate_y", np.s_[-1]), ("rotate", np.s_[0, 0])):
        assert (pixels(OPERATIONS[name](picture(), 1.0, 1.0, red))[place] == red).all(), name


def test_random_augment_draws_every_operation_and_half_of_the_time() -> None:
    counts = dict.fromkeys(OPERATIONS, 0)
    levels: list[float] = []
    signs: list[float] = []

    def record(name: str) -> object:
        def operation(image: Image.Image, level: float, sign: float, fill: object) -> Image.Image:
            counts[name] += 1
            levels.append(level)
            signs.append(sign)
            return image

        return operation

    original = dict(OPERATIONS)
    try:
        OPERATIONS.update({name: record(name) for name in OPERATIONS})  # type: ignore[misc]
        for seed in range(1500):
            PUBLISHED(picture(2), np.random.default_rng(seed), GREY)
    finally:
        OPERATIONS.update(original)
    total = sum(counts.values())
    assert total == pytest.approx(1500, abs=5 * 28)  # 3000 draws, each with probability 1/2
    assert min(counts.values()) > 60, "100 each in the mean"
    assert np.mean(levels) == pytest.approx(0.9, abs=0.01)
    assert np.std(levels) == pytest.approx(0.05, abs=0.01)
    assert max(levels) <= 1.0
    assert abs(np.mean(signs)) < 0.15


def test_erasing_replaces_one_rectangle_by_noise_of_the_data() -> None:
    plain = np.zeros((64, 64, 3), dtype=np.uint8)
    shares, values = [], []
    for seed in range(200):
        found = erase(plain, np.random.default_rng(seed), (0.6, 0.5, 0.4), (0.1, 0.1, 0.1))
        rows, columns = found.any((1, 2)).nonzero()[0], found.any((0, 2)).nonzero()[0]
        box = found[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        shares.append(box[..., 0].size / 64**2)
        values.append(box.reshape(-1, 3).mean(0))
        assert found.astype(int).sum() == box.astype(int).sum(), "nothing outside of it"
    assert min(shares) > 0.01
    assert max(shares) < 0.36
    assert np.mean(values, axis=0) / 255 == pytest.approx([0.6, 0.5, 0.4], abs=0.01)
    assert not plain.any(), "the given pixels are kept"


def test_jitter_keeps_within_its_range() -> None:
    flat = Image.new("RGB", (4, 4), (100, 100, 100))  # contrast and saturation do not change a flat grey
    means = [pixels(jitter_colors(flat, 0.4, np.random.default_rng(seed))).mean() for seed in range(100)]
    assert min(means) >= 59
    assert max(means) <= 141
    assert np.std(means) > 15


def test_all_chance_comes_from_the_generator() -> None:
    for seed in range(20):
        first, second = (FULL(picture(), np.random.default_rng(seed)) for _ in range(2))
        assert np.array_equal(first, second)
    assert not np.array_equal(FULL(picture(), np.random.default_rng(1)), first)


@pytest.mark.parametrize("extra", [{"rand_augment": PUBLISHED}, {"color_jitter": 0.4}, {"erasing": 1.0}])
def test_what_is_added_leaves_crop_and_mirror_as_they_were(extra: dict[str, object]) -> None:
    """Where an image is not recoloured or erased it equals the plain augmentation of the same seed."""
    plain = Augmentation(image_size=32, crop_scale=(0.3, 1.0), flip=True)
    more = replace(plain, **extra)  # type: ignore[arg-type]
    equal = [
        (plain(picture(), np.random.default_rng(s)) == more(picture(), np.random.default_rng(s))).mean()
        for s in range(60)
    ]
    if "rand_augment" in extra:
        assert sum(share == 1.0 for share in equal) >= 8, "a quarter of the images gets no operation"
    if "erasing" in extra:
        assert all(0.6 < share < 1.0 for share in equal)
    assert any(share < 1.0 for share in equal)


@pytest.mark.parametrize(("width", "height"), [(400, 8), (1, 1)])
def test_extreme_shapes_survive_everything(width: int, height: int) -> None:
    image = picture(8).resize((width, height))
    always = replace(FULL, rand_augment=replace(PUBLISHED, operations=8, probability=1.0), erasing=1.0)
    for seed in range(20):
        found = always(image, np.random.default_rng(seed))
        assert (found.shape, found.dtype) == ((32, 32, 3), np.uint8)
