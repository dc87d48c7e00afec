"""SimMIM: masks, targets, loss and the path of the gradient."""

from __future__ import annotations

import hashlib

import pytest
import torch
from torch import Tensor

from models.backbones.swin_v2 import SwinV2, SwinV2Size
from models.pretext.masks import masked_count, upsample_masks
from models.pretext.simmim import SimMIM, masks_from_ids, normalize_targets, random_masks
from tests.models.conftest import randomize

SMALL = SwinV2Size(16, (2, 2), (2, 4))


def simmim(mask_unit: int = 8, normalize_target: int = 0) -> SimMIM:
    return SimMIM(SwinV2(SMALL, image_size=32, window_size=4), mask_unit, normalize_target)


def images_of(batch: int, side: int = 32) -> Tensor:
    return torch.randn(batch, 3, side, side, generator=torch.Generator().manual_seed(1))


# --- masks -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("units", "ratio", "count"), [(36, 0.6, 22), (49, 0.6, 30), (25, 0.6, 15), (30, 0.1, 3), (16, 0.6, 10)]
)
def test_masked_count(units: int, ratio: float, count: int) -> None:
    assert masked_count(units, ratio) == count


@pytest.mark.parametrize("ratio", [0.0, 1.0, 0.99])
def test_masks_that_hide_nothing_or_everything_are_refused(ratio: float) -> None:
    with pytest.raises(ValueError, match=f"mask_ratio {ratio} hides"):
        random_masks(2, 4, ratio)


@pytest.mark.parametrize(("grid", "count"), [(6, 22), (7, 30)])
def test_every_mask_has_the_exact_count(grid: int, count: int) -> None:
    drawn = random_masks(500, grid, 0.6, torch.Generator().manual_seed(0))
    seeded = masks_from_ids(torch.arange(500), grid, 0.6)
    for masks in (drawn, seeded):
        assert masks.shape == (500, grid, grid)
        assert masks.dtype == torch.bool
        assert (masks.sum((1, 2)) == count).all()
        # Uniform: every square is hidden about equally often (five standard deviations).
        share = masks.float().mean(0)
        assert (share - count / grid**2).abs().max() < 5 * (0.24 / 500) ** 0.5
        assert len(masks.flatten(1).unique(dim=0)) == 500


