"""SimMIM (arXiv 2111.09886): hide squares of an image and predict their pixels with one linear layer.

Hidden tokens are replaced by a learnt mask token after the patch embedding, the backbone sees all tokens, a
1×1 convolution predicts every pixel of the final map's cells, and the loss is the mean absolute error over
the hidden pixels alone. Optionally the target is normalised by the statistics of a sliding window (the recipe
of Swin V2).

Shape legend: B batch, S image side, u side of a hidden square, all in pixels.
"""

from __future__ import annotations

from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.backbones.interface import Backbone
from models.pretext.masks import masked_count, masks_from_ids, random_masks, upsample_masks


class SimMIMOutput(NamedTuple):
    """What one forward pass yields. ``loss`` and ``loss_sum`` are fp32 scalars.

    Attributes:
        loss: mean absolute error over hidden pixels and channels of this batch.
        prediction: (B, 3, S, S), in the units of the target, for all pixels.
        loss_sum: absolute errors, averaged over channels and summed over hidden pixels; over a whole set the
            loss is the sum of ``loss_sum`` divided by the sum of ``masked_pixels``.
        masked_pixels: number of hidden pixels in the batch, int64 scalar.
    """

    loss: Tensor
    prediction: Tensor
    loss_sum: Tensor
    masked_pixels: Tensor


class SimMIM(nn.Module):
    """A backbone with a mask token and a linear decoder.

    Args:
        backbone: the network to pretrain; its final map has ``stride`` pixels per token.
        mask_unit: side of a hidden square in pixels, a multiple of the patch size that divides the image.
        normalize_target: side of the window of ``normalize_targets``, odd; 0 predicts the pixels themselves.

    Raises:
        ValueError: the mask unit or the window does not fit.
    """

    def __init__(self, backbone: Backbone, mask_unit: int, normalize_target: int = 0) -> None:
        super().__init__()
        if mask_unit < 1 or mask_unit % backbone.patch_size or backbone.image_size % mask_unit:
            raise ValueError(
                f"mask_unit is {mask_unit}, but must be a multiple of patch_size {backbone.patch_size} that "
                f"divides image_size {backbone.image_size}."
            )
        _check_window(normalize_target)
        if backbone.image_size % backbone.stride:
            raise ValueError(
                f"image_size is {backbone.image_size}, but SimMIM predicts whole cells of {backbone.stride} "
                f"pixels: choose a multiple of {backbone.stride}."
            )
        self.backbone = backbone
        self.mask_unit = mask_unit
        self.normalize_target = normalize_target
        self.mask_grid = backbone.image_size // mask_unit
        self.mask_token = nn.Parameter(torch.empty(1, 1, backbone.embed_dim))
        nn.init.trunc_normal_(self.mask_token, std=0.02)
        # Channel c·r² + i·r + j of the convolution becomes pixel (i, j) of channel c within a cell.
        self.decoder = nn.Sequential(
            nn.Conv2d(backbone.num_features, 3 * backbone.stride**2, kernel_size=1),
            nn.PixelShuffle(backbone.stride),
        )

    def forward(self, images: Tensor, mask: Tensor) -> SimMIMOutput:
        """``images`` (B, 3, S, S) normalised floats, ``mask`` (B, S/u, S/u) bool, set where hidden.

        Raises:
            ValueError: the mask has another shape.
        """
        expected = (images.shape[0], self.mask_grid, self.mask_grid)
        if tuple(mask.shape) != expected:
            raise ValueError(f"the mask has shape {tuple(mask.shape)}, but these images need {expected}.")
        token_mask = upsample_masks(mask, self.mask_unit // self.backbone.patch_size)
        features = self.backbone.forward_features(images, token_mask, self.mask_token)
        prediction = cast(Tensor, self.decoder(features))

        target = images.float()
        if self.normalize_target:
            target = normalize_targets(target, self.normalize_target)
        hidden = upsample_masks(mask, self.mask_unit)
        errors = (prediction.float() - target).abs().mean(dim=1)  # (B, S, S)
        loss_sum = (errors * hidden).sum()
        masked_pixels = hidden.sum()
        return SimMIMOutput(loss_sum / (masked_pixels + 1e-5), prediction, loss_sum, masked_pixels)


def normalize_targets(images: Tensor, window: int) -> Tensor:
    """Each pixel of (B, C, S, S), normalised by mean and unbiased variance of the window around it, per
    channel.

    Windows are cut at the border: only pixels inside the image count. ``window`` is odd and at least 3.
    """
    _check_window(window)
    height, width = images.shape[-2:]
    mean = _window_mean(images, window)
    variance = _window_mean(images * images, window) - mean * mean
    count = _window_count(height, window, images)[:, None] * _window_count(width, window, images)[None, :]
    variance = (variance * (count / (count - 1.0))).clamp_min(0.0)
    return (images - mean) * torch.rsqrt(variance + 1e-6)


def _window_mean(x: Tensor, window: int) -> Tensor:
    # A mean over a rectangle is a mean of means over equally long rows: two thin poolings instead of a square
    # one.
    half = window // 2
    x = F.avg_pool2d(x, (window, 1), stride=1, padding=(half, 0), count_include_pad=False)
    return F.avg_pool2d(x, (1, window), stride=1, padding=(0, half), count_include_pad=False)


def _window_count(size: int, window: int, like: Tensor) -> Tensor:
    position = torch.arange(size, device=like.device)
    half = window // 2
    return ((position + half).clamp_max(size - 1) - (position - half).clamp_min(0) + 1).to(like.dtype)


def _check_window(window: int) -> None:
    if window and (window < 3 or window % 2 == 0):
        raise ValueError(
            f"normalize_target is {window}, but must be 0 (off) or an odd number of pixels from 3 on."
        )


__all__ = ["SimMIM", "SimMIMOutput", "masked_count", "masks_from_ids", "normalize_targets", "random_masks"]
