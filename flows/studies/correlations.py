"""Whether the validation loss tells the finetuned accuracy, and up to which loss.

Two regimes are looked for by a threshold regression of accuracy on loss (Hansen, Econometrica 2000): a line
below and a line at or above the threshold, least squares over all thresholds between two losses. There is a
boundary only if (a) two lines explain more than one line does by chance (a bootstrap under one line,
p < 0.05) and (b) accuracy falls with loss below, while above it falls neither significantly nor half as
steeply. Data seldom fix the threshold to one gap: among those that Hansen's likelihood ratio cannot tell from
the best at 95 %, the one is taken above which the relation is most completely gone (largest Pearson r).

Intervals are percentiles of a bootstrap that draws whole series (a model on its images at all lengths), as
cells of one series are not independent; those from drawing single cells stand beside them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from flows.studies.cells import Cell

Array = NDArray[np.float64]
LEVEL = 0.95
HANSEN_95 = 7.35
"""95 % point of the likelihood ratio of a threshold."""
SHARE, FEWEST = 0.15, 4
"""Each regime has at least this share of the cells, and this many."""
SIGNIFICANT = 0.05
MOST_THRESHOLDS = 200
FEWEST_FOR_CORRELATION = 4


@dataclass(frozen=True)
class Boundary:
    """The loss from which on accuracy no longer follows it."""

    loss: float
    """Cells at or above it have overfitted beyond use of the loss."""
    between: tuple[float, float]
    """Neighbouring losses; `loss` is their middle."""
    plausible: tuple[float, float]
    """Smallest and largest threshold that the data do not tell from the best one, at 95 %."""
    p_value: float
    slope_below: float
    """Percentage points per unit of loss."""
    intercept_below: float
    slope_above: float


@dataclass(frozen=True)
class Correlation:
    """Of validation loss and finetuned accuracy; a coefficient that does not exist is None."""

    cells: int
    series: int
    pearson: float | None = None
    pearson_interval: tuple[float, float] | None = None
    pearson_interval_cells: tuple[float, float] | None = None
    spearman: float | None = None
    spearman_interval: tuple[float, float] | None = None
    spearman_interval_cells: tuple[float, float] | None = None
    reason: str = ""


def with_accuracy(cells: Sequence[Cell]) -> list[Cell]:
    return [cell for cell in cells if cell.finetuned_top1 is not None]


# ---------------------------------------------------------------------------------------- boundary


def find_boundary(cells: Sequence[Cell], draws: int, seed: int) -> tuple[Boundary | None, str]:
    """The boundary, or None and why there is none."""
    known = with_accuracy(cells)
    least = max(FEWEST, math.ceil(SHARE * len(known)))
    if len(known) < 2 * FEWEST + 2:
        return None, (
            f"{len(known)} cells have a finetuned accuracy; a boundary is looked for from {2 * FEWEST + 2} on"
        )
    order = np.argsort([cell.loss for cell in known], kind="stable")
    x = np.array([cell.loss for cell in known])[order]
    y = np.array([cell.finetuned_top1 for cell in known], dtype=float)[order]
    splits = np.array([k for k in range(least, len(x) - least + 1) if x[k] > x[k - 1]], dtype=int)
    if len(splits) > MOST_THRESHOLDS:
        splits = splits[np.linspace(0, len(splits) - 1, MOST_THRESHOLDS).astype(int)]
    if not len(splits) or np.ptp(y) == 0:
        return None, "the losses or the accuracies do not vary enough"
    one = _squares(x, y[None])[0]
    two = _squares_of_split(x, y[None], splits)[0]
    best = float(two.min())
    p_value = _chance_of_split(x, y, splits, one, best, draws, seed)
    if p_value >= SIGNIFICANT:
        return None, f"two lines explain accuracy no better than one line does by chance (p = {p_value:.2f})"
    ratio = len(x) * (two - best) / max(best, 1e-12)
    plausible = splits[ratio <= HANSEN_95]
    split = max(plausible, key=lambda k: _pearson(x[k:], y[k:]))
    (slope, intercept), (above, _) = _line(x[:split], y[:split]), _line(x[split:], y[split:])
    if slope >= 0:
        return None, "accuracy does not fall with the loss among the cells with the lowest losses"
    if above < 0.5 * slope or _falls(x[split:], y[split:]):
        return None, "accuracy keeps falling with the loss up to the largest losses"
    middles = (x[splits - 1] + x[splits]) / 2
    shown = middles[ratio <= HANSEN_95]
    return (
        Boundary(
            loss=float((x[split - 1] + x[split]) / 2),
            between=(float(x[split - 1]), float(x[split])),
            plausible=(float(shown.min()), float(shown.max())),
            p_value=p_value,
            slope_below=slope,
            intercept_below=intercept,
            slope_above=above,
        ),
        "",
    )


def _chance_of_split(
    x: Array, y: Array, splits: NDArray[np.int_], one: float, best: float, draws: int, seed: int
) -> float:
    """How often two lines gain as much over one line if one line is the truth."""
    slope, intercept = _line(x, y)
    expected = slope * x + intercept
    rest = y - expected
    generator = np.random.default_rng(seed)
    drawn = expected + rest[generator.integers(len(x), size=(draws, len(x)))]
    gained = _squares(x, drawn) / np.maximum(_squares_of_split(x, drawn, splits).min(axis=1), 1e-12)
    return float((1 + np.sum(gained >= one / max(best, 1e-12))) / (1 + draws))


def _squares(x: Array, y: Array) -> Array:
    """Residual sums of squares of lines through (x, each row of y)."""
    dx = x - x.mean()
    dy = y - y.mean(axis=1, keepdims=True)
    sxx = float(dx @ dx)
    total = np.sum(dy * dy, axis=1)
    return np.asarray(total - (dy @ dx) ** 2 / sxx if sxx > 0 else total, dtype=float)


def _squares_of_split(x: Array, y: Array, splits: NDArray[np.int_]) -> Array:
    """(rows of y, splits): of a line before and another one from each split on."""
    return np.stack([_squares(x[:k], y[:, :k]) + _squares(x[k:], y[:, k:]) for k in splits], axis=1)


def _line(x: Array, y: Array) -> tuple[float, float]:
    """Slope and intercept."""
    dx = x - x.mean()
    sxx = float(dx @ dx)
    slope = float(dx @ (y - y.mean())) / sxx if sxx > 0 else 0.0
    return slope, float(y.mean() - slope * x.mean())


def _falls(x: Array, y: Array) -> bool:
    """Whether y falls with x beyond chance: Student's t of the correlation, one-sided, 5 %."""
    from scipy.stats import t as student

    r, spare = _pearson(x, y), len(x) - 2
    return bool(student.cdf(r * math.sqrt(spare / max(1 - r * r, 1e-12)), spare) < SIGNIFICANT)


