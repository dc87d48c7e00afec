"""MoBY and the probes through their stages: the same after an interruption and on other numbers of processes,
and what is learnt is worth something."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import training_workspace as workspaces
from forked import in_processes
from safetensors.torch import load_file

import models
from flows import files, params, paths
from flows.classifiers import load_classifier
from flows.errors import ConfigError, Interrupted
from flows.stage import Stage
from flows.stages import evaluate, finetune, pretrain
from flows.training import initialize_processes
from models.batch_norm import SyncBatchNorm1d
from models.pretext.moby import gather

TRAINING = {
    "steps": 5,
    "batch_size": 16,
    "warmup_steps": 2,
    "log_every": 1,
    "validate_every": 5,
    "checkpoint_every": 3,
}
MOBY = {"queue_size": 64, "hidden_dim": 32, "key_dim": 16, "source_size": 16, "drop_path": 0.0}


def moby(**training: Any) -> dict[str, Any]:
    training = {**TRAINING, **training}
    settings = {"pretext": "moby", "moby": MOBY, "picture_images": 2, "training": training}
    return {"pretrain": settings, "knn": {"images": 100}}


def pretrain_for(folder: Path, steps: int) -> str:
    """Pretrain in `folder`, asked to stop after so many steps."""
    os.chdir(folder)
    os.environ |= workspaces.environment(folder)
    stage = Stage("pretrain")
    asked = iter(range(1, 1000))
    stage.stop_requested = lambda: next(asked) > steps  # type: ignore[method-assign]
    try:
        pretrain.run(params.load(), stage)
    except Interrupted as interrupted:
        return str(interrupted)
    return "done"


def saved(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / paths.PRETRAIN / "model.safetensors")


def losses(folder: Path) -> list[float]:
    return [loss for _, loss, *_ in workspaces.curves(folder)["curves"]]


@pytest.mark.parametrize(("stage", "precision"), [(1, "fp32"), (2, "bf16")])
def test_moby_goes_on_bit_for_bit(enter: Any, stage: int, precision: str) -> None:
    """Target, queues and momentum included: none of them is trained, all of them are state."""
    change = moby(zero_stage=stage, precision=precision)
    if precision == "bf16":
        change["pretrain"]["training"]["batch_size"] = 8  # the processor has no bf16
    else:
        change["pretrain"]["moby"] = {**MOBY, "drop_path": 0.2}
    whole, parts = enter(change, "whole"), enter(change, "parts")
    assert pretrain_for(whole, 100) == "done"
    assert "stopped at step 3 of 5" in pretrain_for(parts, 2)
    assert pretrain_for(parts, 100) == "done"
    assert workspaces.weights(parts) == workspaces.weights(whole)
    assert workspaces.curves(parts) == workspaces.curves(whole)
    weights = saved(whole)
    assert int(weights["step"]) == 5
    assert weights["queue_1"].shape == (16, 64)
    assert not torch.equal(weights["backbone.norm.weight"], weights["target_backbone.norm.weight"])
    config = files.read_json(whole / paths.PRETRAIN / "config.json")
    assert (config["task"], config["queue_size"]) == ("moby", 64)
    assert 0.1 < files.read_json(whole / paths.METRICS / "pretrain.json")["knn_top1"] <= 1


def test_moby_on_two_processes_and_then_on_one_loses_like_on_one(enter: Any) -> None:
    """Views, batch norm and queues are those of the step, however it is divided; the target is state."""
    change = moby(zero_stage=1)
    whole, folder = enter(change, "whole"), enter(change, "elastic")
    assert pretrain_for(whole, 100) == "done"
    for answer in in_processes(2, pretrain_for, folder, 2):
        assert "stopped at step 3 of 5" in str(answer), answer
    assert pretrain_for(folder, 100) == "done"
    assert losses(folder) == pytest.approx(losses(whole), rel=1e-4)
    left, right = saved(folder), saved(whole)
    for name in (
        "queue_1",
        "queue_2",
        "projector.linear_hidden.2.running_var",
        "target_backbone.norm.weight",
    ):
        torch.testing.assert_close(left[name], right[name], atol=2e-3, rtol=2e-3)
    metrics = [files.read_json(run / paths.METRICS / "pretrain.json") for run in (folder, whole)]
    assert metrics[0]["val_loss"] == pytest.approx(metrics[1]["val_loss"], rel=1e-3)
    assert metrics[0]["knn_top1"] == pytest.approx(metrics[1]["knn_top1"], abs=0.01)


def normalize_half(raw: dict[str, Any]) -> dict[str, torch.Tensor]:
    """This process's half of a batch through batch norm, and all keys, in the order of processes."""
    checked = params.check(raw, "test")
    processes = initialize_processes(checked.pretrain.training, checked.distributed)
    x, weights = (values.chunk(processes.world_size)[processes.rank] for values in batch())
    x = x.clone().requires_grad_()
    norm = SyncBatchNorm1d(5)
    y = norm(x)
    (y * weights).sum().backward()
    assert norm.weight.grad is not None
    parts = {"y": y.detach(), "dx": x.grad}
    whole = {"running_mean": norm.running_mean, "running_var": norm.running_var, "keys": gather(x.detach())}
    return {**parts, **whole, "dweight": norm.weight.grad}


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return 100 + 3 * torch.randn(12, 5, generator=generator), torch.randn(12, 5, generator=generator)


