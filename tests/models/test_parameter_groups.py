"""Decay groups and layer ids, as tables."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from models.backbones.interface import Backbone
from models.backbones.swin_v1 import SwinV1, SwinV1Size
from models.backbones.swin_v2 import SwinV2, SwinV2Size
from models.backbones.vit import DeiT, DeiTSize, ViT, ViTSize
from models.classification import Classifier
from models.parameter_groups import layer_id, no_weight_decay, num_layer_ids
from models.pretext.simmim import SimMIM

VIT = ViT(ViTSize(16, 3, 2), image_size=16, patch_size=4, pretraining=True)
OTHERS = {
    "swin_v1": SwinV1(SwinV1Size(16, (2, 4), (2, 4)), image_size=32, window_size=4),
    "vit-pretraining": VIT,
    "vit-finetuning": ViT(ViTSize(16, 3, 2), image_size=16, patch_size=4),
    "deit": DeiT(DeiTSize(16, 3, 2), image_size=16, patch_size=4),
}
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


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("cls_token", 0),
        ("pos_embed", 0),
        ("mask_token", 0),
        ("patch_embed.proj.weight", 0),
        ("blocks.0.attn.qkv.weight", 1),
        ("blocks.0.gamma_1", 1),
        ("blocks.2.attn.relative_position_bias_table", 3),
        ("rel_pos_bias.relative_position_bias_table", 4),
        ("norm.weight", 4),
        ("fc_norm.weight", 4),
        ("head.weight", 4),
    ],
)
@pytest.mark.parametrize("prefix", ["", "backbone.", "module.backbone."])
def test_layer_ids_of_a_vit(name: str, expected: int, prefix: str) -> None:
    assert num_layer_ids(VIT) == 5
    assert layer_id(prefix + name, VIT) == expected


@pytest.mark.parametrize("backbone", [BACKBONE, *OTHERS.values()], ids=["swin_v2", *OTHERS])
def test_layer_ids_of_a_whole_classifier_cover_every_depth(backbone: Backbone) -> None:
    ids = {layer_id(name, backbone) for name, _ in Classifier(backbone, 10).named_parameters()}
    assert ids == set(range(num_layer_ids(backbone)))


@pytest.mark.parametrize("backbone", OTHERS.values(), ids=OTHERS)
def test_decayed_parameters_of_other_backbones_are_the_matrices(backbone: Backbone) -> None:
    names = [name for name, _ in backbone.named_parameters()]  # type: ignore[attr-defined]
    endings = ("qkv.weight", "attn.proj.weight", "fc1.weight", "fc2.weight", "reduction.weight")
    expected = {n for n in names if n.endswith(endings) or n == "patch_embed.proj.weight"}
    decayed = {n for n, p in backbone.named_parameters() if not no_weight_decay(n, p)}  # type: ignore[attr-defined]
    assert decayed == expected
    assert len([n for n in decayed if n.endswith("qkv.weight")]) == backbone.num_layers


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
        ("module.backbone.rel_pos_bias.relative_position_bias_table", (52, 2), True),
        ("backbone.cls_token", (1, 1, 16), True),
        ("target_backbone.pos_embed", (1, 17, 16), True),
        ("blocks.0.gamma_1", (16,), True),
        ("norm.weight", (16,), True),
        ("head.bias", (10,), True),
        ("head.weight", (10, 16), False),
        ("my_mask_token_head.weight", (10, 16), False),
    ],
)
def test_decay_table(name: str, shape: tuple[int, ...], exempt: bool) -> None:
    assert no_weight_decay(name, torch.empty(shape)) is exempt
