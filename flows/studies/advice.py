"""What to train next for a compute budget and the images at hand, and whether more images would help.

Choices are the models of the table. Each gets the length that the budget pays for, at most the longest in the
table: what lies beyond is said, not extrapolated. Where the table does not show that such a training is safe
from overfitting, the model's longest one that it does show safe is a choice too. The table shows overfitting
if some cell with no larger model, no fewer images and no longer training has passed its minimum, or lies far
above the law; safety, if a cell with no smaller model, no more images and no shorter training has not. Safe
choices are advised before others. The law (scaling_law) ranks them; its resampled copies tell how surely.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from flows.studies.cells import Cell
from flows.studies.overfitting import find_series
from flows.studies.scaling_law import FACTORS, Fit

Risk = Literal["no", "yes", "unknown"]
Gain = tuple[float, tuple[float, float]]
"""By how much the predicted loss falls, and its 95 % interval."""
WELL_ABOVE = 3
FAR_ABOVE = 4
"""A loss so many root mean square errors above the law is no noise but overfitting."""
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
    """Of the resampled laws, those that find it best among the choices that may be advised."""


@dataclass(frozen=True)
class Advice:
    budget: float
    images: float
    batch_size: float
    costs: Costs
    choices: tuple[Choice, ...]
    best: Choice | None
    """The lowest predicted loss among choices that the table shows not to overfit; where there is none, among
    those of which it shows nothing."""
    open: Choice | None
    """A still lower one of which the table does not show whether it overfits."""
    twice_the_images: Gain | None
    """By how much the best choice for twice the images is better."""
    twice_the_budget: Gain | None
    """The same for twice the budget."""
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
    better = _open(choices, best)
    twice_images = twice_budget = None
    if best:
        if "images" in fit.law.factors:
            then = _best(_choose(fit, cells, costs, budget, 2 * images)) or best
            twice_images = _gain(fit, (best, images), (then, 2 * images))
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
        better,
        twice_images,
        twice_budget,
        _judge_more_data(fit, choices, best, images, twice_images),
        _limits(fit, cells, costs, budget, images, best, better),
    )


def climb(fit: Fit, cells: Sequence[Cell], images: float, batch_size: float) -> list[Advice]:
    """Advice for budgets from the cheapest cell's to the dearest's."""
    costs = count_costs(cells, batch_size)
    if costs.dearest <= costs.cheapest:
        return []
    ladder = np.geomspace(costs.cheapest, costs.dearest, RUNGS)
    return [advise(fit, cells, float(budget), images, batch_size) for budget in ladder]


@dataclass(frozen=True)
class Evidence:
    """Trainings that the table shows to have overfitted, and such that it shows not to: each as parameters,
    images, iterations."""

    overfitted: tuple[tuple[float, float, float], ...]
    safe: tuple[tuple[float, float, float], ...]

    def judge(self, parameters: float, images: float, iterations: float) -> Risk:
        """Larger models, fewer images and longer training only bring overfitting nearer."""
        for size, data, length in self.overfitted:
            if size <= parameters and data >= images and length <= 1.001 * iterations:
                return "yes"
        for size, data, length in self.safe:
            if size >= parameters and data <= images and length >= 0.999 * iterations:
                return "no"
        return "unknown"


def gather_evidence(fit: Fit, cells: Sequence[Cell]) -> Evidence:
    """From the course of every series; of one that only rises also how far its beginning lies above the law,
    as its minimum may lie at any shorter length."""
    overfitted, safe = [], []
    for key, series in find_series(cells).items():
        if series.is_overfitted is None:
            continue
        size, data = series.parameters, series.images
        if series.rises_from_start:
            first = series.iterations[0]
            begin = [cell for cell in cells if cell.series == key and cell.iterations == first]
            excess = series.losses[0] - float(fit.law.predict(begin).mean())
            # between the first two lengths it only rises, so anything longer than the first is past it
            begins = first if excess > FAR_ABOVE * fit.rmse else 1.01 * first
            overfitted.append((size, data, begins))
            continue
        safe.append((size, data, series.minimum_at))
        later = [length for length in series.iterations if length > series.minimum_at]
        if series.is_overfitted:
            overfitted.append((size, data, later[0]))
    return Evidence(tuple(overfitted), tuple(safe))


def _choose(
    fit: Fit, cells: Sequence[Cell], costs: Costs, budget: float, images: float
) -> tuple[Choice, ...]:
    lengths = sorted({cell.iterations for cell in cells})
    evidence = gather_evidence(fit, cells)
    taken: list[tuple[float, str, float, Risk]] = []
    for size, name in sorted({(cell.parameters, cell.model) for cell in cells}):
        longest = min(budget / costs.per_step[name], lengths[-1])
        risk = evidence.judge(size, images, longest)
        taken.append((size, name, longest, risk))
        shorter = [
            length for length in lengths if length < longest and evidence.judge(size, images, length) == "no"
        ]
        if risk != "no" and shorter:
            taken.append((size, name, shorter[-1], "no"))
    losses = _predict(fit, [(size, images, steps) for size, _, steps, _ in taken])
    covered = [steps >= 0.999 * lengths[0] for _, _, steps, _ in taken]
    pool = _pool([(is_covered, risk) for is_covered, (*_, risk) in zip(covered, taken, strict=True)])
    wins = np.zeros(len(taken))
    if pool:
        best = np.array(pool)[losses[1:, pool].argmin(axis=1)]
        wins = np.bincount(best, minlength=len(taken)) / len(best)
    return tuple(
        Choice(
            name,
            size,
            steps,
            budget / costs.per_step[name],
            covered[at],
            risk,
            float(losses[0, at]),
            fit.interval(losses[1:, at].tolist()),
            float(wins[at]),
        )
        for at, (size, name, steps, risk) in enumerate(taken)
    )


def _predict(fit: Fit, points: Sequence[tuple[float, float, float]]) -> np.ndarray:
    """(1 + draws, points): losses by the law and by its resampled copies, at (parameters, images, iterations)
    of the main source of images."""
    known = [FACTORS.index(name) for name in fit.law.factors]
    values = np.array([[point[at] for at in known] for point in points], dtype=float)
    corpora = [fit.law.corpora[0]] * len(points)
    return np.array([law.predict_at(values, corpora) for law in (fit.law, *fit.draws)])


def _pool(choices: Sequence[tuple[bool, Risk]]) -> list[int]:
    """Which of (covered, overfits) may be advised: those shown safe; if none is, those of which nothing is
    shown; within each, those of lengths that the table covers."""
    for risk in ("no", "unknown"):
        for is_covered in (True, False):
            found = [at for at, choice in enumerate(choices) if choice == (is_covered, risk)]
            if found:
                return found
    return []


def _best(choices: Sequence[Choice]) -> Choice | None:
    """The lowest loss among those that may be advised; None if all overfit."""
    pool = _pool([(choice.is_covered, choice.overfits) for choice in choices])
    return min((choices[at] for at in pool), key=lambda choice: choice.loss, default=None)


def _open(choices: Sequence[Choice], best: Choice | None) -> Choice | None:
    """A better choice of which the table does not show whether it overfits."""
    found = [c for c in choices if c.overfits == "unknown" and c.is_covered and best and c.loss < best.loss]
    return min(found, key=lambda choice: choice.loss, default=None)


def _gain(fit: Fit, now: tuple[Choice, float], then: tuple[Choice, float]) -> Gain:
    losses = _predict(fit, [(c.parameters, images, c.iterations) for c, images in (now, then)])
    lowered = losses[:, 0] - losses[:, 1]
    return float(lowered[0]), fit.interval(lowered[1:].tolist())


def _judge_more_data(
    fit: Fit, choices: Sequence[Choice], best: Choice | None, images: float, gain: Gain | None
) -> str:
    if best is None:
        return "yes; with so few images every model of the table overfits at every length that was tried"
    barred = [choice for choice in choices if choice.overfits == "yes" and choice.loss < best.loss]
    verdict = "yes" if barred else ""
    said = ""
    if barred:
        names = ", ".join(f"{choice.model} for {choice.iterations:,.0f}" for choice in barred)
        said = (
            f"; the budget pays for {names} iterations, which would be better but overfit with so few images"
        )
    if gain is None:
        return (verdict or "not known") + said + "; the table has one number of images only"
    value, (low, high) = gain
    said += f"; twice the images lower the predicted loss by {value:.4f} (95 %: {low:.4f} to {high:.4f})"
    longer = Choice(**{**best.__dict__, "iterations": 2 * best.iterations})
    rival = _gain(fit, (best, images), (longer, images))[0] if "iterations" in fit.law.factors else 0.0
    if rival:
        said += f", twice the length would by {rival:.4f}"
    if not verdict and abs(value) < fit.rmse:
        verdict = "hardly"
        said += f", and the law misses a cell by {fit.rmse:.4f}"
    elif not verdict:
        verdict = "not sure" if low <= 0 else "some" if value < rival else "yes"
    return verdict + said


def _limits(
    fit: Fit,
    cells: Sequence[Cell],
    costs: Costs,
    budget: float,
    images: float,
    best: Choice | None,
    better: Choice | None,
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
        longest = best.iterations >= max(cell.iterations for cell in cells)
        why = "the table has no longer training" if longest else "a longer one is not shown to be safe"
        found.append(f"this spends {100 * spent:.0f} % of the budget: {why}")
    if best.overfits == "unknown":
        found.append(f"no cell shows whether {best.model} overfits with so few images at that length")
    elif better:
        found.append(
            f"{better.model} for {better.iterations:,.0f} iterations would reach {better.loss:.4f} if it does"
            " not overfit with so few images, which no cell shows"
        )
    if warning := _compare_with_neighbour(fit, cells, images, best):
        found.append(warning)
    sizes = [cell.parameters for cell in cells]
    if best.parameters == max(sizes) and len(set(sizes)) > 1 and not math.isclose(min(sizes), max(sizes)):
        found.append(f"{best.model} is the largest model of the table: a larger one may be better still")
    return tuple(found)


def _compare_with_neighbour(fit: Fit, cells: Sequence[Cell], images: float, best: Choice) -> str:
    """A warning if the nearest cell of the same model, at most half as much again away, lies well above the
    law: overfitting may have begun there without having turned its series."""

    def distance(cell: Cell) -> float:
        away = (math.log(cell.images / images), math.log(cell.iterations / best.iterations))
        return max(abs(value) for value in away)

    near = min((cell for cell in cells if cell.model == best.model), key=distance)
    missed = near.loss - float(fit.law.predict([near])[0])
    if distance(near) > math.log(1.5) or missed < WELL_ABOVE * fit.rmse:
        return ""
    return f"the nearest cell, {near.label}, has {near.loss:.4f}, {missed:.4f} more than the law says"
