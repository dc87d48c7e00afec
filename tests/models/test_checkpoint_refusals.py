"""Checkpoints that must not be loaded: damaged, hostile, incomplete, of something else. The model stays."""

from __future__ import annotations

import json
import os
import pickle
import struct
import zipfile
from pathlib import Path
from random import Random
from typing import Any

import published
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor, nn

from models import checkpoints
from models.backbones.swin_v1 import SwinV1, SwinV1Size
from models.backbones.swin_v2 import SwinV2, SwinV2Size
from models.checkpoints import CheckpointError
from models.classification import Classifier
from tests.models.conftest import randomize


def build(kind: str = "v2") -> nn.Module:
    if kind == "v2":
        backbone: nn.Module = SwinV2(SwinV2Size(8, (1, 2), (1, 2)), image_size=16, window_size=2)
    else:
        backbone = SwinV1(SwinV1Size(8, (1, 2), (1, 2)), image_size=16, window_size=2)
    model = Classifier(backbone, 3)
    randomize(model)
    return model


MODEL = build()
STATE = published.official(MODEL)
NAMES = sorted(published.plain(MODEL))
REFUSAL_SETTINGS = settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def refused(source: Any, *words: str, model: nn.Module | None = None) -> str:
    """The message of the refusal; the model has to be as it was."""
    model = model or build()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(CheckpointError) as caught:
        checkpoints.load(source, model)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message, message
    return message


# ---- what is in the state dict -----------------------------------------------------------------------------


@REFUSAL_SETTINGS
@given(st.sampled_from(NAMES), st.sampled_from(["missing", "shape", "nan", "inf", "integer"]))
def test_one_wrong_tensor_is_refused_by_name(name: str, fault: str) -> None:
    state = {key: value.clone() for key, value in STATE.items()}
    tensor = state.pop(name)
    if fault == "shape":
        state[name] = torch.zeros(*tensor.shape[:-1], tensor.shape[-1] + 1)
    elif fault in ("nan", "inf"):
        state[name] = tensor.clone()
        state[name].view(-1)[-1] = float(fault)
    elif fault == "integer":
        state[name] = tensor.to(torch.int32)
    refused(state, "head" if fault == "missing" and name == "head.weight" else name)


@REFUSAL_SETTINGS
@given(st.text(min_size=1, max_size=30).filter(lambda name: name not in STATE))
def test_one_tensor_too_many_is_refused_by_name(name: str) -> None:
    refused({**STATE, name: torch.zeros(3)})


def test_a_dozen_names_are_listed_and_the_rest_counted() -> None:
    extra = {f"norm.extra{i:02}": torch.zeros(1) for i in range(15)}
    message = refused({**STATE, **extra}, "left over", "norm.extra11", "and 3 more")
    assert "norm.extra12" not in message


def test_two_names_for_one_parameter_are_refused() -> None:
    state = {f"encoder.{name}": value for name, value in STATE.items()}
    twice = "encoder.layers.0.blocks.0.attn.rpe_mlp.0.weight"
    state[twice] = state[twice.replace("rpe", "cpb")]
    refused(state, "same parameter", twice)


def test_losing_the_position_bias_of_simmim_does_not_go_unnoticed() -> None:
    state = {name: value for name, value in STATE.items() if "cpb_mlp" not in name}
    refused(state, "missing", "layers.0.blocks.0.attn.cpb_mlp.0.weight")


def test_v1_v2_and_their_mixtures_are_told_apart() -> None:
    refused(published.official(build("v1")), "relative_position_bias_table", "logit_scale")
    both = {**STATE, "layers.0.blocks.0.attn.relative_position_bias_table": torch.zeros(9, 1)}
    refused(both, "both logit_scale (V2) and relative_position_bias_table (V1)")
    neither = {name: value for name, value in STATE.items() if "logit_scale" not in name}
    refused(neither, "neither")


