"""Learn a backbone without labels: SimMIM (arXiv 2111.09886) on the training images, through DeepSpeed.

Files in: artifacts/data, artifacts/subsets. Files out: artifacts/pretrain (weights, config, curves,
pictures). The validation loss is the L1 error summed over all masked pixels of the validation split, divided
by their number, in eval mode, on centre crops, with masks seeded by the image: the same for every model (data
scaling study).
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file

import models
from flows import files, paths, plots
from flows.data import (
    Augmentation,
    Batch,
    ImageDataset,
    Manifest,
    even_eval_batches,
    load_manifest,
    load_subset,
    preprocessing_for,
    to_model_input,
    train_batches,
)
from flows.errors import ConfigError, DataError
from flows.imaging import Preprocessing
from flows.params import Params
from flows.stage import Stage, run_stage
from flows.training import (
    Checkpoints,
    Job,
    Result,
    fingerprint,
    group_parameters,
    initialize_processes,
    micro_batch_size,
    settings_that_name,
    train,
    watch_peers,
)
from flows.training.outputs import write_curves, write_weights
from models.parameter_groups import no_weight_decay
from models.pretext.masks import average_distance, masks_from_ids, upsample_masks
from models.pretext.simmim import SimMIM, normalize_targets

MASK_STREAM_BIT = 40
"""Masks are drawn by number: in the validation split that of the row, in training numbers above this bit."""
DISTANCE_MASKS = 64
"""Of the validation split, whose mean AvgDist is logged."""
SOURCES = [Path("flows/stages/pretrain.py"), Path("flows/training"), Path("flows/data"), Path("models")]


def run(params: Params, stage: Stage) -> None:
    settings, training = params.pretrain, params.pretrain.training
    processes = initialize_processes(training, params.distributed)
    manifest = load_manifest(paths.DATA)
    preprocessing = preprocessing_for(manifest, params.model)
    open_split = partial(
        ImageDataset, paths.DATA, cache_mb=params.loader.cache_mb, max_pixels=params.ingest.max_pixels
    )
    dataset = open_split("train", rows=load_subset(paths.SUBSETS, settings.subset))
    validation = open_split("val")
    probed = open_split("val", rows=range(min(training.batch_size, len(validation))))

    torch.manual_seed(params.seed)
    model = build_model(params)
    initial = Path(settings.initialize_from) if settings.initialize_from else None
    if initial is not None:
        load_weights(model, initial)

    augmentation = Augmentation(params.model.image_size, settings.crop_scale, flip=settings.flip)
    micro_batch = micro_batch_size(training, processes.world_size)

    def batches(step: int) -> Iterator[Batch]:
        return train_batches(
            dataset,
            augmentation,
            batch_size=micro_batch,
            global_batch=training.batch_size,
            seed=params.seed,
            start_step=step,
            steps=training.steps - step,
            rank=processes.rank,
            world_size=processes.world_size,
            accumulation=training.accumulation,
            workers=params.loader.workers,
        )

    def images_of(batch: Batch) -> torch.Tensor:
        return to_model_input(batch.images.to(processes.device), preprocessing.mean, preprocessing.std)

    def loss(engine: Any, batch: Batch) -> torch.Tensor:
        # by place in the sequence, so that a step hides the same on any number of processes
        ids = batch.positions + ((params.seed + 1) << MASK_STREAM_BIT)
        masks = draw_masks(ids, model, params)
        value: torch.Tensor = engine(images_of(batch), masks.to(processes.device)).loss
        return value

    def loss_on(images: ImageDataset, engine: Any) -> float:
        total = masked = 0.0
        for batch, weight in even_eval_batches(
            images, preprocessing, micro_batch, processes.rank, processes.world_size
        ):
            masks = draw_masks(batch.rows, model, params)
            output = engine(images_of(batch), masks.to(processes.device))
            total += weight * float(output.loss_sum)
            masked += weight * float(output.masked_pixels)
        total, masked = processes.sum([total, masked])
        return total / masked

    key = fingerprint(
        {
            "model": params.model.model_dump(),
            "pretrain": settings_that_name(settings),
            "seed": params.seed,
        },
        {
            "data": manifest.digest,
            "subsets": files.sha256_file(paths.SUBSETS / "subsets.json"),
            "initial": files.sha256_file(initial) if initial else "",
        },
        SOURCES,
    )
    checkpoints = Checkpoints(paths.scratch() / "pretrain" / key, processes)
    job = Job(
        name="pretrain",
        model=model,
        settings=training,
        seed=params.seed,
        groups=group_parameters(model, training.weight_decay, no_weight_decay),
        batches=batches,
        loss=loss,
        validate=lambda engine: {"val_loss": loss_on(validation, engine)},
        probe=partial(loss_on, probed),
        initialized_from=str(initial or ""),
        continue_from=Path(settings.continue_from) if settings.continue_from else None,
        on_log=stage.run.log_metrics,
        stop_requested=stage.stop_requested,
    )
    with (
        watch_peers(processes, params.distributed.peer_timeout_s, stage.abandon),
        checkpoints.hold(stage.stop_requested),
    ):
        result = train(job, processes, checkpoints)

        stage.device_hours = result.device_seconds / 3600
        if processes.is_main:
            trained = build_model(params)
            trained.load_state_dict(result.weights)
            write_outputs(params, stage, manifest, result, trained, validation, preprocessing)
        processes.barrier()
        checkpoints.prune()


def build_model(params: Params) -> SimMIM:
    """
    Raises:
        ConfigError: sizes in params.yaml do not fit one another.
    """
    try:
        backbone = models.create(
            params.model.backbone,
            image_size=params.model.image_size,
            patch_size=params.model.patch_size,
            window_size=params.model.window_size,
            drop_path=params.pretrain.drop_path,
            activation_checkpointing=params.pretrain.training.activation_checkpointing,
            pretraining=True,
        )
        choices = params.pretrain.simmim
        return SimMIM(
            backbone,
            params.pretrain.mask_unit,
            params.pretrain.normalize_target,
            head=choices.head,
            inverse_swin=choices.inverse_swin,
            window_size=params.model.window_size,
            target_size=choices.target_size,
            loss=choices.loss,
            loss_region=choices.loss_region,
            final_norm=choices.final_norm,
        )
    except ValueError as error:
        raise ConfigError(f"params.yaml: `model` and `pretrain`: {error}") from None


def draw_masks(ids: torch.Tensor, model: SimMIM, params: Params) -> torch.Tensor:
    """(B, g, g) bool, what is hidden of the images of these numbers (B,)."""
    return masks_from_ids(ids, model.mask_grid, params.pretrain.mask_ratio, params.pretrain.simmim.mask_kind)


def load_weights(model: SimMIM, path: Path) -> None:
    """
    Raises:
        DataError: no such file, or its tensors are not exactly those of the model.
    """
    try:
        model.load_state_dict(load_file(path))
    except (OSError, RuntimeError, SafetensorError) as error:
        raise DataError(f"`pretrain.initialize_from`: {' '.join(str(error).split())[:300]}") from None


def write_outputs(
    params: Params,
    stage: Stage,
    manifest: Manifest,
    result: Result,
    model: SimMIM,
    validation: ImageDataset,
    preprocessing: Preprocessing,
) -> None:
    config = {
        "task": "simmim",
        "backbone": {"name": params.model.backbone, **params.model.model_dump(exclude={"backbone"})},
        "mask_unit": params.pretrain.mask_unit,
        "mask_ratio": params.pretrain.mask_ratio,
        "normalize_target": params.pretrain.normalize_target,
        "simmim": params.pretrain.simmim.model_dump(),
        "preprocessing": preprocessing.to_dict(),
        "data_digest": manifest.digest,
    }
    with files.replace_folder(paths.PRETRAIN) as folder:
        write_weights(folder / "model.safetensors", result.weights)
        files.write_json(folder / "config.json", config)
        write_curves(folder, result)
        picture = draw_reconstructions(params, model, validation, preprocessing)
        (folder / "reconstructions.png").write_bytes(picture)
        history = plots.History.read(folder)
        (folder / "curves.png").write_bytes(plots.curves({"pretrain": history}))
    for name in ("reconstructions.png", "curves.png"):
        stage.run.log_artifact(paths.PRETRAIN / name)
    distance = mask_distance(params, model, validation)
    metrics = {
        "backbone": params.model.backbone,
        "parameters": sum(parameter.numel() for parameter in model.backbone.parameters()),
        "steps": params.pretrain.training.steps,
        "images_seen": params.pretrain.training.steps * params.pretrain.training.batch_size,
        "train_loss": result.curves[-1]["train_loss"],
        "val_loss": result.validation[-1]["val_loss"],
        "mask_distance": distance,
    }
    stage.run.log_metrics({"mask_distance": distance}, params.pretrain.training.steps)
    files.write_json(paths.METRICS / "pretrain.json", metrics)
    print(f"pretrain: validation loss {metrics['val_loss']:.4f} after {metrics['steps']} steps")


@torch.no_grad()
def draw_reconstructions(
    params: Params, model: SimMIM, validation: ImageDataset, preprocessing: Preprocessing
) -> bytes:
    """PNG: the first validation images, what the model saw of them, and its guess in the hidden squares."""
    count = min(params.pretrain.picture_images, len(validation))
    batch, _ = next(even_eval_batches(validation, preprocessing, count, 0, 1))
    images = to_model_input(batch.images, preprocessing.mean, preprocessing.std)
    masks = draw_masks(batch.rows, model, params)
    prediction = model.eval()(images, masks).prediction
    if model.normalize_target:  # back to pixels by the statistics that the target was normalised with
        plain = to_size(images, prediction.shape[-1])
        scaled = normalize_targets(plain, model.normalize_target)
        prediction = plain + (prediction - scaled) * _local_deviation(plain, scaled)
    prediction = to_size(prediction, images.shape[-1])
    hidden = upsample_masks(masks, model.mask_unit)[:, None]
    masked = torch.where(hidden, torch.zeros_like(images), images)
    filled = torch.where(hidden, prediction, images)
    return plots.reconstruction_grid(
        *(to_pixels(values, preprocessing) for values in (images, masked, filled))
    )


def to_size(images: torch.Tensor, side: int) -> torch.Tensor:
    """(B, 3, S, S) as squares of another side: means where it is smaller, repeated pixels where larger."""
    if side < images.shape[-1]:
        return F.avg_pool2d(images, images.shape[-1] // side)
    return images if side == images.shape[-1] else F.interpolate(images, size=(side, side))


def mask_distance(params: Params, model: SimMIM, validation: ImageDataset) -> float:
    """AvgDist of the first validation masks, pixels: 10 to 20 served best in the paper (section 4.1.2)."""
    masks = draw_masks(torch.arange(min(DISTANCE_MASKS, len(validation))), model, params)
    return float(average_distance(masks, model.mask_unit).mean())


def _local_deviation(images: torch.Tensor, scaled: torch.Tensor) -> torch.Tensor:
    """Ratio of a pixel's change to its normalised value's, per image and channel (a picture's accuracy)."""
    spread = scaled.std(dim=(2, 3), keepdim=True).clamp_min(1e-3)
    return images.std(dim=(2, 3), keepdim=True) / spread


def to_pixels(images: torch.Tensor, preprocessing: Preprocessing) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Normalised (B, 3, S, S) to uint8 (B, S, S, 3)."""
    mean = torch.tensor(preprocessing.mean).view(1, 3, 1, 1)
    std = torch.tensor(preprocessing.std).view(1, 3, 1, 1)
    pixels = ((images * std + mean) * 255).round().clamp(0, 255)
    return pixels.permute(0, 2, 3, 1).to(torch.uint8).numpy()


def main(argv: list[str] | None = None) -> int:
    return run_stage("pretrain", run, argv, stops_itself=True)


if __name__ == "__main__":
    raise SystemExit(main())
