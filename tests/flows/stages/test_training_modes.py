"""Training in every mode gives what it should: the same losses where the mathematics is the same, and it
learns."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import training_workspace as workspaces
from forked import in_processes
from safetensors.torch import load_file

import models
from flows import files, params, paths, pretexts
from flows.classifiers import load_config
from flows.data import ImageDataset, even_eval_batches, load_manifest, preprocessing_for, to_model_input
from flows.errors import DataError, Interrupted
from flows.stage import Stage
from flows.stages import finetune, pretrain
from flows.training import Processes
from models.classification import Classifier
from models.pretext.masks import masks_from_ids, upsample_masks
from models.pretext.simmim import SimMIM

SHORT = {
    "steps": 6,
    "warmup_steps": 2,
    "log_every": 1,
    "validate_every": 3,
    "checkpoint_every": 3,
    "clip_grad": 0.5,
}
PLAIN = {"mixup": 0.0, "cutmix": 0.0, "label_smoothing": 0.0, "drop_path": 0.0}


def pretrained(enter: Any, name: str = "pretrain", **change: Any) -> Path:
    """A workspace in which `pretrain` has run for a few steps with these settings of its `training`."""
    folder: Path = enter({"pretrain": {"training": {**SHORT, **change}}}, name)
    pretrain.run(params.load(), Stage("pretrain"))
    return folder


def finetuned(enter: Any, name: str = "finetune", **change: Any) -> Path:
    """A workspace in which the control has been trained without anything random but the crops."""
    folder: Path = enter({"finetune": {**PLAIN, "training": {**SHORT, **change}}}, name)
    finetune.run(params.load(), Stage("finetune", "scratch"))
    return folder


def losses(workspace: Path, folder: str = "pretrain") -> list[float]:
    return [loss for _, loss, *_ in workspaces.curves(workspace, folder)["curves"]]


def val_losses(workspace: Path, folder: str = "pretrain") -> list[float]:
    return [loss for _, loss in workspaces.curves(workspace, folder)["validation"]]


def pretext_of(checked: params.Params) -> pretexts.Pretext:
    preprocessing = preprocessing_for(load_manifest(paths.DATA), checked.model)
    return pretexts.create(checked, preprocessing, Processes(0, 1, torch.device("cpu")))


def assert_weights_load(workspace: Path, config: dict[str, Any]) -> None:
    weights = load_file(workspace / paths.PRETRAIN / "model.safetensors")
    model = pretext_of(params.check(config, "test")).model
    model.load_state_dict(weights)  # strict: exactly the model's tensors
    assert all(tensor.dtype == torch.float32 and tensor.isfinite().all() for tensor in weights.values())


# ---- modes ----


@pytest.mark.parametrize(
    ("precision", "stages", "steps", "tolerance"),
    [
        ("fp32", (1, 2, 3), 6, 1e-5),
        ("bf16", (0, 1, 3), 3, 0.03),
    ],  # the processor has no bf16: every step is slow
)
def test_every_zero_stage_trains_alike(
    enter: Any, precision: str, stages: tuple[int, ...], steps: int, tolerance: float
) -> None:
    """On one process ZeRO partitions nothing, so that the losses are those of plain torch, up to rounding.

    AdamW turns the rounding of a gradient near zero into a whole step, so later losses drift apart as far as
    the processor's kernels decide (7e-5 after five steps with AVX-512, less than 1e-5 with AVX2).
    """
    reference = pretrained(enter, "reference", zero_stage=0, precision="fp32", steps=steps)
    assert losses(reference)[-1] < losses(reference)[0]
    for stage in stages:
        folder = pretrained(enter, f"zero-{stage}", zero_stage=stage, precision=precision, steps=steps)
        assert_weights_load(folder, params.read(folder / "params.yaml"))
        assert losses(folder)[:4] == pytest.approx(losses(reference)[:4], abs=tolerance)
        assert losses(folder) == pytest.approx(losses(reference), abs=max(tolerance, 5e-4))


def test_activation_checkpointing_changes_nothing(enter: Any) -> None:
    plain = pretrained(enter, "plain")
    checkpointed = pretrained(enter, "checkpointed", activation_checkpointing=True)
    assert losses(checkpointed) == pytest.approx(losses(plain), abs=1e-6)
    left, right = (
        load_file(folder / paths.PRETRAIN / "model.safetensors") for folder in (plain, checkpointed)
    )
    for name in left:
        torch.testing.assert_close(left[name], right[name], atol=1e-5, rtol=1e-4)


def test_accumulation_and_a_second_process_change_nothing(enter: Any) -> None:
    """The same images in the same steps, however they are divided; drop path, mixing and masks would be
    drawn anew."""
    whole = finetuned(enter, "whole")
    halves = finetuned(enter, "halves", accumulation=2)
    folder = enter({"finetune": {**PLAIN, "training": {**SHORT, "processes": 2}}}, "pair")
    attempt = workspaces.Attempt(folder, "finetune", "--cell", "scratch")
    assert attempt.wait() == 0, attempt.output
    for other in (halves, folder):
        assert losses(other, "finetune/scratch") == pytest.approx(losses(whole, "finetune/scratch"), abs=1e-4)
        assert val_losses(other, "finetune/scratch") == pytest.approx(
            val_losses(whole, "finetune/scratch"), abs=1e-4
        )
        norms = [
            [norm for *_, norm in workspaces.curves(run, "finetune/scratch")["curves"]]
            for run in (whole, other)
        ]
        assert norms[1] == pytest.approx(norms[0], rel=1e-2)


def test_pretraining_on_two_then_one_then_two_processes_loses_like_on_one(enter: Any) -> None:
    """Images, crops and masks are those of the step, however it is divided."""
    training = {**SHORT, "steps": 12, "zero_stage": 2, "checkpoint_every": 6}
    whole = pretrained(enter, "whole", **training)
    folder = enter({"pretrain": {"training": training}}, "elastic")
    for count, steps in ((2, 4), (1, 4)):
        for answer in in_processes(count, pretrain_for, folder, steps):
            assert "the same command continues there" in str(answer), answer
    assert in_processes(2, pretrain_for, folder, 12) == ["done", "done"]
    assert losses(folder) == pytest.approx(losses(whole), rel=1e-4)
    assert val_losses(folder) == pytest.approx(val_losses(whole), rel=1e-4)
    assert list((folder / "scratch" / "pretrain").iterdir()) == []


def pretrain_for(folder: Path, steps: int) -> str:
    """A process that pretrains in `folder` and is asked to stop after so many steps."""
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


def test_the_control_counts_its_parameters_also_when_they_are_partitioned(enter: Any) -> None:

    folder = finetuned(enter, zero_stage=3)
    counted = files.read_json(folder / paths.METRICS / "finetune-scratch.json")["parameters"]
    weights = load_file(folder / paths.FINETUNE / "scratch" / "model.safetensors")
    assert counted == sum(tensor.numel() for tensor in weights.values())


def test_a_run_killed_after_its_last_checkpoint_only_writes_its_outputs(
    enter: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = pretrained(enter, "whole")
    folder = enter({"pretrain": {"training": SHORT}}, "killed")
    with monkeypatch.context() as patch:
        patch.setattr(pretrain, "write_outputs", lambda *arguments: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            pretrain.run(params.load(), Stage("pretrain"))
    pretrain.run(params.load(), Stage("pretrain"))
    assert workspaces.weights(folder) == workspaces.weights(whole)
    assert workspaces.curves(folder) == workspaces.curves(whole)


# ---- learning ----


def test_pretraining_beats_constant_predictions_and_finetuning_beats_chance(enter: Any) -> None:
    schedule = {
        "steps": 100,
        "batch_size": 64,
        "warmup_steps": 10,
        "validate_every": 100,
        "checkpoint_every": 100,
    }
    training = {**schedule, "log_every": 50, "lr": 3e-3}
    enter(
        {
            "pretrain": {"mask_unit": 4, "training": training},
            "finetune": {"training": {**training, "steps": 50}},
        }
    )
    checked = params.load()
    pretrain.run(checked, Stage("pretrain"))
    learnt = val_losses(Path.cwd())[-1]
    images, masks = validation(checked)
    hidden = upsample_masks(masks, checked.pretrain.mask_unit)[:, None].expand_as(images)
    for constant in (torch.zeros(1), images[hidden].median()):  # the latter is the best of all
        assert learnt < 0.6 * float((images - constant)[hidden].abs().mean())
    mean_image = images.mean(
        0, keepdim=True
    )  # the digits lie in the same place, so that this is a strong guess
    assert learnt < 0.93 * float((images - mean_image)[hidden].abs().mean())

    finetune.run(checked, Stage("finetune", "pretrained"))
    start = load_config(paths.FINETUNE / "pretrained").start_sha256
    assert start == files.sha256_file(paths.PRETRAIN / "model.safetensors"), "a link of the chain of custody"
    chance = 0.1
    assert metric("finetune-pretrained", "val_top1") > 4 * chance


def validation(checked: params.Params) -> tuple[torch.Tensor, torch.Tensor]:
    """All validation images, normalised, and their masks: (N, 3, S, S) and (N, S/u, S/u)."""
    dataset, preprocessing = opened(checked)
    ((batch, _),) = even_eval_batches(dataset, preprocessing, len(dataset), 0, 1)
    masks = masks_from_ids(
        batch.rows, checked.model.image_size // checked.pretrain.mask_unit, checked.pretrain.mask_ratio
    )
    return to_model_input(batch.images, preprocessing.mean, preprocessing.std), masks


def opened(checked: params.Params) -> tuple[ImageDataset, Any]:
    dataset = ImageDataset(paths.DATA, "val", cache_mb=8, max_pixels=10_000)
    return dataset, preprocessing_for(load_manifest(paths.DATA), checked.model)


def metric(stage: str, name: str) -> float:

    return float(files.read_json(paths.METRICS / f"{stage}.json")[name])


def test_the_validation_loss_is_that_of_a_plain_loop_whatever_the_batch(enter: Any) -> None:
    """Error summed over hidden pixels and divided by their number, image by image, from the weights that
    were written."""
    recorded = []
    for batch_size in (32, 14):  # neither divides the 270 validation images
        folder = enter(
            {"pretrain": {"training": {**SHORT, "batch_size": batch_size, "steps": 3}}}, str(batch_size)
        )
        checked = params.load()
        pretrain.run(checked, Stage("pretrain"))
        model = pretext_of(checked).model.eval()
        model.load_state_dict(load_file(folder / paths.PRETRAIN / "model.safetensors"))
        images, masks = validation(checked)
        assert plain_loss(model, images, masks) == pytest.approx(val_losses(folder)[-1], rel=1e-5)
        recorded.append(val_losses(folder)[-1])
    assert recorded[0] != recorded[1], "they were trained differently"


@torch.no_grad()
def plain_loss(model: SimMIM, images: torch.Tensor, masks: torch.Tensor) -> float:
    error, pixels = 0.0, 0
    for image, mask in zip(images, masks, strict=True):
        prediction = model(image[None], mask[None]).prediction[0].double()
        unit = model.mask_unit
        for row, column in mask.nonzero().tolist():
            square = (
                slice(None),
                slice(row * unit, (row + 1) * unit),
                slice(column * unit, (column + 1) * unit),
            )
            error += float((prediction[square] - image[square]).abs().mean(0).sum())
            pixels += unit * unit
    return error / pixels


# ---- groups and hand-over ----


@pytest.mark.parametrize("cell", ["pretrained", "scratch"])
def test_layers_learn_at_the_rates_of_the_specification(
    enter: Any, cell: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Decay^(total + 1 - id): stem 0, block k is k + 1, merging with the last block of its stage, norm and
    head on top."""
    enter({"finetune": {"layer_decay": 0.5, "training": SHORT}})
    checked = params.load()
    model = finetune.build_model(checked, 10)
    paths.PRETRAIN.mkdir(parents=True)
    from safetensors.torch import save_file

    save_file(model.state_dict(), paths.PRETRAIN / "model.safetensors")
    jobs: list[Any] = []

    def intercept(job: Any, *rest: Any) -> None:
        jobs.append(job)
        raise InterruptedError

    monkeypatch.setattr(finetune, "train", intercept)
    with pytest.raises(InterruptedError):
        finetune.run(checked, Stage("finetune", cell))
    factor = {name: group.lr_scale for group in jobs[0].groups for name in group.names}
    assert factor.keys() == {name for name, _ in model.named_parameters()}
    if cell == "scratch":
        assert set(factor.values()) == {1.0}
        return
    depths = models.BACKBONES[checked.model.backbone].depths
    total = sum(depths)
    for name, found in factor.items():
        parts = name.split(".")
        if parts[1] == "patch_embed":
            layer = 0
        elif parts[1] == "layers" and parts[3] == "blocks":
            layer = sum(depths[: int(parts[2])]) + int(parts[4]) + 1
        elif parts[1] == "layers":
            layer = sum(depths[: int(parts[2]) + 1])
        else:
            layer = total + 1
        assert found == pytest.approx(0.5 ** (total + 1 - layer)), name
    decayed = {name for group in jobs[0].groups if group.weight_decay for name in group.names}
    vectors = {name for name, parameter in model.named_parameters() if parameter.ndim <= 1}
    assert decayed
    assert not decayed & vectors
    assert not any(word in name for name in decayed for word in ("cpb_mlp", "logit_scale", "norm"))


