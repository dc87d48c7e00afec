"""What every backbone promises, asked of each of them (``models.backbones.interface``)."""

from __future__ import annotations

import pytest
import torch

import models
from models.backbones.interface import Backbone
from models.classification import Classifier
from tests.models.conftest import randomize

QUICK = ["swin_v2_pico", "swin_v1_pico", "vit_pico", "deit_pico"]


def build(name: str) -> Backbone:
    backbone = models.create(name, image_size=32, window_size=4, patch_size=4)
    randomize(backbone)
    return backbone.eval()


@pytest.mark.parametrize("name", QUICK)
@torch.no_grad()
def test_shapes_are_those_of_the_protocol(name: str) -> None:
    backbone = build(name)
    images = torch.randn(2, 3, 32, 32)
    side = 32 // backbone.stride
    assert backbone(images).shape == (2, backbone.num_features, side, side)
    assert backbone.embedding(images).shape == (2, backbone.num_features)
    assert backbone.num_layers == sum(backbone.depths)
    maps = backbone.feature_maps(images)
    assert [m.shape[:2] for m in maps] == [(2, channels) for channels in backbone.feature_channels]
    assert maps[-1].shape[2:] == (side, side)


@pytest.mark.parametrize("name", QUICK)
@torch.no_grad()
def test_chosen_maps_are_those_of_all_and_cost_nothing_above(name: str) -> None:
    backbone, images = build(name), torch.randn(2, 3, 32, 32)
    maps = backbone.feature_maps(images)
    for indices in ([0], [len(maps) - 1], [0, len(maps) - 1]):
        chosen = backbone.feature_maps(images, indices)
        assert len(chosen) == len(indices)
        assert all(torch.equal(map_, maps[index]) for map_, index in zip(chosen, indices, strict=True))
    entered: list[str] = []
    for part, module in backbone.named_modules():  # type: ignore[attr-defined]
        if part.endswith(".mlp"):
            module.register_forward_hook(lambda *_, part=part: entered.append(part))
    backbone.feature_maps(images, [0])
    assert len(entered) == (backbone.depths[0] if len(backbone.depths) > 1 else 1)
    for wrong in ([], [len(maps)], [-1], [1, 0], [0, 0]):
        with pytest.raises(ValueError, match=r"indices are .*must ascend"):
            backbone.feature_maps(images, wrong)


@pytest.mark.parametrize("name", QUICK)
@torch.no_grad()
def test_classifiers_read_any_map(name: str) -> None:
    backbone, images = build(name), torch.randn(2, 3, 32, 32)
    count = len(backbone.feature_channels)
    for feature in (1, count):
        classifier = Classifier(backbone, 5, feature).eval()
        expected = backbone.feature_maps(images)[feature - 1].mean((2, 3))
        torch.testing.assert_close(classifier(images), classifier.head(expected))
    with pytest.raises(ValueError, match=f"feature is {count + 1}, .* from 1 to {count}"):
        Classifier(backbone, 5, count + 1)


@pytest.mark.parametrize("name", QUICK)
@torch.no_grad()
def test_mask_tokens_enter_where_the_mask_is_set_and_nowhere_else(name: str) -> None:
    backbone = build(name)
    images, token = torch.randn(2, 3, 32, 32), torch.randn(1, 1, backbone.embed_dim)
    mask = torch.zeros(2, 32 // backbone.patch_size, 32 // backbone.patch_size, dtype=torch.bool)
    torch.testing.assert_close(
        backbone.forward_features(images, mask, token), backbone(images), atol=0, rtol=0
    )
    mask[1, 2, 3] = True
    changed = backbone.forward_features(images, mask, token)
    assert torch.equal(changed[0], backbone(images)[0])
    assert not torch.equal(changed[1], backbone(images)[1])
    p = backbone.patch_size
    images[1, :, 2 * p : 3 * p, 3 * p : 4 * p] = 7.0  # what is hidden cannot be seen
    assert torch.equal(backbone.forward_features(images, mask, token), changed)
    with pytest.raises(ValueError, match="belong together"):
        backbone.forward_features(images, mask)