@pytest.mark.parametrize(
    ("state", "word"),
    [
        ({"conv1.weight": torch.zeros(1)}, "no known layout"),
        ({"backbone.stages.0.blocks.0.norm.weight": torch.zeros(1)}, "no known layout"),
        ({"patch_embed.proj.weight": torch.zeros(1)}, "no blocks"),
        ({"patch_embed.proj.weight": torch.zeros(()), "layers.0.x.logit_scale": torch.zeros(1)}, "shape ()"),
        ({"stages.0.blocks.0.attn.meta_mlp.fc1.weight": torch.zeros(1)}, "swinv2_cr"),
        ({"model": {"model": {"model": {"model": {}}}}}, "no weights"),
        ({"epoch": 3, "model": [1, 2]}, "epoch, model"),
        ({"w": torch.zeros(1), "epoch": 3}, "epoch"),
        ({1: torch.zeros(1)}, "no state dict"),
        ({}, "empty dict"),
        ({"w": torch.zeros(2, 2).to_sparse()}, "sparse"),
        ({"w": torch.zeros(2, dtype=torch.complex64)}, "complex64"),
        ({"w": torch.zeros(2, device="meta")}, "meta"),
        ({"w": torch.zeros(1).expand(10**12)}, "more than the file holds"),
        ({**STATE, "layers." + "9" * 5000 + ".blocks.0.norm1.weight": torch.zeros(1)}, "left over"),
        ({**STATE, "layers.0.blocks.0.attn.relative_coords_table": torch.full((1, 3, 3, 2), 1e30)}, ""),
    ],
)
def test_other_things_are_refused_in_one_sentence(state: Any, word: str) -> None:
    if word:
        refused(state, word)
    else:
        checkpoints.load(state, build())  # a strange buffer is never loaded, so it does no harm


def test_a_state_dict_that_contains_itself_is_refused() -> None:
    circle: dict[str, Any] = {}
    circle["model"] = circle
    refused(circle, "no weights")


@REFUSAL_SETTINGS
@given(st.data())
def test_no_state_dict_of_another_layout_leads_to_anything_but_a_refusal(data: st.DataObject) -> None:
    """Any three tensors of torchvision's layout with any shapes: never another exception."""
    state = published.torchvision(MODEL)
    for name in data.draw(st.lists(st.sampled_from(sorted(state)), min_size=1, max_size=3, unique=True)):
        shape = data.draw(st.lists(st.integers(0, 5), max_size=4).map(tuple))
        if "relative" in name or shape == tuple(state[name].shape):
            continue
        state[name] = torch.zeros(shape)
        refused(state)


# ---- what is in the file -----------------------------------------------------------------------------------


def test_types_other_than_float32_are_converted_and_said(tmp_path: Path) -> None:
    half = {name: value.half() if value.is_floating_point() else value for name, value in STATE.items()}
    torch.save(half, tmp_path / "half.pth")
    model = build()
    report = checkpoints.load(tmp_path / "half.pth", model)
    assert model.head.weight.dtype == torch.float32
    assert torch.equal(model.head.weight, STATE["head.weight"].half().float())
    assert "float16" in " ".join(report.notes)


@pytest.mark.parametrize("name", ["weights.safetensors", "weights.bin", "weights"])
def test_a_file_is_known_by_what_is_in_it_whatever_its_name(name: str, tmp_path: Path) -> None:
    for save in (torch.save, lambda state, path: save_file(published.plain(MODEL), path)):
        save(STATE, tmp_path / name)
        model = build()
        nn.init.zeros_(model.head.weight)
        checkpoints.load(tmp_path / name, model)
        assert torch.equal(model.head.weight, STATE["head.weight"])


class Config:
    """As yacs' CfgNode: a class of another package, next to the weights."""

    def __reduce__(self) -> Any:
        return os.mkdir, ("executed",)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_that_would_run_code_is_refused_unread_with_the_way_out(
    zipped: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"model": STATE, "config": Config()}, "swin.pth", _use_new_zipfile_serialization=zipped)
    refused("swin.pth", "mkdir", "weights_only=False", "weights.pth", "trust")
    assert not Path("executed").exists()