def test_batch_norm_of_two_processes_is_that_of_the_whole_batch(raw_params: dict[str, Any]) -> None:
    first, second = in_processes(2, normalize_half, raw_params)
    x, weights = batch()
    x.requires_grad_()
    norm = torch.nn.BatchNorm1d(5)
    y = norm(x)
    (y * weights).sum().backward()
    assert norm.weight.grad is not None
    torch.testing.assert_close(torch.cat([first["y"], second["y"]]), y.detach(), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(torch.cat([first["dx"], second["dx"]]), x.grad, atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(first["dweight"] + second["dweight"], norm.weight.grad, atol=1e-4, rtol=1e-3)
    for half in (first, second):
        torch.testing.assert_close(half["keys"], x.detach(), atol=0, rtol=0)
        for name in ("running_mean", "running_var"):
            torch.testing.assert_close(half[name], getattr(norm, name), atol=1e-4, rtol=1e-4)


def test_moby_learns_to_tell_images_apart_and_a_probe_reads_the_frozen_backbone(enter: Any) -> None:
    """Far below the cost of guessing; and the probe changes nothing but its head."""
    schedule = {"steps": 50, "batch_size": 32, "warmup_steps": 5, "lr": 5e-3}
    easy = {"crop_scale": [0.5, 1.0], "jitter": 0.0, "grey": 0.0, "blur": [0.0, 0.0], "solarize": [0.0, 0.0]}
    change = moby(**schedule, log_every=25, validate_every=50, checkpoint_every=50)
    change["pretrain"]["moby"] = {**MOBY, "momentum": 0.9, "views": easy}
    probe = {
        "task": "linear_probe",
        "linear_probe": {"lr_factors": [1e-6, 1.0]},
        "training": {
            **TRAINING,
            "steps": 40,
            "log_every": 20,
            "validate_every": 40,
            "optimizer": "sgd",
            "zero_stage": 0,
            "lr": 0.5,
            "weight_decay": 0.0,
        },
        "mixup": 0.0,
    }
    enter({**change, "finetune": probe})
    checked = params.load()
    pretrain.run(checked, Stage("pretrain"))
    found = files.read_json(paths.METRICS / "pretrain.json")
    chance = 2 * math.log(MOBY["queue_size"] + 1)  # type: ignore[operator]
    assert found["val_loss"] < 0.9 * chance

    finetune.run(checked, Stage("finetune", "pretrained"))
    model, _ = load_classifier(paths.FINETUNE / "pretrained")
    weights = saved(Path.cwd())
    for name, value in model.backbone.state_dict().items():  # type: ignore[attr-defined]
        assert torch.equal(value, weights[f"backbone.{name}"]), name
    metrics = files.read_json(paths.METRICS / "finetune-pretrained.json")
    assert metrics["lr"] == 0.5, "the head that learnt"
    assert metrics["val_top1"] > 0.5
    evaluate.run(checked, Stage("evaluate", "pretrained"))
    evaluated = files.read_json(paths.METRICS / "evaluate-pretrained.json")
    assert evaluated["top1"] > 0.5
    assert evaluated["knn_top1"] > 0.4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pretext": "moby", "moby": {"queue_size": 100}}, "queue_size 100 must be a multiple of"),
        ({"pretext": "moby", "training": {"zero_stage": 3}}, "moby needs training.zero_stage 0 to 2"),
        ({"training": {"optimizer": "sgd"}}, "optimizer sgd needs zero_stage 0"),
    ],
)
def test_what_does_not_fit_is_refused(raw_params: dict[str, Any], change: Any, message: str) -> None:
    values = params.overlay(raw_params, {"pretrain": change}, "test")
    with pytest.raises(ConfigError, match=message):
        params.check(values, "test")


@pytest.mark.parametrize("pretext", ["none", "simmim"])
def test_a_released_vit_is_where_training_starts(
    enter: Any, capsys: pytest.CaptureFixture[str], pretext: str
) -> None:
    """`none` brings it into the form for finetuning and trains nothing."""
    folder = enter(
        {
            "model": {"backbone": "vit_pico"},
            "pretrain": {"pretext": pretext, "initialize_from": "released.pth", "training": TRAINING},
        },
        f"released-{pretext}",
    )
    size = params.load().model
    released = models.create("vit_pico", image_size=16, patch_size=size.patch_size, pretraining=True)
    weights = {f"encoder.{name}": value for name, value in released.state_dict().items()}
    torch.save({"model": weights}, folder / "released.pth")
    pretrain_for(folder, 1)
    said = capsys.readouterr().out
    assert "official layout" in said
    assert f"loaded   {len(weights) + (3 if pretext == 'none' else 0)} tensors" in said
    if pretext == "none":
        for block in range(6):
            table = saved(folder)[f"backbone.blocks.{block}.attn.relative_position_bias_table"]
            assert torch.equal(table, released.rel_pos_bias.relative_position_bias_table)