def _pearson(x: Array, y: Array) -> float:
    dx, dy = x - x.mean(), y - y.mean()
    scale = math.sqrt(float(dx @ dx) * float(dy @ dy))
    return float(dx @ dy) / scale if scale > 0 else 0.0


# ------------------------------------------------------------------------------------- correlation


def correlate(cells: Sequence[Cell], draws: int, seed: int) -> Correlation:
    known = with_accuracy(cells)
    names = sorted({cell.series for cell in known})
    if len(known) < FEWEST_FOR_CORRELATION:
        return Correlation(
            len(known),
            len(names),
            reason=f"{len(known)} cells have an accuracy, {FEWEST_FOR_CORRELATION} are needed",
        )
    x = np.array([cell.loss for cell in known])
    y = np.array([cell.finetuned_top1 for cell in known], dtype=float)
    if np.ptp(x) == 0 or np.ptp(y) == 0:
        which = "loss" if np.ptp(x) == 0 else "accuracy"
        return Correlation(len(known), len(names), reason=f"all cells have the same {which}")
    group = np.array([names.index(cell.series) for cell in known])
    generator = np.random.default_rng(seed)
    by_series = _counts(generator, draws, len(names))[:, group] if len(names) > 2 else None
    by_cell = _counts(generator, draws, len(known))
    whole = np.ones((1, len(known)))
    return Correlation(
        len(known),
        len(names),
        float(_weighted_pearson(x[None], y[None], whole)[0]),
        _interval(_weighted_pearson(x[None], y[None], by_series)) if by_series is not None else None,
        _interval(_weighted_pearson(x[None], y[None], by_cell)),
        float(_weighted_spearman(x, y, whole)[0]),
        _interval(_weighted_spearman(x, y, by_series)) if by_series is not None else None,
        _interval(_weighted_spearman(x, y, by_cell)),
        "" if by_series is not None else "too few series to draw them; intervals of single cells only",
    )


def _counts(generator: np.random.Generator, draws: int, size: int) -> Array:
    """(draws, size): how often each of `size` things is drawn in `size` draws with replacement."""
    return generator.multinomial(size, np.full(size, 1 / size), size=draws).astype(float)


def _weighted_pearson(x: Array, y: Array, weights: Array) -> Array:
    """One coefficient per row; NaN where a draw has no variation."""
    total = weights.sum(axis=1, keepdims=True)
    dx = x - (weights * x).sum(axis=1, keepdims=True) / total
    dy = y - (weights * y).sum(axis=1, keepdims=True) / total
    xy, xx, yy = ((weights * a).sum(axis=1) for a in (dx * dy, dx * dx, dy * dy))
    with np.errstate(invalid="ignore", divide="ignore"):
        found = np.where(xx * yy > 1e-24, xy / np.sqrt(xx * yy), np.nan)
    return np.asarray(np.clip(found, -1, 1), dtype=float)


def _weighted_spearman(x: Array, y: Array, weights: Array) -> Array:
    return _weighted_pearson(_ranks(x, weights), _ranks(y, weights), weights)


def _ranks(x: Array, weights: Array) -> Array:
    """(draws, n): mean ranks of each value when value i occurs `weights[:, i]` times."""
    values, inverse = np.unique(x, return_inverse=True)
    at = np.zeros((weights.shape[0], len(values)))
    for index, place in enumerate(inverse):
        at[:, place] += weights[:, index]
    before = np.cumsum(at, axis=1) - at
    return np.asarray((before + (at + 1) / 2)[:, inverse], dtype=float)


def _interval(values: Array) -> tuple[float, float] | None:
    found = values[np.isfinite(values)]
    if len(found) < 0.5 * len(values):
        return None
    low, high = np.quantile(found, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)
