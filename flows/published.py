"""Weights to start from, of whatever layout: ours, an official release, timm, transformers, torchvision."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torch import nn

from flows.errors import DataError, ResourceError
from models import checkpoints
from models.checkpoints import CheckpointError, Report


@contextmanager
def clear_errors(key: str = "") -> Iterator[None]:
    """A checkpoint that is refused is the user's to act on; so is a machine without the memory for it."""
    where = f"`{key}`: " if key else ""
    try:
        yield
    except CheckpointError as error:
        raise DataError(where + str(error).rstrip(".")) from None
    except MemoryError:
        raise ResourceError(f"{where}there is not enough memory for this checkpoint") from None


def load_published(path: Path, model: nn.Module, key: str) -> Report:
    """Put the weights of one file into `model`; the report says what became of each.

    A head in the file is left out. What the file has nothing for keeps the model's own values: a head, or as
    a whole the parts of a pretext task. `key` is the parameter that names the file.

    Raises:
        DataError: there is no such file, or it does not hold this model's backbone; the model is as before.
    """
    if path.is_dir() or path.name.endswith(".index.json"):
        raise DataError(
            f"`{key}`: {path} is not one file, so no fingerprint of the run could tell it from another; "
            f"make one of it: trunkline convert {path} weights.safetensors"
        )
    with clear_errors(key):
        try:
            return checkpoints.load(path, model, head="drop")
        except CheckpointError as error:
            sizes = "pretrained_windows" in str(error)
            hint = " `model` in params.yaml has to have the sizes of the pretraining." if sizes else ""
            raise CheckpointError(f"{error}{hint}") from None
