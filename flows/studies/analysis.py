"""From a table of cells to what it says: correlations, overfitting, law, held-out check, advice.

Everything is drawn with fixed seeds: the same table gives the same answer. What could not be done is a note,
so that nothing missing is taken for a zero.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from flows.errors import ConfigError
from flows.studies import advice, correlations, held_out, overfitting, scaling_law
from flows.studies.advice import Advice
from flows.studies.cells import COLUMNS, Cell, Table
from flows.studies.correlations import Boundary, Correlation
from flows.studies.held_out import HeldOut
from flows.studies.overfitting import Series, Verdict
from flows.studies.scaling_law import FACTORS, Fit

PUBLISHED_BATCH = 2048
"""Images a step where the table does not say; that of the published study."""


@dataclass(frozen=True)
class AnalysisSettings:
    """How a table is analysed."""

    budget: float | None = None
    """To advise for, in FLOPs (or parameters × images seen); None: the dearest cell's."""
    images: float | None = None
    """At hand; None: the most that the table has of its main source."""
    batch_size: float | None = None
    """Images a step; None: the table's, else 2048."""
    draws: int = 2000
    """Resamples for correlations and boundary."""
    law_draws: int = 300
    """Resamples for the law, its predictions and the advice."""
    seed: int = 0

    def check(self) -> None:
        for name in ("budget", "images", "batch_size"):
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                raise ConfigError(f"`{name}` must be a number above 0, found {value}")
        for name in ("draws", "law_draws"):
            if not 20 <= getattr(self, name) <= 100_000:
                raise ConfigError(f"`{name}` must be from 20 to 100,000, found {getattr(self, name)}")
        if self.seed < 0:
            raise ConfigError(f"`seed` must not be negative, found {self.seed}")


@dataclass(frozen=True)
class Judged:
    """A cell with what was found about it."""

    cell: Cell
    verdict: Verdict
    series_overfitted: bool | None
    past_boundary: bool | None
    """None without a boundary."""
    in_fit: bool


@dataclass(frozen=True)
class Analysis:
    table: Table
    settings: AnalysisSettings
    cells: tuple[Judged, ...]
    series: tuple[Series, ...]
    boundary: Boundary | None
    boundary_absent: str
    """Why there is no boundary."""
    correlations: dict[str, Correlation]
    """`all`, `below_boundary`, `at_or_above_boundary`."""
    correlations_by_model: dict[str, Correlation]
    correlations_by_loss: dict[str, Correlation]
    """Of accuracy with other validation losses, on the cells that have them all: does the choice matter?"""
    fit: Fit | None
    fit_absent: str
    held_out: HeldOut | None
    held_out_others: tuple[HeldOut, ...]
    advice: Advice | None
    ladder: tuple[Advice, ...]
    notes: tuple[str, ...]

    @property
    def overfitted(self) -> list[Series]:
        return [series for series in self.series if series.is_overfitted]

    @property
    def is_boundary_of_overfitting(self) -> bool:
        """Whether at least half of the cells past the boundary belong to overfitted series."""
        above = [found for found in self.cells if found.past_boundary]
        return bool(above) and 2 * sum(bool(found.series_overfitted) for found in above) >= len(above)

    @property
    def early_overfitted(self) -> list[float]:
        """How many points overfitted cells below the boundary finetune above the line through all of them."""
        line = self.boundary
        if line is None:
            return []
        return [
            found.cell.finetuned_top1 - (line.intercept_below + line.slope_below * found.cell.loss)
            for found in self.cells
            if found.verdict == "overfitted"
            and not found.past_boundary
            and found.cell.finetuned_top1 is not None
        ]

    @property
    def fitted_cells(self) -> list[Cell]:
        return [judged.cell for judged in self.cells if judged.in_fit]

    @property
    def doubling(self) -> dict[str, dict[str, Any] | None]:
        """What doubling each factor brings, at the mean of the cells of the largest source of images."""
        if not self.fit:
            return dict.fromkeys(FACTORS)
        return {name: self.fit.doubling_gain(name, self.fitted_cells) for name in FACTORS}


