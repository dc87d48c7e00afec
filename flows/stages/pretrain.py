"""Learn a backbone without labels, by the pretext task that params.yaml names, through DeepSpeed.

Files in: artifacts/data, artifacts/subsets. Files out: artifacts/pretrain (weights, config, curves, a
picture). What is predicted and what the validation loss means is told in flows/pretexts. With labels and
`knn.images`, each validation also asks the neighbours of the validation images for their class.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from flows import files, initial_weights, knn, paths, plots, pretexts
from flows.data import (
    Batch,
    ImageDataset,
    Manifest,
    load_manifest,
    load_smallest_subset,
    load_subset,
    preprocessing_for,
    train_batches,
)
from flows.imaging import Preprocessing
from flows.params import Params
from flows.pretexts import ImagePretext
from flows.stage import Stage, is_main_process, run_stage
from flows.training import (
    Checkpoints,
    Job,
    Result,
    Row,
    fingerprint,
    group_parameters,
    initialize_processes,
    settings_that_name,
    train,
    watch_peers,
)
from flows.training.outputs import write_curves, write_weights
from models.parameter_groups import no_weight_decay

SOURCES = [
    Path("flows/stages/pretrain.py"),
    Path("flows/pretexts"),
    Path("flows/training"),
    Path("flows/data"),
    Path("models"),
]
PICTURE = "examples.png"
EXTRA_LOSSES = ("val_loss_drop_path", "val_loss_crops", "train_loss_eval")


def run(params: Params, stage: Stage) -> None:
    settings, training = params.pretrain, params.pretrain.training
    if settings.pretext == "none":
        if is_main_process():
            initial_weights.write(params)
        return
    processes = initialize_processes(training, params.distributed)
    manifest = load_manifest(paths.DATA)
    preprocessing = preprocessing_for(manifest, params.model)
    open_split = partial(
        ImageDataset, paths.DATA, cache_mb=params.loader.cache_mb, max_pixels=params.ingest.max_pixels
    )
    dataset = open_split("train", rows=load_subset(paths.SUBSETS, settings.subset))
    validation = open_split("val")
    probed = open_split("val", rows=range(min(training.batch_size, len(validation))))
    # the same for every subset: a study compares their losses
    common = load_smallest_subset(paths.SUBSETS) if settings.extra_losses else []
    trained_on = open_split("train", rows=knn.choose_voters(common, len(validation)))
    voters = open_split("train", rows=knn.choose_voters(dataset.rows.tolist(), params.knn.images or 1))

    torch.manual_seed(params.seed)
    pretext = pretexts.create(params, preprocessing, processes)
    initial = Path(settings.initialize_from) if settings.initialize_from else None
    if initial is not None:
        pretext.initialize_from(initial)

    def batches(step: int) -> Iterator[Batch]:
        return train_batches(
            dataset,
            pretext.transform,
            batch_size=pretext.micro_batch,
            global_batch=training.batch_size,
            seed=params.seed,
            start_step=step,
            steps=training.steps - step,
            rank=processes.rank,
            world_size=processes.world_size,
            accumulation=training.accumulation,
            workers=params.loader.workers,
        )

    def validate(engine: Any) -> Row:
        row = {"val_loss": pretext.loss_on(validation, engine)}
        if settings.extra_losses:
            row |= pretext.extra_losses(validation, trained_on, engine)
        if manifest.classes and params.knn.images:
            known, queries = pretext.eval_batches(voters), pretext.eval_batches(validation)
            embedding, device = pretext.backbone.embedding, processes.device
            row["knn_top1"] = knn.top1(
                embedding, known, queries, params.knn, preprocessing, device, processes.gather
            )
        return row

    key = fingerprint(
        {
            "model": params.model.model_dump(),
            "pretrain": settings_that_name(settings),
            "knn": params.knn.model_dump(),
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
        model=pretext.model,
        settings=training,
        seed=params.seed,
        groups=group_parameters(pretext.model, training.weight_decay, no_weight_decay),
        batches=batches,
        loss=pretext.loss,
        validate=validate,
        probe=partial(pretext.loss_on, probed),
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
            trained = pretexts.create(params, preprocessing, processes)
            trained.model.load_state_dict(result.weights)
            write_outputs(params, stage, manifest, result, trained, validation, preprocessing)
        processes.barrier()
        checkpoints.prune()


def write_outputs(
    params: Params,
    stage: Stage,
    manifest: Manifest,
    result: Result,
    trained: ImagePretext,
    validation: ImageDataset,
    preprocessing: Preprocessing,
) -> None:
    config = {
        "task": params.pretrain.pretext,
        "backbone": {"name": params.model.backbone, **params.model.model_dump(exclude={"backbone"})},
        **trained.describe(),
        "preprocessing": preprocessing.to_dict(),
        "data_digest": manifest.digest,
    }
    with files.replace_folder(paths.PRETRAIN) as folder:
        write_weights(folder / "model.safetensors", result.weights)
        files.write_json(folder / "config.json", config)
        write_curves(folder, result)
        (folder / PICTURE).write_bytes(trained.draw(validation))
        history = plots.History.read(folder)
        (folder / "curves.png").write_bytes(plots.curves({"pretrain": history}))
    for name in (PICTURE, "curves.png"):
        stage.run.log_artifact(paths.PRETRAIN / name)
    validated, measured = result.validation[-1], trained.measures(validation)
    stage.run.log_metrics(measured, params.pretrain.training.steps)
    metrics: dict[str, Any] = {
        "backbone": params.model.backbone,
        "pretext": params.pretrain.pretext,
        "parameters": sum(parameter.numel() for parameter in trained.backbone.parameters()),
        "steps": params.pretrain.training.steps,
        "images_seen": params.pretrain.training.steps * params.pretrain.training.batch_size,
        "train_loss": result.curves[-1]["train_loss"],
        **{name: validated[name] for name in ("val_loss", "knn_top1", *EXTRA_LOSSES) if name in validated},
        **measured,
    }
    files.write_json(paths.METRICS / "pretrain.json", metrics)
    print(
        f"pretrain: validation loss {metrics['val_loss']:.4f} after {metrics['steps']} steps"
        + (
            f", neighbours know {100 * metrics['knn_top1']:.2f} % of the classes"
            if "knn_top1" in metrics
            else ""
        )
    )


def main(argv: list[str] | None = None) -> int:
    return run_stage("pretrain", run, argv, stops_itself=True)


if __name__ == "__main__":
    raise SystemExit(main())
