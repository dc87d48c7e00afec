"""ViT and DeiT against independent implementations (transformers) on shared random weights; their forms."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import BeitConfig, BeitModel, ViTConfig, ViTModel

import models
from models.backbones.vit import DeiT, DeiTSize, ViT, ViTSize, finetuning_weights
from models.classification import Classifier
from tests.models.conftest import randomize
from tests.models.peers import vit_state

TINY = ViTSize(24, 5, 3)
SHAPE = {"num_hidden_layers": 5, "num_attention_heads": 3, "hidden_size": 24, "intermediate_size": 96}


def vit(pretraining: bool = False, **arguments: object) -> ViT:
    settings: dict[str, object] = {"image_size": 48, "patch_size": 8, **arguments}
    model = ViT(TINY, pretraining=pretraining, **settings)  # type: ignore[arg-type]
    randomize(model)
    return model.eval()


def deit(**arguments: object) -> DeiT:
    settings: dict[str, object] = {"image_size": 48, "patch_size": 8, **arguments}
    model = DeiT(DeiTSize(24, 5, 3), **settings)  # type: ignore[arg-type]
    randomize(model)
    return model.eval()


def images_of(batch: int, side: int = 48) -> Tensor:
    return torch.randn(batch, 3, side, side, generator=torch.Generator().manual_seed(1))


def beit_of(pretraining: bool, shape: dict[str, int], image: int, patch: int) -> BeitModel:
    config = BeitConfig(
        **shape,
        image_size=image,
        patch_size=patch,
        use_shared_relative_position_bias=pretraining,
        use_relative_position_bias=not pretraining,
        use_mean_pooling=not pretraining,
        use_mask_token=pretraining,
        layer_norm_eps=1e-6,
        drop_path_rate=0.0,
    )
    return BeitModel(config).eval()


# --- the same numbers ------------------------------------------------------------------------------------


@pytest.mark.parametrize("pretraining", [True, False])
@torch.no_grad()
def test_vit_equals_that_of_transformers(pretraining: bool) -> None:
    model = vit(pretraining)
    peer = beit_of(pretraining, SHAPE, 48, 8)
    state = vit_state(model.state_dict())
    mask_token, mask = torch.randn(1, 1, 24), torch.rand(3, 6, 6) < 0.5
    if pretraining:
        state["embeddings.mask_token"] = mask_token
    peer.load_state_dict(state, strict=True)
    images = images_of(3)
    expected = peer(images)
    assert expected.last_hidden_state.std() > 0.1
    if pretraining:
        ours = model(images).flatten(2).mT
        torch.testing.assert_close(ours, expected.last_hidden_state[:, 1:], atol=1e-5, rtol=0)
        torch.testing.assert_close(model.embedding(images), ours.mean(1), atol=1e-6, rtol=0)
        expected = peer(images, bool_masked_pos=mask.flatten(1)).last_hidden_state[:, 1:]
        ours = model.forward_features(images, mask, mask_token).flatten(2).mT
        torch.testing.assert_close(ours, expected, atol=1e-5, rtol=0)
    else:
        torch.testing.assert_close(model.embedding(images), expected.pooler_output, atol=1e-5, rtol=0)
        (last,) = model.feature_maps(images, [4])
        torch.testing.assert_close(last.flatten(2).mT, expected.last_hidden_state[:, 1:], atol=1e-5, rtol=0)
        normalized = model.fc_norm(last.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        torch.testing.assert_close(model(images), normalized)


@pytest.mark.parametrize("side", [48, 64])  # the second with interpolated positions
@torch.no_grad()
def test_deit_equals_the_vit_of_transformers(side: int) -> None:
    model = deit()
    config = ViTConfig(**SHAPE, image_size=48, patch_size=8, layer_norm_eps=1e-6)
    peer = ViTModel(config, add_pooling_layer=False).eval()
    peer.load_state_dict(vit_state(model.state_dict()), strict=True)
    images = images_of(3, side)
    expected = peer(images, interpolate_pos_encoding=side != 48).last_hidden_state
    assert expected.std() > 0.1
    torch.testing.assert_close(model.embedding(images), expected[:, 0], atol=1e-5, rtol=0)
    torch.testing.assert_close(model(images).flatten(2).mT, expected[:, 1:], atol=1e-5, rtol=0)


@pytest.mark.parametrize("pretraining", [True, False])
def test_gradients_equal_those_of_transformers(pretraining: bool) -> None:
    model = vit(pretraining).train()
    peer = beit_of(pretraining, SHAPE, 48, 8)
    peer.load_state_dict(vit_state(model.state_dict()), strict=False)
    images = images_of(2)
    result = peer(images)
    if pretraining:
        model.embedding(images).square().sum().backward()
        result.last_hidden_state[:, 1:].mean(1).square().sum().backward()
    else:
        model.embedding(images).square().sum().backward()
        result.pooler_output.square().sum().backward()
    theirs = {name: parameter.grad for name, parameter in peer.named_parameters()}
    for name, gradient in vit_state({n: p.grad for n, p in model.named_parameters()}).items():
        scale = theirs[name].abs().max()
        assert (gradient - theirs[name]).abs().max() <= 1e-4 * scale + 1e-6, name


# --- sizes and forms -------------------------------------------------------------------------------------


def test_deit_s_has_the_published_number_of_parameters() -> None:
    with torch.device("meta"):
        model = Classifier(models.create("deit_small", image_size=224), num_classes=1000)
    assert sum(p.numel() for p in model.parameters()) == 22_050_664


@pytest.mark.parametrize(
    ("name", "width", "depth", "heads"), [("vit_base", 768, 12, 12), ("vit_large", 1024, 24, 16)]
)
@pytest.mark.parametrize("pretraining", [True, False])
def test_vit_has_as_many_parameters_as_beit(
    name: str, width: int, depth: int, heads: int, pretraining: bool
) -> None:
    shape = {
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": depth,
        "num_attention_heads": heads,
    }
    with torch.device("meta"):
        model = models.create(name, image_size=224, pretraining=pretraining)
        peer = beit_of(pretraining, shape, 224, 16)
    expected = sum(p.numel() for p in peer.parameters()) - (width if pretraining else 0)  # its mask token
    assert sum(p.numel() for p in model.parameters()) == expected
    if name == "vit_base" and not pretraining:
        assert expected + 1000 * 769 == 86_530_984  # BEiT-B with a head of 1000 classes


def test_weights_of_pretraining_become_those_of_finetuning() -> None:
    source, target = vit(pretraining=True), vit()
    fresh = target.fc_norm.weight.detach().clone()
    before = dict(source.state_dict())
    target.load_state_dict(finetuning_weights(source.state_dict(), target), strict=True)
    assert set(source.state_dict()) == set(before)  # the source stays whole
    for block in target.blocks:
        table = block.attn.relative_position_bias_table
        assert torch.equal(table, source.rel_pos_bias.relative_position_bias_table)
        assert table.data_ptr() != source.rel_pos_bias.relative_position_bias_table.data_ptr()
    assert torch.equal(target.fc_norm.weight, fresh)
    with torch.no_grad():  # the same network up to the norm
        maps = [model.feature_maps(images_of(2))[-1] for model in (source, target)]
    torch.testing.assert_close(*maps)


def test_other_weights_stay_as_they_are() -> None:
    swin = models.create("swin_v2_pico", image_size=32, window_size=4)
    state = swin.state_dict()
    assert finetuning_weights(state, swin) == state
    pretrained = vit(pretraining=True)
    assert finetuning_weights(pretrained.state_dict(), pretrained).keys() == pretrained.state_dict().keys()
    finetuned = vit()
    assert finetuning_weights(finetuned.state_dict(), finetuned).keys() == finetuned.state_dict().keys()


def test_state_dicts_have_the_official_names() -> None:
    block = {
        f"{part}.{kind}"
        for part in ("norm1", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
        for kind in ("weight", "bias")
    } | {"attn.qkv.weight"}
    beit = block | {"attn.q_bias", "attn.v_bias", "gamma_1", "gamma_2"}
    stem = {"cls_token", "patch_embed.proj.weight", "patch_embed.proj.bias"}
    norm = {"norm.weight", "norm.bias"}

    def blocks(names: set[str]) -> set[str]:
        return {f"blocks.{index}.{name}" for index in range(5) for name in names}

    table = "relative_position_bias_table"
    assert set(vit(True).state_dict()) == stem | blocks(beit) | norm | {f"rel_pos_bias.{table}"}
    finetuned = stem | blocks(beit | {f"attn.{table}"}) | {"fc_norm.weight", "fc_norm.bias"}
    assert set(vit().state_dict()) == finetuned
    assert set(deit().state_dict()) == stem | blocks(block | {"attn.qkv.bias"}) | norm | {"pos_embed"}


def test_initial_weights() -> None:
    torch.manual_seed(0)
    model = models.create("vit_pico", image_size=32)
    assert isinstance(model, ViT)
    for number, block in enumerate(model.blocks, start=1):
        assert block.attn.qkv.weight.std().item() == pytest.approx(0.02, rel=0.1)
        for weight in (block.attn.proj.weight, block.mlp.fc2.weight):
            assert weight.std().item() == pytest.approx(0.02 / (2 * number) ** 0.5, rel=0.1)
        assert (block.gamma_1 == 0.1).all()
        assert (block.attn.relative_position_bias_table == 0).all()


# --- the rest --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("build", [vit, deit])
def test_activation_checkpointing_changes_nothing(build: object) -> None:
    results = []
    for choice in (False, True):
        model = build(drop_path=0.5, activation_checkpointing=choice).train()  # type: ignore[operator]
        torch.manual_seed(3)
        loss = model.embedding(images_of(4)).square().sum()
        loss.backward()
        results.append([loss.detach(), *(p.grad for p in model.parameters())])
    assert all((a is None and b is None) or torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("build", [vit, deit])
def test_half_precision_is_finite_and_close(build: object, dtype: torch.dtype) -> None:
    model = build().train()  # type: ignore[operator]
    reference = model.embedding(images_of(2)).detach()
    model.to(dtype)
    output = model.embedding(images_of(2).to(dtype))
    output.square().mean().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    assert (output.float() - reference).abs().mean() < 0.05 * reference.abs().mean()


def test_tables_survive_materialisation() -> None:
    with torch.device("meta"):
        empty = ViT(TINY, image_size=48, patch_size=8)
    model = empty.to_empty(device="cpu")
    assert torch.equal(model.positions.index, vit().positions.index)
    assert torch.equal(vit().half().positions.index, vit().positions.index)


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("vit_pico", {"image_size": 30}, "image_size is 30, .* multiple of patch_size 4"),
        ("vit_base", {"image_size": 32, "window_rule": "pad"}, "window_rule cannot be set"),
        ("deit_pico", {"image_size": 32, "attention_chunk": 4}, "attention_chunk cannot be set"),
        ("deit_pico", {"image_size": 32, "num_heads": (4,)}, "num_heads cannot be set"),
        ("vit_pico", {"image_size": 32, "drop_path": 1.0}, "drop_path is 1.0"),
        ("swin_v1_pico", {"image_size": 32}, "window_size is missing"),
    ],
)
def test_impossible_arguments_are_one_clear_sentence(
    name: str, arguments: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match=f"{name} cannot be built: .*{message}") as error:
        models.create(name, **arguments)  # type: ignore[arg-type]
    assert "\n" not in str(error.value)


def test_images_of_another_size_are_refused_by_the_vit() -> None:
    with pytest.raises(ValueError, match="8x8 patches, but this backbone was built for 6x6"):
        vit()(images_of(1, 64))
