"""What the stage `pretrain` asks of a pretext: a model, a loss, how good it is, and what to show of it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import models
from flows.data import Batch, ImageDataset, ImageTransform, even_eval_batches, to_model_input
from flows.imaging import Preprocessing
from flows.params import Params
from flows.published import load_published
from flows.training import Processes, micro_batch_size
from models.backbones.interface import Backbone

Pixels = np.ndarray[Any, np.dtype[np.uint8]]


class Pretext(ABC):
    """Holds the model that is trained; every method that takes `engine` calls that, the engine around it."""

    transform: ImageTransform
    """From a training image to the pixels of a batch."""
    model: nn.Module
    """Its backbone is called `backbone`."""

    def __init__(self, params: Params, preprocessing: Preprocessing, processes: Processes) -> None:
        self.params, self.settings = params, params.pretrain
        self.preprocessing, self.processes = preprocessing, processes
        self.micro_batch = micro_batch_size(params.pretrain.training, processes.world_size)

    @abstractmethod
    def loss(self, engine: Any, batch: Batch) -> torch.Tensor:
        """Of a micro-batch of the training sequence; the mean over processes and micro-steps is minimised."""

    @abstractmethod
    def loss_on(self, images: ImageDataset, engine: Any) -> float:
        """Of all `images`, in eval mode, on all processes; chance depends on each image's row alone."""

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """What config.json says of it beside model, preprocessing and data."""

    @abstractmethod
    def draw(self, images: ImageDataset) -> bytes:
        """PNG: what the pretext makes of the first images; called where the weights are on the CPU."""

    def measures(self, images: ImageDataset) -> dict[str, float]:
        """What else is worth knowing of the task itself, for the stage's metrics."""
        return {}

    @property
    def backbone(self) -> Backbone:
        backbone: Backbone = self.model.backbone  # type: ignore[assignment]
        return backbone

    def initialize_from(self, path: Path) -> None:
        """Begin a new run with the weights of an earlier one or of a published checkpoint of any layout.

        What the file has nothing for starts fresh, which is printed: a SimMIM that begins with a classifier's
        backbone has a new decoder.

        Raises:
            DataError: no such file, or it does not hold exactly the weights of this backbone.
        """
        report = load_published(path, self.model, "pretrain.initialize_from")
        if self.processes.is_main:
            print("\n".join(report.lines()))

    def create_backbone(self, drop_path: float) -> Backbone:
        return models.create(
            self.params.model.backbone,
            image_size=self.params.model.image_size,
            patch_size=self.params.model.patch_size,
            window_size=self.params.model.window_size,
            mlp_norm=self.params.model.mlp_norm,
            drop_path=drop_path,
            activation_checkpointing=self.settings.training.activation_checkpointing,
            attention_chunk=self.settings.training.attention_chunk,
            pretraining=True,
        )

    def eval_batches(self, images: ImageDataset) -> Iterator[tuple[Batch, float]]:
        """This process's share, on the device; see `even_eval_batches`."""
        return even_eval_batches(
            images, self.preprocessing, self.micro_batch, self.processes.rank, self.processes.world_size
        )

    def normalized(self, batch: Batch) -> torch.Tensor:
        images = batch.images.to(self.processes.device)
        return to_model_input(images, self.preprocessing.mean, self.preprocessing.std)

    def first(self, images: ImageDataset) -> Batch:
        """The images of the picture."""
        count = min(self.settings.picture_images, len(images))
        batch, _ = next(even_eval_batches(images, self.preprocessing, count, 0, 1))
        return batch

    def to_pixels(self, images: torch.Tensor) -> Pixels:
        """Normalised (B, 3, S, S) to uint8 (B, S, S, 3)."""
        mean = torch.tensor(self.preprocessing.mean).view(1, 3, 1, 1)
        std = torch.tensor(self.preprocessing.std).view(1, 3, 1, 1)
        pixels = ((images * std + mean) * 255).round().clamp(0, 255)
        return pixels.permute(0, 2, 3, 1).to(torch.uint8).numpy()
