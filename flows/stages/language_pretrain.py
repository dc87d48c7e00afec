"""Train the decoder of params.yaml on the tokens of artifacts/text, through DeepSpeed.

Files in: artifacts/text. Files out: artifacts/language_pretrain, a folder that transformers reads as it is
(flows/decoders.py), with the curves of training. What is predicted and what the losses mean is told in
flows/pretexts/causal_lm.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from flows import decoders, files, paths, plots
from flows.decoders import TrainingRecord
from flows.errors import DataError
from flows.params import Params
from flows.pretexts.causal_lm import CausalLMPretext
from flows.stage import Stage, run_stage
from flows.text.batches import PackedRows, TokenBatch, train_batches
from flows.text.corpus import TextManifest, TokenSplit, load_manifest, load_split
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
from flows.training.outputs import write_curves
from models.parameter_groups import no_weight_decay

SOURCES = [
    Path("flows/stages/language_pretrain.py"),
    Path("flows/decoders.py"),
    Path("flows/pretexts"),
    Path("flows/text"),
    Path("flows/training"),
    Path("models/language"),
    Path("models/pretext/causal_lm.py"),
]
CURVES = "curves.png"
PREFIX = "decoder."  # of the weights within what is trained


def run(params: Params, stage: Stage) -> None:
    settings, training = params.language_pretrain, params.language_pretrain.training
    processes = initialize_processes(training, params.distributed)
    manifest = load_manifest(paths.TEXT)
    split, validation = (load_split(paths.TEXT, manifest, name) for name in ("train", "val"))
    if int(split.starts[-1]) <= 2 * len(split):
        raise DataError("the training documents have no tokens")
    rows = PackedRows(split, settings.context, params.seed)

    torch.manual_seed(params.seed)
    pretext = CausalLMPretext(params, manifest.vocab_size, processes)

    def batches(step: int) -> Iterator[TokenBatch]:
        return train_batches(
            rows,
            batch_size=pretext.micro_batch,
            start_step=step,
            steps=training.steps - step,
            rank=processes.rank,
            world_size=processes.world_size,
            accumulation=training.accumulation,
        )

    def validate(engine: Any) -> Row:
        judged = pretext.judge(validation, engine)
        return {
            "val_loss": judged.loss,
            "val_bits_per_byte": float(judged.nats.sum()) / np.log(2) / int(validation.bytes.sum()),
        }

    key = fingerprint(
        {
            "decoder": params.decoder.model_dump(),
            "language_pretrain": settings_that_name(settings),
            "seed": params.seed,
        },
        {"text": manifest.digest},
        SOURCES,
    )
    checkpoints = Checkpoints(paths.scratch() / "language_pretrain" / key, processes)
    job = Job(
        name="language_pretrain",
        model=pretext.model,
        settings=training,
        seed=params.seed,
        groups=group_parameters(pretext.model, training.weight_decay, no_weight_decay),
        batches=batches,
        loss=pretext.loss,
        validate=validate,
        probe=partial(pretext.loss_on, first_documents(validation)),
        unit="tokens",
        units_per_sample=settings.context,
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
            write_outputs(params, stage, manifest, pretext, result)
        processes.barrier()
        checkpoints.prune()


def first_documents(split: TokenSplit, tokens: int = 4096) -> TokenSplit:
    """The first document, and those after it as long as all have no more than `tokens`."""
    count = max(1, int(np.searchsorted(split.starts, tokens, side="right")) - 1)
    count = min(count, len(split))
    starts = split.starts[: count + 1]
    return replace(
        split,
        ids=split.ids[: starts[-1]],
        starts=starts,
        bytes=split.bytes[:count],
        names=split.names[:count],
    )


def write_outputs(
    params: Params, stage: Stage, manifest: TextManifest, pretext: CausalLMPretext, result: Result
) -> None:
    training = params.language_pretrain.training
    weights = {name.removeprefix(PREFIX): value for name, value in result.weights.items()}
    record = TrainingRecord(data_digest=manifest.digest, **pretext.describe())
    with files.replace_folder(paths.LANGUAGE_PRETRAIN) as folder:
        decoders.write_decoder(folder, pretext.config, weights, paths.TEXT, record)
        write_curves(folder, result)
        (folder / CURVES).write_bytes(plots.curves({"language_pretrain": plots.History.read(folder)}))
    stage.run.log_artifact(paths.LANGUAGE_PRETRAIN / CURVES)
    validated = result.validation[-1]
    parameters = sum(parameter.numel() for parameter in pretext.model.parameters())
    metrics: dict[str, Any] = {
        "parameters": parameters,
        "steps": training.steps,
        "tokens_seen": training.steps * training.batch_size * params.language_pretrain.context,
        "train_loss": result.curves[-1]["train_loss"],
        "val_loss": validated["val_loss"],
        "val_bits_per_byte": validated["val_bits_per_byte"],
    }
    files.write_json(paths.METRICS / "language_pretrain.json", metrics)
    print(
        f"language_pretrain: {parameters / 1e6:.2f} M parameters, validation loss {metrics['val_loss']:.4f}, "
        f"{metrics['val_bits_per_byte']:.3f} bits per byte after {training.steps} steps"
    )


def main(argv: list[str] | None = None) -> int:
    return run_stage("language_pretrain", run, argv, stops_itself=True)


if __name__ == "__main__":
    raise SystemExit(main())
