"""Folders of finetuned classifiers: what is saved is what comes back, and damage has a name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from flows.classifiers import CONFIG, WEIGHTS, load_classifier, save_classifier
from flows.errors import DataError

FOLDER = Path("artifacts/finetune/pretrained")


def test_a_classifier_comes_back_bit_for_bit(workspace: Path, tmp_path: Path) -> None:
    model, config = load_classifier(FOLDER)
    save_classifier(tmp_path / "copy", model.double(), config)  # stored in float32 whatever the model has now
    again, config_again = load_classifier(tmp_path / "copy")

    assert config_again == config
    assert not again.training
    expected = load_classifier(FOLDER)[0].state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in again.state_dict().items())
    assert {value.dtype for value in load_file(tmp_path / "copy" / WEIGHTS).values()} == {torch.float32}


def test_saving_replaces_the_folder(workspace: Path) -> None:
    model, config = load_classifier(FOLDER)
    (FOLDER / "left over").write_text("")
    save_classifier(FOLDER, model, config)
    assert sorted(path.name for path in FOLDER.iterdir()) == [CONFIG, WEIGHTS]


def test_missing_files_are_named(workspace: Path) -> None:
    (FOLDER / WEIGHTS).unlink()
    with pytest.raises(DataError, match=r"model\.safetensors does not exist; run the finetune stage"):
        load_classifier(FOLDER)
    with pytest.raises(DataError, match=r"config\.json does not exist"):
        load_classifier(FOLDER / "nowhere")


def test_damaged_weights_are_refused(workspace: Path) -> None:
    data = (FOLDER / WEIGHTS).read_bytes()
    (FOLDER / WEIGHTS).write_bytes(data[: len(data) // 2])
    with pytest.raises(DataError, match="is damaged"):
        load_classifier(FOLDER)


def test_weights_of_another_network_are_refused(workspace: Path) -> None:
    weights = load_file(FOLDER / WEIGHTS)
    weights["head.weight"] = weights["head.weight"][:3].contiguous()
    save_file(weights, FOLDER / WEIGHTS)
    with pytest.raises(DataError, match=r"does not fit its config\.json.*head\.weight"):
        load_classifier(FOLDER)


@pytest.mark.parametrize("change", [{"task": "detection"}, {"classes": None}, {"preprocessing": {"mean": 1}}])
def test_another_configuration_is_refused(workspace: Path, change: dict[str, object]) -> None:
    config = json.loads((FOLDER / CONFIG).read_text())
    (FOLDER / CONFIG).write_text(json.dumps(config | change))
    with pytest.raises(DataError, match="does not describe a classifier"):
        load_classifier(FOLDER)
