"""Published ViT: SimMIM's in both its forms, BEiT and DeiT, tensor for tensor and against transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import BeitConfig, DeiTConfig, ViTConfig

import models
from models import checkpoints
from models.backbones.bias_tables import resize_bias_table, resize_position_embedding
from models.backbones.vit import DeiTSize, ViTSize
from models.checkpoints import CheckpointError, Geometry, Weights
from models.classification import Classifier
from models.pretext.simmim import SimMIM
from tests.models.conftest import randomize

SIZE = (24, 2, 3)  # channels, blocks, heads: eight channels each, which no rule would guess


@pytest.fixture(autouse=True)
def tiny_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(models.BACKBONES, "vit_test", ViTSize(*SIZE, patch_size=8))
    monkeypatch.setitem(models.BACKBONES, "deit_test", DeiTSize(*SIZE, patch_size=8))


def build(name: str, task: str = "classifier", image_size: int = 32, pretraining: bool = False) -> nn.Module:
    backbone = models.create(name, image_size=image_size, pretraining=pretraining)
    model: nn.Module = backbone
    if task == "classifier":
        model = Classifier(backbone, 5)
    elif task == "simmim":
        model = SimMIM(backbone, mask_unit=16)
    randomize(model, seed=image_size)
    return model.eval()


def released(model: nn.Module, prefix: str) -> dict[str, Tensor]:
    """As the SimMIM and MoBY releases: backbone and mask token under a prefix, with the saved index."""
    state = {}
    for name, value in model.state_dict().items():
        name = name.removeprefix("backbone.")
        state[name if name.startswith(("decoder", "head")) else prefix + name] = value.clone()
        if name.endswith("bias_table"):
            state[prefix + name.replace("bias_table", "index")] = torch.zeros(17, 17, dtype=torch.long)
    return state


def assert_same(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert left.keys() == right.keys()
    for name in left:
        assert torch.equal(left[name], right[name]), name


# ---- the releases ------------------------------------------------------------------------------------------


def test_the_release_of_simmim_goes_into_simmim_tensor_for_tensor() -> None:
    source, target = (build("vit_test", "simmim", pretraining=True) for _ in range(2))
    randomize(target, seed=5)
    report = checkpoints.load({"model": released(source, "encoder.")}, target)
    assert_same(target.state_dict(), source.state_dict())
    assert (report.layout, report.model.family, report.model.name) == ("official", "vit", "vit_test")
    assert (report.model.image_size, report.model.num_heads) == (32, (3,))
    assert report.rebuilt == ("encoder.rel_pos_bias.relative_position_index",)


@pytest.mark.parametrize("image_size", [32, 64])
@pytest.mark.parametrize("method", ["bicubic", "geometric"])
def test_for_finetuning_every_block_gets_its_own_copy_of_the_table(image_size: int, method: Any) -> None:
    source = build("vit_test", "simmim", pretraining=True)
    target = build("vit_test", image_size=image_size)
    own_norm = target.backbone.fc_norm.weight.clone()
    report = checkpoints.load(released(source, "encoder."), target, tables=method)
    shared = source.backbone.rel_pos_bias.relative_position_bias_table
    tables = [block.attn.relative_position_bias_table for block in target.backbone.blocks]
    for table in tables:
        torch.testing.assert_close(table, resize_bias_table(shared, image_size // 8, method))
        assert torch.equal(table[-3:], shared[-3:])
    assert tables[0].data_ptr() != tables[1].data_ptr()
    assert torch.equal(target.backbone.fc_norm.weight, own_norm)
    assert set(report.dropped) == {
        "encoder.norm.weight", "encoder.norm.bias", "encoder.mask_token",
        "decoder.0.weight", "decoder.0.bias",
    }  # fmt: skip
    assert set(report.fresh) == {
        "head.weight", "head.bias", "backbone.fc_norm.weight", "backbone.fc_norm.bias",
    }  # fmt: skip
    assert len(report.resized) == 2
    assert ("(52, 3) → (228, 3)" in str(report.resized)) == (image_size == 64)


def test_the_online_deit_of_moby_gets_interpolated_positions() -> None:
    source, target = build("deit_test", "backbone"), build("deit_test", image_size=64)
    state = released(source, "encoder.")
    state |= {name.replace("encoder.", "encoder_k."): torch.ones_like(value) for name, value in state.items()}
    report = checkpoints.load(state, target)
    expected = resize_position_embedding(source.pos_embed, (8, 8))
    torch.testing.assert_close(target.backbone.pos_embed, expected)
    assert torch.equal(target.backbone.norm.weight, source.norm.weight)
    assert report.resized == {"pos_embed": "(1, 17, 24) → (1, 65, 24), bicubic"}
    assert (report.model.task, report.model.name, report.model.num_heads) == ("moby", "deit_test", (3,))
    assert len(report.dropped) == len(source.state_dict())


@pytest.mark.parametrize(
    ("name", "task", "pretraining"),
    [("deit_test", "classifier", False), ("deit_test", "simmim", False), ("vit_test", "classifier", False),
     ("vit_test", "simmim", True), ("vit_test", "backbone", True)],
)  # fmt: skip
@pytest.mark.parametrize("target", ["ours", "official", "timm"])
def test_every_layout_comes_back_bit_for_bit(name: str, task: str, pretraining: bool, target: Any) -> None:
    model = build(name, task, pretraining=pretraining)
    if target == "timm" and task == "simmim":
        return
    made = checkpoints.convert(Weights(model.state_dict()), target)
    again = build(name, task, pretraining=pretraining)
    randomize(again, seed=9)
    checkpoints.load(made.tensors, again)
    assert_same(again.state_dict(), model.state_dict())
    arguments = dict(made.config["backbone"])
    rebuilt = models.create(arguments.pop("name"), **arguments)
    assert rebuilt.state_dict().keys() == getattr(model, "backbone", model).state_dict().keys()


# ---- transformers ------------------------------------------------------------------------------------------

SHAPE: dict[str, Any] = {
    "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 96,
    "image_size": 32, "patch_size": 8, "num_labels": 5, "layer_norm_eps": 1e-6, "encoder_stride": 8,
}  # fmt: skip
BEIT = {"use_relative_position_bias": True, "use_mean_pooling": True}
SHARED = {"use_shared_relative_position_bias": True, "use_mean_pooling": False}
TOKENS = {"use_mask_token": True, "vocab_size": 7}
PEERS: dict[str, tuple[Any, str, str, bool]] = {
    "ViTForImageClassification": (ViTConfig(**SHAPE), "deit_test", "classifier", False),
    "ViTForMaskedImageModeling": (ViTConfig(**SHAPE), "deit_test", "simmim", False),
    "BeitForImageClassification": (BeitConfig(**SHAPE, **BEIT), "vit_test", "classifier", False),
    "BeitModel": (BeitConfig(**SHAPE, **SHARED), "vit_test", "backbone", True),
    "BeitForMaskedImageModeling": (
        BeitConfig(**SHAPE, **{**SHARED, **TOKENS, "use_mean_pooling": True}), "vit_test", "backbone", True,
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", PEERS)
@pytest.mark.parametrize("form", ["in memory", "file"])
@torch.no_grad()
def test_a_model_of_transformers_answers_the_same_after_loading(kind: str, form: str, tmp_path: Path) -> None:
    config, name, task, pretraining = PEERS[kind]
    peer = getattr(transformers, kind)(config).eval()
    randomize(peer)
    model = build(name, task, pretraining=pretraining)
    if form == "file":
        peer.save_pretrained(tmp_path)
    report = checkpoints.load(tmp_path if form == "file" else peer.state_dict(), model)
    assert (report.layout, report.model.name) == ("transformers", name)
    assert set(report.loaded) == set(model.state_dict())
    assert all("lm_head" in n or "mask_token" in n or "pooler.dense" in n for n in report.dropped)
    compare(model, peer, kind)


@pytest.mark.parametrize("kind", [kind for kind in PEERS if kind != "BeitForMaskedImageModeling"])
@torch.no_grad()
def test_transformers_reads_what_is_exported_strictly_and_it_comes_back_bit_for_bit(
    kind: str, tmp_path: Path
) -> None:
    _, name, task, pretraining = PEERS[kind]
    model = build(name, task, pretraining=pretraining)
    made = checkpoints.convert(Weights(model.state_dict()), "transformers", geometry=Geometry(32))
    assert made.config["architectures"] == [kind]
    save_file(made.tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(made.config))
    peer, info = getattr(transformers, kind).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    compare(model, peer.eval(), kind)
    back = checkpoints.convert(checkpoints.read(tmp_path), "ours")
    ours = {n if task != "backbone" else f"backbone.{n}": v for n, v in model.state_dict().items()}
    assert_same(back.tensors, ours)


def compare(model: nn.Module, peer: nn.Module, kind: str) -> None:
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    if kind == "ViTForMaskedImageModeling":
        mask = torch.rand(2, 2, 2, generator=torch.Generator().manual_seed(2)) < 0.5
        tokens = mask.repeat_interleave(2, 1).repeat_interleave(2, 2).flatten(1)
        expected, found = peer(images, bool_masked_pos=tokens).reconstruction, model(images, mask).prediction
    elif kind.startswith("Beit") and "Classification" not in kind:
        if kind == "BeitForMaskedImageModeling":
            expected = peer.layernorm(peer.beit(images).last_hidden_state)[:, 1:]
        else:
            expected = peer(images).last_hidden_state[:, 1:]
        found = model(images).flatten(2).mT
    else:
        expected, found = peer(images).logits, model(images)
    assert expected.std() > 0.05
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_the_norm_of_beits_token_head_is_not_taken_for_the_backbones() -> None:
    peer = transformers.BeitForMaskedImageModeling(BeitConfig(**SHAPE, **SHARED, **TOKENS))
    randomize(peer)
    model = build("vit_test", "backbone", pretraining=True)
    report = checkpoints.load(peer.state_dict(), model)
    assert torch.equal(model.norm.weight, peer.beit.layernorm.weight)
    assert {"layernorm.weight", "layernorm.bias", "lm_head.weight"} <= report.dropped.keys()


def test_a_distilled_deit_is_refused_for_what_it_is() -> None:
    peer = transformers.DeiTForImageClassification(DeiTConfig(**SHAPE))
    model = build("deit_test")
    with pytest.raises(CheckpointError, match="distillation token"):
        checkpoints.load(peer.state_dict(), model)
    with pytest.raises(CheckpointError, match="distillation token"):
        checkpoints.load(released(model, "") | {"dist_token": torch.zeros(1, 1, 24)}, model)


def test_the_two_kinds_are_told_apart_and_simmims_decoder_has_no_place_in_transformers() -> None:
    with pytest.raises(CheckpointError, match="pos_embed"):
        checkpoints.load(released(build("deit_test"), ""), build("vit_test"))
    state = released(build("deit_test"), "") | {"blocks.0.gamma_1": torch.ones(24)}
    with pytest.raises(CheckpointError, match="both absolute positions"):
        checkpoints.load(state, build("deit_test"))
    model = build("vit_test", "simmim", pretraining=True)
    with pytest.raises(CheckpointError, match="--head drop"):
        checkpoints.convert(Weights(model.state_dict()), "transformers")
    made = checkpoints.convert(Weights(model.state_dict()), "transformers", head="drop")
    assert made.config["architectures"] == ["BeitModel"]
