"""SimMIM (arXiv 2111.09886): paint in the hidden squares of an image.

The validation loss is the L1 error summed over all masked pixels of the validation split, divided by their
number, in eval mode, on centre crops, with masks seeded by the image: the same for every model (data scaling
study).
"""

from __future__ import annotations

from typing import Any

import torch

from flows import plots
from flows.data import Augmentation, Batch, ImageDataset, to_model_input
from flows.imaging import Preprocessing
from flows.params import Params
from flows.pretexts.interface import Pretext
from flows.training import Processes
from models.pretext.masks import masks_from_ids, upsample_masks
from models.pretext.simmim import SimMIM, normalize_targets

MASK_STREAM_BIT = 40
"""Masks are drawn by number: in the validation split that of the row, in training numbers above this bit."""


class SimMIMPretext(Pretext):
    model: SimMIM

    def __init__(self, params: Params, preprocessing: Preprocessing, processes: Processes) -> None:
        super().__init__(params, preprocessing, processes)
        settings = self.settings
        self.transform = Augmentation(params.model.image_size, settings.crop_scale, flip=settings.flip)
        self.model = SimMIM(
            self.create_backbone(settings.drop_path), settings.mask_unit, settings.normalize_target
        )

    def loss(self, engine: Any, batch: Batch) -> torch.Tensor:
        # by place in the sequence, so that a step hides the same on any number of processes
        masks = self._masks(batch.positions + ((self.params.seed + 1) << MASK_STREAM_BIT))
        value: torch.Tensor = engine(self.normalized(batch), masks).loss
        return value

    def loss_on(self, images: ImageDataset, engine: Any) -> float:
        total = masked = 0.0
        for batch, weight in self.eval_batches(images):
            output = engine(self.normalized(batch), self._masks(batch.rows))
            total += weight * float(output.loss_sum)
            masked += weight * float(output.masked_pixels)
        total, masked = self.processes.sum([total, masked])
        return total / masked

    def _masks(self, ids: torch.Tensor) -> torch.Tensor:
        masks = masks_from_ids(ids, self.model.mask_grid, self.settings.mask_ratio)
        return masks.to(self.processes.device)

    def describe(self) -> dict[str, Any]:
        return {
            "mask_unit": self.settings.mask_unit,
            "mask_ratio": self.settings.mask_ratio,
            "normalize_target": self.settings.normalize_target,
        }

    @torch.no_grad()
    def draw(self, images: ImageDataset) -> bytes:
        """The first validation images, what the model saw of them, and its guess in the hidden squares."""
        batch = self.first(images)
        inputs = to_model_input(batch.images, self.preprocessing.mean, self.preprocessing.std)
        masks = masks_from_ids(batch.rows, self.model.mask_grid, self.settings.mask_ratio)
        prediction = self.model.eval()(inputs, masks).prediction
        if (
            self.model.normalize_target
        ):  # back to pixels by the statistics that the target was normalised with
            scaled = normalize_targets(inputs, self.model.normalize_target)
            prediction = inputs + (prediction - scaled) * _local_deviation(inputs, scaled)
        hidden = upsample_masks(masks, self.model.mask_unit)[:, None]
        masked = torch.where(hidden, torch.zeros_like(inputs), inputs)
        filled = torch.where(hidden, prediction, inputs)
        return plots.triple_grid(*(self.to_pixels(values) for values in (inputs, masked, filled)))


def _local_deviation(images: torch.Tensor, scaled: torch.Tensor) -> torch.Tensor:
    """Ratio of a pixel's change to its normalised value's, per image and channel (a picture's accuracy)."""
    spread = scaled.std(dim=(2, 3), keepdim=True).clamp_min(1e-3)
    return images.std(dim=(2, 3), keepdim=True) / spread
