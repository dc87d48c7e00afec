"""Intervals against closed forms, an independent bootstrap, and what they promise: coverage."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.stats
from numpy.typing import NDArray

from flows.bootstrap import compare_accuracy, recall_by_class

Verdicts = NDArray[np.bool_]


def draw(count: int, seed: int = 0) -> tuple[Verdicts, Verdicts, NDArray[np.int64]]:
    """Two models of different strength on classes of different difficulty and size."""
    generator = np.random.default_rng(seed)
    labels = generator.choice(4, size=count, p=[0.1, 0.2, 0.3, 0.4])
    hard = generator.random(count) < np.asarray([0.6, 0.3, 0.2, 0.1])[labels]
    first = ~hard | (generator.random(count) < 0.2)
    second = ~hard | (generator.random(count) < 0.5)
    return first, second, labels


def test_the_spread_is_that_of_the_closed_forms() -> None:
    """Normal intervals from the variance of a stratified proportion and a paired difference (McNemar)."""
    first, second, labels = draw(2000)
    found = compare_accuracy(first, second, labels, resamples=20000, confidence=0.95, seed=1)
    for interval, values in (
        (found.first, first.astype(float)),
        (found.second, second.astype(float)),
        (found.gain, second.astype(float) - first),
    ):
        # per class: of single verdicts p(1-p), of differences p01 + p10 - (p01 - p10)²; both are np.var
        variance = sum((labels == c).sum() * values[labels == c].var() for c in range(4)) / len(labels) ** 2
        half = 1.959964 * variance**0.5
        assert interval.value == pytest.approx(values.mean(), abs=1e-12)
        assert interval.low == pytest.approx(interval.value - half, abs=0.06 * half)
        assert interval.high == pytest.approx(interval.value + half, abs=0.06 * half)
    first_rate, second_rate = (first & ~second).mean(), (second & ~first).mean()
    mcnemar = (first_rate + second_rate - (second_rate - first_rate) ** 2) / len(labels)
    width = found.gain.high - found.gain.low
    assert width <= 2 * 1.96 * mcnemar**0.5 * 1.03, "strata never widen an interval"


def test_one_stratum_agrees_with_scipy() -> None:
    first, second, _ = draw(400)
    labels = np.zeros(400, dtype=np.int64)
    found = compare_accuracy(first, second, labels, resamples=10000, confidence=0.9, seed=0).gain

    def gain(a: NDArray[np.float64], b: NDArray[np.float64], axis: int) -> NDArray[np.float64]:
        return np.asarray(b.mean(axis) - a.mean(axis))

    theirs = scipy.stats.bootstrap(
        (first.astype(float), second.astype(float)),
        gain,
        paired=True,
        n_resamples=10000,
        confidence_level=0.9,
        method="percentile",
        rng=np.random.default_rng(5),
    ).confidence_interval
    assert found.low == pytest.approx(theirs.low, abs=3e-3)
    assert found.high == pytest.approx(theirs.high, abs=3e-3)


def test_intervals_hold_the_true_gain_as_often_as_they_say() -> None:
    truth = float(np.dot([0.1, 0.2, 0.3, 0.4], [0.6, 0.3, 0.2, 0.1])) * (0.5 - 0.2)
    hits = 0
    for seed in range(300):
        found = compare_accuracy(*draw(600, seed), resamples=400, confidence=0.9, seed=seed).gain
        hits += found.low <= truth <= found.high
    assert 0.85 < hits / 300 < 0.95


def test_equal_models_gain_nothing_and_the_seed_decides() -> None:
    first, second, labels = draw(300)
    same = compare_accuracy(first, first, labels, resamples=200, confidence=0.95, seed=0)
    assert (same.gain.value, same.gain.low, same.gain.high) == (0.0, 0.0, 0.0)
    arguments = {"resamples": 200, "confidence": 0.95}
    once = compare_accuracy(first, second, labels, **arguments, seed=3)  # type: ignore[arg-type]
    again = compare_accuracy(first, second, labels, **arguments, seed=3)  # type: ignore[arg-type]
    assert once == again
    assert once.gain.low <= once.gain.value <= once.gain.high


def test_a_perfect_model_has_an_interval_of_one_point() -> None:
    right = np.ones(50, dtype=bool)
    found = compare_accuracy(~right, right, np.arange(50) % 7, resamples=100, confidence=0.95, seed=0)
    assert (found.gain.value, found.gain.low, found.gain.high) == (1.0, 1.0, 1.0)


def test_arrays_must_belong_together() -> None:
    empty = np.zeros(0, dtype=bool)
    with pytest.raises(ValueError, match="0 and 0 verdicts on 0 images"):
        compare_accuracy(empty, empty, np.zeros(0, dtype=np.int64), resamples=100, confidence=0.9, seed=0)
    with pytest.raises(ValueError, match="1 and 2 verdicts"):
        compare_accuracy(
            np.ones(1, dtype=bool),
            np.ones(2, dtype=bool),
            np.zeros(2, dtype=np.int64),
            resamples=100,
            confidence=0.9,
            seed=0,
        )


def test_recall_of_each_class() -> None:
    labels = np.asarray([0, 0, 2, 2, 2, 2])
    correct = np.asarray([True, False, True, True, True, False])
    np.testing.assert_equal(recall_by_class(correct, labels, 4), [0.5, np.nan, 0.75, np.nan])
