"""SimMIM (arXiv 2111.09886): hide squares of an image and predict their pixels with one linear layer.

Hidden tokens are replaced by a learnt mask token after the patch embedding, the backbone sees all tokens, a
1×1 convolution predicts every pixel of the final map's cells, and the loss is the mean absolute error over
the hidden pixels alone. Optionally the target is normalised by the statistics of a sliding window (the recipe
of Swin V2). Every choice that the paper ablates is an argument; the defaults are the published method.

Shape legend: B batch, S image side, u side of a hidden square, T side of the target, all in pixels.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, cast, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.backbones.interface import Backbone
from models.pretext.masks import masked_count, masks_from_ids, random_masks, upsample_masks
from models.pretext.simmim_heads import HeadKind, build_head

LossKind = Literal["l1", "l2", "smooth_l1"]
LossRegion = Literal["masked", "all"]


class SimMIMOutput(NamedTuple):
    """What one forward pass yields. ``loss`` and ``loss_sum`` are fp32 scalars.

    Attributes:
        loss: mean error over the pixels that count (hidden ones, or all) and channels of this batch.
        prediction: (B, 3, T, T), in the units of the target, for all pixels.
        loss_sum: errors, averaged over channels and summed over the pixels that count; over a whole set the
            loss is the sum of ``loss_sum`` divided by the sum of ``masked_pixels``.
        masked_pixels: number of pixels of the target that count in the batch, int64 scalar.
    """

    loss: Tensor
    prediction: Tensor
    loss_sum: Tensor
    masked_pixels: Tensor


class SimMIM(nn.Module):
    """A backbone with a mask token and a light decoder.

    Args:
        backbone: the network to pretrain; its final map has ``stride`` pixels per token.
        mask_unit: side of a hidden square in pixels, a multiple of the patch size that divides the image.
        normalize_target: side of the window of ``normalize_targets``, odd; 0 predicts the pixels themselves.
        head: what predicts the pixels, see ``simmim_heads.py``.
        inverse_swin: name of the Swin that the head of that kind is made of.
        window_size: of that Swin, in tokens.
        target_size: side of the target; smaller ones are the image's means over squares. 0 = the image's.
        loss: error of a pixel: absolute, squared, or smooth L1 (squared below 1, halved).
        loss_region: the pixels whose errors count.
        final_norm: keep the backbone's last norm before the head. Without it the norm's parameters stay as
            they are and are not trained.

    Raises:
        ValueError: the sizes do not fit, or a choice is unknown.
    """

    def __init__(
        self,
        backbone: Backbone,
        mask_unit: int,
        normalize_target: int = 0,
        *,
        head: HeadKind = "linear",
        inverse_swin: str = "",
        window_size: int = 0,
        target_size: int = 0,
        loss: LossKind = "l1",
        loss_region: LossRegion = "masked",
        final_norm: bool = True,
    ) -> None:
        super().__init__()
        if mask_unit < 1 or mask_unit % backbone.patch_size or backbone.image_size % mask_unit:
            raise ValueError(
                f"mask_unit is {mask_unit}, but must be a multiple of patch_size {backbone.patch_size} that "
                f"divides image_size {backbone.image_size}."
            )
        _check_window(normalize_target)
        _check_choice("loss", loss, get_args(LossKind))
        _check_choice("loss_region", loss_region, get_args(LossRegion))
        if backbone.image_size % backbone.stride:
            raise ValueError(
                f"image_size is {backbone.image_size}, but SimMIM predicts whole cells of {backbone.stride} "
                f"pixels: choose a multiple of {backbone.stride}."
            )
        self.backbone = backbone
        self.mask_unit = mask_unit
        self.normalize_target = normalize_target
        self.mask_grid = backbone.image_size // mask_unit
        self.target_size = target_size or backbone.image_size
        if backbone.image_size % self.target_size or self.target_size % self.mask_grid:
            raise ValueError(
                f"target_size is {target_size}, but must divide image_size {backbone.image_size} and be a "
                f"multiple of the {self.mask_grid} squares of the mask along a side."
            )
        self.loss = loss
        self.loss_region = loss_region
        self.mask_token = nn.Parameter(torch.empty(1, 1, backbone.embed_dim))
        nn.init.trunc_normal_(self.mask_token, std=0.02)
        self.decoder = build_head(
            head,
            num_features=backbone.num_features,
            grid=backbone.image_size // backbone.stride,
            target_size=self.target_size,
            inverse_swin=inverse_swin,
            window_size=window_size,
        )
        if not final_norm:
            _skip_final_norm(backbone)

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

        errors = self._errors(prediction.float(), self.target_of(images)).mean(dim=1)  # (B, T, T)
        counted = upsample_masks(mask, self.target_size // self.mask_grid)
        if self.loss_region == "all":
            counted = torch.ones_like(counted)
        loss_sum = (errors * counted).sum()
        masked_pixels = counted.sum()
        return SimMIMOutput(loss_sum / (masked_pixels + 1e-5), prediction, loss_sum, masked_pixels)

    def target_of(self, images: Tensor) -> Tensor:
        """(B, 3, S, S) → (B, 3, T, T) fp32; a normalised target counts its window in the target's pixels."""
        target = images.float()
        if self.target_size != self.backbone.image_size:
            target = F.avg_pool2d(target, self.backbone.image_size // self.target_size)
        return normalize_targets(target, self.normalize_target) if self.normalize_target else target

    def _errors(self, prediction: Tensor, target: Tensor) -> Tensor:
        if self.loss == "l1":
            return (prediction - target).abs()
        if self.loss == "l2":
            return (prediction - target).square()
        return F.smooth_l1_loss(prediction, target, reduction="none")


def _skip_final_norm(backbone: Backbone) -> None:
    """The head reads what the norm would read; the norm keeps its place among the weights, untrained."""
    norm = getattr(backbone, "norm", None)
    if not isinstance(norm, nn.Module) or isinstance(norm, nn.Identity):
        raise ValueError("final_norm is off, but this backbone has no last norm to leave out.")
    norm.requires_grad_(False)
    norm.register_forward_hook(lambda module, inputs, output: inputs[0])


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


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} is {value!r}, but must be one of {', '.join(choices)}.")


def _check_window(window: int) -> None:
    if window and (window < 3 or window % 2 == 0):
        raise ValueError(
            f"normalize_target is {window}, but must be 0 (off) or an odd number of pixels from 3 on."
        )


__all__ = ["SimMIM", "SimMIMOutput", "masked_count", "masks_from_ids", "normalize_targets", "random_masks"]
