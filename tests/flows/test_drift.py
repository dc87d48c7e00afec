"""The drift tests are the textbook's, keep their level on clean traffic, and see what has changed."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
from scipy import stats

from flows.drift import (
    FAMILIES,
    DriftTest,
    compare,
    compare_classes,
    ks_p_values,
    ks_statistics,
    pool_rare,
)
from flows.serving.statistics import PIXEL_STATISTICS, Records

ALPHA = 0.05


def records(generator: np.random.Generator, count: int, shift: float = 0.0, dims: int = 8) -> Records:
    """Clean traffic of a made-up network; `shift` moves every number, in standard deviations."""
    mixing = np.random.default_rng(9).standard_normal((dims, dims))  # directions are not independent
    confidence = generator.beta(5, 2, count)
    return Records(
        pixels=(generator.standard_normal((count, len(PIXEL_STATISTICS))) + shift).astype(np.float32),
        embedding=(generator.standard_normal((count, dims)) @ mixing + shift * mixing.std()).astype(
            np.float32
        ),
        predicted=generator.choice(5, count, p=[0.3, 0.3, 0.2, 0.15, 0.05]).astype(np.int32),
        confidence=confidence.astype(np.float32),
        entropy=(-np.log(confidence)).astype(np.float32),
    )


def alarmed(tests: list[DriftTest]) -> bool:
    return any(test.alarmed for test in tests)


@pytest.mark.parametrize(("n", "m"), [(1, 1), (7, 3), (270, 100), (100, 400)])
@pytest.mark.parametrize("tied", [False, True])
def test_statistics_are_those_of_scipy(n: int, m: int, tied: bool) -> None:
    generator = np.random.default_rng(n + m)
    if tied:
        first, second = generator.integers(0, 9, (n, 6)), generator.integers(2, 10, (m, 6))
    else:  # apart by more than what counts as equal
        values = np.stack([generator.permutation(3000)[: n + m] for _ in range(6)], axis=1) / 1000
        first, second = values[:n], values[n:] ** 1.1
    expected = [stats.ks_2samp(first[:, column], second[:, column]).statistic for column in range(6)]
    found = ks_statistics(first.astype(np.float32), second.astype(np.float32))
    np.testing.assert_allclose(found, expected, atol=1e-12)


def test_statistics_by_hand() -> None:
    first, second = np.float32([[1], [2], [3], [4]]), np.float32([[3.5], [5]])
    assert ks_statistics(first, second).tolist() == [0.75]  # after 3: 3/4 against 0
    assert ks_statistics(first, first).tolist() == [0.0]
    assert ks_statistics(first, first + 10).tolist() == [1.0]


@pytest.mark.parametrize(("n", "m"), [(270, 100), (1800, 50), (1000, 1000)])
def test_p_values_are_close_to_the_exact_ones(n: int, m: int) -> None:
    generator = np.random.default_rng(0)
    for shift in (0.0, 0.2, 0.4):
        first, second = generator.standard_normal(n), generator.standard_normal(m) + shift
        exact = stats.ks_2samp(first, second, method="exact")
        (found,) = ks_p_values(np.asarray([exact.statistic]), n, m)
        assert math.log(found) == pytest.approx(math.log(exact.pvalue), rel=0.02, abs=0.1)


def test_rounding_errors_of_equal_images_are_no_difference() -> None:
    """A third of the pictures is the same black frame, described in batches of other sizes."""
    generator = np.random.default_rng(0)
    first, second = (generator.standard_normal((300, 1)).astype(np.float32) for _ in range(2))
    first[:100], second[:100] = 0.7, np.nextafter(np.float32(0.7), np.float32(1))
    assert stats.ks_2samp(first[:, 0], second[:, 0]).statistic > 0.25  # what happens otherwise
    assert ks_statistics(first, second)[0] < 0.1


def test_classes_agree_with_scipy() -> None:
    generator = np.random.default_rng(0)
    first = generator.choice(4, 400, p=[0.4, 0.3, 0.2, 0.1]).astype(np.int32)
    second = generator.choice(4, 150, p=[0.2, 0.3, 0.3, 0.2]).astype(np.int32)
    table = np.stack([np.bincount(first), np.bincount(second)])
    effect, p_value = compare_classes(first, second)
    assert p_value == pytest.approx(stats.chi2_contingency(table, correction=False).pvalue)
    assert effect == pytest.approx(0.5 * np.abs(table[0] / 400 - table[1] / 150).sum())


def test_rare_classes_are_taken_together() -> None:
    table = np.asarray([[500, 3, 400, 2, 90, 1], [50, 1, 40, 1, 7, 0]])
    pooled = pool_rare(table)
    assert pooled.sum() == table.sum()
    assert (pooled.sum(axis=0) * pooled.sum(axis=1).min() / pooled.sum()).min() >= 5
    assert pooled.shape[1] < table.shape[1]
    assert compare_classes(np.zeros(50, np.int32), np.zeros(40, np.int32)) == (0.0, 1.0)  # one class
    many = np.arange(1000, dtype=np.int32)  # each class once
    assert compare_classes(many, many[:200])[1] == 1.0


def test_a_class_that_the_reference_never_had_is_seen() -> None:
    effect, p_value = compare_classes(np.zeros(200, np.int32), np.full(100, 3, np.int32))
    assert effect == 1.0
    assert p_value < 1e-20


def test_the_level_holds_on_clean_traffic() -> None:
    """Alarms on clean windows are at most `alpha`; and not none, as a test that cannot fail would have."""
    generator, windows = np.random.default_rng(1), 400
    found = {True: 0, False: 0}
    single = dict.fromkeys(FAMILIES, 0)
    for _ in range(windows):
        reference, window = records(generator, 300), records(generator, 120)
        for correct in found:
            tests = compare(reference, window, alpha=ALPHA, min_effect=0.0, correct=correct)
            found[correct] += alarmed(tests)
            if correct:
                for family in FAMILIES:
                    single[family] += any(test.alarmed for test in tests if test.family == family)
    upper = stats.binom.ppf(0.999, windows, ALPHA)
    assert stats.binom.ppf(0.001, windows, ALPHA / 4) <= found[True] <= upper
    assert max(single.values()) <= stats.binom.ppf(0.9999, windows, ALPHA / len(FAMILIES))
    assert found[False] > 2 * upper  # what Bonferroni is for


@pytest.mark.parametrize("family", FAMILIES)
def test_each_family_sees_its_own_shift_and_no_other(family: str) -> None:
    generator = np.random.default_rng(2)
    reference, window = records(generator, 500), records(generator, 200)
    changed = {
        "embedding": {"embedding": window.embedding + 1.5 * np.abs(window.embedding).mean()},
        "pixels": {"pixels": window.pixels + np.float32([0, 0, 0, 0, 0, 0, 0, 0.7, 0])},
        "predictions": {"predicted": (window.predicted + 1) % 5},
        "confidence": {"confidence": window.confidence * 0.7, "entropy": window.entropy + 0.4},
    }[family]
    tests = compare(reference, dataclasses.replace(window, **changed), alpha=ALPHA, min_effect=0.1)
    assert {test.family for test in tests if test.alarmed} == {family}
    alone = compare(
        reference, dataclasses.replace(window, **changed), alpha=ALPHA, min_effect=0.1, families=[family]
    )
    assert alone[0].level == pytest.approx(4 * next(t.level for t in tests if t.family == family))
    if family == "pixels":
        assert [test.name for test in tests if test.alarmed] == ["sharpness"]


def test_power_grows_with_the_window_and_the_shift() -> None:
    generator = np.random.default_rng(3)
    reference = records(generator, 1000)

    def rate(shift: float, size: int) -> float:
        windows = [records(generator, size, shift) for _ in range(30)]
        return sum(alarmed(compare(reference, w, alpha=0.001, min_effect=0.1)) for w in windows) / 30

    assert rate(0.0, 200) <= 0.1
    assert rate(0.5, 25) < 0.8 < rate(0.5, 200)
    assert rate(1.5, 50) == 1.0


def test_a_certain_but_tiny_shift_is_no_alarm() -> None:
    generator = np.random.default_rng(4)
    reference, window = records(generator, 20_000), records(generator, 20_000, shift=0.1)
    tests = compare(reference, window, alpha=0.001, min_effect=0.1)
    assert min(test.p_value for test in tests) < 1e-6
    assert not alarmed(tests)
    assert alarmed(compare(reference, window, alpha=0.001, min_effect=0.0))


def test_what_cannot_be_compared_is_an_error() -> None:
    good = np.zeros((3, 2), np.float32)
    for bad in (good[:0], good[:, :1]):
        with pytest.raises(ValueError, match="need"):
            ks_statistics(good, bad)
    one = records(np.random.default_rng(0), 5)
    with pytest.raises(ValueError, match="unknown family"):
        compare(one, one, alpha=0.1, min_effect=0.1, families=["colour"])