def test_random_masks_follow_their_generator() -> None:
    first, second = (random_masks(8, 6, 0.6, torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(first, second)
    assert not torch.equal(first, random_masks(8, 6, 0.6, torch.Generator().manual_seed(4)))


def test_masks_of_ids_never_change() -> None:
    masks = masks_from_ids(torch.arange(1000), 6, 0.6)
    digest = hashlib.sha256(bytes(masks.flatten().to(torch.uint8).tolist())).hexdigest()
    assert digest == "2a76de6aca57bcbb94a02441d1b2001e7675538bd3fa2419a825592beae129b6"


def test_masks_of_ids_do_not_depend_on_the_batch() -> None:
    ids = torch.tensor([5, 2**40 + 5, 2**62, 0])
    together = masks_from_ids(ids, 6, 0.6)
    alone = torch.cat([masks_from_ids(ids[i : i + 1], 6, 0.6) for i in (3, 1, 0, 2)])
    assert torch.equal(alone, together[[3, 1, 0, 2]])
    assert not torch.equal(together[0], together[1])  # the upper half of the id counts


def test_masks_are_aligned_with_squares() -> None:
    masks = random_masks(3, 6, 0.6)
    pixels = upsample_masks(masks, 32)
    assert pixels.shape == (3, 192, 192)
    for row in range(6):
        for column in range(6):
            square = pixels[:, row * 32 : row * 32 + 32, column * 32 : column * 32 + 32].flatten(1)
            assert torch.equal(square, masks[:, row, column, None].expand_as(square))


# --- targets ---------------------------------------------------------------------------------------------


def test_normalized_target_equals_its_definition() -> None:
    images = images_of(2, 16)
    expected = torch.empty_like(images)
    for row in range(16):
        for column in range(16):
            window = images[:, :, max(row - 2, 0) : row + 3, max(column - 2, 0) : column + 3].flatten(2)
            variance, mean = torch.var_mean(window, dim=2, unbiased=True)
            expected[:, :, row, column] = (images[:, :, row, column] - mean) / (variance + 1e-6).sqrt()
    torch.testing.assert_close(normalize_targets(images, 5), expected, atol=1e-5, rtol=1e-5)


def test_window_larger_than_the_image_takes_the_whole_image() -> None:
    images = images_of(2, 16)
    variance, mean = torch.var_mean(images, dim=(2, 3), keepdim=True)
    expected = (images - mean) / (variance + 1e-6).sqrt()
    torch.testing.assert_close(normalize_targets(images, 47), expected, atol=1e-5, rtol=1e-5)


def test_constant_images_have_finite_targets() -> None:
    assert normalize_targets(torch.full((1, 3, 16, 16), 2.64), 5).abs().max() < 1.0


@pytest.mark.parametrize("window", [1, 4, -3])
def test_impossible_windows_are_refused(window: int) -> None:
    with pytest.raises(
        ValueError, match=f"normalize_target is {window}, but must be 0 .off. or an odd number"
    ):
        simmim(normalize_target=window)


# --- loss ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mask_unit", [4, 8, 16])
@pytest.mark.parametrize("normalize_target", [0, 5])
def test_loss_is_the_mean_absolute_error_over_hidden_pixels(mask_unit: int, normalize_target: int) -> None:
    model = simmim(mask_unit, normalize_target)
    randomize(model)
    images, mask = images_of(3), random_masks(3, 32 // mask_unit, 0.6)
    output = model(images, mask)
    target = normalize_targets(images, normalize_target) if normalize_target else images
    hidden = upsample_masks(mask, mask_unit)[:, None].expand_as(images)
    expected = (output.prediction - target)[hidden].abs().mean()
    torch.testing.assert_close(output.loss, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(output.loss_sum / output.masked_pixels, expected, atol=1e-5, rtol=1e-5)
    assert output.masked_pixels.item() == hidden[:, 0].sum()
    assert output.prediction.shape == images.shape


def test_closed_form_of_a_constant_prediction() -> None:
    model = simmim()
    for parameter in model.decoder.parameters():
        torch.nn.init.constant_(parameter, 0.0)
    images = torch.full((2, 3, 32, 32), -2.0)
    images[:, 1] = 0.5
    output = model(images, random_masks(2, 4, 0.5))
    assert output.loss.item() == pytest.approx((2.0 + 0.5 + 2.0) / 3)
    assert output.masked_pixels.item() == 2 * 8 * 64


def test_sums_over_batches_give_the_loss_of_the_whole_set() -> None:
    model = simmim().eval()
    randomize(model)
    images, masks = images_of(5), masks_from_ids(torch.arange(5), 4, 0.6)
    with torch.no_grad():
        whole = model(images, masks)
        parts = [model(images[s], masks[s]) for s in (slice(0, 2), slice(2, 5))]
    total = sum(p.loss_sum for p in parts) / sum(p.masked_pixels for p in parts)
    assert total.item() == pytest.approx(whole.loss.item(), rel=1e-5)


def test_pixels_under_the_mask_cannot_be_seen() -> None:
    model = simmim().eval()
    randomize(model)
    mask = random_masks(2, 4, 0.6)
    hidden = upsample_masks(mask, 8)[:, None]
    images = images_of(2)
    with torch.no_grad():
        first = model(images, mask).prediction
        assert torch.equal(model(torch.where(hidden, 9.0, images), mask).prediction, first)
        assert not torch.equal(model(torch.where(hidden, images, 9.0), mask).prediction, first)


def test_gradient_reaches_the_mask_token_and_no_hidden_pixel() -> None:
    model = simmim()
    randomize(model)
    images, mask = images_of(2).requires_grad_(), random_masks(2, 4, 0.6)
    model(
        images, mask
    ).prediction.square().sum().backward()  # the prediction: the loss has images as its target
    hidden = upsample_masks(mask, 8)[:, None].expand_as(images)
    assert model.mask_token.grad.any()
    assert not images.grad[hidden].any()
    assert images.grad[~hidden].all()


def test_fresh_mask_token_and_half_precision_loss() -> None:
    torch.manual_seed(0)
    model = simmim()
    assert 0.005 < model.mask_token.std().item() < 0.04
    output = model.bfloat16()(images_of(2), random_masks(2, 4, 0.6))
    assert output.prediction.dtype == torch.bfloat16
    assert output.loss.dtype == output.loss_sum.dtype == torch.float32


def test_a_few_steps_learn_what_neighbours_tell() -> None:
    torch.manual_seed(0)
    model = simmim()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    generator = torch.Generator().manual_seed(0)
    losses = []
    for _ in range(40):  # images of one random colour: hidden pixels equal visible ones
        images = torch.randn(16, 3, 1, 1, generator=generator).expand(-1, -1, 32, 32)
        loss = model(images, random_masks(16, 4, 0.6, generator)).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    # The best answer without looking, 0, costs E|N(0,1)| = 0.80.
    assert sum(losses[-5:]) / 5 < 0.5


@pytest.mark.parametrize("mask_unit", [0, 2, 6, 12])
def test_mask_units_that_do_not_fit_are_refused(mask_unit: int) -> None:
    with pytest.raises(
        ValueError, match=f"mask_unit is {mask_unit}, .* multiple of patch_size 4 that divides"
    ):
        simmim(mask_unit)


def test_masks_of_another_shape_are_refused() -> None:
    with pytest.raises(ValueError, match=r"shape \(1, 4, 4\), but these images need \(2, 4, 4\)"):
        simmim()(images_of(2), random_masks(1, 4, 0.6))


def test_mask_and_token_belong_together() -> None:
    with pytest.raises(ValueError, match="belong together"):
        simmim().backbone.forward_features(images_of(1), mask=torch.ones(1, 8, 8, dtype=torch.bool))
