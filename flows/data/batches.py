"""Batches: images by position in an endless, seeded sequence, so that training can stop and go on anywhere.

The sequence is epoch after epoch, each a permutation that depends only on the seed and the epoch's number.
Optimiser step t takes positions [t·G, (t+1)·G) for a global batch of G, and the augmentation of a sample
depends only on the seed and its position. So the data of a step are the same after a resume, with any number
of loading processes, and, taken over all ranks and micro-steps, with any number of training processes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset

from flows import imaging
from flows.data.augmentation import ImageTransform
from flows.data.dataset import ImageDataset
from flows.data.manifest import Manifest
from flows.errors import DataError
from flows.imaging import Preprocessing
from flows.params import Model

_ORDER, _AUGMENT, _EVALUATE = 1, 2, 3  # separate random streams under one seed


@dataclass(frozen=True)
class Batch:
    """B images with what is known of them."""

    images: torch.Tensor
    """uint8 (B, 3, S, S)."""
    labels: torch.Tensor
    """int64 (B,); -1 if unlabelled."""
    positions: torch.Tensor
    """int64 (B,): place in the endless training sequence, or in the data set when evaluating."""
    rows: torch.Tensor
    """int64 (B,): row of the split's index; names an image across subsets and runs."""


def preprocessing_for(manifest: Manifest, model: Model) -> Preprocessing:
    """The evaluation preprocessing: images larger than the network's input lose their border (224 of 256)."""
    size = model.image_size
    resize_to = size if manifest.median_short_side <= size else round(size * 256 / 224)
    return Preprocessing(image_size=size, resize_to=resize_to, mean=manifest.mean, std=manifest.std)


def train_batches(
    dataset: ImageDataset,
    augmentation: ImageTransform,
    *,
    batch_size: int,
    global_batch: int,
    seed: int,
    start_step: int,
    steps: int,
    rank: int,
    world_size: int,
    accumulation: int,
    workers: int,
) -> Iterator[Batch]:
    """The micro-batches of one process for `steps` optimiser steps, `accumulation` each, from `start_step`.

    Args:
        batch_size: images per process and micro-step.
        global_batch: images per optimiser step, = batch_size · world_size · accumulation.
        workers: loading processes; 0 loads in this one.

    Raises:
        ValueError: the batch sizes disagree, or the data set is empty.
    """
    if global_batch != batch_size * world_size * accumulation:
        raise ValueError(
            f"global batch {global_batch} is not {batch_size} images x {world_size} processes x "
            f"{accumulation} micro-steps"
        )
    if len(dataset) == 0:
        raise ValueError("cannot train on an empty data set")
    micro_batches = _MicroBatches(dataset, augmentation, batch_size, seed, rank, world_size)
    numbers = range(start_step * accumulation, (start_step + steps) * accumulation)
    if workers == 0:
        return (micro_batches[number] for number in numbers)
    return _load_elsewhere(micro_batches, numbers, workers)


def _load_elsewhere(micro_batches: _MicroBatches, numbers: range, workers: int) -> Iterator[Batch]:
    loader = DataLoader(
        _Answers(micro_batches),
        sampler=numbers,
        batch_size=None,  # an item is a whole batch
        num_workers=workers,
        collate_fn=_unchanged,
        # else the loader would draw from the global generator, and the model's noise depend on `workers`
        generator=torch.Generator(),
    )
    for answer in loader:
        if isinstance(answer, DataError):
            raise answer
        yield answer


