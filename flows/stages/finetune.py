"""Learn to classify: from the pretrained backbone (cell `pretrained`) or from random weights (`scratch`).

With `finetune.task: linear_probe` the backbone is frozen and only the head learns, in both cells: how much
of the answer the features hold already, and how much random ones do.

Files in: artifacts/data, artifacts/subsets and, for `pretrained`, artifacts/pretrain. Files out:
artifacts/finetune/<cell>. Both cells get the same data, steps and augmentation, so that the difference is
what pretraining is worth. Layer-wise learning-rate decay follows SimMIM (section 4.1.1); it only makes sense
for weights that know something already, so the control trains all layers at the full rate.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file

import models
from flows import files, paths
from flows.classifiers import ClassifierConfig, save_classifier
from flows.data import (
    Augmentation,
    Batch,
    ImageDataset,
    RandAugment,
    even_eval_batches,
    load_manifest,
    load_subset,
    mix,
    preprocessing_for,
    to_model_input,
    train_batches,
)
from flows.errors import ConfigError, DataError
from flows.imaging import Preprocessing
from flows.params import Finetune, Params
from flows.stage import Stage, run_stage
from flows.training import (
    Checkpoints,
    Job,
    Row,
    fingerprint,
    group_parameters,
    initialize_processes,
    micro_batch_size,
    settings_that_name,
    train,
    watch_peers,
)
from flows.training.outputs import write_curves
from models.backbones.bias_tables import resize_bias_table, resize_position_embedding
from models.classification import Classifier, LinearProbe, classifier_weights
from models.parameter_groups import layer_id, no_weight_decay, num_layer_ids

CELLS = ["pretrained", "scratch"]
SOURCES = [Path("flows/stages/finetune.py"), Path("flows/training"), Path("flows/data"), Path("models")]
BACKBONE = "backbone."


def run(params: Params, stage: Stage) -> None:
    settings, training = params.finetune, params.finetune.training
    manifest = load_manifest(paths.DATA)
    if not manifest.classes:
        raise DataError(
            "the data set has no labels, so there is nothing to classify; it serves pretraining only"
        )
    processes = initialize_processes(training, params.distributed)
    size = params.finetune_model()
    preprocessing = preprocessing_for(manifest, size)
    if settings.test_resize:
        preprocessing = replace(preprocessing, resize_to=settings.test_resize)
    open_split = partial(
        ImageDataset, paths.DATA, cache_mb=params.loader.cache_mb, max_pixels=params.ingest.max_pixels
    )
    dataset = open_split("train", rows=load_subset(paths.SUBSETS, settings.subset))
    validation = open_split("val")
    probed = open_split("val", rows=range(min(training.batch_size, len(validation))))
    num_classes = len(manifest.classes)

    torch.manual_seed(params.seed)  # before the model: the head starts equal in both cells
    arguments = backbone_arguments(params, stage.cell == "pretrained")
    classifier = build_model(params, num_classes, arguments)
    probe = settings.linear_probe if settings.task == "linear_probe" else None
    weights = paths.PRETRAIN / "model.safetensors" if stage.cell == "pretrained" else None
    if weights is not None:
        load_backbone(classifier, weights)
    model = classifier if probe is None else LinearProbe(classifier, len(probe.lr_factors))
    start_sha256 = files.sha256_file(weights) if weights else ""

    augmentation = augmentation_for(settings, size.image_size, preprocessing)
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

    def answers(engine: Any, images: torch.Tensor) -> torch.Tensor:
        """Logits (heads, B, classes); a probe has several heads."""
        logits: torch.Tensor = engine(images).float()
        return logits[None] if probe is None else logits

    def loss(engine: Any, batch: Batch) -> torch.Tensor:
        images, targets = mix(
            images_of(batch),
            batch.labels.to(processes.device),
            num_classes,
            mixup=settings.mixup,
            cutmix=settings.cutmix,
            label_smoothing=settings.label_smoothing,
            generator=torch.default_generator,
        )
        losses = [F.cross_entropy(logits, targets) for logits in answers(engine, images)]
        return torch.stack(losses).sum()

    def measure(images: ImageDataset, engine: Any) -> Row:
        heads = 1 if probe is None else len(probe.lr_factors)
        loss_sums, corrects, count = [0.0] * heads, [0.0] * heads, 0.0
        for batch, weight in even_eval_batches(
            images, preprocessing, micro_batch, processes.rank, processes.world_size
        ):
            labels = batch.labels.to(processes.device)
            for head, logits in enumerate(answers(engine, images_of(batch))):
                loss_sums[head] += weight * float(F.cross_entropy(logits, labels, reduction="sum"))
                corrects[head] += weight * float((logits.argmax(1) == labels).sum())
            count += weight * len(labels)
        *sums, count = processes.sum([*loss_sums, *corrects, count])
        loss_sums, corrects = sums[:heads], sums[heads:]
        best = max(range(heads), key=lambda head: corrects[head])
        row = {"val_loss": loss_sums[best] / count, "val_top1": corrects[best] / count}
        return row if probe is None else {**row, "head": float(best)}

    def lr_scale(name: str) -> float:
        if probe is not None:
            return probe.lr_factors[int(name.split(".")[1])]  # heads.<number>.weight
        return layer_decay ** (top - layer_id(name, classifier.backbone))

    layer_decay = settings.layer_decay if weights is not None else 1.0
    top = num_layer_ids(classifier.backbone) - 1
    key = fingerprint(
        {
            "model": params.model.model_dump(),
            "finetune": settings_that_name(settings),
            "seed": params.seed,
        },
        {
            "cell": stage.cell or "",
            "data": manifest.digest,
            "subsets": files.sha256_file(paths.SUBSETS / "subsets.json"),
            "weights": start_sha256,
        },
        SOURCES,
    )
    checkpoints = Checkpoints(paths.scratch() / f"finetune-{stage.cell}" / key, processes)
    job = Job(
        name="finetune",
        label=stage.label,
        model=model,
        settings=training,
        seed=params.seed,
        groups=group_parameters(
            model,
            training.weight_decay,
            no_weight_decay,
            lr_scale,
        ),
        batches=batches,
        loss=loss,
        validate=partial(measure, validation),
        probe=lambda engine: measure(probed, engine)["val_loss"],
        initialized_from=str(weights or ""),
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
            trained = build_model(params, num_classes, arguments)
            if probe is None:
                trained.load_state_dict(result.weights)
            else:
                head = int(result.validation[-1]["head"])
                trained.load_state_dict(classifier_weights(result.weights, head))
            folder = paths.FINETUNE / str(stage.cell)
            config = ClassifierConfig(
                backbone=arguments,
                classes=tuple(manifest.classes),
                preprocessing=preprocessing,
                data_digest=manifest.digest,
                start_sha256=start_sha256,
                feature=trained.feature,
            )
            save_classifier(folder, trained, config)
            write_curves(folder, result)
            metrics = {
                "val_top1": result.validation[-1]["val_top1"],
                "val_loss": result.validation[-1]["val_loss"],
                "train_loss": result.curves[-1]["train_loss"],
                "images_seen": training.steps * training.batch_size,
                "parameters": sum(parameter.numel() for parameter in trained.parameters()),
            }
            if probe is not None:
                metrics["lr"] = training.lr * probe.lr_factors[head]
            files.write_json(paths.METRICS / f"finetune-{stage.cell}.json", metrics)
            print(f"{stage.label}: validation top-1 {metrics['val_top1']:.4f} after {training.steps} steps")
        processes.barrier()
        checkpoints.prune()


def backbone_arguments(params: Params, pretrained: bool) -> dict[str, Any]:
    """The name and the sizes of the network, as `config.json` keeps them.

    Swin V2 scales the coordinates of its position bias by the windows it was pretrained in; weights that come
    from others have to be told them (arXiv 2111.09883, section 3.3).
    """
    size = params.finetune_model()
    arguments: dict[str, Any] = {"name": size.backbone, **size.model_dump(exclude={"backbone"})}
    if pretrained and size != params.model:
        with torch.device("meta"):
            before = create_backbone(params.model.model_dump(exclude={"backbone"}), params.model.backbone)
        if isinstance(before, models.SwinV2):
            arguments["pretrained_windows"] = list(before.window_sizes)
    return arguments


def build_model(params: Params, num_classes: int, arguments: dict[str, Any] | None = None) -> Classifier:
    """With fresh weights; `arguments` are those of `backbone_arguments`, by default for pretrained ones."""
    arguments = arguments or backbone_arguments(params, pretrained=True)
    backbone = create_backbone(
        {
            **{key: value for key, value in arguments.items() if key != "name"},
            "drop_path": params.finetune.drop_path,
            "activation_checkpointing": params.finetune.training.activation_checkpointing,
            "attention_chunk": params.finetune.training.attention_chunk,
        },
        arguments["name"],
    )
    probing = params.finetune.task == "linear_probe"
    feature = params.finetune.linear_probe.feature if probing else 0
    try:
        return Classifier(backbone, num_classes, feature)
    except ValueError as error:
        raise ConfigError(f"params.yaml: `finetune.linear_probe`: {error}") from None


def create_backbone(arguments: dict[str, Any], name: str) -> models.Backbone:
    try:
        return models.create(name, **arguments)
    except ValueError as error:
        raise ConfigError(f"params.yaml: `model` and `finetune`: {error}") from None


def augmentation_for(settings: Finetune, image_size: int, preprocessing: Preprocessing) -> Augmentation:
    augment = settings.rand_augment
    return Augmentation(
        image_size,
        settings.crop_scale,
        flip=settings.flip,
        interpolation=settings.interpolation,
        rand_augment=RandAugment(**augment.model_dump()) if augment.operations else None,
        color_jitter=settings.color_jitter,
        erasing=settings.random_erasing,
        mean=preprocessing.mean,
        std=preprocessing.std,
    )


def load_backbone(model: Classifier, path: Path) -> None:
    """Copy the pretrained backbone; tables of positions are resized to the model's windows and grid.

    Raises:
        DataError: no such file, or not exactly the backbone's tensors are in it.
    """
    try:
        weights = load_file(path)
    except (OSError, SafetensorError) as error:
        raise DataError(f"{path} cannot be read ({error}); run pretrain first") from None
    own = {name: value for name, value in model.state_dict().items() if name.startswith(BACKBONE)}
    found = {name[len(BACKBONE) :]: value for name, value in weights.items() if name.startswith(BACKBONE)}
    found = {
        BACKBONE + name: fit_positions(name, value, own.get(BACKBONE + name))
        for name, value in models.finetuning_weights(found, model.backbone).items()
    }
    wrong = sorted(
        name
        for name in found.keys() | own.keys()
        if name not in found or name not in own or found[name].shape != own[name].shape
    )
    if wrong:
        raise DataError(f"{path} does not fit the backbone of params.yaml: {', '.join(wrong[:5])}")
    model.load_state_dict({**model.state_dict(), **found})


def fit_positions(name: str, table: torch.Tensor, own: torch.Tensor | None) -> torch.Tensor:
    """A table of positions resized to the shape of the model's own; anything else as it is."""
    if own is None or own.shape == table.shape or own.ndim != table.ndim:
        return table
    try:
        if name.endswith("relative_position_bias_table"):
            return resize_bias_table(table, (math.isqrt(len(own)) + 1) // 2)
        if name == "pos_embed":
            grid = math.isqrt(own.shape[1] - 1)
            return resize_position_embedding(table, (grid, grid))
    except ValueError:
        pass  # of another shape altogether, which is said below with all the others
    return table


def main(argv: list[str] | None = None) -> int:
    return run_stage("finetune", run, argv, cells=CELLS, stops_itself=True)


if __name__ == "__main__":
    raise SystemExit(main())
