"""Checkpoints of another number of processes, through DeepSpeed's universal form (one file per parameter).

DeepSpeed 0.19's loader leaves five things to us. Buffers are not read, and neither are weights that are not
trained (with ZeRO-3 a model may not have any). With ZeRO-3 all parameters share one
step counter afterwards, which counts once for each of their groups and spoils Adam's bias correction; and all
groups get the hyper-parameters of the first (the loop sets them from params.yaml in any case). The flag that
makes it read this form must be off when the engine saves (DeepSpeed#7546). Without ZeRO nothing is
partitioned and nothing is converted.
"""

from __future__ import annotations

import argparse
import logging
import os
from pathlib import Path
from typing import Any

import torch
from deepspeed.checkpoint import ds_to_universal

from flows import files
from flows.training.distributed import silenced


def convert(source: Path, target: Path) -> None:
    """Write checkpoint folder `source` in universal form as `target`: whole or not at all."""
    with files.replace_folder(target) as temporary:
        arguments = argparse.Namespace(
            input_folder=str(source),
            output_folder=str(temporary),
            # in this process: it belongs to a process group, and its children would inherit the connections
            num_extract_workers=1,
            num_merge_workers=1,
            keep_temp_folder=False,
            strict=True,
            inject_missing_state=True,
        )
        with silenced():
            ds_to_universal.main(arguments)
        for path in temporary.rglob("*.pt"):
            with open(path, "rb") as file:
                os.fsync(file.fileno())
    (target.parent / "latest_universal").unlink()  # DeepSpeed's note; it names the temporary folder


def load(engine: Any, folder: Path) -> dict[str, Any] | None:
    """The engine's state from `folder` in universal form, on all processes; returns what was saved with it.

    The files are pickles that this pipeline wrote.
    """
    logger = logging.getLogger("DeepSpeed")
    level = logger.level
    logger.setLevel(logging.ERROR)  # it warns that there is no tensor parallelism
    engine._config.load_universal_checkpoint = True
    try:
        _, saved = engine.load_checkpoint(str(folder.parent), tag=folder.name)
    finally:
        engine._config.load_universal_checkpoint = False
        logger.setLevel(level)
    if saved is None:
        return None
    for state in engine.optimizer.optimizer.state.values():
        if isinstance(step := state.get("step"), torch.Tensor):
            state["step"] = step.clone()
    _load_untrained(engine, folder)
    return dict(saved)


def _load_untrained(engine: Any, folder: Path) -> None:
    """Buffers that are saved (running statistics) and frozen weights, from the first process's file."""
    first = min(folder.glob("*model_states.pt"))
    saved = torch.load(first, map_location="cpu", weights_only=False)["module"]
    for name, buffer in engine.module.named_buffers():
        if name in saved:
            buffer.copy_(saved[name])
    for name, parameter in engine.module.named_parameters():
        if not parameter.requires_grad and not hasattr(parameter, "ds_id"):
            parameter.data.copy_(saved[name])