@dataclass
class _MicroBatches(Dataset[Batch]):
    """Micro-batch n of this rank; micro-step n of all ranks covers positions [n·B·W, (n+1)·B·W)."""

    dataset: ImageDataset
    augmentation: ImageTransform
    batch_size: int
    seed: int
    rank: int
    world_size: int
    _orders: dict[int, NDArray[np.int64]] = field(default_factory=dict)

    def __getitem__(self, number: int) -> Batch:
        first = (number * self.world_size + self.rank) * self.batch_size
        positions = np.arange(first, first + self.batch_size, dtype=np.int64)
        chosen = [int(self._order(p // len(self.dataset))[p % len(self.dataset)]) for p in positions.tolist()]
        size = self.augmentation.image_size
        images = np.empty((self.batch_size, 3, size, size), dtype=np.uint8)
        for slot, (position, i) in enumerate(zip(positions.tolist(), chosen, strict=True)):
            rng = _generator(self.seed, _AUGMENT, position)
            images[slot] = self.augmentation(self.dataset.image(i), rng).transpose(2, 0, 1)
        return _batch(self.dataset, images, positions, chosen)

    def _order(self, epoch: int) -> NDArray[np.int64]:
        if epoch not in self._orders:
            if len(self._orders) >= 2:  # a batch seldom touches more than two epochs
                self._orders.pop(min(self._orders))
            self._orders[epoch] = _generator(self.seed, _ORDER, epoch).permutation(len(self.dataset))
        return self._orders[epoch]


def _generator(seed: int, stream: int, number: int) -> np.random.Generator:
    # Philox is counter-based: every key is a stream of its own and costs nothing to begin
    return np.random.Generator(
        np.random.Philox(key=np.array([seed, number], np.uint64), counter=[0, 0, 0, stream])
    )


@dataclass
class _Answers(Dataset["Batch | DataError"]):
    """Micro-batches, or a user's mistake as a value: raised in a worker it would arrive as a stack trace."""

    micro_batches: _MicroBatches

    def __getitem__(self, number: int) -> Batch | DataError:
        try:
            return self.micro_batches[number]
        except DataError as error:
            return error


def _unchanged(answer: Any) -> Any:
    return answer


def _batch(
    dataset: ImageDataset, images: NDArray[np.uint8], positions: NDArray[np.int64], chosen: list[int]
) -> Batch:
    return Batch(
        images=torch.from_numpy(images),
        labels=torch.from_numpy(dataset.labels[chosen]),
        positions=torch.from_numpy(positions),
        rows=torch.from_numpy(dataset.rows[chosen]),
    )


def eval_batches(
    dataset: ImageDataset,
    preprocessing: Preprocessing,
    batch_size: int,
    rank: int = 0,
    world_size: int = 1,
    transform: ImageTransform | None = None,
) -> Iterator[Batch]:
    """Every image once over all ranks, resized and cropped as the server does; the last batch may be smaller.

    Ranks take every `world_size`-th image, so their numbers of images, and of batches, may differ by one.

    Args:
        transform: prepares the images instead, each with the chance that belongs to its row in every run.
    """
    if transform is not None:

        def prepare(i: int) -> NDArray[np.uint8]:
            return transform(dataset.image(i), _generator(0, _EVALUATE, int(dataset.rows[i])))
    else:

        def prepare(i: int) -> NDArray[np.uint8]:
            return imaging.resize_and_crop(dataset.image(i), preprocessing)

    mine = list(range(rank, len(dataset), world_size))
    for start in range(0, len(mine), batch_size):
        chosen = mine[start : start + batch_size]
        images = np.ascontiguousarray(np.stack([prepare(i) for i in chosen]).transpose(0, 3, 1, 2))
        yield _batch(dataset, images, np.asarray(chosen, dtype=np.int64), chosen)


def even_eval_batches(
    dataset: ImageDataset,
    preprocessing: Preprocessing,
    batch_size: int,
    rank: int,
    world_size: int,
    transform: ImageTransform | None = None,
) -> Iterator[tuple[Batch, float]]:
    """`eval_batches` with equally many batches on every rank, each with its weight: 1, or 0 for a filler.

    With ZeRO-3 every forward pass is collective, so a rank that ran out of images would leave the others
    waiting.
    """
    largest_share = -(-len(dataset) // world_size)
    rounds = -(-largest_share // batch_size)
    batches = eval_batches(dataset, preprocessing, batch_size, rank, world_size, transform)
    filler: Batch | None = None
    for _ in range(rounds):
        batch = next(batches, None)
        if batch is not None:
            filler = batch
            yield batch, 1.0
        else:
            yield filler or next(eval_batches(dataset, preprocessing, 1)), 0.0


def to_model_input(
    images: torch.Tensor, mean: tuple[float, float, float], std: tuple[float, float, float]
) -> torch.Tensor:
    """uint8 (B, 3, S, S) to normalised float32 on the same device.

    On the CPU bit for bit what `flows.imaging.normalize` computes.
    """

    def constant(values: tuple[float, float, float]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.float32, device=images.device).view(1, 3, 1, 1)

    # divided by a tensor: for a plain number CUDA would multiply with the rounded reciprocal
    full = constant((255.0, 255.0, 255.0))
    return images.to(torch.float32).div(full).sub_(constant(mean)).div_(constant(std))
