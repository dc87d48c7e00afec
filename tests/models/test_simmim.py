"""SimMIM: masks, targets, loss and the path of the gradient."""

from __future__ import annotations

import hashlib
from typing import Any

import pytest
import torch
from torch import Tensor

import models
from models.backbones.swin_v2 import SwinV2, SwinV2Size
from models.pretext.masks import MASK_KINDS, average_distance, masked_count, upsample_masks
from models.pretext.simmim import SimMIM, masks_from_ids, normalize_targets, random_masks
from tests.models.conftest import randomize

SMALL = SwinV2Size(16, (2, 2), (2, 4))


def simmim(mask_unit: int = 8, normalize_target: int = 0, **choices: Any) -> SimMIM:
    return SimMIM(SwinV2(SMALL, image_size=32, window_size=4), mask_unit, normalize_target, **choices)


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


@pytest.mark.parametrize("kind", MASK_KINDS)
@pytest.mark.parametrize(("grid", "ratio"), [(6, 0.6), (14, 0.4), (2, 0.5), (7, 0.95)])
def test_every_kind_of_mask_has_the_exact_count_and_depends_on_the_id_alone(
    kind: Any, grid: int, ratio: float
) -> None:
    masks = masks_from_ids(torch.arange(200), grid, ratio, kind)
    assert (masks.sum((1, 2)) == masked_count(grid**2, ratio)).all()
    assert torch.equal(masks_from_ids(torch.tensor([7]), grid, ratio, kind)[0], masks[7])
    if kind != "square" or grid**2 > 2 * masked_count(grid**2, ratio):  # else it may have one place only
        assert len(masks.flatten(1).unique(dim=0)) > 1


def test_blocks_and_squares_hold_together() -> None:
    """Neighbours of hidden squares are hidden far more often than by chance; a square is one rectangle."""
    masks = {kind: masks_from_ids(torch.arange(300), 14, 0.4, kind) for kind in MASK_KINDS}

    def togetherness(mask: Tensor) -> float:
        return (mask[:, :, 1:] & mask[:, :, :-1]).float().mean().item() / mask.float().mean().item()

    assert togetherness(masks["random"]) == pytest.approx(0.4, abs=0.02)
    assert togetherness(masks["block"]) > 0.75
    for mask in masks["square"]:
        rows, columns = mask.any(1).nonzero(), mask.any(0).nonzero()
        assert rows.max() - rows.min() == columns.max() - columns.min() == 8  # 9 x 9 holds 79 of 196
    # Blocks lie anywhere: no row is favoured by more than the border explains.
    share = masks["block"].float().mean((0, 2))
    assert share.min() > 0.15


def test_an_unknown_kind_of_mask_is_refused() -> None:
    with pytest.raises(ValueError, match="mask_kind is 'cross', but must be one of random, block, square"):
        masks_from_ids(torch.arange(2), 4, 0.5, "cross")  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", MASK_KINDS)
def test_average_distance_equals_brute_force(kind: Any) -> None:
    masks = masks_from_ids(torch.arange(6), 5, 0.6, kind)
    for unit in (1, 3):
        expected = []
        for pixels in upsample_masks(masks, unit):
            between = torch.cdist(pixels.nonzero().double(), (~pixels).nonzero().double())
            expected.append(between.amin(1).mean().float())
        torch.testing.assert_close(average_distance(masks, unit), torch.stack(expected))


def test_average_distance_of_known_masks() -> None:
    alone = torch.zeros(1, 3, 3, dtype=torch.bool)
    alone[0, 1, 1] = True
    assert average_distance(alone, 1).item() == 1.0
    all_but_one = torch.ones(1, 1, 1, dtype=torch.bool).repeat(1, 2, 2)
    all_but_one[0, 0, 0] = False
    assert average_distance(all_but_one, 1).item() == pytest.approx((1 + 1 + 2**0.5) / 3)


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


# --- what the paper ablates ------------------------------------------------------------------------------

ERRORS = {
    "l1": lambda d: d.abs(),
    "l2": lambda d: d**2,
    "smooth_l1": lambda d: torch.where(d.abs() < 1, 0.5 * d**2, d.abs() - 0.5),
}