@pytest.mark.parametrize("fault", ["missing", "extra", "misshaped"])
def test_a_backbone_that_does_not_fit_is_refused_by_name(tmp_path: Path, fault: str) -> None:
    from safetensors.torch import save_file

    def small() -> Classifier:
        backbone = models.create("swin_v2_pico", image_size=16, patch_size=4, window_size=4)
        return Classifier(backbone, 3)

    torch.manual_seed(1)
    donor, name = small(), "backbone.norm.weight"
    state = {key: value.clone() for key, value in donor.state_dict().items() if key != "head.weight"}
    save_file(state, tmp_path / "fits.safetensors")
    taker = small()
    finetune.load_backbone(taker, tmp_path / "fits.safetensors")
    assert all(
        torch.equal(value, donor.state_dict()[key])
        for key, value in taker.state_dict().items()
        if key != "head.weight"
    )
    if fault == "missing":
        del state[name]
    elif fault == "extra":
        name = "backbone.extra.weight"
        state[name] = torch.zeros(3)
    else:
        state[name] = torch.zeros(3)
    save_file(state, tmp_path / "wrong.safetensors")
    with pytest.raises(DataError, match=rf"wrong.safetensors does not fit .*: {name}$"):
        finetune.load_backbone(small(), tmp_path / "wrong.safetensors")


