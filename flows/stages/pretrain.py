"""Learn a backbone without labels: SimMIM (arXiv 2111.09886) on the training images, through DeepSpeed.

Files in: artifacts/data, artifacts/subsets. Files out: artifacts/pretrain (weights, config, curves, pictures).
The validation loss is the L1 error summed over all masked pixels of the validation split, divided by their number,
in eval mode, on centre crops, with masks seeded by the image: the same for every model (data scaling study).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

import models
from flows import files, paths, plots
from flows.data import (
    Augmentation,
    Batch,
    ImageDataset,
    eval_batches,
    load_manifest,
    load_subset,
    preprocessing_for,
    to_model_input,
    train_batches,
)
from flows.errors import ConfigError
from flows.imaging import Preprocessing
from flows.params import Params
from flows.stage import Stage, run_stage
from flows.training import Checkpoints, Job, Processes, fingerprint, group_parameters, initialize_processes, train
from flows.training.loop import Row
from flows.training.outputs import write_training_outputs
from models.parameter_groups import no_weight_decay
from models.pretext.simmim import SimMIM, masks_from_ids, random_masks

SOURCES = [Path("flows/stages/pretrain.py"), Path("flows/training"), Path("flows/data"), Path("models")]


def run(params: Params, stage: Stage) -> None:
    settings, training = params.pretrain, params.pretrain.training
    processes = initialize_processes(training)
    manifest = load_manifest(paths.DATA)
    preprocessing = preprocessing_for(manifest, params.model)
    dataset = _open(params, "train", load_subset(paths.SUBSETS, settings.subset))
    validation = _open(params, "val")

    torch.manual_seed(params.seed)
    backbone_config = {**params.model.model_dump(exclude={"backbone"}), "name": params.model.backbone}
    model = build_model(params, backbone_config)
    began_from = _initialize(model, settings.initialize_from)

    grid = params.model.image_size // settings.mask_unit
    augmentation = Augmentation(params.model.image_size, settings.crop_scale, flip=settings.flip)
    micro_batch = training.batch_size // (processes.world_size * training.accumulation)

    def batches(step: int) -> Iterator[Batch]:
        return train_batches(
            dataset,
            augmentation,
            batch_size=micro_batch,
            global_batch=training.batch_size,
            seed=params.seed,
            start_step=step,
            steps=training.steps,
            rank=processes.rank,
            world_size=processes.world_size,
            accumulation=training.accumulation,
            workers=params.loader.workers,
        )

    def loss(engine: Any, batch: Batch) -> torch.Tensor:
        images = _to_device(batch, preprocessing, processes)
        masks = random_masks(len(images), grid, settings.mask_ratio).to(processes.device)
        value: torch.Tensor = engine(images, masks).loss
        return value

    def validate(engine: Any) -> Row:
        total = masked = 0.0
        for batch, weight in _equal_batches(validation, preprocessing, micro_batch, processes):
            images = _to_device(batch, preprocessing, processes)
            masks = masks_from_ids(batch.rows, grid, settings.mask_ratio).to(processes.device)
            output = engine(images, masks)
            total += weight * float(output.loss_sum)
            masked += weight * float(output.masked_values)
        total, masked = processes.sum([total, masked])
        return {"val_loss": total / masked}

    key = fingerprint(
        {"model": params.model.model_dump(), "pretrain": settings.model_dump(), "seed": params.seed},
        {
            "data": manifest.digest,
            "subsets": files.sha256_file(paths.SUBSETS / "subsets.json"),
            "initial": began_from and files.sha256_file(Path(settings.initialize_from)),
            "world": str(processes.world_size),
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
        validate=validate,
        initialized_from=began_from,
        continue_from=Path(settings.continue_from) if settings.continue_from else None,
        on_log=stage.run.log_metrics,
        stop_requested=stage.stop_requested,
    )
    result = train(job, processes, checkpoints)

    stage.device_hours = result.seconds * processes.world_size / 3600
    if processes.is_main:
        _write_outputs(params, stage, result, backbone_config, manifest.digest, validation, preprocessing, grid)
    processes.barrier()
    checkpoints.prune()


def build_model(params: Params, backbone_config: dict[str, Any]) -> SimMIM:
    try:
        backbone = models.create(
            **backbone_config,
            drop_path=params.pretrain.drop_path,
            activation_checkpointing=params.pretrain.training.activation_checkpointing,
        )
        return SimMIM(backbone, params.pretrain.mask_unit, params.pretrain.normalize_target)
    except ValueError as error:
        raise ConfigError(f"params.yaml: `model`: {error}") from None
