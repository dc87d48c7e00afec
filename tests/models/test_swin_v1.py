"""Swin V1 against an independent implementation (transformers) on shared random weights, and its sizes."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import SwinConfig, SwinModel

import models
from models.backbones.swin_v1 import SwinV1, SwinV1Size
from models.classification import Classifier
from tests.models.conftest import randomize
from tests.models.peers import swin_state

TINY = SwinV1Size(24, (2, 2, 2), (3, 6, 12))
# (image, window, rule): every stage divides; the last one or two shrink; no map divides, the last is smaller.
GEOMETRIES = {
    "dividing": (64, 4, "shrink"),
    "last-stage-shrunken": (64, 8, "shrink"),
    "two-stages-shrunken": (48, 12, "shrink"),
    "padded": (72, 7, "pad"),
}


def peer_of(model: SwinV1, size: SwinV1Size, window: int) -> SwinModel:
    config = SwinConfig(
        image_size=model.image_size,
        patch_size=model.patch_size,
        embed_dim=size.embed_dim,
        depths=list(size.depths),
        num_heads=list(size.num_heads),
        window_size=window,
        drop_path_rate=0.0,
    )
    peer = SwinModel(config).eval()
    if (
        model.window_rule == "shrink"
    ):  # transformers gives shrunken windows the table of whole ones, and fails
        for ours, theirs in zip(model.layers, peer.encoder.layers, strict=True):
            for block in theirs.blocks:
                dim, heads = block.attention.q_proj.out_features, ours.blocks[0].attn.num_heads
                local = copy.copy(config)
                local.num_attention_heads = heads
                block.attention = type(block.attention)(local, dim, heads, window_size=ours.windows.window)
    return peer.eval()


@pytest.mark.parametrize("geometry", GEOMETRIES)
@torch.no_grad()
def test_outputs_equal_those_of_transformers(geometry: str) -> None:
    image, window, rule = GEOMETRIES[geometry]
    model = SwinV1(TINY, image_size=image, window_size=window, window_rule=rule).eval()  # type: ignore[arg-type]
    randomize(model)
    peer = peer_of(model, TINY, window)
    peer.load_state_dict(swin_state(model.state_dict()), strict=True)
    images = torch.randn(3, 3, image, image, generator=torch.Generator().manual_seed(1))
    maps = model.feature_maps(images)
    expected = peer(images, output_hidden_states=True, always_partition=rule == "pad")
    hidden = expected.reshaped_hidden_states
    for stage in range(2):  # transformers reports the input of each stage: our map after merging
        merged = model.layers[stage].downsample(maps[stage].permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        assert hidden[stage + 1].std() > 0.1
        torch.testing.assert_close(merged, hidden[stage + 1], atol=1e-5, rtol=0)
    torch.testing.assert_close(model(images).flatten(2), expected.last_hidden_state.mT, atol=1e-5, rtol=0)
    torch.testing.assert_close(model.embedding(images), expected.pooler_output, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("swin_v1_tiny", 28_288_354),
        ("swin_v1_small", 49_606_258),
        ("swin_v1_base", 87_768_224),
        ("swin_v1_large", 196_532_476),
    ],
)
def test_parameter_counts_of_the_published_sizes(name: str, parameters: int) -> None:
    with torch.device("meta"):
        model = Classifier(models.create(name, image_size=224, window_size=7), num_classes=1000)
        size = models.BACKBONES[name]
        peer = peer_of(model.backbone, size, 7)  # type: ignore[arg-type]
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert sum(p.numel() for p in model.backbone.parameters()) == sum(p.numel() for p in peer.parameters())


def test_state_dict_has_the_official_names_and_no_tables_of_geometry() -> None:
    names = set(SwinV1(SwinV1Size(16, (1, 2), (2, 4)), image_size=32, window_size=4).state_dict())
    block = {
        f"{part}.{kind}"
        for part in ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
        for kind in ("weight", "bias")
    } | {"attn.relative_position_bias_table"}
    expected = {f"layers.{i}.blocks.{j}.{name}" for i, j in ((0, 0), (1, 0), (1, 1)) for name in block}
    expected |= {f"layers.0.downsample.{n}" for n in ("reduction.weight", "norm.weight", "norm.bias")}
    expected |= {f"patch_embed.{part}.{kind}" for part in ("proj", "norm") for kind in ("weight", "bias")}
    assert names == expected | {"norm.weight", "norm.bias"}


def test_pretrained_windows_are_refused() -> None:
    with pytest.raises(ValueError, match="swin_v1_pico cannot be built: pretrained_windows are for Swin V2"):
        models.create("swin_v1_pico", image_size=32, window_size=4, pretrained_windows=(2, 2))


@torch.no_grad()
def test_initial_weights_are_those_of_the_release() -> None:
    torch.manual_seed(0)
    model = models.create("swin_v1_pico", image_size=32, window_size=4)
    for name, parameter in model.named_parameters():
        if name.endswith(("qkv.weight", "fc1.weight", "reduction.weight", "bias_table")):
            assert parameter.std().item() == pytest.approx(0.02, rel=0.15), name
        if "norm" in name:
            assert (parameter == float(name.endswith("weight"))).all(), name


@torch.no_grad()
def test_cached_bias_follows_its_table() -> None:
    model = SwinV1(TINY, image_size=32, window_size=4).eval()
    randomize(model)
    images = torch.randn(1, 3, 32, 32)
    before = model(images)
    model.layers[0].blocks[0].attn.relative_position_bias_table.mul_(-1)
    after = model(images)
    assert not torch.equal(before, after)
    assert torch.equal(after, model.train()(images))
