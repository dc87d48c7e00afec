"""Pretext `none`: random or given weights reach finetuning untouched, and what does not fit is named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import models
from flows import files, params, paths
from flows.errors import DataError
from flows.stage import Stage
from flows.stages import finetune, pretrain
from models.classification import Classifier
from models.pretext.simmim import SimMIM


def pretrained(enter: Any, name: str = "", **model: Any) -> dict[str, torch.Tensor]:
    """Run the stage; the weights it wrote."""
    settings = {"pretext": "none", "initialize_from": name}
    enter({"pretrain": settings, "model": model}, Path(name).stem or "random")
    pretrain.run(params.load(), Stage("pretrain"))
    return load_file(paths.PRETRAIN / "model.safetensors")


def test_random_weights_are_those_of_the_seed_and_are_finetuned(enter: Any) -> None:
    weights = pretrained(enter)
    torch.manual_seed(0)
    expected = models.create("swin_v2_pico", image_size=16, patch_size=4, window_size=4).state_dict()
    assert weights.keys() == {f"backbone.{name}" for name in expected}
    assert all(torch.equal(weights[f"backbone.{name}"], value) for name, value in expected.items())
    told = files.read_json(paths.METRICS / "pretrain.json")
    assert (told["steps"], told["initialized_from"]) == (0, "")
    started = finetune.build_model(params.load(), 10)
    finetune.load_backbone(started, paths.PRETRAIN / "model.safetensors")
    assert all(torch.equal(started.state_dict()[name], value) for name, value in weights.items())


@pytest.mark.parametrize("name", ["swin_v2_pico", "vit_pico"])
def test_given_weights_arrive_without_head_and_decoder(enter: Any, tmp_path: Path, name: str) -> None:
    donor = models.create(name, image_size=16, patch_size=4, window_size=4, pretraining=True)
    source = tmp_path / "simmim.safetensors"
    save_file(SimMIM(donor, 8).state_dict(), source)
    weights = pretrained(enter, str(source), backbone=name)
    assert all(key.startswith("backbone.") for key in weights)
    shared = [key for key in donor.state_dict() if "norm" not in key and f"backbone.{key}" in weights]
    assert len(shared) > 10
    assert all(torch.equal(weights[f"backbone.{key}"], donor.state_dict()[key]) for key in shared)

    classifier = Classifier(models.create(name, image_size=16, patch_size=4, window_size=4), 7)
    source = tmp_path / "classifier.safetensors"
    save_file(classifier.state_dict(), source)
    weights = pretrained(enter, str(source), backbone=name)
    own = {key: value for key, value in classifier.state_dict().items() if key.startswith("backbone.")}
    assert weights.keys() == own.keys()
    assert all(torch.equal(weights[key], value) for key, value in own.items())


def test_weights_of_another_network_are_refused_and_nothing_is_written(enter: Any, tmp_path: Path) -> None:
    donor = models.create("swin_v2_nano", image_size=16, patch_size=4, window_size=4)
    save_file(Classifier(donor, 3).state_dict(), tmp_path / "nano.safetensors")
    with pytest.raises(DataError, match=r"`pretrain.initialize_from`: .*nano.safetensors"):
        pretrained(enter, str(tmp_path / "nano.safetensors"))
    assert not paths.PRETRAIN.exists()
