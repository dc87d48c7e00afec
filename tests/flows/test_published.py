"""Pretraining that begins with weights of others, or with those of an earlier run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import models
from flows import files, params, pretexts
from flows.errors import DataError
from flows.imaging import Preprocessing
from flows.params import Params
from flows.published import load_published
from flows.training import Processes
from models.classification import Classifier

ROOT = Path(__file__).resolve().parents[2]


def of(pretext: str, **model: Any) -> Params:
    values = params.read(ROOT / "params.yaml")
    change = {
        "model": {"image_size": 16, "window_size": 4, **model},
        "pretrain": {"pretext": pretext, "training": {"batch_size": 32, "accumulation": 1}},
    }
    return params.check(params.overlay(values, change, "test"), "test")


def create(checked: Params) -> pretexts.Pretext:
    side = checked.model.image_size
    flat = Preprocessing(side, side, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
    return pretexts.create(checked, flat, Processes(0, 1, torch.device("cpu")))


def backbone_of(pretext: pretexts.Pretext) -> dict[str, torch.Tensor]:
    state = pretext.model.state_dict()
    return {n.removeprefix("backbone."): v for n, v in state.items() if n.startswith("backbone.")}


def save_official(path: Path, pretext: pretexts.Pretext) -> None:
    """In the layout of the SimMIM release."""
    state = {f"encoder.{name}": value for name, value in backbone_of(pretext).items()}
    own = pretext.model.state_dict()
    state |= {"encoder.mask_token": own["mask_token"], "decoder.0.weight": own["decoder.0.weight"]}
    torch.save({"model": {**state, "decoder.0.bias": own["decoder.0.bias"]}}, path)


def test_simmim_goes_on_from_the_release_and_says_what_it_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = create(of("simmim")), create(of("simmim"))
    save_official(tmp_path / "release.pth", first)
    second.initialize_from(tmp_path / "release.pth")
    for name, value in first.model.state_dict().items():
        assert torch.equal(second.model.state_dict()[name], value), name
    assert "official layout, of SimMIM's pretraining" in capsys.readouterr().out


def test_moby_starts_both_networks_from_a_published_backbone_and_its_heads_afresh(tmp_path: Path) -> None:
    first, second = create(of("simmim")), create(of("moby"))
    save_official(tmp_path / "release.pth", first)
    heads = second.model.projector.linear_out.weight.clone()
    second.initialize_from(tmp_path / "release.pth")
    for name, value in backbone_of(first).items():
        assert torch.equal(second.model.state_dict()[f"backbone.{name}"], value), name
        assert torch.equal(second.model.state_dict()[f"target_backbone.{name}"], value), name
    assert torch.equal(second.model.projector.linear_out.weight, heads)


def test_moby_begins_anew_with_what_an_earlier_moby_learnt(tmp_path: Path) -> None:
    """The step is 0 and the target a copy of the online network; the rest is taken over."""
    first, second = create(of("moby")), create(of("moby"))
    with torch.no_grad():
        first.model.step.fill_(7)
        first.model.target_projector.linear_out.weight.add_(1.0)
    save_file({n: v.clone() for n, v in first.model.state_dict().items()}, tmp_path / "model.safetensors")
    second.initialize_from(tmp_path / "model.safetensors")
    parameters = {name for name, _ in first.model.named_parameters()}
    state = first.model.state_dict()
    for name, value in state.items():
        expected = torch.zeros_like(value) if name == "step" else value
        if name.startswith("target_") and name in parameters:
            expected = state[name.removeprefix("target_")]
        assert torch.equal(second.model.state_dict()[name], expected), name


def test_weights_for_other_windows_are_refused_with_what_to_change(tmp_path: Path) -> None:
    checked = of("simmim", image_size=32)
    first = create(of("simmim", image_size=32, window_size=8))
    save_file({n: v.clone() for n, v in first.model.state_dict().items()}, tmp_path / "model.safetensors")
    model = {"image_size": 32, "window_size": 8, "patch_size": checked.model.patch_size}
    files.write_json(tmp_path / "config.json", {"backbone": model})
    with pytest.raises(DataError, match=r"`pretrain\.initialize_from`.*windows.*`model` in params\.yaml"):
        create(checked).initialize_from(tmp_path / "model.safetensors")


def test_what_has_no_single_fingerprint_or_is_of_another_network_is_refused(tmp_path: Path) -> None:
    pretext = create(of("simmim"))
    with pytest.raises(DataError, match="trunkline convert"):
        load_published(tmp_path, pretext.model, "key")
    other = Classifier(models.create("swin_v1_pico", image_size=16, window_size=4), 3)
    save_file(other.state_dict(), tmp_path / "model.safetensors")
    with pytest.raises(DataError, match=r"`key`.*left over.*missing"):
        load_published(tmp_path / "model.safetensors", pretext.model, "key")
