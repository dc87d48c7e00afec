"""Packed rows: every token once, documents apart, a pure function of the place in the sequence."""

from __future__ import annotations

import itertools
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch

from flows.text import ngrams
from flows.text.batches import PADDING, PackedRows, count_predicted, eval_batches, train_batches
from flows.text.corpus import TokenSplit


def make_split(lengths: list[int], vocabulary: int = 50, seed: int = 0) -> TokenSplit:
    generator = np.random.default_rng(seed)
    ids = generator.integers(2, vocabulary, sum(lengths)).astype("<u2")
    starts = np.concatenate(([0], np.cumsum(lengths))).astype(np.int64)
    return TokenSplit(ids, starts, np.array(lengths), tuple(f"d{n}" for n in range(len(lengths))))


LENGTHS = [5, 40, 2, 17, 8, 3, 29]


@pytest.mark.parametrize("context", [4, 8, 16, 200])
def test_an_epoch_predicts_every_token_but_the_first_of_a_document_once(context: int) -> None:
    split = make_split(LENGTHS)
    rows = PackedRows(split, context, seed=1)
    for epoch in range(2):
        found: Counter[tuple[int, int, int]] = Counter()
        for n in range(rows.rows_per_epoch):
            position = epoch * rows.rows_per_epoch + n
            tokens, documents = rows.row(position)
            pairs = zip(documents[:-1], documents[1:], tokens[:-1], tokens[1:], strict=True)
            found.update((int(a), int(x), int(y)) for a, b, x, y in pairs if a == b != PADDING)
            shown = torch.from_numpy(documents)[None]
            assert rows.predicted(position) == count_predicted(shown)
        expected: Counter[tuple[int, int, int]] = Counter()
        for d in range(len(split)):
            ids = split.document(d).tolist()
            expected.update((d, x, y) for x, y in itertools.pairwise(ids))
        assert found == expected


def flat(batches: list[Any]) -> list[list[int]]:
    return [row for batch in batches for row in batch.tokens.tolist()]


def test_the_sequence_depends_on_the_step_alone() -> None:
    rows = PackedRows(make_split(LENGTHS), 8, seed=1)
    alone: dict[str, Any] = {"rank": 0, "world_size": 1, "accumulation": 1}
    whole = list(train_batches(rows, batch_size=4, start_step=0, steps=9, **alone))
    fresh = PackedRows(make_split(LENGTHS), 8, seed=1)  # with nothing remembered
    resumed = list(train_batches(fresh, batch_size=4, start_step=5, steps=4, **alone))
    assert flat(resumed) == flat(whole[5:])
    assert flat(whole[:4]) != flat(whole[4:8]), "another epoch has another order"
    assert flat(whole) != flat(
        list(
            train_batches(PackedRows(make_split(LENGTHS), 8, 2), batch_size=4, start_step=0, steps=9, **alone)
        )
    )


def test_a_step_is_the_same_however_it_is_divided() -> None:
    rows = PackedRows(make_split(LENGTHS), 8, seed=1)
    whole = next(
        train_batches(rows, batch_size=8, start_step=2, steps=1, rank=0, world_size=1, accumulation=1)
    )
    parts = [
        list(train_batches(rows, batch_size=2, start_step=2, steps=1, rank=r, world_size=2, accumulation=2))
        for r in range(2)
    ]
    divided = [parts[rank][step] for step in range(2) for rank in range(2)]
    assert flat(divided) == whole.tokens.tolist()
    assert {batch.predicted for batch in divided} == {whole.predicted / 4}
    assert whole.predicted == count_predicted(whole.documents)


@pytest.mark.parametrize("ranks", [1, 3])
def test_judging_sees_every_token_once_whatever_the_number_of_processes(ranks: int) -> None:
    split = make_split(LENGTHS)
    found: Counter[tuple[int, int]] = Counter()
    rounds = set()
    for rank in range(ranks):
        batches = list(eval_batches(split, 8, 2, rank, ranks))
        rounds.add(len(batches))
        for batch, weight in batches:
            assert not weight or batch.predicted > 0
            documents = batch.documents.numpy()
            for row, owners in zip(batch.tokens.numpy(), documents, strict=True):
                inside = (owners[1:] == owners[:-1]) & (owners[1:] != PADDING)
                found.update((int(owners[0]), int(token)) for token in row[1:][inside] if weight)
    assert len(rounds) == 1, "all processes take part in every forward pass"
    expected = Counter((d, int(t)) for d in range(len(split)) for t in split.document(d)[1:])
    assert found == expected


def test_bigrams_are_probabilities_and_score_as_counted_by_hand() -> None:
    split = make_split([30, 50, 20], vocabulary=9)
    counted = ngrams.count(split.documents(), 9)
    held_out = [np.array([2, 5]), np.array([0, 3, 3])]
    every = np.array([[a, b] for a in range(9) for b in range(9)])
    nats = np.array([counted.score([pair])[1].nats for pair in every]).reshape(9, 9)
    np.testing.assert_allclose(np.exp(-nats).sum(axis=1), 1.0, atol=1e-12)  # also after a token never seen
    single, double = counted.score(held_out)
    assert single.tokens == double.tokens == 3
    assert double.nats == pytest.approx(nats[2, 5] + nats[0, 3] + nats[3, 3])
    after = Counter(int(t) for d in split.documents() for t in d[1:])
    total = sum(after.values()) + 9
    assert single.nats == pytest.approx(-sum(np.log((after[t] + 1) / total) for t in (5, 3, 3)))
    guesses = np.exp(-nats).argmax(axis=1)
    assert double.correct == sum(guesses[a] == b for a, b in ((2, 5), (0, 3), (3, 3)))