@pytest.mark.parametrize(
    ("content", "word"),
    [
        (b"", "empty"),
        (b"<!DOCTYPE html><html>", "web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid", "git lfs pull"),
        (b"\x89PNG\r\n\x1a\n" + bytes(100), "neither"),
        (b"\x80\x02K\x03.", "damaged"),
        (struct.pack("<Q", 2**60) + b"{}" + bytes(50), "damaged"),
        (b"PK\x03\x04" + bytes(100), "damaged"),
    ],
)
def test_files_that_are_no_checkpoints_say_what_they_are(content: bytes, word: str, tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    path.write_bytes(content)
    refused(path, word, "weights.pth")


@pytest.mark.parametrize("form", ["zip", "legacy", "safetensors"])
def test_a_file_cut_off_anywhere_is_refused(form: str, tmp_path: Path) -> None:
    path = tmp_path / "weights"
    if form == "safetensors":
        save_file(published.plain(MODEL), path)
    else:
        torch.save(STATE, path, _use_new_zipfile_serialization=form == "zip")
    whole = path.read_bytes()
    checkpoints.load(path, build())
    for length in sorted({len(whole) * i // 13 for i in range(13)} | {8, 100, len(whole) - 1}):
        path.write_bytes(whole[:length])
        refused(path, str(path))


@pytest.mark.parametrize("form", ["zip", "legacy", "safetensors"])
def test_a_file_with_any_wrong_bytes_is_loaded_or_refused(form: str, tmp_path: Path) -> None:
    path, model, random = tmp_path / "weights", build(), Random(form)
    if form == "safetensors":
        save_file(published.plain(MODEL), path)
    else:
        torch.save(STATE, path, _use_new_zipfile_serialization=form == "zip")
    whole, messages = path.read_bytes(), []
    for _ in range(60):
        damaged = bytearray(whole)
        for _ in range(3):
            place = random.choice((random.randrange(len(whole)), -1 - random.randrange(3000)))
            damaged[place] = random.randrange(256)
        path.write_bytes(damaged)
        try:
            checkpoints.load(path, model)
        except CheckpointError as error:
            messages.append(str(error))
    assert messages
    assert all(message.isprintable() for message in messages)


def test_a_compressed_archive_and_a_file_above_the_limit_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({}) + bytes(10**6))
    refused(path, "compressed")
    torch.save(STATE, path)
    with pytest.raises(CheckpointError, match="more than the"):
        checkpoints.read(path, max_bytes=1000)


def test_missing_files_and_folders_without_weights_are_refused(tmp_path: Path) -> None:
    refused(tmp_path / "nowhere.pth", "does not exist")
    refused(tmp_path, "holds no weights")
    (tmp_path / "config.json").write_text("[1]")
    torch.save(STATE, tmp_path / "pytorch_model.bin")
    refused(tmp_path, "config.json")
    (tmp_path / "config.json").write_text("{")
    refused(tmp_path, "not JSON")


@pytest.mark.parametrize(
    "config",
    [
        {"image_size": "224", "window_size": [8, 4], "pretrained_window_sizes": "all"},
        {"backbone": {"image_size": -1, "window_size": True}, "pretrained_windows": [1.5]},
        {"architecture": ["window7"], "pretrained_cfg": {"input_size": "3"}},
        {"backbone": 3, "image_size": [32, 64], "id2label": {"0": 3}},
    ],
)
def test_a_strange_config_is_ignored(config: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(published.plain(MODEL), tmp_path / "model.safetensors")
    checkpoints.load(tmp_path, build())


# ---- shards ------------------------------------------------------------------------------------------------


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """The index of two shards."""
    state: dict[str, Tensor] = published.plain(MODEL)
    halves = [dict(list(state.items())[i::2]) for i in range(2)]
    places = {}
    for i, half in enumerate(halves):
        save_file(half, tmp_path / f"model-{i}.safetensors")
        places |= dict.fromkeys(half, f"model-{i}.safetensors")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return index


def test_shards_are_read_together_from_the_index_or_the_folder(shards: Path) -> None:
    for source in (shards, shards.parent):
        model = build()
        nn.init.zeros_(model.head.weight)
        checkpoints.load(source, model)
        assert torch.equal(model.head.weight, STATE["head.weight"])


def test_shards_that_are_absent_outside_or_of_another_index_are_refused(shards: Path) -> None:
    index = json.loads(shards.read_text())
    places = index["weight_map"]
    for wrong, word in (
        ({**places, "norm.weight": "model-7.safetensors"}, "model-7"),
        ({**places, "norm.weight": "../model-0.safetensors"}, "outside"),
        ({**places, "more.weight": "model-0.safetensors"}, "more.weight"),
        ({name: place for name, place in places.items() if name != "norm.weight"}, "norm.weight"),
        ({"norm.weight": 3}, "weight_map"),
    ):
        shards.write_text(json.dumps({"weight_map": wrong}))
        refused(shards, word)
    shards.write_text(json.dumps(index))
    (shards.parent / "model-1.safetensors").write_bytes(b"")
    refused(shards, "model-1")
