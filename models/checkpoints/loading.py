"""Published weights into a model, all of them or none."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Literal, cast, get_args

import torch
from torch import Tensor, nn

from models.backbones.bias_tables import TableMethod
from models.backbones.windows import WindowGeometry
from models.checkpoints.description import Description, describe
from models.checkpoints.errors import CheckpointError
from models.checkpoints.fitting import Head, fit
from models.checkpoints.layouts import recognize
from models.checkpoints.reading import Weights, pick_tensors, read
from models.checkpoints.report import Report

Windows = Literal["check", "ignore"]


def load(
    source: Path | str | Mapping[str, Tensor] | Weights,
    model: nn.Module,
    *,
    head: Head = "keep",
    windows: Windows = "check",
    tables: TableMethod = "bicubic",
) -> Report:
    """Load published weights of any known layout into a backbone, a classifier or a pretext task of ours.

    Args:
        source: a file, a folder, a state dict, or what ``read`` returned.
        model: keeps its device, its type and, where the report says so, its own values.
        head: ``keep`` wants the checkpoint's head, if it has one, in the model's; ``drop`` leaves it out.
        windows: ``check`` refuses a Swin V2 whose position coordinates are scaled for other windows than
            those it was trained with, where the checkpoint tells them; ``ignore`` does not look.
        tables: how the relative position tables of Swin V1 and ViT are brought to another size: ``bicubic``
            as the Swin release, ``geometric`` as the SimMIM release.

    Raises:
        CheckpointError: the checkpoint cannot be read or does not fit; the model is as before.
    """
    if windows not in get_args(Windows):
        raise CheckpointError(f"windows is {windows!r}, but must be check or ignore.")
    weights = as_weights(source)
    own = model.state_dict()
    fitted, report = fit(weights, own, head, tables)
    if windows == "check":
        report = check_windows(report, model)
    with torch.no_grad():
        model.load_state_dict({**own, **fitted})
    return report


def infer_model(source: Path | str | Mapping[str, Tensor] | Weights) -> Description:
    """What model a checkpoint is of: name, widths, depths, heads, windows, as far as it tells.

    Raises:
        CheckpointError: it cannot be read or is of no known layout.
    """
    weights = as_weights(source)
    return describe(recognize(weights.tensors), weights.config)


def as_weights(source: Path | str | Mapping[str, Tensor] | Weights) -> Weights:
    if isinstance(source, Weights):
        return source
    if isinstance(source, Mapping):
        tensors, notes = pick_tensors(source, "the state dict")
        return Weights(tensors, notes=notes)
    return read(source)


def check_windows(report: Report, model: nn.Module) -> Report:
    """The report, with a note where the checkpoint does not tell its windows.

    Raises:
        CheckpointError: the model is a Swin V2 that scales its coordinates otherwise than the checkpoint's.
    """
    backbone = getattr(model, "backbone", model)
    if report.model.family != "swin_v2" or not hasattr(backbone, "layers"):
        return report
    stages = [cast(WindowGeometry, stage.windows) for stage in cast(nn.ModuleList, backbone.layers)]
    here = tuple(stage.pretrained_window for stage in stages)
    there = report.pretrained_windows
    for stage, (built, trained) in enumerate(zip(here, there, strict=True)):
        # A single token has no neighbours whose distance could be scaled.
        if trained is not None and trained != built and stages[stage].window > 1:
            raise CheckpointError(
                f"{report.source} was trained with windows {_tuple(there)}, but this model scales the "
                f"coordinates of its position bias for {_tuple(here)}: build it with "
                f"pretrained_windows={_tuple(there)}, or say windows='ignore'."
            )
    if None not in there:
        return report
    note = f"it does not tell the windows it was trained with; the model scales its coordinates for {here}"
    return replace(report, notes=(*report.notes, note))


def _tuple(values: tuple[int | None, ...]) -> str:
    return str(tuple("?" if value is None else value for value in values)).replace("'", "")
