"""MoBY (arXiv 2105.04553): find the other view of an image among the keys of many others.

The validation loss is the mean over the validation split of the same loss on fixed views (seeded by the
image), in eval mode, against the queues as they are; guessing costs 2·ln(queue_size + 1). It says how well
views are told apart, not how useful the features are: `knn` does.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from flows import plots
from flows.data import Batch, ImageDataset
from flows.data.views import Squeeze, Views, two_views
from flows.imaging import Preprocessing
from flows.params import Params
from flows.pretexts.images import ImagePretext
from flows.training import Processes
from models.pretext.moby import MoBY

VALIDATION_SEED = 2**32
"""Of the fixed views; no run is seeded alike, and all runs are validated on the same views."""


class MoBYPretext(ImagePretext):
    model: MoBY

    def __init__(self, params: Params, preprocessing: Preprocessing, processes: Processes) -> None:
        super().__init__(params, preprocessing, processes)
        moby, training = self.settings.moby, self.settings.training
        self.transform = Squeeze(moby.source_size)
        self.views = Views(params.model.image_size, **moby.views.model_dump())
        self.model = MoBY(
            self.create_backbone(moby.drop_path),
            self.create_backbone(0.0),
            queue_size=moby.queue_size,
            batch_size=training.batch_size,
            steps=training.steps,
            momentum=moby.momentum,
            temperature=moby.temperature,
            hidden_dim=moby.hidden_dim,
            key_dim=moby.key_dim,
        )

    def loss(self, engine: Any, batch: Batch) -> torch.Tensor:
        view_1, view_2 = self._views(batch, batch.positions, self.params.seed)
        first = int(batch.positions[0]) % self.settings.training.batch_size
        begins_step = first < self.micro_batch * self.processes.world_size  # its first micro-step
        value: torch.Tensor = engine(view_1, view_2, begins_step).loss
        return value

    def loss_on(self, data: ImageDataset, engine: Any) -> float:
        total = count = 0.0
        for batch, weight in self.eval_batches(data):
            losses = engine(*self._views(batch, batch.rows, VALIDATION_SEED)).losses
            total += weight * float(losses.double().sum())
            count += weight * len(losses)
        total, count = self.processes.sum([total, count])
        return total / count

    def _views(self, batch: Batch, numbers: torch.Tensor, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Normalised, on the device."""
        pair = two_views(batch.images.to(self.processes.device), numbers, seed, self.views)
        mean, std = (
            torch.tensor(values, device=self.processes.device).view(1, 3, 1, 1)
            for values in (self.preprocessing.mean, self.preprocessing.std)
        )
        first, second = ((view - mean) / std for view in pair)
        return first, second

    def initialize_from(self, path: Path) -> None:
        super().initialize_from(path)
        self.model.restart()

    def describe(self) -> dict[str, Any]:
        return {**self.settings.moby.model_dump(), "steps": self.settings.training.steps}

    def draw(self, images: ImageDataset) -> bytes:
        """The first validation images and the two views that they are validated on."""
        batch = self.first(images)
        pair = two_views(batch.images, batch.rows, VALIDATION_SEED, self.views)
        shown = [(view * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy() for view in pair]
        return plots.triple_grid(
            batch.images.permute(0, 2, 3, 1).numpy(), *shown, titles=("image", "view 1", "view 2")
        )
