"""models/classification/metrics.py against scikit-learn, brute force and closed forms."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as sk
from torch import Tensor

from models.classification import metrics


@pytest.fixture
def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 7, (400,), generator=generator)
    logits = 2.0 * torch.randn(400, 7, generator=generator)
    logits[torch.arange(400), labels] += 2.0
    return logits, labels


@pytest.mark.parametrize("k", [1, 2, 3, 5, 6])
def test_topk_equals_sklearn(batch: tuple[Tensor, Tensor], k: int) -> None:
    logits, labels = batch
    expected = sk.top_k_accuracy_score(labels.numpy(), logits.numpy(), k=k, labels=range(7))
    assert metrics.topk_accuracy(logits, labels, k) == pytest.approx(expected, abs=1e-12)


def test_topk_with_more_places_than_classes_is_one(batch: tuple[Tensor, Tensor]) -> None:
    assert metrics.topk_accuracy(*batch, 50) == 1.0


def test_ties_do_not_count_for_every_class() -> None:
    constant, labels = torch.zeros(10, 10), torch.arange(10)
    assert metrics.topk_accuracy(constant, labels, 1) == pytest.approx(0.1)
    assert metrics.topk_accuracy(constant, labels, 5) == pytest.approx(0.5)


def test_top1_agrees_with_predict(batch: tuple[Tensor, Tensor]) -> None:
    logits, labels = batch
    logits = logits.round()  # many ties
    predicted, _ = metrics.predict(logits)
    assert metrics.topk_accuracy(logits, labels, 1) == float((predicted == labels).double().mean())


def test_confusion_and_class_scores_equal_sklearn(batch: tuple[Tensor, Tensor]) -> None:
    logits, labels = batch
    predicted, _ = metrics.predict(logits)
    confusion = metrics.confusion_matrix(labels, predicted, 7)
    np.testing.assert_array_equal(confusion.numpy(), sk.confusion_matrix(labels, predicted))
    precision, recall, f1, support = sk.precision_recall_fscore_support(labels, predicted, zero_division=0)
    scores = metrics.class_scores(confusion)
    np.testing.assert_allclose(scores.precision.numpy(), precision)
    np.testing.assert_allclose(scores.recall.numpy(), recall)
    np.testing.assert_allclose(scores.f1.numpy(), f1)
    np.testing.assert_array_equal(scores.support.numpy(), support)


def test_class_scores_of_absent_and_never_predicted_classes_are_zero() -> None:
    confusion = metrics.confusion_matrix(torch.tensor([0, 0, 1]), torch.tensor([0, 2, 0]), 4)
    scores = metrics.class_scores(confusion)
    assert scores.precision.tolist() == [0.5, 0.0, 0.0, 0.0]
    assert scores.recall.tolist() == [0.5, 0.0, 0.0, 0.0]
    assert scores.f1.tolist() == [0.5, 0.0, 0.0, 0.0]
    assert scores.support.tolist() == [2, 1, 0, 0]


def test_likelihood_and_brier_equal_sklearn(batch: tuple[Tensor, Tensor]) -> None:
    logits, labels = batch
    probabilities = metrics.probabilities(logits).numpy()
    assert metrics.negative_log_likelihood(logits, labels) == pytest.approx(
        sk.log_loss(labels, probabilities)
    )
    one_hot = np.eye(7)[labels.numpy()]
    expected = ((probabilities - one_hot) ** 2).sum(axis=1).mean()
    assert metrics.brier_score(logits, labels) == pytest.approx(expected)


def test_likelihood_of_certain_mistakes_is_finite() -> None:
    """A logit 1,000 below the largest has probability 0 in float64; the logarithm must not go through it."""
    logits = torch.tensor([[1000.0, 0.0]])
    assert metrics.negative_log_likelihood(logits, torch.tensor([1])) == pytest.approx(1000.0)


def _brute_force_ece(confidence: list[float], correct: list[bool], bins: int) -> float:
    total = 0.0
    for m in range(bins):
        low, high = m / bins, (m + 1) / bins
        chosen = [i for i, value in enumerate(confidence) if low < value <= high or (m == 0 and value == 0.0)]
        if chosen:
            accuracy = sum(correct[i] for i in chosen) / len(chosen)
            mean = sum(confidence[i] for i in chosen) / len(chosen)
            total += len(chosen) / len(confidence) * abs(accuracy - mean)
    return total


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.tuples(st.floats(0.0, 1.0), st.booleans()), min_size=1, max_size=60),
    st.integers(1, 20),
)
def test_calibration_error_equals_brute_force(pairs: list[tuple[float, bool]], bins: int) -> None:
    confidence, correct = [p for p, _ in pairs], [c for _, c in pairs]
    table = metrics.reliability_table(
        torch.tensor(confidence, dtype=torch.float64), torch.tensor(correct), bins
    )
    assert metrics.expected_calibration_error(table) == pytest.approx(
        _brute_force_ece(confidence, correct, bins)
    )
    assert sum(row.count for row in table) == len(pairs)


def test_bins_are_closed_on_the_right() -> None:
    table = metrics.reliability_table(torch.tensor([0.0, 0.25, 0.26, 1.0]), torch.ones(4), 4)
    assert [row.count for row in table] == [2, 1, 0, 1]
    assert (table[1].lower, table[1].upper) == (0.25, 0.5)


def test_calibration_error_of_known_over_confidence() -> None:
    confidence, correct = torch.full((10,), 0.9), torch.tensor([True] * 6 + [False] * 4)
    table = metrics.reliability_table(confidence, correct, 15)
    assert metrics.expected_calibration_error(table) == pytest.approx(0.3, abs=1e-7)


@pytest.mark.parametrize(
    ("hits", "total", "low", "high"),
    # solved independently from (p - x)² n = z² x (1 - x), e.g. Newcombe (1998), table I
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_interval_equals_published_values(hits: int, total: int, low: float, high: float) -> None:
    interval = metrics.wilson_interval(hits, total)
    assert interval.low == pytest.approx(low, abs=5e-5)
    assert interval.high == pytest.approx(high, abs=5e-5)
    assert interval.value == hits / total


def test_wilson_limits_solve_the_score_equation() -> None:
    interval = metrics.wilson_interval(340, 360)
    for limit in (interval.low, interval.high):
        z = (interval.value - limit) / math.sqrt(limit * (1 - limit) / 360)
        assert abs(z) == pytest.approx(metrics.Z_95)


def test_wilson_interval_reaches_one_exactly() -> None:
    assert metrics.wilson_interval(360, 360).high == 1.0


def test_paired_difference_is_narrower_than_unpaired_and_antisymmetric() -> None:
    generator = torch.Generator().manual_seed(1)
    hard = torch.rand(1000, generator=generator) < 0.2  # both fail on these
    first = ~hard & (torch.rand(1000, generator=generator) < 0.99)
    second = ~hard & (torch.rand(1000, generator=generator) < 0.95)
    interval = metrics.paired_difference(first, second)
    assert interval.value == pytest.approx(float(first.double().mean() - second.double().mean()))
    unpaired = metrics.Z_95 * math.sqrt(sum(float(x.double().var()) / 1000 for x in (first, second)))
    assert (interval.high - interval.low) / 2 < 0.7 * unpaired
    mirrored = metrics.paired_difference(second, first)
    assert (mirrored.low, mirrored.high) == pytest.approx((-interval.high, -interval.low))


def test_paired_difference_covers_the_truth() -> None:
    """About 95 % of 400 simulated test sets must cover the true difference of 3 points."""
    generator = torch.Generator().manual_seed(2)
    covered = 0
    for _ in range(400):
        # < .06: only first right; < .09: only second; < .2: neither
        draw = torch.rand(300, generator=generator)
        first, second = (draw < 0.06) | (draw >= 0.2), ((draw >= 0.06) & (draw < 0.09)) | (draw >= 0.2)
        interval = metrics.paired_difference(first, second)
        covered += interval.low <= 0.03 <= interval.high
    assert 0.92 <= covered / 400 <= 0.98


def test_equal_answers_still_have_an_interval() -> None:
    same = torch.ones(50, dtype=torch.bool)
    interval = metrics.paired_difference(same, same)
    assert interval.value == 0.0
    assert interval.low < 0.0 < interval.high


def test_summary_agrees_with_its_parts(batch: tuple[Tensor, Tensor]) -> None:
    logits, labels = batch
    summary = metrics.summarize(logits, labels, 15)
    predicted, confidence = metrics.predict(logits)
    table = metrics.reliability_table(confidence, predicted == labels, 15)
    assert summary.images == 400
    assert summary.top1 == metrics.topk_accuracy(logits, labels, 1)
    assert summary.top5 == metrics.topk_accuracy(logits, labels, 5)
    assert summary.ece == metrics.expected_calibration_error(table)
    assert summary.top1_low < summary.top1 < summary.top1_high


@pytest.mark.parametrize(
    ("logits", "labels", "message"),
    [
        (torch.zeros(2, 3), torch.tensor([0]), "need logits"),
        (torch.zeros(0, 3), torch.zeros(0, dtype=torch.long), "at least one image"),
        (torch.zeros(1, 3), torch.tensor([3]), "labels must lie"),
        (torch.zeros(1, 3), torch.tensor([-1]), "labels must lie"),
        (torch.tensor([[0.0, math.nan]]), torch.tensor([0]), "not finite"),
    ],
)
def test_impossible_batches_are_refused(logits: Tensor, labels: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        metrics.summarize(logits, labels, 10)


def test_impossible_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="k must be"):
        metrics.topk_accuracy(torch.zeros(1, 2), torch.tensor([0]), 0)
    with pytest.raises(ValueError, match="0 <= hits"):
        metrics.wilson_interval(3, 2)
    with pytest.raises(ValueError, match="bins"):
        metrics.reliability_table(torch.ones(1), torch.ones(1), 0)
    with pytest.raises(ValueError, match="predictions must lie"):
        metrics.confusion_matrix(torch.tensor([0]), torch.tensor([2]), 2)
