"""`trunkline convert`: published weights → a file or folder of another layout, checked tensor by tensor.

The work is done by `models.checkpoints`; this module asks for the missing sizes, writes, and prints. Nothing
is written before the whole checkpoint has been found to fit, and then the result is whole or absent.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import get_args

import torch
from safetensors.torch import save_file

from flows import files
from flows.errors import ConfigError, DataError
from flows.published import clear_errors
from models import checkpoints
from models.backbones.bias_tables import TABLE_METHODS
from models.checkpoints import CheckpointError, Converted, Geometry
from models.checkpoints.exporting import Target
from models.checkpoints.fitting import Head
from models.checkpoints.reading import MAX_BYTES, METADATA_KEY

PICKLES = (".pth", ".pt", ".bin")
WEIGHTS = "model.safetensors"
CONFIG = "config.json"


def convert(
    source: Path,
    target: Path,
    *,
    layout: str = "ours",
    name: str = "",
    image_size: int = 0,
    window_size: int = 0,
    pretrained_windows: str = "",
    head: str = "keep",
    tables: str = "bicubic",
    force: bool = False,
    max_gb: float = 0.0,
) -> list[str]:
    """Read `source`, write `target`; empty and zero mean: as the checkpoint says.

    A `target` that ends in .safetensors, .pth, .pt or .bin becomes one file, any other a folder with
    model.safetensors and config.json. Returns the lines to print.

    Raises:
        ConfigError: an option is wrong, or `target` exists.
        DataError: the checkpoint cannot be read or does not fit; `target` is as before.
    """
    _check_choice("--to", layout, get_args(Target))
    _check_choice("--head", head, get_args(Head))
    _check_choice("--tables", tables, TABLE_METHODS)
    _check_target(source, target, force)
    limit = int(max_gb * 2**30) if max_gb else MAX_BYTES
    geometry = Geometry(image_size or None, window_size or None, _windows(pretrained_windows))
    with clear_errors():
        weights = checkpoints.read(source, limit)
        try:
            converted = checkpoints.convert(
                weights,
                layout,  # type: ignore[arg-type]  # checked above
                name=name or None,
                geometry=geometry,
                head=head,  # type: ignore[arg-type]
                tables=tables,  # type: ignore[arg-type]
            )
        except CheckpointError as error:
            raise CheckpointError(f"{error}{_hint(source, str(error))}") from None
    _write(target, converted, layout)
    return [*converted.report.lines(), f"{target}: {layout} layout, {len(converted.tensors)} tensors"]


def _check_choice(option: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ConfigError(f"`{option}` is {value!r}; choose one of {', '.join(choices)}")


def _windows(text: str) -> tuple[int, ...] | None:
    if not text:
        return None
    if not re.fullmatch(r"[1-9]\d*(,[1-9]\d*)*", text):
        raise ConfigError(f"`--pretrained-windows` is {text!r}; give one window per stage, like 12,12,12,6")
    return tuple(int(number) for number in text.split(","))


def _check_target(source: Path, target: Path, force: bool) -> None:
    if not source.exists():
        raise DataError(f"{source} does not exist")
    if not target.exists():
        return
    if target.resolve() in (source.resolve(), source.resolve().parent):
        raise ConfigError(f"{target} is what is converted; give another place to write to")
    if target.is_dir():
        strangers = sorted(entry.name for entry in target.iterdir() if entry.name not in (WEIGHTS, CONFIG))
        if strangers:
            raise ConfigError(f"{target} holds other files ({', '.join(strangers[:5])}); give a new folder")
    if not force:
        raise ConfigError(f"{target} exists; give another place, or --force to replace it")


def _hint(source: Path, message: str) -> str:
    """Released files carry their sizes in their names: worth telling, too little to rely on."""
    if "--image-size" not in message and "--window-size" not in message:
        return ""
    if match := re.search(r"window(\d+)_(\d+)", source.name):
        return f" Its name suggests --image-size {match[2]} --window-size {match[1]}."
    return ""


def _write(target: Path, converted: Converted, layout: str) -> None:
    metadata = {"format": "pt", METADATA_KEY: json.dumps(converted.config)}
    if target.suffix == ".safetensors":
        with files.replace_file(target) as temporary:
            save_file(converted.tensors, temporary, metadata=metadata)
    elif target.suffix in PICKLES:
        # The authors' loaders read the entry `model`; others want the tensors alone, without room for sizes.
        official = {"model": converted.tensors, METADATA_KEY: metadata[METADATA_KEY]}
        content = official if layout == "official" else converted.tensors
        with files.replace_file(target) as temporary:
            torch.save(content, temporary)
    else:
        with files.replace_folder(target) as temporary:
            save_file(converted.tensors, temporary / WEIGHTS, metadata=metadata)
            (temporary / WEIGHTS).chmod(0o644)  # as replace_file does; safetensors keeps it to its owner
            files.write_json(temporary / CONFIG, converted.config)
