"""Every kind of backbone goes through pretraining and finetuning by its name alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from flows import params, paths
from flows.classifiers import load_classifier
from flows.stage import Stage
from flows.stages import finetune, pretrain

TRAINING = {"steps": 2, "warmup_steps": 1, "log_every": 1, "validate_every": 2, "checkpoint_every": 2}


@pytest.mark.parametrize(("name", "window"), [("swin_v1_pico", 2), ("vit_pico", 4), ("deit_pico", None)])
def test_pretrained_and_finetuned(enter: Callable[..., Path], name: str, window: int | None) -> None:
    change: dict[str, Any] = {
        "model": {"backbone": name, "window_size": window},
        "pretrain": {"training": TRAINING},
        "finetune": {"training": TRAINING},
    }
    enter(change)
    checked = params.load()
    pretrain.run(checked, Stage("pretrain"))
    finetune.run(checked, Stage("finetune", "pretrained"))

    pretrained = load_file(paths.PRETRAIN / "model.safetensors")
    model, config = load_classifier(paths.FINETUNE / "pretrained")
    assert config.backbone["name"] == name
    assert all(value.isfinite().all() for value in model.state_dict().values())
    with torch.no_grad():
        assert model(torch.randn(2, 3, 16, 16)).std() > 0
    shared = "backbone.rel_pos_bias.relative_position_bias_table"
    assert (shared in pretrained) == name.startswith("vit")
    # Two small steps away from where pretraining ended, not from fresh weights.
    stem = "backbone.patch_embed.proj.weight"
    assert (model.state_dict()[stem] - pretrained[stem]).abs().max() < 0.02
