"""Power laws of validation loss in model size, images and length, fitted by least squares.

Two forms are fitted, the one with the lower AICc is used, both are reported:

    sum      L = E + A·(N/N₀)^-a + B·(D/D₀)^-b + C·(T/T₀)^-c
    product  L = E + K·(N/N₀)^-a·(D/D₀)^-b·(T/T₀)^-c

with parameters N, images D, iterations T, their geometric means N₀, D₀, T₀, and E, A, B, C, K ≥ 0. Images of
another source than the most frequent one add a constant of their own to L: the loss is measured on one set,
to which they are foreign. Given the exponents all else is linear (non-negative least squares), so the search
is over the exponents alone, from a grid of starts, with Huber weights against outliers. Intervals are
percentiles of a bootstrap of the residuals (inflated by √(n/(n−p)); they take errors as independent and the
form as true).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from flows.errors import DataError
from flows.studies.cells import Cell

Array = NDArray[np.float64]
Form = Literal["sum", "product"]
FACTORS = ("parameters", "images", "iterations")
SMALLEST_EXPONENT, LARGEST_EXPONENT = 0.01, 4.0
STARTS = (0.05, 0.2, 0.6, 1.5)
SPARE_CELLS = 2
"""Cells beyond the number of free constants, without which there is nothing to judge the fit by."""
SEARCH_TOLERANCE = 1e-5
"""Relative; no interval claims to be narrower."""
HUBER = 1.345
"""Residuals beyond so many standard deviations weigh less; 95 % efficient for normal errors."""
LEVEL = 0.95
FIXED_EXPONENT = 0.5
"""Of a term whose factor has two values only: any exponent fits them equally well."""


@dataclass(frozen=True)
class Law:
    """One fitted form."""

    form: Form
    factors: tuple[str, ...]
    """Those that vary among the cells."""
    centres: tuple[float, ...]
    """Geometric mean of each factor."""
    exponents: tuple[float, ...]
    irreducible: float
    coefficients: tuple[float, ...]
    """Of each factor's term at its centre (sum), or of the one product."""
    corpora: tuple[str, ...]
    """The most frequent source of images first."""
    offsets: tuple[float, ...]
    """Added to the loss for each of `corpora`; the first is 0."""

    def predict(self, cells: Sequence[Cell]) -> Array:
        return self.predict_at(
            np.array([[getattr(cell, name) for name in self.factors] for cell in cells], dtype=float),
            [cell.corpus for cell in cells],
        )

    def predict_at(self, values: Array, corpora: Sequence[str]) -> Array:
        """Losses at (rows, factors) values; a source of images that no cell had counts as the first one."""
        columns = _columns(self.form, values / np.array(self.centres), self.exponents)
        offsets = dict(zip(self.corpora, self.offsets, strict=True))
        extra = np.array([offsets.get(corpus, 0.0) for corpus in corpora])
        return np.asarray(self.irreducible + extra + columns @ np.array(self.coefficients), dtype=float)


