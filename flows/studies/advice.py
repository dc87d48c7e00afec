"""What to train next for a compute budget and the images at hand, and whether more images would help.

Choices are the models of the table. Each gets the length that the budget pays for, at most the longest in the
table: what lies beyond is said, not extrapolated. A choice that the table shows to overfit is not advised:
some cell with as large or smaller a model, as many or more images and as short or shorter a training has
passed its minimum. The law (scaling_law) ranks the others; its resampled copies tell how sure the ranking is.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from flows.studies.cells import Cell
from flows.studies.overfitting import find_series
from flows.studies.scaling_law import Fit

Risk = Literal["no", "yes", "unknown"]
RUNGS = 7
"""Budgets of the ladder, from the cheapest cell's to the dearest's."""


@dataclass(frozen=True)
class Costs:
    """What a step of each model costs, and in which unit."""

    unit: str
    per_step: dict[str, float]
    assumption: str
    """Said beside every figure; empty if costs were measured or counted."""
    cheapest: float
    dearest: float


@dataclass(frozen=True)
class Choice:
    """One model with what the budget pays for."""

    model: str
    parameters: float
    iterations: float
    affordable: float
    """Iterations that the whole budget would pay for."""
    is_covered: bool
    """False if the length lies outside those of the table."""
    overfits: Risk
    loss: float
    interval: tuple[float, float]
    share: float
    """Of the resampled laws, those that find it best among the choices that do not overfit."""


@dataclass(frozen=True)
class Advice:
    budget: float
    images: float
    batch_size: float
    costs: Costs
    choices: tuple[Choice, ...]
    best: Choice | None
    twice_the_images: tuple[float, tuple[float, float]] | None
    """By how much twice as many images lower the best choice's loss by the law, and its interval."""
    twice_the_budget: tuple[float, tuple[float, float]] | None
    """The same for the best choice within the table's lengths and twice the budget."""
    more_data: str
    """Whether more images would help, in words."""
    limits: tuple[str, ...]
    """Where the question leaves what the cells cover."""


def count_costs(cells: Sequence[Cell], batch_size: float) -> Costs:
    """From the column `flops` if all cells have it, else parameters times images seen."""
    if all(cell.flops for cell in cells):
        per_step = {
            name: float(
                np.mean([(cell.flops or 0.0) / cell.iterations for cell in cells if cell.model == name])
            )
            for name in {cell.model for cell in cells}
        }
        unit, assumption = "FLOPs", ""
    else:
        per_step = {cell.model: cell.parameters * batch_size for cell in cells}
        unit = "parameter-images"
        assumption = (
            "the table has no complete column `flops`: a budget counts backbone parameters × images seen "
            f"({batch_size:,.0f} a step), which takes cost as proportional to parameters"
        )
    totals = [per_step[cell.model] * cell.iterations for cell in cells]
    return Costs(unit, per_step, assumption, min(totals), max(totals))


def advise(fit: Fit, cells: Sequence[Cell], budget: float, images: float, batch_size: float) -> Advice:
    """The best choice for `budget` (in the unit of `count_costs`) and `images` at hand."""
    costs = count_costs(cells, batch_size)
    choices = _choose(fit, cells, costs, budget, images)
    best = _best(choices)
    twice_images = twice_budget = None
    if best:
        twice_images = _gain(fit, (best, images), (best, 2 * images)) if "images" in fit.law.factors else None
        richer = _best(_choose(fit, cells, costs, 2 * budget, images))
        if richer and richer.loss < best.loss:
            twice_budget = _gain(fit, (best, images), (richer, images))
    return Advice(
        budget,
        images,
        batch_size,
        costs,
        choices,
        best,
        twice_images,
        twice_budget,
        _judge_more_data(choices, best, twice_images, fit, images),
        _limits(cells, costs, budget, images, best),
    )


def climb(fit: Fit, cells: Sequence[Cell], images: float, batch_size: float) -> list[Advice]:
    """Advice for budgets from the cheapest cell's to the dearest's."""
    costs = count_costs(cells, batch_size)
    if costs.dearest <= costs.cheapest:
        return []
    ladder = np.geomspace(costs.cheapest, costs.dearest, RUNGS)
    return [advise(fit, cells, float(budget), images, batch_size) for budget in ladder]


def overfits(cells: Sequence[Cell], parameters: float, images: float, iterations: float) -> Risk:
    """What the table says of such a training, as larger models, fewer images and longer training only bring
    overfitting nearer."""
    safe = False
    for series in find_series(cells).values():
        for length in series.iterations:
            has_risen = bool(series.is_overfitted) and length > series.minimum_at
            if (
                has_risen
                and series.parameters <= parameters
                and series.images >= images
                and length <= iterations
            ):
                return "yes"
            falls = length <= series.minimum_at and not series.rises_from_start
            if (
                falls
                and series.is_overfitted is not None
                and series.parameters >= parameters
                and series.images <= images
                and length >= iterations
            ):
                safe = True
    return "no" if safe else "unknown"


