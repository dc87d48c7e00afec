"""What counting alone knows: unigram and bigram models of the training tokens, as baselines.

The bigram is interpolated Kneser-Ney (Chen and Goodman 1999, section 2.7) with one discount by their formula
n1 / (n1 + 2·n2): what remains of a context is shared out by how many different tokens a token has followed.
Unigrams have one count added, so that no token is impossible.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import sparse


@dataclass(frozen=True)
class Score:
    """Sums over predicted tokens."""

    nats: float
    correct: int
    tokens: int


@dataclass(frozen=True)
class Ngrams:
    unigram: NDArray[np.float64]  # (V,), sums to 1
    counts: sparse.csr_matrix  # (V, V): how often the column followed the row
    discount: float
    continuation: NDArray[np.float64]  # (V,), sums to 1

    def score(self, documents: Iterable[NDArray[np.int64]]) -> tuple[Score, Score]:
        """Unigram and bigram on every token but the first of each document."""
        seen = np.asarray(self.counts.sum(axis=1)).ravel()
        kinds = np.diff(self.counts.indptr)
        favourite = int(self.unigram.argmax())
        likeliest = np.array([self._likeliest(row) for row in range(len(self.unigram))])
        single = double = 0.0
        right_single = right_double = tokens = 0
        for ids in documents:
            before, after = ids[:-1], ids[1:]
            single -= float(np.log(self.unigram[after]).sum())
            counted = np.asarray(self.counts[before, after]).ravel()
            known = np.maximum(seen[before], 1)
            kept = np.maximum(counted - self.discount, 0.0) / known
            left = np.where(seen[before] > 0, self.discount * kinds[before] / known, 1.0)
            double -= float(np.log(kept + left * self.continuation[after]).sum())
            right_single += int((after == favourite).sum())
            right_double += int((after == likeliest[before]).sum())
            tokens += len(after)
        return Score(single, right_single, tokens), Score(double, right_double, tokens)

    def _likeliest(self, row: int) -> int:
        """The most probable token after `row`."""
        begin, end = self.counts.indptr[row], self.counts.indptr[row + 1]
        if begin == end:
            return int(self.continuation.argmax())
        followers, counted = self.counts.indices[begin:end], self.counts.data[begin:end]
        left = self.discount * (end - begin)
        kept = np.maximum(counted - self.discount, 0.0) + left * self.continuation[followers]
        best, other = int(kept.argmax()), int(self.continuation.argmax())
        return int(followers[best]) if kept[best] >= left * self.continuation[other] else other


def count(documents: Iterable[NDArray[np.int64]], vocab_size: int) -> Ngrams:
    """Count the tokens of `documents`; the first of each is given, never predicted."""
    pairs = [(ids[:-1], ids[1:]) for ids in documents]
    before = np.concatenate([pair[0] for pair in pairs])
    after = np.concatenate([pair[1] for pair in pairs])
    counts = sparse.csr_matrix((np.ones(len(after)), (before, after)), shape=(vocab_size, vocab_size))
    counts.sum_duplicates()
    single = np.bincount(after, minlength=vocab_size).astype(np.float64) + 1.0
    once, twice = int((counts.data == 1).sum()), int((counts.data == 2).sum())
    discount = once / (once + 2 * twice) if once and twice else 0.5
    followed = np.bincount(counts.indices, minlength=vocab_size).astype(np.float64) + 1.0
    return Ngrams(single / single.sum(), counts, discount, followed / followed.sum())
