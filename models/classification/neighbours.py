"""Classification by the nearest neighbours in an embedding (arXiv 1805.01978, section 3.4).

Shape legend: Q queries, N known vectors, C channels, K classes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

_CHUNK = 1024  # queries compared at once


def vote(
    queries: Tensor, known: Tensor, labels: Tensor, num_classes: int, k: int = 20, temperature: float = 0.07
) -> Tensor:
    """Class of each query (Q,): the k known vectors of largest cosine similarity s vote with exp(s / τ).

    Args:
        queries, known: (Q, C) and (N, C) of any length; all N are neighbours if there are fewer than k.
        labels: (N,) of the known ones, 0 … K − 1.
    """
    known = F.normalize(known, dim=1)
    answers = []
    for part in F.normalize(queries, dim=1).split(_CHUNK):  # type: ignore[no-untyped-call]
        similarity, nearest = (part @ known.T).topk(min(k, len(known)), dim=1)
        weights = ((similarity - similarity[:, :1]) / temperature).exp()  # a common factor changes no vote
        votes = torch.zeros(len(part), num_classes, dtype=weights.dtype, device=weights.device)
        answers.append(votes.scatter_add_(1, labels[nearest], weights).argmax(1))
    return torch.cat(answers)