@pytest.mark.parametrize("name", ["swin_v2_pico", "swin_v1_pico", "vit_pico", "deit_pico"])
def test_weights_of_one_size_start_another(tmp_path: Path, raw_params: dict[str, Any], name: str) -> None:
    """Pretrained at 16 pixels and windows of 2, finetuned at 32 and 4: all weights arrive, tables resized,
    and Swin V2 is told the windows it comes from."""
    from safetensors.torch import save_file

    from models.pretext.simmim import SimMIM

    raw_params["model"].update(backbone=name, image_size=16, window_size=2)
    raw_params["finetune"].update(image_size=32, window_size=4)
    checked = params.check(raw_params, "test")
    donor = models.create(name, image_size=16, patch_size=4, window_size=2, pretraining=True)
    torch.manual_seed(3)
    for parameter in donor.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    save_file(SimMIM(donor, 8).state_dict(), tmp_path / "pretrained.safetensors")

    taker = finetune.build_model(checked, 10)
    assert taker.backbone.image_size == 32
    before = {key: value.clone() for key, value in taker.state_dict().items()}
    finetune.load_backbone(taker, tmp_path / "pretrained.safetensors")
    unchanged = {key for key, value in taker.state_dict().items() if torch.equal(value, before[key])}
    fresh = {"head.weight", "head.bias"} | (
        {"backbone.fc_norm.weight", "backbone.fc_norm.bias"} & set(before)
    )
    assert unchanged == fresh
    assert torch.isfinite(taker(torch.randn(2, 3, 32, 32))).all()
    arguments = finetune.backbone_arguments(checked, pretrained=True)
    if name == "swin_v2_pico":
        assert arguments["pretrained_windows"] == [2, 2]
        assert taker.backbone.layers[0].windows.pretrained_window == 2
    else:
        assert "pretrained_windows" not in arguments
    assert "pretrained_windows" not in finetune.backbone_arguments(checked, pretrained=False)