def _choose(
    fit: Fit, cells: Sequence[Cell], costs: Costs, budget: float, images: float
) -> tuple[Choice, ...]:
    lengths = [cell.iterations for cell in cells]
    shortest, longest = min(lengths), max(lengths)
    models = sorted({(cell.parameters, cell.model) for cell in cells})
    affordable = [budget / costs.per_step[name] for _, name in models]
    taken = [min(steps, longest) for steps in affordable]
    risks = [overfits(cells, size, images, steps) for (size, _), steps in zip(models, taken, strict=True)]
    corpus = fit.law.corpora[0]
    points = [
        {"parameters": size, "images": images, "iterations": steps}
        for (size, _), steps in zip(models, taken, strict=True)
    ]
    values = np.array([[point[name] for name in fit.law.factors] for point in points])
    losses = fit.law.predict_at(values, [corpus] * len(models))
    drawn = np.array([law.predict_at(values, [corpus] * len(models)) for law in fit.draws])
    covered = [steps >= 0.999 * shortest for steps in affordable]
    pool = [at for at, risk in enumerate(risks) if risk != "yes" and covered[at]] or [
        at for at, risk in enumerate(risks) if risk != "yes"
    ]
    wins = np.zeros(len(models))
    if pool:
        for row in drawn:
            wins[pool[int(np.argmin(row[pool]))]] += 1 / len(drawn)
    return tuple(
        Choice(
            name,
            size,
            taken[at],
            affordable[at],
            covered[at],
            risks[at],
            float(losses[at]),
            fit.interval(drawn[:, at].tolist()),
            float(wins[at]),
        )
        for at, (size, name) in enumerate(models)
    )


def _best(choices: Sequence[Choice]) -> Choice | None:
    """The lowest loss among choices that do not overfit, covered ones first; None if all overfit."""
    open_ones = [choice for choice in choices if choice.overfits != "yes"]
    covered = [choice for choice in open_ones if choice.is_covered]
    return min(covered or open_ones, key=lambda choice: choice.loss, default=None)


def _gain(
    fit: Fit, now: tuple[Choice, float], then: tuple[Choice, float]
) -> tuple[float, tuple[float, float]]:
    values = np.array(
        [
            [
                {"parameters": choice.parameters, "images": images, "iterations": choice.iterations}[name]
                for name in fit.law.factors
            ]
            for choice, images in (now, then)
        ]
    )
    corpora = [fit.law.corpora[0]] * 2

    def lowered(losses: np.ndarray) -> float:
        return float(losses[0] - losses[1])

    drawn = [lowered(law.predict_at(values, corpora)) for law in fit.draws]
    return lowered(fit.law.predict_at(values, corpora)), fit.interval(drawn)


def _as_cell(choice: Choice, images: float, fit: Fit) -> Cell:
    return Cell(
        choice.model, choice.parameters, images, choice.iterations, choice.loss, data=fit.law.corpora[0]
    )


def _judge_more_data(
    choices: Sequence[Choice],
    best: Choice | None,
    gain: tuple[float, tuple[float, float]] | None,
    fit: Fit,
    images: float,
) -> str:
    if best is None:
        return "yes: with so few images every model of the table overfits at the length the budget pays for"
    barred = [
        choice for choice in choices if choice.overfits == "yes" and choice.parameters > best.parameters
    ]
    words = ""
    if barred and min(choice.loss for choice in barred) < best.loss:
        names = ", ".join(choice.model for choice in barred)
        words = f"yes: {names} would be better at this budget but overfits with so few images. "
    if gain is None:
        return words + "beyond overfitting the table cannot tell: it has one number of images only"
    value, (low, high) = gain
    length = fit.doubling_gain("iterations", [_as_cell(best, images, fit)])
    rival = length["value"] if length else 0.0
    said = f"twice the images lower the predicted loss by {value:.4f} (95 %: {low:.4f} to {high:.4f})"
    if rival:
        said += f", twice the length by {rival:.4f}"
    if not words and abs(value) < fit.rmse:
        words = "little: "
        said += f"; the law misses a cell by {fit.rmse:.4f}"
    elif not words:
        words = (
            "unclear: "
            if low <= 0
            else "some, but longer training helps more: "
            if value < rival
            else "yes: "
        )
    return words + said


def _limits(
    cells: Sequence[Cell], costs: Costs, budget: float, images: float, best: Choice | None
) -> tuple[str, ...]:
    found = []
    if budget > 1.001 * costs.dearest:
        found.append(
            f"the budget is {budget / costs.dearest:.3g} times that of the dearest cell: the table does not "
            "cover it, and what it buys beyond that cell is not known"
        )
    if budget < 0.999 * costs.cheapest:
        found.append(
            f"the budget is {budget / costs.cheapest:.2g} of the cheapest cell's: the table does not cover it"
        )
    most, fewest = (function(cell.images for cell in cells) for function in (max, min))
    if not fewest <= images <= most:
        found.append(
            f"{images:,.0f} images lie outside the table's {fewest:,.0f} to {most:,.0f}: the loss is "
            "extrapolated, and whether a model overfits there is not known"
        )
    if best is None:
        return tuple(found)
    if not best.is_covered:
        found.append(
            f"the budget pays for {best.affordable:,.0f} iterations of {best.model}, fewer than any cell has"
        )
    elif best.affordable > 1.001 * best.iterations:
        spent = best.iterations / best.affordable
        found.append(
            f"{best.model} at the table's longest training spends {100 * spent:.0f} % of the budget; longer "
            "ones are not covered"
        )
    if best.overfits == "unknown":
        found.append(f"no cell shows whether {best.model} overfits with so few images at that length")
    sizes = [cell.parameters for cell in cells]
    if best.parameters == max(sizes) and len(set(sizes)) > 1 and not math.isclose(min(sizes), max(sizes)):
        found.append(f"{best.model} is the largest model of the table: a larger one may be better still")
    return tuple(found)