@pytest.mark.parametrize("loss", ERRORS)
@pytest.mark.parametrize("region", ["masked", "all"])
@pytest.mark.parametrize(("target_size", "window"), [(32, 0), (16, 5), (4, 0)])
def test_every_loss_equals_its_definition(loss: Any, region: Any, target_size: int, window: int) -> None:
    model = simmim(8, window, loss=loss, loss_region=region, target_size=target_size)
    randomize(model)
    images, mask = images_of(3), random_masks(3, 4, 0.6)
    output = model(images, mask)
    assert output.prediction.shape == (3, 3, target_size, target_size)
    side = 32 // target_size
    total, count = 0.0, 0
    target = torch.stack(  # means over squares, one by one
        [
            torch.stack([images[..., y : y + side, x : x + side].mean((2, 3)) for x in range(0, 32, side)], 2)
            for y in range(0, 32, side)
        ],
        2,
    )
    if window:
        target = normalize_targets(target, window)
    for i in range(3):
        for y in range(target_size):
            for x in range(target_size):
                if region == "all" or mask[i, y * side // 8, x * side // 8]:
                    error = ERRORS[loss](output.prediction[i, :, y, x] - target[i, :, y, x])
                    total, count = total + error.mean().item(), count + 1
    assert output.masked_pixels.item() == count
    assert output.loss.item() == pytest.approx(total / count, rel=1e-4)
    assert output.loss_sum.item() == pytest.approx(total, rel=1e-4)


@pytest.mark.parametrize("head", ["linear", "mlp", "inverse_swin"])
@pytest.mark.parametrize("target_size", [0, 8])
def test_every_head_learns_through_all_its_weights(head: Any, target_size: int) -> None:
    if head == "inverse_swin" and target_size:
        target_size = 16  # it ends with more tokens than 8 x 8 pixels
    model = simmim(
        head=head, inverse_swin="swin_v2_pico", window_size=4, target_size=target_size
    )  # pico: two stages, 64 channels
    randomize(model)
    output = model(images_of(2), random_masks(2, 4, 0.6))
    assert output.prediction.shape[2] == (target_size or 32)
    output.loss.backward()
    for name, parameter in model.decoder.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.any(), name


def test_a_head_of_its_own_does_not_change_the_weights_of_the_default() -> None:
    """The order in which weights are drawn is part of a default run's bytes."""
    torch.manual_seed(0)
    model = simmim()
    digest = hashlib.sha256(
        b"".join(p.detach().numpy().tobytes() for p in model.state_dict().values())
    ).hexdigest()
    assert list(model.state_dict())[-2:] == ["decoder.0.weight", "decoder.0.bias"]
    assert digest == "96984645b31ec26ffd656316300e08ffd15f1d1fce2aad81f741f41f6096ef8b"


@pytest.mark.parametrize(("head", "millions"), [("mlp", 91.09), ("inverse_swin", 115.26)])
def test_heads_have_the_sizes_of_the_paper(head: Any, millions: float) -> None:
    """90.9 M and 115 M with Swin-B (section 4.1.3, there V1: 0.2 M smaller)."""
    with torch.device("meta"):
        backbone = models.create("swin_v2_base", image_size=192, window_size=6)
        model = SimMIM(backbone, 32, head=head, inverse_swin="swin_v2_tiny", window_size=6)
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.01)


def test_without_the_final_norm_the_head_reads_the_map_before_it() -> None:
    model, plain = simmim(final_norm=False), simmim()
    randomize(model)
    randomize(plain)
    assert model.state_dict().keys() == plain.state_dict().keys()
    images, mask = images_of(2), random_masks(2, 4, 0.6)
    normalised = plain.backbone.forward_features(images, upsample_masks(mask, 2), plain.mask_token)
    raw = model.backbone.forward_features(images, upsample_masks(mask, 2), model.mask_token)
    again = plain.backbone.norm(raw.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    torch.testing.assert_close(again, normalised, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(model(images, mask).prediction, model.decoder(raw))
    model(images, mask).loss.backward()
    assert model.backbone.norm.weight.grad is None
    assert not model.backbone.norm.weight.requires_grad


@pytest.mark.parametrize(
    ("choices", "words"),
    [
        ({"target_size": 12}, "target_size is 12, but must divide image_size 32"),
        ({"target_size": 2}, "multiple of the 4 squares"),
        ({"head": "conv"}, "head is 'conv', but must be one of linear, mlp, inverse_swin"),
        ({"head": "inverse_swin"}, "inverse_swin is '', but the head needs one of swin_v2_pico"),
        ({"loss": "huber"}, "loss is 'huber', but must be one of l1, l2, smooth_l1"),
        ({"loss_region": "visible"}, "loss_region is 'visible', but must be one of masked, all"),
    ],
)
def test_choices_that_do_not_exist_are_refused(choices: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        simmim(**choices)


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
