"""What a training stage leaves for later stages and for people: weights, config, curves."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from flows import files
from flows.training.loop import Result, Row


def write_csv(path: Path, rows: list[Row]) -> None:
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    files.write_text(path, buffer.getvalue())


def write_weights(path: Path, weights: Mapping[str, torch.Tensor]) -> None:
    with files.replace_file(path) as temporary:
        save_file(dict(weights), temporary)


def write_training_outputs(folder: Path, result: Result, config: dict[str, Any]) -> None:
    """model.safetensors, config.json, curves.csv and validation.csv in `folder`, which must exist."""
    write_weights(folder / "model.safetensors", result.weights)
    files.write_json(folder / "config.json", config)
    write_csv(folder / "curves.csv", result.curves)
    write_csv(folder / "validation.csv", result.validation)
