"""Swin V2 and SimMIM against an independent implementation (transformers) on shared random weights."""

from __future__ import annotations

import pytest
import torch
from transformers import Swinv2ForImageClassification, Swinv2ForMaskedImageModeling

from models.backbones.swin_v2 import SwinV2, SwinV2Size
from models.classification import Classifier
from models.pretext.masks import upsample_masks
from models.pretext.simmim import SimMIM, random_masks
from tests.models.conftest import peer_config, peer_state, randomize

TINY = SwinV2Size(24, (2, 2, 2), (3, 6, 12))
# (image, window, pretrained windows): every stage divides; last stage shrinks; two stages shrink; other
# windows.
GEOMETRIES = {
    "dividing": (64, 4, (0, 0, 0)),
    "last-stage-shrunken": (64, 8, (0, 0, 0)),
    "two-stages-shrunken": (48, 12, (0, 0, 0)),
    "smaller-pretrained": (96, 6, (3, 3, 3)),
    "pretrained-per-stage": (64, 8, (4, 4, 2)),
}


def backbone_of(geometry: str) -> SwinV2:
    image, window, pretrained = GEOMETRIES[geometry]
    return SwinV2(TINY, image_size=image, window_size=window, pretrained_windows=pretrained)


@pytest.mark.parametrize("geometry", GEOMETRIES)
@torch.no_grad()
def test_logits_equal_those_of_transformers(geometry: str) -> None:
    image, window, pretrained = GEOMETRIES[geometry]
    model = Classifier(backbone_of(geometry), num_classes=10).eval()
    randomize(model)
    peer = Swinv2ForImageClassification(peer_config(TINY, model.backbone, window, pretrained)).eval()
    peer.load_state_dict(peer_state(model.state_dict()), strict=True)
    images = torch.randn(3, 3, image, image, generator=torch.Generator().manual_seed(1))
    expected = peer(images).logits
    assert expected.std() > 0.1  # the comparison would be empty otherwise
    torch.testing.assert_close(model(images), expected, atol=1e-5, rtol=0)
    # In double precision rounding no longer hides a small mistake; both keep fp32 coordinate tables.
    expected = peer.double()(images.double()).logits
    torch.testing.assert_close(model.double()(images.double()), expected, atol=1e-6, rtol=0)


@torch.no_grad()
def test_logits_at_the_lowest_temperatures_equal_those_of_transformers() -> None:
    """In double precision: factors of up to 100 before the softmax magnify every rounding of fp32."""
    model = Classifier(backbone_of("last-stage-shrunken"), num_classes=10).eval()
    randomize(model)
    for name, parameter in model.named_parameters():
        if name.endswith("logit_scale"):
            parameter.add_(2.0)  # 3 … 6.5; the bound is 4.6
    peer = Swinv2ForImageClassification(peer_config(TINY, model.backbone, 8, (0, 0, 0))).eval()
    peer.load_state_dict(peer_state(model.state_dict()), strict=True)
    images = torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(1)).double()
    torch.testing.assert_close(model.double()(images), peer.double()(images).logits, atol=1e-5, rtol=0)


@pytest.mark.parametrize("pretrained", [(0, 0, 0), (3, 5, 2)])
@torch.no_grad()
def test_padded_maps_equal_those_of_transformers(pretrained: tuple[int, ...]) -> None:
    """Maps of 18, 9 and 5 tokens under windows of 7. transformers shrinks the window of the last, we do not:
    compare what enters the stages."""
    backbone = SwinV2(TINY, image_size=72, window_size=7, window_rule="pad", pretrained_windows=pretrained)
    model = Classifier(backbone, num_classes=10).eval()
    randomize(model)
    peer = Swinv2ForImageClassification(peer_config(TINY, model.backbone, 7, pretrained)).eval()
    peer.load_state_dict(peer_state(model.state_dict()), strict=True)
    images = torch.randn(2, 3, 72, 72, generator=torch.Generator().manual_seed(1))
    maps = backbone.feature_maps(images)
    hidden = peer.swinv2(images, output_hidden_states=True).reshaped_hidden_states
    for stage in range(2):
        merged = backbone.layers[stage].downsample(maps[stage].permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        assert merged.std() > 0.1
        torch.testing.assert_close(merged, hidden[stage + 1], atol=1e-5, rtol=0)


@torch.no_grad()
def test_stage_maps_equal_those_of_transformers() -> None:
    model = Classifier(backbone_of("last-stage-shrunken"), num_classes=10).eval()
    randomize(model)
    peer = Swinv2ForImageClassification(peer_config(TINY, model.backbone, 8, (0, 0, 0))).eval()
    peer.load_state_dict(peer_state(model.state_dict()), strict=True)
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    maps = model.backbone.feature_maps(images)
    hidden = peer.swinv2(images, output_hidden_states=True).reshaped_hidden_states
    assert [m.shape for m in maps] == [(2, 24, 16, 16), (2, 48, 8, 8), (2, 96, 4, 4)]
    # transformers reports the input of each stage, that is our map after merging; its last one is ours
    # before.
    torch.testing.assert_close(maps[-1], hidden[-1], atol=1e-5, rtol=0)
    merged = model.backbone.layers[0].downsample(maps[0].permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    torch.testing.assert_close(merged, hidden[1], atol=1e-5, rtol=0)


@torch.no_grad()
def test_simmim_equals_that_of_transformers() -> None:
    model = SimMIM(backbone_of("last-stage-shrunken"), mask_unit=16).eval()
    randomize(model)
    peer = Swinv2ForMaskedImageModeling(peer_config(TINY, model.backbone, 8, (0, 0, 0))).eval()
    peer.load_state_dict(peer_state(model.state_dict()), strict=True)
    images = torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    mask = random_masks(3, 4, 0.6, torch.Generator().manual_seed(2))
    output = model(images, mask)
    expected = peer(images, bool_masked_pos=upsample_masks(mask, 4).flatten(1))
    torch.testing.assert_close(output.prediction, expected.reconstruction, atol=1e-5, rtol=0)
    torch.testing.assert_close(output.loss, expected.loss, atol=1e-6, rtol=0)


def test_gradients_equal_those_of_transformers() -> None:
    model = Classifier(backbone_of("dividing"), num_classes=10)
    randomize(model)
    peer = Swinv2ForImageClassification(peer_config(TINY, model.backbone, 4, (0, 0, 0))).train()
    peer.load_state_dict(peer_state(model.state_dict()), strict=True)
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    model(images).square().sum().backward()
    for parameter in peer.parameters():
        parameter.grad = None
    peer.config.hidden_dropout_prob = 0.0
    peer(images).logits.square().sum().backward()
    theirs = {name: parameter.grad for name, parameter in peer.named_parameters()}
    ours = peer_state({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, gradient in ours.items():
        scale = theirs[name].abs().max()
        assert (gradient - theirs[name]).abs().max() <= 1e-4 * scale + 1e-6, name
