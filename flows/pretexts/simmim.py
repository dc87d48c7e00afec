"""SimMIM (arXiv 2111.09886): paint in the hidden squares of an image.

The validation loss is the error summed over all masked pixels of the validation split, divided by their
number, in fp32 and eval mode, on centre crops, with masks seeded by the image: the same for every model,
subset, length and batch size (data scaling study). How much its absolute value depends on these choices is
what `extra_losses` tells.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from flows import plots
from flows.data import Augmentation, Batch, ImageDataset, ImageTransform, to_model_input
from flows.imaging import Preprocessing
from flows.params import Params
from flows.pretexts.images import ImagePretext
from flows.training import Processes
from models.backbones.layers import DropPath
from models.pretext.masks import average_distance, masks_from_ids, upsample_masks
from models.pretext.simmim import SimMIM, normalize_targets

MASK_STREAM_BIT = 40
"""Masks are drawn by number: in the validation split that of the row, in training numbers above this bit."""
NOISE_SEED = 2**33
"""Of the drop path in `extra_losses`: the same in every run with the same batch size."""
DISTANCE_MASKS = 64
"""Of the validation split, whose mean AvgDist is logged."""


class SimMIMPretext(ImagePretext):
    model: SimMIM

    def __init__(self, params: Params, preprocessing: Preprocessing, processes: Processes) -> None:
        super().__init__(params, preprocessing, processes)
        settings, choices = self.settings, self.settings.simmim
        self.transform = Augmentation(params.model.image_size, settings.crop_scale, flip=settings.flip)
        self.model = SimMIM(
            self.create_backbone(settings.drop_path),
            settings.mask_unit,
            settings.normalize_target,
            head=choices.head,
            inverse_swin=choices.inverse_swin,
            window_size=params.model.window_size or 0,
            target_size=choices.target_size,
            loss=choices.loss,
            loss_region=choices.loss_region,
            final_norm=choices.final_norm,
        )

    def loss(self, engine: Any, batch: Batch) -> torch.Tensor:
        # by place in the sequence, so that a step hides the same on any number of processes
        masks = self._masks(batch.positions + ((self.params.seed + 1) << MASK_STREAM_BIT))
        value: torch.Tensor = engine(self.normalized(batch), masks).loss
        return value

    def loss_on(self, data: ImageDataset, engine: Any, transform: ImageTransform | None = None) -> float:
        """
        Args:
            transform: prepares the images instead of the centre crop, seeded by the image.
        """
        total = masked = 0.0
        for batch, weight in self.eval_batches(data, transform):
            output = engine(self.normalized(batch), self._masks(batch.rows))
            total += weight * float(output.loss_sum)
            masked += weight * float(output.masked_pixels)
        total, masked = self.processes.sum([total, masked])
        return total / masked

    def extra_losses(self, images: ImageDataset, trained_on: ImageDataset, engine: Any) -> dict[str, float]:
        """The validation loss with drop path on, the one on random crops as in training, and the loss of
        images that were trained on, prepared like those of validation: `train_loss` is the mean over changing
        weights, crops and masks and cannot be compared with `val_loss`."""
        drop_paths = [module for module in self.model.modules() if isinstance(module, DropPath)]
        with torch.random.fork_rng():
            torch.manual_seed(NOISE_SEED + self.processes.rank)
            for module in drop_paths:
                module.train()
            dropped = self.loss_on(images, engine)
            for module in drop_paths:
                module.eval()
        return {
            "val_loss_drop_path": dropped,
            "val_loss_crops": self.loss_on(images, engine, self.transform),
            "train_loss_eval": self.loss_on(trained_on, engine),
        }

    def _masks(self, ids: torch.Tensor) -> torch.Tensor:
        return self._draw_masks(ids).to(self.processes.device)

    def _draw_masks(self, ids: torch.Tensor) -> torch.Tensor:
        """(B, g, g) bool on the device of `ids`: what is hidden of the images of these numbers."""
        kind = self.settings.simmim.mask_kind
        return masks_from_ids(ids, self.model.mask_grid, self.settings.mask_ratio, kind)

    def measures(self, data: ImageDataset) -> dict[str, float]:
        """AvgDist of the first validation masks, pixels: 10 to 20 served best (section 4.1.2)."""
        masks = self._draw_masks(torch.arange(min(DISTANCE_MASKS, len(data))))
        return {"mask_distance": float(average_distance(masks, self.model.mask_unit).mean())}

    def describe(self) -> dict[str, Any]:
        return {
            "mask_unit": self.settings.mask_unit,
            "mask_ratio": self.settings.mask_ratio,
            "normalize_target": self.settings.normalize_target,
            "simmim": self.settings.simmim.model_dump(),
        }

    @torch.no_grad()
    def draw(self, images: ImageDataset) -> bytes:
        """The first validation images, what the model saw of them, and its guess in the hidden squares."""
        batch = self.first(images)
        inputs = to_model_input(batch.images, self.preprocessing.mean, self.preprocessing.std)
        masks = self._draw_masks(batch.rows)
        prediction = self.model.eval()(inputs, masks).prediction
        if self.model.normalize_target:  # back to pixels by the statistics the target was normalised with
            plain = to_size(inputs, prediction.shape[-1])
            scaled = normalize_targets(plain, self.model.normalize_target)
            prediction = plain + (prediction - scaled) * _local_deviation(plain, scaled)
        prediction = to_size(prediction, inputs.shape[-1])
        hidden = upsample_masks(masks, self.model.mask_unit)[:, None]
        masked = torch.where(hidden, torch.zeros_like(inputs), inputs)
        filled = torch.where(hidden, prediction, inputs)
        return plots.triple_grid(*(self.to_pixels(values) for values in (inputs, masked, filled)))


def to_size(images: torch.Tensor, side: int) -> torch.Tensor:
    """(B, 3, S, S) as squares of another side: means where it is smaller, repeated pixels where larger."""
    if side < images.shape[-1]:
        return F.avg_pool2d(images, images.shape[-1] // side)
    return images if side == images.shape[-1] else F.interpolate(images, size=(side, side))


def _local_deviation(images: torch.Tensor, scaled: torch.Tensor) -> torch.Tensor:
    """Ratio of a pixel's change to its normalised value's, per image and channel (a picture's accuracy)."""
    spread = scaled.std(dim=(2, 3), keepdim=True).clamp_min(1e-3)
    return images.std(dim=(2, 3), keepdim=True) / spread
