"""A checkpoint of one layout → the same weights in another, checked against the model they are of.

The model is built on the meta device, so nothing is left over or missing in what comes out, and position
tables are resized where other windows are asked for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

import models
from models.backbones.bias_tables import TableMethod
from models.checkpoints.description import SWIN, Description, describe, stage_windows
from models.checkpoints.errors import CheckpointError
from models.checkpoints.exporting import TARGETS, Target, export, transformers_config
from models.checkpoints.fitting import Head, fit
from models.checkpoints.layouts import recognize
from models.checkpoints.reading import Weights
from models.checkpoints.report import Report
from models.checkpoints.transfer import is_pretraining_form
from models.classification import Classifier
from models.pretext.simmim import SimMIM


@dataclass(frozen=True)
class Geometry:
    """What the caller says about sizes; None leaves it to the checkpoint.

    Attributes:
        image_size, window_size: of the model that the result is for.
        pretrained_windows: per stage the windows that a Swin V2 was trained with.
    """

    image_size: int | None = None
    window_size: int | None = None
    pretrained_windows: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Converted:
    """A state dict of its own memory, the configuration to write beside it, and the report."""

    tensors: dict[str, Tensor]
    config: dict[str, Any]
    report: Report


def convert(
    weights: Weights,
    target: Target = "ours",
    *,
    name: str | None = None,
    geometry: Geometry = Geometry(),
    head: Head = "keep",
    tables: TableMethod = "bicubic",
) -> Converted:
    """
    Args:
        weights: what ``read`` returned.
        target: the layout to write.
        name: of ``models.BACKBONES``; None: the one whose sizes the checkpoint has.
        geometry: sizes that the checkpoint does not tell, or that shall be others.
        head: ``drop`` leaves out the head and the parts of a pretext task.
        tables: as for ``load``.

    Raises:
        CheckpointError: the checkpoint does not fit its model, or the target has no place for it.
    """
    if target not in TARGETS:
        raise CheckpointError(f"the target layout is {target!r}, but must be one of {', '.join(TARGETS)}.")
    recognized = recognize(weights.tensors)
    found = describe(recognized, weights.config)
    task = _task_to_write(found, recognized.state, head)
    arguments = backbone_arguments(found, name, geometry)
    if is_pretraining_form(recognized.state):
        arguments["pretraining"] = True
    model = _build_on_meta(found, task, arguments)
    fitted, report = fit(weights, model.state_dict(), head, tables, recognized)
    state = {full.removeprefix("backbone."): tensor for full, tensor in fitted.items()}
    tensors = _own_memory(export(state, found.family, task, target))
    written = replace(found, task=task, num_classes=found.num_classes if task == "classifier" else None)
    if found.family == "swin_v2" and None in found.pretrained_windows and not geometry.pretrained_windows:
        taken = stage_windows(
            arguments["image_size"], found.patch_size, len(found.depths), arguments["window_size"]
        )
        note = f"it does not tell the windows it was trained with; taken to be {'-'.join(map(str, taken))}"
        report = replace(report, notes=(*report.notes, note))
    return Converted(tensors, _config(written, target, arguments, weights, report), report)


def backbone_arguments(found: Description, name: str | None, geometry: Geometry) -> dict[str, Any]:
    """Name and keyword arguments of ``models.create`` for the model that the result is for.

    Raises:
        CheckpointError: a size is neither told by the checkpoint nor given.
    """
    name = name or found.name
    if name is None:
        raise CheckpointError(
            f"no size of Trunkline has the shapes of this checkpoint: {found}; the known names are "
            f"{', '.join(models.BACKBONES)}."
        )
    if name not in models.BACKBONES:
        raise CheckpointError(f"model {name!r} is unknown: choose one of {', '.join(models.BACKBONES)}.")
    size = models.BACKBONES[name]
    if not name.startswith(f"{found.family}_") or (size.embed_dim, size.depths) != (
        found.embed_dim,
        found.depths,
    ):
        blocks = "-".join(map(str, size.depths))
        raise CheckpointError(
            f"{name} has {size.embed_dim} channels and blocks {blocks}, but this checkpoint is of {found}."
        )
    image_size = geometry.image_size or found.image_size
    window_size = geometry.window_size or found.window_size
    if image_size is None or (found.family in SWIN and window_size is None):
        sizes = {"image_size (--image-size)": image_size, "window_size (--window-size)": window_size}
        lacking = [option for option, value in sizes.items() if value is None]
        raise CheckpointError(
            f"the checkpoint does not tell its {' and '.join(lacking)}: give those it was trained with."
        )
    arguments: dict[str, Any] = {"name": name, "image_size": image_size, "patch_size": found.patch_size}
    if found.in_channels != 3:
        arguments["in_channels"] = found.in_channels
    if found.family not in SWIN or window_size is None:
        return arguments
    arguments["window_size"] = window_size
    if size.num_heads != found.num_heads:
        arguments["num_heads"] = list(found.num_heads)
    if found.family == "swin_v2":
        stages = len(found.depths)
        here = stage_windows(image_size, found.patch_size, stages, window_size)
        trained = geometry.pretrained_windows or tuple(
            told or same or 0 for told, same in zip(found.pretrained_windows, here, strict=True)
        )
        if len(trained) != stages:
            raise CheckpointError(f"{len(trained)} pretrained windows are given for {stages} stages.")
        if trained != here:
            arguments["pretrained_windows"] = list(trained)
    return arguments


def _task_to_write(found: Description, state: Mapping[str, Tensor], head: Head) -> str:
    if head == "drop":
        return "backbone"
    if "mask_token" in state and "decoder.0.weight" in state:
        return "simmim"
    return "classifier" if found.num_classes else "backbone"


def _build_on_meta(found: Description, task: str, arguments: Mapping[str, Any]) -> nn.Module:
    given = dict(arguments)
    try:
        with torch.device("meta"):
            backbone = models.create(given.pop("name"), **given)
            if task == "simmim":
                return SimMIM(backbone, mask_unit=backbone.patch_size)
            if task == "classifier":
                return Classifier(backbone, cast(int, found.num_classes))
    except ValueError as error:
        raise CheckpointError(str(error)) from None
    return cast(nn.Module, backbone)


def _config(
    model: Description, target: Target, arguments: dict[str, Any], weights: Weights, report: Report
) -> dict[str, Any]:
    if target == "transformers":
        shared = bool(arguments.get("pretraining"))
        window = arguments.get("window_size", 0)
        return transformers_config(
            model,
            image_size=arguments["image_size"],
            window_size=window,
            pretrained_windows=arguments.get("pretrained_windows", [0] * len(model.depths)),
            labels=_labels(weights, model.num_classes),
            shared_table=shared,
        )
    config: dict[str, Any] = {
        "task": {"classifier": "classification"}.get(model.task, model.task),
        "layout": target,
        "backbone": arguments,
        "converted_from": {"layout": report.layout, "task": report.model.task},
    }
    if model.num_classes:
        config["num_classes"] = model.num_classes
        if labels := _labels(weights, model.num_classes):
            config["classes"] = labels
    return config


def _labels(weights: Weights, num_classes: int | None) -> Sequence[str]:
    """Names of the classes in a configuration of transformers or ours, if there is one for each."""
    named = weights.config.get("id2label")
    found: object = weights.config.get("classes")
    if isinstance(named, Mapping):  # by number: files often have "10" before "2"
        by_number = {str(number): label for number, label in named.items()}
        numbers = [str(number) for number in range(len(by_number))]
        found = [by_number[number] for number in numbers] if by_number.keys() == set(numbers) else None
    if not isinstance(found, list) or len(found) != num_classes:
        return []
    labels = [str(label) for label in found]
    stand_ins = [f"LABEL_{i}" for i in range(len(labels))]  # transformers' own
    return labels if labels != stand_ins and len(set(labels)) == len(labels) else []


def _own_memory(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous, and no two of them in the same storage: what safetensors writes."""
    seen: set[int] = set()
    owned = {}
    for name, tensor in tensors.items():
        storage = tensor.untyped_storage()
        whole = storage.nbytes() == tensor.numel() * tensor.element_size() and tensor.is_contiguous()
        if not whole or storage.data_ptr() in seen:
            tensor = tensor.contiguous().clone()
        seen.add(tensor.untyped_storage().data_ptr())
        owned[name] = tensor
    return owned