def analyse(table: Table, settings: AnalysisSettings) -> Analysis:
    """
    Raises:
        DataError: the table has fewer cells than the fit needs, or none of its factors varies.
    """
    settings.check()
    cells = table.cells
    scaling_law.check_enough(cells)
    series = overfitting.find_series(cells)
    notes = [*table.notes]
    boundary, absent = correlations.find_boundary(cells, settings.draws, settings.seed)
    fitted = [cell for cell in cells if overfitting.can_be_fitted(cell, series[cell.series])]
    fit, fit_absent = None, ""
    needed = scaling_law.cells_needed(fitted or cells)
    if len(fitted) < needed:
        fit_absent = f"{len(fitted)} of {len(cells)} cells have not overfitted, the fit needs {needed}"
    elif not scaling_law.varying(fitted):
        fit_absent = f"the {len(fitted)} cells that have not overfitted do not differ"
    else:
        fit = scaling_law.fit_law(fitted, settings.law_draws, settings.seed)
    if fit_absent:
        notes.append(f"no law is fitted: {fit_absent}")
    main, advised = None, None
    others: list[HeldOut] = []
    ladder: list[Advice] = []
    if fit:
        main, others = held_out.check_all(cells, min(settings.law_draws, 200), settings.seed)
        budget, images, batch = _question(cells, fit, settings)
        advised = advice.advise(fit, cells, budget, images, batch)
        ladder = advice.climb(fit, cells, images, batch)
    keep = {id(cell) for cell in fitted} if fit else set()
    judged = tuple(
        Judged(
            cell,
            overfitting.judge_cell(cell, series[cell.series]),
            series[cell.series].is_overfitted,
            None if boundary is None else cell.loss >= boundary.loss,
            id(cell) in keep,
        )
        for cell in cells
    )
    return Analysis(
        table,
        settings,
        judged,
        tuple(series.values()),
        boundary,
        absent,
        _correlate(cells, boundary, settings),
        {
            name: correlations.correlate([c for c in cells if c.model == name], settings.draws, settings.seed)
            for name in dict.fromkeys(found.model for found in series.values())
        },
        _compare_losses(cells, settings),
        fit,
        fit_absent,
        main,
        tuple(others),
        advised,
        tuple(ladder),
        (*notes, *_notes(table, series, boundary, judged, advised)),
    )


def _correlate(
    cells: Sequence[Cell], boundary: Boundary | None, settings: AnalysisSettings
) -> dict[str, Correlation]:
    found = {"all": correlations.correlate(cells, settings.draws, settings.seed)}
    if boundary:
        below = [cell for cell in cells if cell.loss < boundary.loss]
        above = [cell for cell in cells if cell.loss >= boundary.loss]
        found["below_boundary"] = correlations.correlate(below, settings.draws, settings.seed)
        found["at_or_above_boundary"] = correlations.correlate(above, settings.draws, settings.seed)
    return found


LOSSES = {
    "validation_loss": "the validation loss",
    "validation_loss_drop_path": "with drop path on",
    "validation_loss_crops": "on random crops",
}


def _compare_losses(cells: Sequence[Cell], settings: AnalysisSettings) -> dict[str, Correlation]:
    """Per loss that the table has; empty if there is one only."""
    given = [name for name in LOSSES if any(getattr(cell, name) is not None for cell in cells)]
    same = [cell for cell in cells if all(getattr(cell, name) is not None for name in given)]
    if len(given) < 2 or not same:
        return {}
    return {
        name: correlations.correlate(
            [replace(cell, validation_loss=getattr(cell, name)) for cell in same],
            settings.draws,
            settings.seed,
        )
        for name in given
    }


def _question(cells: Sequence[Cell], fit: Fit, settings: AnalysisSettings) -> tuple[float, float, float]:
    """Budget, images at hand and batch size that the advice is for."""
    batches = [cell.batch_size for cell in cells if cell.batch_size]
    batch = settings.batch_size or (max(set(batches), key=batches.count) if batches else PUBLISHED_BATCH)
    main = [cell.images for cell in cells if cell.corpus == fit.law.corpora[0]]
    costs = advice.count_costs(cells, batch)
    return settings.budget or costs.dearest, settings.images or max(main), batch


def _notes(
    table: Table,
    series: dict[tuple[str, float], Series],
    boundary: Boundary | None,
    judged: Sequence[Judged],
    advised: Advice | None,
) -> list[str]:
    notes = []
    cells = table.cells
    for found in table.left_out:
        notes.append(f"left out: {found.cell.label} (line {found.cell.line}): {found.reason}")
    bare = [cell for cell in cells if cell.finetuned_top1 is None]
    if len(bare) == len(cells):
        notes.append("no cell has a finetuned accuracy: nothing is said about loss and accuracy")
    elif bare:
        notes.append(f"{len(bare)} cells have no finetuned accuracy and take no part in the correlations")
    single = [found for found in series.values() if found.is_overfitted is None]
    if single:
        notes.append(
            f"{len(single)} of {len(series)} series have one length only: whether they overfit is not known"
        )
    if len({cell.model for cell in cells}) == 1:
        notes.append("there is one model only: nothing is said about model size")
    if boundary:
        above = [found for found in judged if found.past_boundary]
        share = sum(bool(found.series_overfitted) for found in above)
        if all(found.series_overfitted is None for found in above):
            notes.append("whether overfitting makes the boundary is not known: no series past it is judged")
        elif 2 * share < len(above):
            notes.append(
                f"of {len(above)} cells past the boundary {share} belong to an overfitted series: it parts "
                "two regimes, but overfitting is not what makes them"
            )
    if not any(cell.train_loss is not None for cell in cells):
        notes.append("no column train_loss: the gap of train and validation loss is not drawn")
    if advised and advised.costs.assumption:
        notes.append(advised.costs.assumption)
    return notes


# -------------------------------------------------------------------------------------------- JSON


