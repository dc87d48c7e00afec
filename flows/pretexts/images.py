"""What the stage `pretrain` asks of a pretext on images beside model and loss: views, pictures, backbone."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

import models
from flows.data import Batch, ImageDataset, ImageTransform, even_eval_batches, to_model_input
from flows.imaging import Preprocessing
from flows.params import Params
from flows.pretexts.interface import Pretext
from flows.published import load_published
from flows.training import Processes
from models.backbones.interface import Backbone

Pixels = np.ndarray[Any, np.dtype[np.uint8]]


class ImagePretext(Pretext[Batch, ImageDataset]):
    """Its model has a backbone that is called `backbone`; chance depends on each image's row alone."""

    transform: ImageTransform
    """From a training image to the pixels of a batch."""

    def __init__(self, params: Params, preprocessing: Preprocessing, processes: Processes) -> None:
        super().__init__(params, params.pretrain.training, processes)
        self.settings, self.preprocessing = params.pretrain, preprocessing

    def extra_losses(self, images: ImageDataset, trained_on: ImageDataset, engine: Any) -> dict[str, float]:
        """Further losses that a study of data scaling compares, like `loss_on`; called where
        `pretrain.extra_losses` is on.

        Args:
            images: the validation split.
            trained_on: training images that every subset has.
        """
        return {}

    @abstractmethod
    def draw(self, images: ImageDataset) -> bytes:
        """PNG: what the pretext makes of the first images; called where the weights are on the CPU."""

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

    def eval_batches(
        self, images: ImageDataset, transform: ImageTransform | None = None
    ) -> Iterator[tuple[Batch, float]]:
        """This process's share, on the device; see `even_eval_batches`."""
        rank, world_size = self.processes.rank, self.processes.world_size
        return even_eval_batches(images, self.preprocessing, self.micro_batch, rank, world_size, transform)

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
