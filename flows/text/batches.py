"""Rows of tokens: packed for training, document by document for judging.

The training sequence is epoch after epoch. In each, the documents stand one after the other in an order that
depends on the seed and the epoch's number alone; rows are cut from that stream every `context` tokens and
taken in a random order. Row r reads one token more than it is long, so that every token of the stream is
predicted once. What a row holds is a pure function of its position in the endless sequence: training stops
and goes on anywhere, with any number of processes.

    B rows · L = context + 1 tokens of a row
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

from flows.text.corpus import TokenSplit

PADDING = -1
"""The document of a token that is none."""
_DOCUMENTS, _ROWS = 1, 2  # separate random streams under one seed


@dataclass(frozen=True)
class TokenBatch:
    tokens: torch.Tensor
    """int64 (B, L); where there is none, 0."""
    documents: torch.Tensor
    """int64 (B, L): number of the document within the split or epoch, PADDING where there is no token."""
    predicted: float
    """Tokens that a micro-batch predicts, on average over its optimiser step; what its loss is divided by."""


def count_predicted(documents: torch.Tensor) -> int:
    """Tokens that the one before them predicts: both belong to the same document."""
    following, before = documents[:, 1:], documents[:, :-1]
    return int(((following == before) & (following != PADDING)).sum())


@dataclass
class _Epoch:
    order: NDArray[np.int64]  # documents
    starts: NDArray[np.int64]  # in the stream; the last entry is its length
    rows: NDArray[np.int64]  # order of the rows


@dataclass
class PackedRows:
    """The endless training sequence of one split."""

    split: TokenSplit
    context: int
    seed: int
    _epochs: dict[int, _Epoch] = field(default_factory=dict)

    @property
    def rows_per_epoch(self) -> int:
        return max(1, -(-(int(self.split.starts[-1]) - 1) // self.context))

    def row(self, position: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Tokens and their documents, (L,) each, at a place of the sequence."""
        epoch = self._epoch(position // self.rows_per_epoch)
        begin = int(epoch.rows[position % self.rows_per_epoch]) * self.context
        tokens = np.zeros(self.context + 1, np.int64)
        documents = np.full(self.context + 1, PADDING, np.int64)
        end = min(begin + self.context + 1, int(epoch.starts[-1]))
        at = begin
        place = int(np.searchsorted(epoch.starts, begin, side="right")) - 1
        while at < end:
            stop = min(end, int(epoch.starts[place + 1]))
            document = int(epoch.order[place])
            first = int(self.split.starts[document]) + at - int(epoch.starts[place])
            tokens[at - begin : stop - begin] = self.split.ids[first : first + stop - at]
            documents[at - begin : stop - begin] = document
            at, place = stop, place + 1
        return tokens, documents

    def predicted(self, position: int) -> int:
        """`count_predicted` of a row, without reading it."""
        epoch = self._epoch(position // self.rows_per_epoch)
        begin = int(epoch.rows[position % self.rows_per_epoch]) * self.context
        last = min(begin + self.context, int(epoch.starts[-1]) - 1)
        inner = np.searchsorted(epoch.starts, [begin, last], side="right")
        return last - begin - int(inner[1] - inner[0])

    def _epoch(self, number: int) -> _Epoch:
        if number not in self._epochs:
            if len(self._epochs) >= 2:  # a batch seldom touches more than two
                self._epochs.pop(min(self._epochs))
            order = _generator(self.seed, _DOCUMENTS, number).permutation(len(self.split))
            starts = np.concatenate(([0], np.cumsum(self.split.lengths[order])))
            rows = _generator(self.seed, _ROWS, number).permutation(self.rows_per_epoch)
            self._epochs[number] = _Epoch(order, starts, rows)
        return self._epochs[number]


def _generator(seed: int, stream: int, number: int) -> np.random.Generator:
    # Philox is counter-based: every key is a stream of its own and costs nothing to begin
    return np.random.Generator(
        np.random.Philox(key=np.array([seed, number], np.uint64), counter=[0, 0, 0, stream])
    )


def train_batches(
    rows: PackedRows,
    *,
    batch_size: int,
    start_step: int,
    steps: int,
    rank: int,
    world_size: int,
    accumulation: int,
) -> Iterator[TokenBatch]:
    """The micro-batches of one process, `accumulation` for each optimiser step from `start_step` on.

    Args:
        batch_size: rows per process and micro-step; step t takes places [t·G, (t+1)·G) of the sequence for
            G = batch_size · world_size · accumulation.
    """
    parts = world_size * accumulation
    for step in range(start_step, start_step + steps):
        first = step * parts * batch_size
        predicted = sum(rows.predicted(first + place) for place in range(parts * batch_size)) / parts
        for micro_step in range(accumulation):
            mine = first + (micro_step * world_size + rank) * batch_size
            tokens, documents = zip(*(rows.row(mine + n) for n in range(batch_size)), strict=True)
            yield TokenBatch(
                torch.from_numpy(np.stack(tokens)), torch.from_numpy(np.stack(documents)), predicted
            )


def eval_batches(
    split: TokenSplit, context: int, batch_size: int, rank: int = 0, world_size: int = 1
) -> Iterator[tuple[TokenBatch, float]]:
    """Every document by itself, in rows of `context` predictions each; every token but the first is predicted
    once over all ranks. A row after the first of its document has no more context than its own tokens.

    All ranks get equally many batches, each with its weight: 1, or 0 for a filler. With ZeRO-3 every forward
    pass is collective, so a rank that ran out of rows would leave the others waiting.
    """
    places = [
        (document, begin)
        for document, length in enumerate(split.lengths.tolist())
        for begin in range(0, length - 1, context)
    ]
    rounds = -(-len(places) // (batch_size * world_size))
    for number in range(rounds):
        first = (number * world_size + rank) * batch_size
        chosen = places[first : first + batch_size]
        yield _eval_batch(split, context, chosen or places[:1]), float(bool(chosen))


def _eval_batch(split: TokenSplit, context: int, places: list[tuple[int, int]]) -> TokenBatch:
    tokens = np.zeros((len(places), context + 1), np.int64)
    documents = np.full_like(tokens, PADDING)
    for row, (document, begin) in enumerate(places):
        piece = split.document(document)[begin : begin + context + 1]
        tokens[row, : len(piece)], documents[row, : len(piece)] = piece, document
    shown = torch.from_numpy(documents)
    return TokenBatch(torch.from_numpy(tokens), shown, float(count_predicted(shown)))