def to_dict(analysis: Analysis) -> dict[str, Any]:
    """What analysis.json holds."""
    from flows.studies import words

    return {
        "table": analysis.table.name,
        "cells": len(analysis.cells),
        "series": len(analysis.series),
        "conclusions": words.conclude(analysis),
        "correlations": {
            **{name: asdict(found) for name, found in analysis.correlations.items()},
            "by_loss": {name: asdict(found) for name, found in analysis.correlations_by_loss.items()},
            "by_model": {name: asdict(found) for name, found in analysis.correlations_by_model.items()},
        },
        "boundary": asdict(analysis.boundary) if analysis.boundary else None,
        "boundary_absent": analysis.boundary_absent,
        "overfitted": [_series(found) for found in analysis.overfitted],
        "accuracy_falls": [
            {
                "model": found.model,
                "data": found.data,
                "images": found.images,
                "change": found.accuracy_change,
            }
            for found in analysis.series
            if found.accuracy_change is not None and found.accuracy_change < 0
        ],
        "verdict_unknown": [_name(found) for found in analysis.series if found.is_overfitted is None],
        "fit": _fit(analysis),
        "held_out": _held_out(analysis),
        "advice": _advice(analysis),
        "left_out": [
            {**_key(found.cell), "line": found.cell.line, "reason": found.reason}
            for found in analysis.table.left_out
        ],
        "notes": list(analysis.notes),
        "settings": asdict(analysis.settings),
    }


def _key(cell: Cell) -> dict[str, Any]:
    return {
        "model": cell.model,
        "data": cell.data_label,
        "images": cell.images,
        "iterations": cell.iterations,
        "seed": cell.seed,
    }


def _name(series: Series) -> dict[str, Any]:
    return {"model": series.model, "data": series.data, "images": series.images}


def _series(series: Series) -> dict[str, Any]:
    return {
        **_name(series),
        "iterations": list(series.iterations),
        "validation_loss": list(series.losses),
        "minimum_at": series.minimum_at,
        "past_minimum": [length for length in series.iterations if length > series.minimum_at],
        "accuracy_change": series.accuracy_change,
    }


def _fit(analysis: Analysis) -> dict[str, Any] | None:
    fit = analysis.fit
    if fit is None:
        return None
    law = fit.law
    terms = law.factors if law.form == "sum" else ("product",)
    return {
        "form": law.form,
        "exponents": {name: fit.exponent(name) for name in FACTORS},
        "irreducible": fit.irreducible(),
        "coefficients": dict(zip(terms, law.coefficients, strict=True)),
        "centres": dict(zip(law.factors, law.centres, strict=True)),
        "offsets": {name: law.offsets[at] for at, name in enumerate(law.corpora) if at},
        "doubling": analysis.doubling,
        "cells": fit.cells,
        "constants": fit.constants,
        "rmse": fit.rmse,
        "r_squared": fit.r_squared,
        "aicc": dict(fit.aicc_of),
    }


def _held_out(analysis: Analysis) -> dict[str, Any] | None:
    from flows.studies import words

    if analysis.held_out is None:
        return None
    return {
        **_check(analysis.held_out),
        "verdict": words.say_held_out(analysis.held_out),
        "others": [_check(found, has_predictions=False) for found in analysis.held_out_others],
    }


def _check(found: HeldOut, has_predictions: bool = True) -> dict[str, Any]:
    said: dict[str, Any] = {
        "what": found.what,
        "fitted_on": found.fitted_on,
        "form": found.form,
        "errors": asdict(found.fitted) if found.fitted else None,
        "errors_overfitted": asdict(found.overfitted) if found.overfitted else None,
        "spread": found.spread,
        "reason": found.reason,
    }
    if has_predictions:
        said["predictions"] = [
            {
                **_key(each.cell),
                "truth": each.truth,
                "predicted": each.predicted,
                "interval": each.interval,
                "next_smaller": each.nearest,
                "trend_of_two_smaller": each.trend,
                "is_fitted": each.is_fitted,
            }
            for each in found.predictions
        ]
    return said


def _advice(analysis: Analysis) -> dict[str, Any] | None:
    if analysis.advice is None:
        return None
    said = asdict(analysis.advice)
    said["ladder"] = [
        {"budget": found.budget, **(asdict(found.best) if found.best else {"model": None})}
        for found in analysis.ladder
    ]
    return said


def judged_rows(analysis: Analysis) -> tuple[list[str], list[list[Any]]]:
    """The table with the verdict columns: names, rows in the order of the file."""
    shown = [
        name
        for name in COLUMNS
        if any(getattr(found.cell, name) not in ("", None) for found in analysis.cells)
        or name in ("validation_loss", "finetuned_top1")
    ]
    every = [
        (found.cell.line, [getattr(found.cell, name) for name in shown], _verdicts(found))
        for found in analysis.cells
    ]
    every += [
        (found.cell.line, [getattr(found.cell, name) for name in shown], ["", "", "", "no", found.reason])
        for found in analysis.table.left_out
    ]
    names = [*shown, "verdict", "series_overfitted", "past_boundary", "in_fit", "left_out"]
    return names, [[*values, *verdicts] for _, values, verdicts in sorted(every, key=lambda row: row[0])]


def _verdicts(found: Judged) -> list[str]:
    flags = (found.series_overfitted, found.past_boundary, found.in_fit)
    return [found.verdict, *("" if flag is None else "yes" if flag else "no" for flag in flags), ""]
