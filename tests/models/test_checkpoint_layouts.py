"""Published layouts into our models, tensor for tensor, and against the models of transformers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import published
import pytest
import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import SwinConfig, Swinv2Config

import models
from models import checkpoints
from models.backbones.swin_v1 import SwinV1, SwinV1Size
from models.backbones.swin_v2 import SwinV2, SwinV2Size
from models.checkpoints import CheckpointError, Geometry, Weights
from models.classification import Classifier
from models.pretext.simmim import SimMIM
from tests.models.conftest import randomize

SIZES = {
    "swin_v2_test": SwinV2Size(16, (2, 2), (2, 4), extra_norm_period=2),
    "swin_v1_test": SwinV1Size(16, (2, 2), (2, 4)),
}
SWIN = list(SIZES)


@pytest.fixture(autouse=True)
def tiny_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, size in SIZES.items():
        monkeypatch.setitem(models.BACKBONES, name, size)
    monkeypatch.setitem(models.BACKBONES, "swin_v2_peer", PEER_V2)


def build(name: str, task: str = "classifier", **arguments: Any) -> nn.Module:
    """A model whose every parameter is random."""
    backbone = models.create(name, **{"image_size": 32, "window_size": 4, **arguments})
    model: nn.Module = backbone
    if task == "classifier":
        model = Classifier(backbone, 5)
    elif task == "simmim":
        model = SimMIM(backbone, mask_unit=8)
    randomize(model, seed=len(name))
    return model.eval()


def assert_same(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert left.keys() == right.keys()
    for name in left:
        assert torch.equal(left[name], right[name]), name


# ---- layouts of the releases -------------------------------------------------------------------------------

RELEASES: dict[str, tuple[Callable[[nn.Module], dict[str, Tensor]], str, str]] = {
    "official": (published.official, "classifier", "official"),
    "simmim": (published.simmim, "simmim", "official"),
    "timm": (published.timm, "classifier", "timm"),
    "torchvision": (published.torchvision, "classifier", "torchvision"),
    "ours": (lambda model: model.state_dict(), "classifier", "ours"),
    "ours-simmim": (lambda model: model.state_dict(), "simmim", "ours"),
}


@pytest.mark.parametrize("name", SWIN)
@pytest.mark.parametrize("release", RELEASES)
def test_a_release_loads_tensor_for_tensor(release: str, name: str) -> None:
    rename, task, layout = RELEASES[release]
    source, target = build(name, task), build(name, task)
    if release == "torchvision" and name == "swin_v2_test":
        source, target = (build("swin_v2_peer"), build("swin_v2_peer"))  # torchvision has no extra norms
    for parameter in target.parameters():
        nn.init.constant_(parameter, 7.0)
    report = checkpoints.load(rename(source), target)
    assert_same(target.state_dict(), source.state_dict())
    assert (report.layout, report.model.task) == (layout, task)
    assert set(report.loaded) == set(target.state_dict())
    assert not report.fresh
    assert not report.dropped
    assert not report.resized
    assert all("relative" in n or n.endswith("attn_mask") for n in report.rebuilt)


@pytest.mark.parametrize("name", SWIN)
def test_only_the_online_encoder_of_moby_is_taken_and_the_rest_is_named(name: str) -> None:
    source, target = build(name, "backbone"), build(name)
    head = target.head.weight.clone()
    report = checkpoints.load({"model": published.moby(source), "epoch": 3, "optimizer": {}}, target)
    assert_same(target.backbone.state_dict(), source.state_dict())
    assert torch.equal(target.head.weight, head)
    assert report.fresh == ("head.weight", "head.bias")
    for part in ("encoder_k.norm.weight", "projector_k.linear_hidden.1.weight", "queue1", "queue_ptr"):
        assert "MoBY" in report.dropped[part]
    assert "'model' read, epoch, optimizer left aside" in report.notes[0]


@pytest.mark.parametrize("wrapper", ["state_dict", "module", None])
def test_entries_and_prefixes_of_training_scripts_are_looked_through(wrapper: str | None) -> None:
    source, target = build("swin_v2_test"), build("swin_v2_test")
    state: Any = {f"module.{name}": value for name, value in published.official(source).items()}
    checkpoints.load({wrapper: state} if wrapper else state, target)
    assert_same(target.state_dict(), source.state_dict())


def test_the_extra_norms_are_known_by_the_name_of_the_authors_extended_code() -> None:
    source, target = build("swin_v2_test"), build("swin_v2_test")
    state = {name.replace(".norm3.", ".enorm."): value for name, value in published.official(source).items()}
    assert len(state.keys() - published.official(source).keys()) == 4
    nn.init.zeros_(target.backbone.layers[0].blocks[1].norm3.weight)
    checkpoints.load(state, target)
    assert_same(target.state_dict(), source.state_dict())


def test_pretext_parts_and_heads_stay_out_or_fresh_only_as_a_whole_and_are_named() -> None:
    simmim, classifier = build("swin_v2_test", "simmim"), build("swin_v2_test")
    report = checkpoints.load(published.simmim(simmim), classifier)
    assert set(report.dropped) == {"encoder.mask_token", "decoder.0.weight", "decoder.0.bias"}
    assert set(report.fresh) == {"head.weight", "head.bias"}
    report = checkpoints.load(published.official(classifier), simmim, head="drop")
    assert set(report.dropped) == {"head.weight", "head.bias"}
    assert set(report.fresh) == {"mask_token", "decoder.0.weight", "decoder.0.bias"}
    half = published.official(classifier)
    del half["head.bias"]
    with pytest.raises(CheckpointError, match=r"missing: head\.bias"):
        checkpoints.load(half, classifier)


def test_a_head_is_never_dropped_or_cut_without_being_told() -> None:
    source = build("swin_v2_test")
    with pytest.raises(CheckpointError, match="head='drop'"):
        checkpoints.load(published.official(source), build("swin_v2_test", "backbone"))
    other = Classifier(build("swin_v2_test", "backbone"), 3)
    before = {name: value.clone() for name, value in other.state_dict().items()}
    with pytest.raises(
        CheckpointError, match=r"head\.fc\.weight is \(5, 32\) and not \(3, 32\).*head='drop'"
    ):
        checkpoints.load(published.timm(source), other)
    assert_same(before, other.state_dict())
    report = checkpoints.load(published.timm(source), other, head="drop")
    assert set(report.dropped) == {"head.fc.weight", "head.fc.bias"}


# ---- windows -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "rename"),
    [
        ("swin_v2_test", published.official),
        ("swin_v2_test", published.simmim),
        ("swin_v1_test", published.official),
    ],
)
def test_saved_tables_tell_image_and_windows(name: str, rename: Callable[..., dict[str, Tensor]]) -> None:
    task = "simmim" if rename is published.simmim else "classifier"
    found = checkpoints.infer_model(rename(build(name, task, image_size=64, window_size=8)))
    assert (found.name, found.image_size, found.window_size, found.windows) == (name, 64, 8, (8, 8))
    assert (found.depths, found.num_heads, found.patch_size) == ((2, 2), (2, 4), 4)
    shrunken = checkpoints.infer_model(rename(build(name, task, image_size=32, window_size=8)))
    assert (shrunken.image_size, shrunken.windows) == (32, (8, 4))
    if name == "swin_v2_test":
        assert shrunken.pretrained_windows == (8, 4)


def test_the_windows_that_scale_the_coordinates_are_read_off_the_table_and_have_to_be_the_models() -> None:
    source = build("swin_v2_test", image_size=64, window_size=8, pretrained_windows=(6, 3))
    state = published.official(source)
    assert checkpoints.infer_model(state).pretrained_windows == (6, 3)
    other = build("swin_v2_test", image_size=64, window_size=8)
    before = {name: value.clone() for name, value in other.state_dict().items()}
    with pytest.raises(CheckpointError, match=r"pretrained_windows=\(6, 3\)"):
        checkpoints.load(state, other)
    assert_same(before, other.state_dict())
    fitting = build("swin_v2_test", image_size=64, window_size=8, pretrained_windows=(6, 3))
    images = torch.randn(1, 3, 64, 64)
    checkpoints.load(state, fitting)
    assert torch.equal(fitting(images), source(images))
    checkpoints.load(state, other, windows="ignore")
    assert not torch.allclose(other(images), source(images), atol=1e-3)  # what the check is for


def test_a_checkpoint_that_hides_its_windows_says_so() -> None:
    report = checkpoints.load(published.timm(build("swin_v2_test")), build("swin_v2_test"))
    assert any("does not tell the windows" in note for note in report.notes)


def test_tables_of_v1_are_resized_to_other_windows_and_named() -> None:
    source = build("swin_v1_test", image_size=32, window_size=4)
    target = build("swin_v1_test", image_size=64, window_size=8)
    report = checkpoints.load(published.official(source), target)
    name = "layers.0.blocks.1.attn.relative_position_bias_table"
    assert "(49, 2) → (225, 2)" in report.resized[name]
    square = source.backbone.state_dict()[name].T.reshape(1, 2, 7, 7)
    expected = nn.functional.interpolate(square, size=(15, 15), mode="bicubic", align_corners=False)
    torch.testing.assert_close(target.backbone.state_dict()[name], expected.reshape(2, 225).T)
    assert len(report.resized) == 4


# ---- transformers ------------------------------------------------------------------------------------------

PEER_V2 = SwinV2Size(16, (2, 2), (2, 4))


def swin_config(kind: type, **changes: Any) -> Any:
    return kind(
        **{
            "image_size": 32, "patch_size": 4, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4],
            "window_size": 4, "num_labels": 5, "encoder_stride": 8, **changes,
        }
    )  # fmt: skip


PEERS = {
    "Swinv2ForImageClassification": (Swinv2Config, "swin_v2_peer", "classifier"),
    "Swinv2ForMaskedImageModeling": (Swinv2Config, "swin_v2_peer", "simmim"),
    "SwinForImageClassification": (SwinConfig, "swin_v1_test", "classifier"),
    "SwinForMaskedImageModeling": (SwinConfig, "swin_v1_test", "simmim"),
}


@pytest.mark.parametrize("kind", PEERS)
@pytest.mark.parametrize("form", ["in memory", "file"])
@torch.no_grad()
def test_a_model_of_transformers_answers_the_same_after_loading(kind: str, form: str, tmp_path: Path) -> None:
    config, name, task = PEERS[kind]
    peer = getattr(transformers, kind)(swin_config(config)).eval()
    randomize(peer)
    model = build(name, task)
    if form == "file":
        peer.save_pretrained(tmp_path)
        report = checkpoints.load(tmp_path, model)
        assert (report.model.image_size, report.model.windows) == (32, (4, 4))
    else:
        report = checkpoints.load(peer.state_dict(), model)
    assert report.layout == "transformers"
    assert set(report.loaded) == set(model.state_dict())
    compare(model, peer, task)


@pytest.mark.parametrize("kind", PEERS)
@torch.no_grad()
def test_transformers_reads_what_is_exported_strictly_and_it_comes_back_bit_for_bit(
    kind: str, tmp_path: Path
) -> None:
    _, name, task = PEERS[kind]
    model = build(name, task)
    weights = Weights(model.state_dict())
    geometry = Geometry(image_size=32, window_size=4)
    made = checkpoints.convert(weights, "transformers", geometry=geometry)
    save_file(made.tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(__import__("json").dumps(made.config))
    peer, info = getattr(transformers, kind).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    compare(model, peer.eval(), task)
    back = checkpoints.convert(checkpoints.read(tmp_path), "ours")
    assert_same(back.tensors, model.state_dict())
    assert back.config["backbone"] == {"name": name, "image_size": 32, "patch_size": 4, "window_size": 4}


def compare(model: nn.Module, peer: nn.Module, task: str) -> None:
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    if task == "classifier":
        expected, found = peer(images).logits, model(images)
    else:
        mask = torch.rand(2, 4, 4, generator=torch.Generator().manual_seed(2)) < 0.5
        tokens = mask.repeat_interleave(2, 1).repeat_interleave(2, 2).flatten(1)
        expected, found = peer(images, bool_masked_pos=tokens).reconstruction, model(images, mask).prediction
    assert expected.std() > 0.05  # the comparison would be empty otherwise
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


# ---- there and back ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["swin_v2_test", "swin_v1_test"])
@pytest.mark.parametrize("target", ["ours", "official", "timm"])
@pytest.mark.parametrize("task", ["classifier", "backbone", "simmim"])
def test_every_layout_comes_back_bit_for_bit(name: str, target: Any, task: str) -> None:
    model = build(name, task)
    geometry = Geometry(image_size=32, window_size=4)
    if target == "timm" and task == "simmim":
        with pytest.raises(CheckpointError, match="timm has no model for SimMIM"):
            checkpoints.convert(Weights(model.state_dict()), target, geometry=geometry)
        return
    made = checkpoints.convert(Weights(model.state_dict()), target, geometry=geometry)
    if target == "timm":
        assert_same(made.tensors, published.timm(model))
    again = build(name, task)
    randomize(again, seed=99)
    checkpoints.load(made.tensors, again)
    assert_same(again.state_dict(), model.state_dict())


def test_classes_keep_their_numbers_whatever_their_order_in_the_file() -> None:
    model = Classifier(build("swin_v2_peer", "backbone"), 12)
    named = {str(i): f"class {i}" for i in range(12)}
    config = {
        "id2label": dict(sorted(named.items())),
        "image_size": 32,
        "window_size": 4,
    }  # 0, 1, 10, 11, 2 …
    made = checkpoints.convert(Weights(model.state_dict(), config), "ours")
    assert made.config["classes"] == list(named.values())
    back = checkpoints.convert(Weights(made.tensors, made.config), "transformers")
    assert back.config["id2label"] == named
    strange = {**config, "id2label": {"0": "a", "x": "b"}}
    assert "classes" not in checkpoints.convert(Weights(model.state_dict(), strange), "ours").config


def test_nothing_that_is_written_shares_memory() -> None:
    made = checkpoints.convert(
        Weights(build("swin_v2_peer").state_dict()), "transformers", geometry=Geometry(32, 4)
    )
    assert len({value.untyped_storage().data_ptr() for value in made.tensors.values()}) == len(made.tensors)


def test_peers_are_what_their_names_say() -> None:
    assert isinstance(build("swin_v1_test", "backbone"), SwinV1)
    assert isinstance(build("swin_v2_test", "backbone"), SwinV2)
