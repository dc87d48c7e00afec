"""How well the law predicts cells that it has not seen: the largest model from the smaller ones, and others.

Each check is compared with simple rules on the same cells. A law that does not beat the nearest smaller cell
has learnt nothing worth its formula, and the page says so.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from flows.errors import DataError
from flows.studies import scaling_law
from flows.studies.cells import Cell
from flows.studies.overfitting import can_be_fitted, find_series, judge_cell

MOST_MODELS = 12
"""Held out in turn besides the largest one: its nearest."""


@dataclass(frozen=True)
class Prediction:
    cell: Cell
    truth: float
    predicted: float
    interval: tuple[float, float] | None
    """Of the law's curve, 95 %; a single cell strays by its own noise besides. None if not asked for."""
    nearest: float | None
    """The loss of the next smaller cell: the rule to beat."""
    trend: float | None
    """The line through the two next smaller cells, over the logarithm of what was left out."""
    is_fitted: bool
    """False for a cell past the minimum of its series, which no law without overfitting can predict."""


@dataclass(frozen=True)
class Errors:
    """Predicted minus true loss over some cells. Rules that do not apply to every cell are compared on those
    cells that have all of them."""

    cells: int
    mean_absolute: float
    bias: float
    largest: float
    mean_absolute_nearest: float | None
    mean_absolute_trend: float | None
    compared: int
    mean_absolute_compared: float | None


@dataclass(frozen=True)
class HeldOut:
    """One check: fitted without some cells, then asked for them."""

    what: str
    fitted_on: int
    form: str = ""
    predictions: tuple[Prediction, ...] = ()
    fitted: Errors | None = None
    """Over cells that the law can be asked for."""
    overfitted: Errors | None = None
    """Over the others."""
    spread: float = 0.0
    """Largest minus smallest true loss of the first: what there was to tell apart."""
    reason: str = ""
    """Why there is no check."""


def check_all(cells: Sequence[Cell], draws: int, seed: int) -> tuple[HeldOut, list[HeldOut]]:
    """The largest model from the smaller ones; then each other model from all the rest, the longest training
    and the most images from the shorter and the fewer."""
    sizes = sorted({(cell.parameters, cell.model) for cell in cells})
    models = [name for _, name in sizes]
    longest = max(cell.iterations for cell in cells)
    most = max(cells, key=lambda cell: cell.images)

    def leave_out(what: str, factor: str, value: float | str, draws: int = 0) -> HeldOut:
        key = "model" if factor == "parameters" else factor
        return check(what, cells, lambda cell: getattr(cell, key) == value, factor, draws, seed)

    main = leave_out(f"largest model, {models[-1]}", "parameters", models[-1], draws)
    others = [
        leave_out(f"model {name}, from all others", "parameters", name) for name in models[:-1][-MOST_MODELS:]
    ]
    others.append(leave_out(f"longest training, {longest:,.0f} iterations", "iterations", longest))
    foreign = all(cell.corpus != most.corpus for cell in cells if cell.images != most.images)
    alien = " (of a source that no other cell has)" if foreign and most.corpus else ""
    others.append(leave_out(f"most images, {most.data_label}{alien}", "images", most.images))
    return main, others


def check(
    what: str, cells: Sequence[Cell], is_held: Callable[[Cell], bool], factor: str, draws: int, seed: int
) -> HeldOut:
    """Fit on the cells that are not held out, judged anew without them, and predict the others."""
    rest = [cell for cell in cells if not is_held(cell)]
    series = find_series(rest) if rest else {}
    training = [cell for cell in rest if can_be_fitted(cell, series[cell.series])]
    if not training:
        return HeldOut(what, 0, reason="no other cells are left to learn from")
    try:
        scaling_law.check_enough(training, "cells besides")
        fit = scaling_law.fit_law(training, draws, seed)
    except DataError as error:
        return HeldOut(what, len(training), reason=str(error))
    asked = [cell for cell in cells if is_held(cell)]
    predicted = fit.law.predict(asked)
    resampled = np.array([law.predict(asked) for law in fit.draws])
    whole = find_series(cells)
    made = []
    for at, cell in enumerate(asked):
        smaller = _smaller(cell, rest, factor)
        made.append(
            Prediction(
                cell,
                cell.loss,
                float(predicted[at]),
                fit.interval(resampled[:, at].tolist()) if draws else None,
                smaller[-1].loss if smaller else None,
                _extrapolate(cell, smaller, factor),
                judge_cell(cell, whole[cell.series]) in ("fitted", "unknown")
                and not whole[cell.series].rises_from_start,
            )
        )
    good = [found for found in made if found.is_fitted]
    truths = [found.truth for found in good]
    return HeldOut(
        what,
        len(training),
        fit.law.form,
        tuple(made),
        _errors(good),
        _errors([found for found in made if not found.is_fitted]),
        max(truths) - min(truths) if truths else 0.0,
        "" if good else "all cells held out are past the minimum of their series",
    )


def _smaller(cell: Cell, rest: Sequence[Cell], factor: str) -> list[Cell]:
    """Cells that differ from `cell` in `factor` only and have less of it, the nearest last."""
    same = [name for name in scaling_law.FACTORS if name != factor]
    found = [
        other
        for other in rest
        if all(getattr(other, name) == getattr(cell, name) for name in same)
        and (factor == "parameters" or other.model == cell.model)
        and other.seed == cell.seed
        and getattr(other, factor) < getattr(cell, factor)
    ]
    return sorted(found, key=lambda other: float(getattr(other, factor)))


def _extrapolate(cell: Cell, smaller: Sequence[Cell], factor: str) -> float | None:
    if len(smaller) < 2:
        return None
    far, near = smaller[-2:]
    x, x_far, x_near = (math.log(getattr(found, factor)) for found in (cell, far, near))
    return near.loss + (near.loss - far.loss) * (x - x_near) / (x_near - x_far)


def _errors(found: Sequence[Prediction]) -> Errors | None:
    if not found:
        return None
    off = np.array([each.predicted - each.truth for each in found])
    both = [each for each in found if each.nearest is not None]
    trends = [each for each in both if each.trend is not None]
    return Errors(
        len(found),
        float(np.abs(off).mean()),
        float(off.mean()),
        float(off[np.abs(off).argmax()]),
        _mean([abs(each.nearest - each.truth) for each in both if each.nearest is not None]),
        _mean([abs(each.trend - each.truth) for each in both if each.trend is not None])
        if len(trends) == len(both)
        else None,
        len(both),
        _mean([abs(each.predicted - each.truth) for each in both]),
    )


def _mean(values: Sequence[float]) -> float | None:
    return float(np.mean(values)) if values else None
