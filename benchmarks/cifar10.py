"""A part of CIFAR-10 as tensors, for benchmarks that need real images and labels."""

from __future__ import annotations

import io
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from flows.data.readers import read_cifar10
from flows.data.sources import resolve
from flows.imaging import Preprocessing

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)


def load_encoded(split: str, count: int) -> list[tuple[bytes, int]]:
    """Encoded files and labels of `count` images, drawn at random; found as the pipeline does."""
    _, folder = resolve("cifar10", Path.cwd())
    with ExitStack() as resources:
        source = read_cifar10(Path(folder), resources)
        images = [image for image in source.images if image.split == split and image.label is not None]
        order = np.random.default_rng(0).permutation(len(images))[:count]
        return [(images[i].load(1 << 20), int(images[i].label or 0)) for i in order]


def load_cifar10(split: str, count: int, side: int) -> tuple[Tensor, Tensor]:
    """Normalised images (n, 3, side, side) fp32 and labels (n,) int64."""
    encoded = load_encoded(split, count)
    resized = [
        np.asarray(Image.open(io.BytesIO(data)).convert("RGB").resize((side, side), Image.Resampling.BICUBIC))
        for data, _ in encoded
    ]
    pixels = torch.from_numpy(np.stack(resized)).permute(0, 3, 1, 2).float() / 255
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (MEAN, STD))
    return (pixels - mean) / std, torch.tensor([label for _, label in encoded])


def preprocessing(side: int) -> Preprocessing:
    """The same for an export."""
    return Preprocessing(side, side, MEAN, STD)
