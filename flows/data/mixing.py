"""Mixup (arXiv 1710.09412), CutMix (arXiv 1905.04899) and label smoothing of a batch, on any device."""

from __future__ import annotations

import math

import numpy as np
import torch


def mix(
    images: torch.Tensor,
    labels: torch.Tensor,
    num_classes: int,
    *,
    mixup: float,
    cutmix: float,
    label_smoothing: float,
    generator: torch.Generator,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Blend each image with another of the batch and the targets alike.

    One coefficient for the whole batch; partners are the batch in reverse order. With both methods on, each
    batch gets one of them, chosen evenly. Targets are always smoothed: 1 − s + s/K for the class, s/K for the
    others.

    Args:
        images: float (B, C, H, W), normalised; not changed.
        labels: int64 (B,), 0 … num_classes − 1.
        mixup: parameter of the Beta distribution of the blend; 0 = off.
        cutmix: the same for the area that is pasted; 0 = off.
        label_smoothing: s, 0 ≤ s < 1.
        generator: CPU generator, the only source of chance.

    Returns:
        The images and float32 targets (B, num_classes), each row summing to 1.

    Raises:
        ValueError: the images are not floating-point (a blend of uint8 would be rounded and could overflow).
    """
    if not images.is_floating_point():
        raise ValueError(f"mix needs floating-point images, got {images.dtype}")
    targets = _smooth(labels, num_classes, label_smoothing)
    if mixup <= 0 and cutmix <= 0:
        return images, targets
    seed = int(torch.randint(2**63 - 1, (), generator=generator, dtype=torch.int64))
    rng = np.random.default_rng(seed)  # torch has no public Beta sampler that takes a generator
    if cutmix > 0 and (mixup <= 0 or rng.random() < 0.5):
        images, kept = _cutmix(images, rng.beta(cutmix, cutmix), rng)
    else:
        kept = float(rng.beta(mixup, mixup))
        images = images * kept + images.flip(0) * (1.0 - kept)
    return images, targets * kept + targets.flip(0) * (1.0 - kept)


def _smooth(labels: torch.Tensor, num_classes: int, smoothing: float) -> torch.Tensor:
    targets = torch.full((len(labels), num_classes), smoothing / num_classes, device=labels.device)
    return targets.scatter_(1, labels[:, None], 1.0 - smoothing + smoothing / num_classes)


def _cutmix(images: torch.Tensor, kept: float, rng: np.random.Generator) -> tuple[torch.Tensor, float]:
    """Paste a rectangle of the partner; returns the share of the image that really remains its own."""
    height, width = images.shape[-2:]
    side = math.sqrt(1.0 - kept)
    half_h, half_w = int(height * side) // 2, int(width * side) // 2
    y, x = int(rng.integers(height)), int(rng.integers(width))
    top, bottom = max(y - half_h, 0), min(y + half_h, height)  # cut off at the border, as in the paper's code
    left, right = max(x - half_w, 0), min(x + half_w, width)
    mixed = images.clone()
    mixed[..., top:bottom, left:right] = images.flip(0)[..., top:bottom, left:right]
    return mixed, 1.0 - (bottom - top) * (right - left) / (height * width)