@dataclass(frozen=True)
class Fit:
    """The law that is used, how good it is, and how sure."""

    law: Law
    cells: int
    constants: int
    rmse: float
    r_squared: float
    aicc: float
    aicc_of: dict[Form, float]
    """Per form that was fitted."""
    aicc_without_irreducible: float
    draws: tuple[Law, ...]
    """The same form fitted to resampled tables."""
    absent: dict[str, str]
    """Factors without an exponent in this form, and why."""
    other_draws: tuple[Law, ...] = ()
    """The product and its resampled copies where a sum lacks exponents that the product has."""

    def interval(self, values: Sequence[float]) -> tuple[float, float]:
        low, high = np.quantile(np.array(values), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
        slack = SEARCH_TOLERANCE * abs(float(np.mean(values)))  # without noise the draws are all alike
        return float(low) - slack, float(high) + slack

    def exponent(self, factor: str) -> dict[str, Any]:
        """Value, interval and whether the data fix it."""
        law, draws = self.law, self.draws
        if factor in self.absent:
            if factor not in law.factors or not self.other_draws:
                missing = {"value": None, "interval": None, "form": None, "is_identified": False}
                return {**missing, "reason": self.absent[factor]}
            law, draws = self.other_draws[0], self.other_draws[1:]
        at = law.factors.index(factor)
        low, high = self.interval([each.exponents[at] for each in draws])
        reason = ""
        term = law.coefficients[at] if law.form == "sum" else law.coefficients[0]
        if term <= 0:
            reason = "its term is zero in the best fit"
        elif min(low, law.exponents[at]) <= 1.01 * SMALLEST_EXPONENT or high >= 0.99 * LARGEST_EXPONENT:
            reason = f"its interval reaches an end of the search, {SMALLEST_EXPONENT} to {LARGEST_EXPONENT}"
        borrowed = f"{self.absent[factor]}; of the product of powers" if factor in self.absent else ""
        return {
            "value": law.exponents[at],
            "interval": [low, high],
            "form": law.form,
            "is_identified": not reason,
            "reason": "; ".join(text for text in (borrowed, reason) if text),
        }

    def irreducible(self) -> dict[str, Any]:
        """The loss that nothing lowers; identified if leaving it out fits clearly worse and its interval does
        not reach 0."""
        low, high = self.interval([law.irreducible for law in self.draws])
        gain = self.aicc_without_irreducible - self.aicc
        identified = low > 0 and gain > 2
        return {
            "value": self.law.irreducible,
            "interval": [max(low, 0.0), high],
            "is_identified": identified,
            "aicc_gain": gain,
        }

    def doubling_gain(self, factor: str, at: Sequence[Cell]) -> dict[str, Any] | None:
        """How much doubling one factor lowers the loss, mean over `at`, with interval."""
        if factor not in self.law.factors:
            return None
        index = self.law.factors.index(factor)
        values = np.array([[getattr(cell, name) for name in self.law.factors] for cell in at], dtype=float)
        doubled = values.copy()
        doubled[:, index] *= 2
        corpora = [cell.corpus for cell in at]

        def gain(law: Law) -> float:
            return float(np.mean(law.predict_at(values, corpora) - law.predict_at(doubled, corpora)))

        return {"value": gain(self.law), "interval": list(self.interval([gain(law) for law in self.draws]))}


# --------------------------------------------------------------------------------------------- fit


def varying(cells: Sequence[Cell]) -> list[str]:
    """Factors that differ between cells."""
    return [name for name in FACTORS if len({getattr(cell, name) for cell in cells}) > 1]


def cells_needed(cells: Sequence[Cell]) -> int:
    """By the smaller form: E, a factor, an exponent per factor that varies, a constant per further source."""
    return 2 + len(varying(cells)) + len({cell.corpus for cell in cells}) - 1 + SPARE_CELLS


def check_enough(cells: Sequence[Cell], what: str = "cells") -> None:
    """
    Raises:
        DataError: the fit needs more cells, or none of its factors varies.
    """
    if not varying(cells):
        raise DataError(
            f"no fit: all {len(cells)} {what} have the same {', '.join(FACTORS)}; at least one has to vary"
        )
    needed = cells_needed(cells)
    if len(cells) < needed:
        raise DataError(
            f"the fit of the loss needs at least {needed} {what}, there are {len(cells)}: one per constant "
            f"of the law and {SPARE_CELLS} to judge it by"
        )


def fit_law(cells: Sequence[Cell], draws: int, seed: int) -> Fit:
    """Fit both forms to `cells`, keep the better one, resample it `draws` times."""
    check_enough(cells)
    problem = _Problem(cells)
    found = {form: _search(problem, form, problem.losses) for form in problem.forms()}
    aicc = {form: _aicc(problem, form, law) for form, law in found.items()}
    form = min(aicc, key=lambda name: aicc[name])
    law = found[form]
    bare = _search(problem, form, problem.losses, has_irreducible=False)
    rest = problem.losses - law.predict(cells)
    total = float(np.sum((problem.losses - problem.losses.mean()) ** 2))
    constants = problem.constants(form)
    absent = problem.absent(form)
    other: list[Law] = []
    if draws and set(absent) & set(problem.factors) and form == "sum" and "product" in found:
        product = found["product"]
        other = [product, *_resample(problem, "product", product, draws, seed)]
    return Fit(
        law=law,
        cells=len(cells),
        constants=constants,
        rmse=float(np.sqrt(np.mean(rest**2))),
        r_squared=1 - float(rest @ rest) / total if total > 0 else 0.0,
        aicc=aicc[form],
        aicc_of=aicc,
        aicc_without_irreducible=_aicc(problem, form, bare, fewer=1),
        draws=tuple(_resample(problem, form, law, draws, seed)),
        absent=absent,
        other_draws=tuple(other),
    )


class _Problem:
    """What all fits of one set of cells share."""

    def __init__(self, cells: Sequence[Cell]) -> None:
        self.cells = cells
        self.losses = np.array([cell.loss for cell in cells])
        self.levels = {name: len({getattr(cell, name) for cell in cells}) for name in FACTORS}
        self.factors = tuple(name for name in FACTORS if self.levels[name] > 1)
        values = np.array([[getattr(cell, name) for name in self.factors] for cell in cells], dtype=float)
        self.centres = np.exp(np.log(values).mean(axis=0))
        self.logs = np.log(values / self.centres)
        names = [cell.corpus for cell in cells]
        self.corpora = tuple(sorted(set(names), key=lambda name: (-names.count(name), name)))
        foreign = np.array([[name == corpus for corpus in self.corpora[1:]] for name in names], dtype=float)
        self.foreign = foreign.reshape(len(cells), len(self.corpora) - 1)

    def forms(self) -> tuple[Form, ...]:
        """A sum needs three values of each factor to tell exponent from coefficient, and more cells."""
        if len(self.factors) == 1:  # both forms are the same
            return ("sum",) if self.levels[self.factors[0]] > 2 else ("product",)
        enough = len(self.cells) >= self.constants("sum") + SPARE_CELLS
        return ("sum", "product") if enough else ("product",)

    def constants(self, form: Form) -> int:
        free = len(self._free("sum")) + len(self.factors) if form == "sum" else 1 + len(self.factors)
        return 1 + free + len(self.corpora) - 1

    def _free(self, form: Form) -> list[int]:
        """Which exponents are searched for."""
        at = range(len(self.factors))
        return [i for i in at if form == "product" or self.levels[self.factors[i]] > 2]

    def absent(self, form: Form) -> dict[str, str]:
        missing = {name: "all cells have the same value" for name in FACTORS if name not in self.factors}
        for at, name in enumerate(self.factors):
            if at not in self._free(form):
                missing[name] = "there are two values only, which fix a difference but no exponent"
        return missing

    def exponents(self, form: Form, free: Array) -> tuple[float, ...]:
        found = np.full(len(self.factors), FIXED_EXPONENT)
        found[self._free(form)] = free
        return tuple(float(value) for value in found)

    def number_free(self, form: Form) -> int:
        return len(self._free(form))


def _columns(form: Form, values: Array, exponents: Sequence[float]) -> Array:
    """(rows, terms) of the law, without its constants."""
    terms: Array = np.asarray(values, dtype=float) ** -np.array(exponents)
    return terms if form == "sum" else np.asarray(terms.prod(axis=1, keepdims=True), dtype=float)


def _design(problem: _Problem, form: Form, exponents: Sequence[float], has_irreducible: bool) -> Array:
    terms: Array = np.exp(-problem.logs * np.array(exponents))
    if form == "product":
        terms = terms.prod(axis=1, keepdims=True)
    constant = np.ones((len(terms), 1 if has_irreducible else 0))
    # an offset may have either sign, and all coefficients of NNLS are at least 0
    return np.asarray(
        np.concatenate([terms, problem.foreign, -problem.foreign, constant], axis=1), dtype=float
    )


def _solve(design: Array, losses: Array, root: Array) -> tuple[Array, Array]:
    """Non-negative coefficients and weighted residuals."""
    from scipy.optimize import nnls

    weighted = design * root[:, None]
    coefficients = nnls(weighted, losses * root)[0]
    return coefficients, losses * root - weighted @ coefficients


def _search(
    problem: _Problem,
    form: Form,
    losses: Array,
    start: Sequence[float] | None = None,
    has_irreducible: bool = True,
    rounds: int = 4,
) -> Law:
    """The best exponents; from `start` if given, else from the best few points of a grid."""
    from scipy.optimize import least_squares

    size = problem.number_free(form)
    root = np.ones(len(losses))

    def residuals(log_exponents: Array) -> Array:
        exponents = problem.exponents(form, np.exp(log_exponents))
        return _solve(_design(problem, form, exponents, has_irreducible), losses, root)[1]

    bounds = (math.log(SMALLEST_EXPONENT), math.log(LARGEST_EXPONENT))
    if start is not None:
        starts = [np.log(np.array(start))]
    else:
        grid = [np.log(np.array(point)) for point in itertools.product(STARTS, repeat=size)]
        starts = sorted(grid, key=lambda point: float(np.sum(residuals(point) ** 2)))[:3]
    best = starts[0]
    for turn in range(rounds):
        tries = (
            [
                least_squares(residuals, np.clip(point, bounds[0] + 1e-6, bounds[1] - 1e-6), bounds=bounds)
                for point in starts
            ]
            if size
            else []
        )
        if tries:
            best = min(tries, key=lambda found: float(found.cost)).x
        starts = [best]
        weights = _huber_weights(residuals(best) / root)
        if turn and np.allclose(weights, root**2, atol=1e-3):
            break
        root = np.sqrt(weights)
    exponents = problem.exponents(form, np.exp(best))
    coefficients, _ = _solve(_design(problem, form, exponents, has_irreducible), losses, root)
    terms = len(problem.factors) if form == "sum" else 1
    foreign = len(problem.corpora) - 1
    up, down = coefficients[terms : terms + foreign], coefficients[terms + foreign : terms + 2 * foreign]
    return Law(
        form=form,
        factors=problem.factors,
        centres=tuple(float(value) for value in problem.centres),
        exponents=exponents,
        irreducible=float(coefficients[-1]) if has_irreducible else 0.0,
        coefficients=tuple(float(value) for value in coefficients[:terms]),
        corpora=problem.corpora,
        offsets=(0.0, *(float(value) for value in up - down)),
    )


def _huber_weights(rest: Array) -> Array:
    scale = 1.4826 * float(np.median(np.abs(rest - np.median(rest))))
    if scale <= 1e-9:
        return np.ones(len(rest))
    return np.asarray(np.minimum(1.0, HUBER * scale / np.maximum(np.abs(rest), 1e-12)), dtype=float)


def _aicc(problem: _Problem, form: Form, law: Law, fewer: int = 0) -> float:
    rest = problem.losses - law.predict(problem.cells)
    n, k = len(rest), problem.constants(form) - fewer + 1  # and the variance
    spare = max(n - k - 1, 0.5)
    return n * math.log(max(float(rest @ rest) / n, 1e-16)) + 2 * k + 2 * k * (k + 1) / spare


def _resample(problem: _Problem, form: Form, law: Law, draws: int, seed: int) -> list[Law]:
    generator = np.random.default_rng(seed)
    expected = law.predict(problem.cells)
    n = len(expected)
    rest = (problem.losses - expected) * math.sqrt(n / max(n - problem.constants(form), 1))
    rest -= rest.mean()
    free = [law.exponents[at] for at in problem._free(form)]
    return [
        _search(problem, form, expected + rest[generator.integers(n, size=n)], start=free, rounds=1)
        for _ in range(draws)
    ]
