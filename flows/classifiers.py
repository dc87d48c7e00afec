"""A finetuned classifier on disk: `model.safetensors` beside the `config.json` that says how to rebuild and
feed it.

Finetuning writes it; evaluation, export and parity read it. The configuration is complete: weights, class
names and preprocessing travel together, so that no reader has to consult params.yaml, which may have changed
since.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

import models
from flows import files
from flows.errors import DataError
from flows.imaging import Preprocessing
from models.classification import Classifier

WEIGHTS = "model.safetensors"
CONFIG = "config.json"


@dataclass(frozen=True)
class ClassifierConfig:
    """What `config.json` holds."""

    backbone: Mapping[str, Any]  # {"name": …, and the keyword arguments of models.create}
    classes: tuple[str, ...]
    preprocessing: Preprocessing
    data_digest: str  # digest of the data set's manifest
    start_sha256: str  # of the weights that training started from; empty: random weights
    feature: int = 0  # what the head reads, see Classifier

    def to_dict(self) -> dict[str, Any]:
        return {
            "task": "classification",
            "backbone": dict(self.backbone),
            "classes": list(self.classes),
            "preprocessing": self.preprocessing.to_dict(),
            "data_digest": self.data_digest,
            "start_sha256": self.start_sha256,
            **({"feature": self.feature} if self.feature else {}),
        }

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> ClassifierConfig:
        """
        Raises:
            KeyError, TypeError, ValueError: not such a configuration.
        """
        if value["task"] != "classification":
            raise ValueError(f"task is {value['task']!r}, not 'classification'")
        return cls(
            backbone=dict(value["backbone"]),
            classes=tuple(value["classes"]),
            preprocessing=Preprocessing.from_dict(value["preprocessing"]),
            data_digest=value["data_digest"],
            start_sha256=value["start_sha256"],
            feature=value.get("feature", 0),
        )


def build_classifier(config: ClassifierConfig) -> Classifier:
    """The network that `config` describes, with fresh weights."""
    arguments = dict(config.backbone)
    backbone = models.create(arguments.pop("name"), **arguments)
    return Classifier(backbone, len(config.classes), config.feature)


def save_classifier(folder: Path, model: Classifier, config: ClassifierConfig) -> None:
    """Replace `folder` by the two files; the folder is whole or the old one stays.

    Weights are stored on the CPU in float32, whatever device and precision the model has now.
    """
    weights = {
        name: (value.detach().float() if value.is_floating_point() else value.detach()).cpu().contiguous()
        for name, value in model.state_dict().items()
    }
    with files.replace_folder(folder) as temporary:
        save_file(weights, temporary / WEIGHTS)
        files.write_json(temporary / CONFIG, config.to_dict())


def load_config(folder: Path) -> ClassifierConfig:
    """Read `config.json` alone.

    Raises:
        DataError: missing or not a classifier's configuration.
    """
    path = folder / CONFIG
    try:
        return ClassifierConfig.from_dict(files.read_json(path))
    except FileNotFoundError:
        raise DataError(f"{path} does not exist; run the finetune stage first") from None
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{path} does not describe a classifier: {type(error).__name__} {error}") from None


def load_classifier(folder: Path) -> tuple[Classifier, ClassifierConfig]:
    """The model in evaluation mode, float32 on the CPU, and its configuration.

    Raises:
        DataError: a file is missing or damaged, or the weights do not fit the configuration.
    """
    config = load_config(folder)
    path = folder / WEIGHTS
    try:
        weights = load_file(path)
    except FileNotFoundError:
        raise DataError(f"{path} does not exist; run the finetune stage first") from None
    except SafetensorError as error:
        raise DataError(f"{path} is damaged: {error}; run the finetune stage again") from None
    model = build_classifier(config)
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise DataError(f"{path} does not fit its {CONFIG}: {' '.join(str(error).split())[:300]}") from None
    return model.eval(), config
