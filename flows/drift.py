"""Is served traffic what the model was made for? Two-sample tests of its records against the reference.

Four families, each answering another question:

    embedding     do the images look different to the network?   Kolmogorov-Smirnov per projected feature
    pixels        do they look different before the network?     Kolmogorov-Smirnov per pixel statistic
    predictions   does it answer other classes?                  chi-squared on predicted classes
    confidence    is it less sure, or surer?                     Kolmogorov-Smirnov on confidence and entropy

`alpha` is the probability that clean traffic alarms at all: it is divided among the families and, within one,
among its tests (Bonferroni), so it holds whatever the tests have to do with one another. It bounds the rate
for independent images; pictures of one scene in a row are not (docs/monitoring.md).

With enough images any difference is certain, also one that harms nobody. A test therefore alarms only if its
effect is large as well: the largest gap of the two distribution functions, or the total variation distance of
the predicted classes; both are 0 for equal distributions and 1 for disjoint ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from flows.serving.statistics import PIXEL_STATISTICS, Records

FAMILIES = ("embedding", "pixels", "predictions", "confidence")
MIN_EXPECTED = 5.0  # images per class below which the chi-squared approximation is not trusted
GRID = 1e-4  # of the reference's standard deviation; values this close are equal


@dataclass(frozen=True)
class DriftTest:
    """One comparison of the window with the reference."""

    family: str
    name: str
    method: str  # ks | chi2
    effect: float  # 0-1
    p_value: float
    level: float  # p-values up to here are significant, after both corrections
    min_effect: float

    @property
    def alarmed(self) -> bool:
        return self.p_value <= self.level and self.effect >= self.min_effect

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "alarmed": self.alarmed}


def compare(
    reference: Records,
    window: Records,
    *,
    alpha: float,
    min_effect: float,
    families: Sequence[str] = FAMILIES,
    correct: bool = True,
) -> list[DriftTest]:
    """All tests of `families`, in their order.

    Args:
        alpha: probability of at least one alarm on clean traffic.
        correct: divide `alpha` among the tests; without it each has the level `alpha` (for comparison only).
    """
    tests = []
    for family in families:
        names, method, effects, p_values = _family(family, reference, window)
        level = alpha / len(families) / len(names) if correct else alpha
        tests += [
            DriftTest(family, name, method, float(effect), float(p_value), level, min_effect)
            for name, effect, p_value in zip(names, effects, p_values, strict=True)
        ]
    return tests


_Outcome = tuple[
    Sequence[str], str, NDArray[np.float64], NDArray[np.float64]
]  # names, method, effects, p-values


def _family(family: str, reference: Records, window: Records) -> _Outcome:
    if family == "predictions":
        effect, p_value = compare_classes(reference.predicted, window.predicted)
        return ["classes"], "chi2", np.asarray([effect]), np.asarray([p_value])
    names: Sequence[str]
    if family == "embedding":
        first, second = reference.embedding, window.embedding
        names = [f"direction {index}" for index in range(first.shape[1])]
    elif family == "pixels":
        first, second, names = reference.pixels, window.pixels, PIXEL_STATISTICS
    elif family == "confidence":
        first = np.stack([reference.confidence, reference.entropy], axis=1)
        second = np.stack([window.confidence, window.entropy], axis=1)
        names = ("confidence", "entropy")
    else:
        raise ValueError(f"unknown family {family!r}; there are {', '.join(FAMILIES)}")
    statistics = ks_statistics(first, second)
    return names, "ks", statistics, ks_p_values(statistics, len(first), len(second))


def ks_statistics(reference: NDArray[np.float32], window: NDArray[np.float32]) -> NDArray[np.float64]:
    """Largest gap of the two empirical distribution functions, per column of (n, d) and (m, d): (d,).

    Values within `GRID` count as equal: the same black image gives results a rounding error apart in batches
    of different sizes, and a gap between those would be no difference of the images.
    """
    if reference.ndim != 2 or reference.shape[1] != window.shape[1] or not len(reference) or not len(window):
        raise ValueError(f"need (n, d) and (m, d), got {reference.shape} and {window.shape}")
    scale = GRID * reference.std(axis=0, dtype=np.float64)
    scale = np.where(scale > 0, scale, GRID)
    first = np.sort(np.round(reference / scale), axis=0)
    second = np.sort(np.round(window / scale), axis=0)
    gaps = np.empty(first.shape[1])
    sides: tuple[Literal["left", "right"], ...] = ("left", "right")
    for column in range(first.shape[1]):
        a, b = first[:, column], second[:, column]
        # between two values of b its function is flat and a's rises: the gap is largest beside a value of b
        gaps[column] = max(
            np.abs(np.searchsorted(a, b, side) / len(a) - np.searchsorted(b, b, side) / len(b)).max()
            for side in sides
        )
    return gaps


def ks_p_values(statistics: NDArray[np.float64], n: int, m: int) -> NDArray[np.float64]:
    """Two-sided p-values, by the exact one-sample distribution at the effective size n·m/(n+m).

    A close approximation without ties (tests/flows/test_drift.py compares it with the exact two-sample one);
    with ties the true p-value is smaller, so fewer alarms, not more.
    """
    from scipy.stats import kstwo

    effective = max(1, round(n * m / (n + m)))
    return np.asarray(np.clip(kstwo.sf(statistics, effective), 0.0, 1.0))


def compare_classes(reference: NDArray[np.int32], window: NDArray[np.int32]) -> tuple[float, float]:
    """Total variation distance of the predicted classes, and the p-value of Pearson's chi-squared test.

    Classes that are too rare for it (`MIN_EXPECTED` expected in either sample) are taken together.
    """
    from scipy.stats import chi2

    classes = 1 + max(int(reference.max()), int(window.max()))
    table = np.stack([np.bincount(reference, minlength=classes), np.bincount(window, minlength=classes)])
    table = pool_rare(table)
    total = table.sum()
    sizes = table.sum(axis=1, keepdims=True)  # (2, 1)
    expected = sizes * table.sum(axis=0, keepdims=True) / total
    effect = 0.5 * float(np.abs(table[0] / sizes[0] - table[1] / sizes[1]).sum())
    if table.shape[1] < 2:
        return effect, 1.0
    statistic = float(((table - expected) ** 2 / expected).sum())
    return effect, float(chi2.sf(statistic, table.shape[1] - 1))


def pool_rare(table: NDArray[np.int64]) -> NDArray[np.int64]:
    """Counts (2, K), the rarest columns merged until each is expected `MIN_EXPECTED` times in both rows."""
    order = np.argsort(-table.sum(axis=0), kind="stable")
    table = table[:, order]
    smaller = table.sum(axis=1).min() / table.sum()  # share of the smaller sample
    while table.shape[1] > 1 and table[:, -1].sum() * smaller < MIN_EXPECTED:
        merged = table[:, -2] + table[:, -1]
        table = np.concatenate([table[:, :-2], merged[:, None]], axis=1)
    return table
