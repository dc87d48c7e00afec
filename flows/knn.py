"""How well the neighbours of an image know its class: the probe that trains nothing.

Weighted votes among the nearest embeddings of training images (arXiv 1805.01978, section 3.4). Nothing is
augmented: all images are prepared as for evaluation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from flows.data import Batch, to_model_input
from flows.imaging import Preprocessing
from flows.params import NearestNeighbours
from models.classification.neighbours import vote

Weighted = Iterable[tuple[Batch, float]]
"""Batches of this process; one of weight 0 is company for other processes and does not count."""


def choose_voters(rows: Sequence[int], count: int) -> list[int]:
    """`count` of the rows, evenly spread, because neighbours in an index may be of one class; or all."""
    count = min(count, len(rows))
    return [rows[i * len(rows) // count] for i in range(count)]


@torch.no_grad()
def top1(
    embedding: Callable[[Tensor], Tensor],
    known: Weighted,
    queries: Weighted,
    settings: NearestNeighbours,
    preprocessing: Preprocessing,
    device: torch.device,
    gather: Callable[[Any], list[Any]] = lambda value: [value],
) -> float:
    """Fraction of queries whose class the known images name.

    Args:
        embedding: images (B, 3, S, S) to (B, C), in eval mode.
        gather: a value of every process, on all of them; each compares its own queries with all known images.
    """

    def embed(batches: Weighted) -> tuple[Tensor, Tensor]:
        vectors, labels = [], []
        for batch, weight in batches:
            images = to_model_input(batch.images.to(device), preprocessing.mean, preprocessing.std)
            found = embedding(images).float()
            if weight:
                vectors.append(found.cpu())
                labels.append(batch.labels)
        return torch.cat(vectors) if vectors else torch.empty(0, 1), torch.cat(
            [*labels, torch.empty(0).long()]
        )

    parts = [part for part in gather(embed(known)) if len(part[1])]
    vectors, labels = (torch.cat(values) for values in zip(*parts, strict=True))
    mine, classes = embed(queries)
    correct = 0
    if len(classes):
        answers = vote(mine, vectors, labels, int(labels.max()) + 1, settings.k, settings.temperature)
        correct = int((answers == classes).sum())
    counts: list[tuple[int, int]] = gather((correct, len(classes)))
    return sum(right for right, _ in counts) / sum(number for _, number in counts)
