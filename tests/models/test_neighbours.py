"""Votes of neighbours against a loop."""

from __future__ import annotations

import math
from collections import defaultdict

import torch
import torch.nn.functional as F

from models.classification.neighbours import vote


def test_votes_are_those_of_a_loop_over_queries() -> None:
    generator = torch.Generator().manual_seed(0)
    known, queries = (torch.randn(n, 4, generator=generator, dtype=torch.float64) for n in (60, 25))
    labels = torch.randint(0, 5, (60,), generator=generator)
    expected = []
    for query in queries:
        similarities = [float(F.cosine_similarity(query, other, dim=0)) for other in known]
        nearest = sorted(range(60), key=lambda i: -similarities[i])[:7]
        votes: defaultdict[int, float] = defaultdict(float)
        for i in nearest:
            votes[int(labels[i])] += math.exp(similarities[i] / 0.1)
        expected.append(max(votes, key=lambda label: votes[label]))
    assert vote(queries, known, labels, 5, k=7, temperature=0.1).tolist() == expected


def test_fewer_known_images_than_neighbours_are_all_heard() -> None:
    known, labels = torch.eye(3), torch.tensor([0, 1, 1])
    answers = vote(torch.tensor([[1.0, 0.1, 0.0], [0.1, 1.0, 0.9]]), known, labels, 2, k=20)
    assert answers.tolist() == [0, 1]
