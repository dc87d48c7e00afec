"""Two views: chance of each image's own, and every operation against a closed form or Pillow."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from PIL import Image

from flows import params
from flows.data.views import Squeeze, Views, _boxes, _crop, two_views

PLAIN = Views(
    image_size=24,
    crop_scale=(1.0, 1.0),
    flip=0.0,
    jitter=0.0,
    brightness=0.0,
    contrast=0.0,
    saturation=0.0,
    hue=0.0,
    grey=0.0,
    blur=(0.0, 0.0),
    blur_sigma=(0.1, 2.0),
    solarize=(0.0, 0.0),
    solarize_threshold=0.5,
)


def published(size: int = 24) -> Views:
    strengths = params.load().pretrain.moby.views.model_dump()
    return Views(size, **{**strengths, "flip": 0.5})


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randint(0, 256, (6, 3, 24, 24), generator=torch.Generator().manual_seed(0)).to(torch.uint8)


def changed(images: torch.Tensor, **change: object) -> tuple[torch.Tensor, torch.Tensor]:
    return two_views(images, torch.arange(len(images)), 0, dataclasses.replace(PLAIN, **change))  # type: ignore[arg-type]


def test_an_images_views_depend_on_its_number_and_nothing_else(images: torch.Tensor) -> None:
    numbers = torch.tensor([5, 2, 9, 2, 7, 1])
    state = torch.get_rng_state()
    whole = two_views(images, numbers, 3, published())
    assert torch.equal(torch.get_rng_state(), state), "nobody else's chance is used"
    for part in (slice(0, 1), slice(1, 4), slice(4, 6)):
        for found, expected in zip(
            two_views(images[part], numbers[part], 3, published()), whole, strict=True
        ):
            torch.testing.assert_close(found, expected[part], atol=1e-6, rtol=1e-5)
    assert not torch.allclose(whole[0], whole[1]), "two views"
    for other in (two_views(images, numbers + 1, 3, published()), two_views(images, numbers, 4, published())):
        assert all(not torch.allclose(left, right) for left, right in zip(other, whole, strict=True))
    same = images[1].expand(2, 3, 24, 24)
    first, second = two_views(same, numbers[[1, 3]], 3, published())
    torch.testing.assert_close(first[0], first[1])
    torch.testing.assert_close(second[0], second[1])
    assert float(torch.stack(whole).min()) >= 0
    assert float(torch.stack(whole).max()) <= 1


def test_with_everything_off_a_view_is_the_image_and_a_mirror_image_is_exact(images: torch.Tensor) -> None:
    pixels = images / 255
    for view in changed(images):
        torch.testing.assert_close(view, pixels, atol=1e-4, rtol=0)
    for view in changed(images, flip=1.0):
        torch.testing.assert_close(view, pixels.flip(3), atol=1e-4, rtol=0)


def test_crops_lie_inside_and_have_the_areas_and_shapes_that_were_asked_for() -> None:
    draws = np.random.default_rng(0).random((2000, 12, 2))
    boxes = _boxes(draws[:, :10], draws[:, 10], 100, dataclasses.replace(PLAIN, crop_scale=(0.08, 0.5)))
    left, upper, width, height = boxes.T
    assert (left >= 0).all()
    assert (upper >= 0).all()
    assert (left + width <= 100 + 1e-9).all()
    assert (upper + height <= 100 + 1e-9).all()
    area, ratio = width * height / 100**2, width / height
    assert 0.08 <= area.min() < 0.09
    assert 0.49 < area.max() <= 0.5
    assert area.mean() == pytest.approx(0.29, abs=0.01), "evenly distributed"
    assert 0.75 <= ratio.min() < 0.76
    assert 1.32 < ratio.max() <= 4 / 3
    assert np.median(np.log(ratio)) == pytest.approx(0, abs=0.02)


def test_an_enlarged_crop_is_that_of_pillow(images: torch.Tensor) -> None:
    box = np.array([[3.3, 5.1, 9.7, 8.4]])  # left, upper, width, height
    found = _crop(images[:1] / 255, box, np.array([False]), 24)[0]
    picture = Image.fromarray(images[0].permute(1, 2, 0).numpy())
    expected = picture.resize((24, 24), Image.Resampling.BILINEAR, box=(3.3, 5.1, 13.0, 13.5))
    expected_pixels = torch.from_numpy(np.asarray(expected).copy()).permute(2, 0, 1) / 255
    # Pillow sees nothing outside the box and has eight bits: its border pixels differ
    inner = (slice(None), slice(2, -2), slice(2, -2))
    torch.testing.assert_close(found[inner], expected_pixels[inner], atol=2 / 255, rtol=0)


def test_each_view_has_probabilities_of_its_own(images: torch.Tensor) -> None:
    pixels = images / 255
    first, second = changed(images, solarize=(0.0, 1.0))
    torch.testing.assert_close(first, pixels, atol=1e-4, rtol=0)
    inverted = torch.where(images >= 128, 1 - pixels, pixels)
    torch.testing.assert_close(second, inverted, atol=1e-3, rtol=0)

    first, second = changed(images, blur=(1.0, 0.0), blur_sigma=(1.5, 1.5))
    torch.testing.assert_close(second, pixels, atol=1e-4, rtol=0)
    line = torch.zeros(1, 3, 24, 24, dtype=torch.uint8)
    line[..., 12] = 255
    blurred = two_views(
        line, torch.zeros(1).long(), 0, dataclasses.replace(PLAIN, blur=(1, 0), blur_sigma=(1.5, 1.5))
    )
    bell = torch.exp(-((torch.arange(24) - 12.0) ** 2) / (2 * 1.5**2))
    torch.testing.assert_close(blurred[0][0, 0, 12], bell / bell.sum(), atol=2e-3, rtol=0)


def test_colours_change_as_pillow_changes_them(images: torch.Tensor) -> None:
    pixels = images / 255
    grey = (pixels * torch.tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)).sum(1, keepdim=True)
    view, _ = changed(images, grey=1.0)
    torch.testing.assert_close(view, grey.expand(-1, 3, -1, -1), atol=1e-4, rtol=0)

    bright, _ = changed(images, jitter=1.0, brightness=0.4)
    factors = (bright.sum((1, 2, 3)) / pixels.sum((1, 2, 3))).numpy()
    assert len(set(factors.round(4))) == len(images), "a factor for each image"
    dark = pixels < 0.5
    for image in range(len(images)):
        ratio = (bright[image] / pixels[image].clamp_min(1e-3))[dark[image] & (pixels[image] > 0.1)]
        assert 0.6 <= float(ratio.median()) <= 1.4
        assert float(ratio.max() - ratio.min()) < 1e-2

    turned, _ = changed(images, jitter=1.0, hue=0.1)
    for before, after in ((pixels.amax(1), turned.amax(1)), (pixels.amin(1), turned.amin(1))):
        torch.testing.assert_close(after, before, atol=1e-3, rtol=0)  # value and saturation stay
    assert not torch.allclose(turned, pixels, atol=0.01)

    faint, _ = changed(images, jitter=1.0, saturation=0.2)
    chroma = [(values.amax(1) - values.amin(1)).mean((1, 2)) for values in (faint, pixels)]
    assert (chroma[0] / chroma[1]).min() > 0.75
    assert (chroma[0] / chroma[1]).max() < 1.2


def test_the_loader_hands_over_the_whole_image() -> None:
    picture = Image.new("RGB", (60, 30))
    picture.paste((255, 255, 255), (30, 0, 60, 30))
    pixels = Squeeze(20)(picture, np.random.default_rng(0))
    assert pixels.shape == (20, 20, 3)
    assert (pixels[:, :8] == 0).all()
    assert (pixels[:, 12:] == 255).all()
