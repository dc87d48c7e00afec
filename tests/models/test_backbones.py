"""What every backbone promises, asked of each of them (``models.backbones.interface``)."""

from __future__ import annotations

import pytest
import torch

import models
from models.backbones.interface import Backbone
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
    assert all(m.shape[0] == 2 and m.ndim == 4 for m in backbone.feature_maps(images))


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
