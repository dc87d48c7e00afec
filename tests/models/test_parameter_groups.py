"""Decay groups and layer ids, as tables."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from models.backbones.swin_v2 import SwinV2, SwinV2Size
from models.classification import Classifier
from models.parameter_groups import layer_id, no_weight_decay, num_layer_ids
from models.pretext.simmim import SimMIM

BACKBONE = SwinV2(SwinV2Size(16, (2, 4, 2), (2, 4, 8)), image_size=32, window_size=4)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("patch_embed.proj.weight", 0),
        ("patch_embed.norm.bias", 0),
        ("mask_token", 0),
        ("layers.0.blocks.0.attn.qkv.weight", 1),
        ("layers.0.blocks.1.norm2.weight", 2),
        ("layers.0.downsample.reduction.weight", 2),
        ("layers.1.blocks.0.attn.cpb_mlp.0.weight", 3),
        ("layers.1.blocks.3.mlp.fc1.weight", 6),
        ("layers.1.downsample.norm.weight", 6),
        ("layers.2.blocks.1.attn.logit_scale", 8),
        ("norm.weight", 9),
        ("head.weight", 9),
        ("decoder.0.weight", 9),
        ("head.layers.0.blocks.0.weight", 9),
    ],
)
@pytest.mark.parametrize("prefix", ["", "backbone.", "module.backbone."])
def test_layer_ids(name: str, expected: int, prefix: str) -> None:
    assert layer_id(prefix + name, BACKBONE) == expected


def test_layer_ids_of_a_whole_classifier_cover_every_depth() -> None:
    ids = {layer_id(name, BACKBONE) for name, _ in Classifier(BACKBONE, 10).named_parameters()}
    assert ids == set(range(num_layer_ids(BACKBONE)))


@pytest.mark.parametrize("wrap", [lambda b: SimMIM(b, 8), lambda b: Classifier(b, 10)])
def test_decayed_parameters_are_the_matrices(wrap: object) -> None:
    model: nn.Module = wrap(BACKBONE)  # type: ignore[operator]
    decayed = {name for name, p in model.named_parameters() if not no_weight_decay(name, p)}
    endings = ("qkv.weight", "attn.proj.weight", "fc1.weight", "fc2.weight", "reduction.weight")
    others = {"backbone.patch_embed.proj.weight", "decoder.0.weight", "head.weight"}
    expected = {n for n, _ in model.named_parameters() if n.endswith(endings) or n in others}
    assert decayed == expected
    assert len([n for n in decayed if n.endswith("qkv.weight")]) == BACKBONE.num_layers


@pytest.mark.parametrize(
    ("name", "shape", "exempt"),
    [
        ("backbone.layers.0.blocks.0.attn.cpb_mlp.0.weight", (512, 2), True),
        ("encoder.layers.0.blocks.0.attn.logit_scale", (2, 1, 1), True),
        ("mask_token", (1, 1, 16), True),
        ("absolute_pos_embed", (1, 64, 16), True),
        ("layers.0.blocks.0.attn.relative_position_bias_table", (49, 2), True),
        ("norm.weight", (16,), True),
        ("head.bias", (10,), True),
        ("head.weight", (10, 16), False),
        ("my_mask_token_head.weight", (10, 16), False),
    ],
)
def test_decay_table(name: str, shape: tuple[int, ...], exempt: bool) -> None:
    assert no_weight_decay(name, torch.empty(shape)) is exempt
