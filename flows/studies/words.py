"""What the analysis found, as sentences: the same on the terminal, in analysis.json and on the page."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

from flows.plots import write_count
from flows.studies.advice import Advice
from flows.studies.analysis import Analysis
from flows.studies.correlations import Correlation
from flows.studies.held_out import HeldOut
from flows.studies.overfitting import Series
from flows.studies.scaling_law import FACTORS, Fit

FACTOR_NAMES = {"parameters": "model size", "images": "images", "iterations": "length"}


def conclude(analysis: Analysis) -> dict[str, str]:
    """By subject: `accuracy`, `overfitting`, `law`, `held_out`, `advice`."""
    return {
        "accuracy": say_accuracy(analysis),
        "overfitting": say_overfitting(analysis.series),
        "law": say_law(analysis),
        "held_out": say_held_out(analysis.held_out),
        "advice": say_advice(analysis.advice),
    }


def signed(value: float | None, digits: int = 2) -> str:
    """`+0.23`, `−0.79`; a dash for what does not exist."""
    return "–" if value is None else f"{value:+.{digits}f}".replace("-", "−")


def interval(found: Sequence[float] | None, digits: int = 2, sign: bool = True) -> str:
    """`−0.87 to −0.67`; empty without one."""
    if found is None:
        return ""
    low, high = (signed(v, digits) if sign else f"{v:.{digits}f}".replace("-", "−") for v in found)
    return f"{low} to {high}"


def listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}" if names else ""


def say_accuracy(analysis: Analysis) -> str:
    whole = analysis.correlations["all"]
    if whole.pearson is None:
        return f"Whether the validation loss tells the finetuned accuracy cannot be said: {whole.reason}."
    said = (
        f"Over all {whole.cells} cells validation loss and finetuned accuracy correlate with Pearson "
        f"{_coefficient(whole.pearson, whole.pearson_interval)} and Spearman "
        f"{_coefficient(whole.spearman, whole.spearman_interval)}."
    )
    line = analysis.boundary
    if line is None:
        return f"{said} There is no boundary from which on the relation ends: {analysis.boundary_absent}."
    below = analysis.correlations["below_boundary"]
    above = analysis.correlations["at_or_above_boundary"]
    return (
        f"{said} The relation ends at a loss of about {line.loss:.3f}: below, {_r(below)} over {below.cells} "
        f"cells and accuracy ≈ {line.intercept_below:.1f} {signed(line.slope_below, 1)[0]} "
        f"{abs(line.slope_below):.1f} · loss; at or above, {_r(above)} over {above.cells} cells"
        + (", which is no relation." if _holds_zero(above) else ", the other way round.")
        + _say_early(analysis.early_overfitted)
    )


def _say_early(found: Sequence[float]) -> str:
    if len(found) < 2 or not (min(found) > 0 or max(found) < 0):
        return ""
    better = "above" if min(found) > 0 else "below"
    low, high = sorted((abs(min(found)), abs(max(found))))
    return (
        f" The {len(found)} overfitted cells before it finetune {low:.1f} to {high:.1f} points {better} that "
        "line."
    )


def _r(found: Correlation) -> str:
    if found.pearson is None:
        return f"no coefficient ({found.reason})"
    return f"Pearson {_coefficient(found.pearson, found.pearson_interval or found.pearson_interval_cells)}"


def _coefficient(value: float | None, found: Sequence[float] | None) -> str:
    return signed(value) + (f" ({interval(found)})" if found else "")


def _holds_zero(found: Correlation) -> bool:
    around = found.pearson_interval or found.pearson_interval_cells
    return around is not None and around[0] <= 0 <= around[1]


def say_overfitting(series: Sequence[Series]) -> str:
    judged = [found for found in series if found.is_overfitted is not None]
    if not judged:
        return "Overfitting cannot be judged: every series has one length only."
    over = sorted((found for found in judged if found.is_overfitted), key=lambda found: found.images)
    if not over:
        return (
            f"None of the {len(judged)} series overfitted: each ends with a lower loss than it begins with."
        )
    groups = [
        f"{listed([found.model for found in members])} on {label}"
        for label, members in (
            (label, list(found)) for label, found in groupby(over, key=lambda each: each.data)
        )
    ]
    said = (
        f"{len(over)} of {len(judged)} series overfitted (the longest training ends with a higher loss than "
        f"the shortest): {'; '.join(groups)}."
    )
    falls = [found for found in judged if found.accuracy_change is not None and found.accuracy_change < 0]
    if falls:
        names = [f"{found.model} on {found.data} ({signed(found.accuracy_change)})" for found in falls]
        said += f" Finetuned accuracy falls with length in {len(falls)}: {listed(names)} points."
    elif any(found.accuracy_change is not None for found in judged):
        said += " Finetuned accuracy falls in none."
    return said


def say_law(analysis: Analysis) -> str:
    fit = analysis.fit
    if fit is None:
        return f"No law of the loss: {analysis.fit_absent}."
    gains = [
        f"{FACTOR_NAMES[name]} by {gain['value']:.4f} ({interval(gain['interval'], 4, sign=False)})"
        for name, gain in analysis.doubling.items()
        if gain
    ]
    shown = {name: fit.exponent(name) for name in FACTORS}
    exponents = [
        f"{FACTOR_NAMES[name]} {found['value']:.2f} ({interval(found['interval'], sign=False)}"
        + ("" if found["is_identified"] else ", not identified")
        + ("" if found["form"] == fit.law.form else ", in a product of powers")
        + ")"
        for name, found in shown.items()
        if found["value"] is not None
    ]
    absent = [
        f"{FACTOR_NAMES[name]}: {shown[name]['reason']}"
        for name in fit.absent
        if shown[name]["value"] is None
    ]
    said = (
        f"Where nothing overfits, doubling lowers the loss: {', '.join(gains)}. Exponents of the "
        f"{'sum of power laws' if fit.law.form == 'sum' else 'product of powers'} over {fit.cells} cells: "
        f"{', '.join(exponents) or 'none'}; it misses a cell by {fit.rmse:.4f}."
    )
    if absent:
        said += f" No exponent for {'; '.join(absent)}."
    return f"{said} {_say_irreducible(fit)}"


def _say_irreducible(fit: Fit) -> str:
    found = fit.irreducible()
    around = interval(found["interval"], 3, sign=False)
    if found["is_identified"]:
        return f"The loss that nothing lowers is {found['value']:.3f} ({around})."
    return (
        f"The loss that nothing lowers is not identifiable from these cells (best fit {found['value']:.3f}, "
        f"{around}): exponents trade off against it, so do not extrapolate far."
    )


def say_held_out(found: HeldOut | None) -> str:
    if found is None:
        return "Nothing was held out, as there is no law."
    if found.fitted is None:
        return f"Held out ({found.what}): no check, {found.reason}."
    errors = found.fitted
    said = (
        f"Fitted without the {found.what}, the law misses its {errors.cells} "
        f"{'cell' if errors.cells == 1 else 'cells'} before overfitting by {errors.mean_absolute:.4f} on "
        "average "
        f"(bias {signed(errors.bias, 4)}), where their losses spread over {found.spread:.4f}."
    )
    if errors.mean_absolute_nearest is not None and errors.mean_absolute_compared is not None:
        ratio = errors.mean_absolute_compared / max(errors.mean_absolute_nearest, 1e-12)
        how = (
            "clearly better than" if ratio < 0.75 else "hardly better than" if ratio < 1 else "no better than"
        )
        said += f" That is {how} taking the next smaller one's loss ({errors.mean_absolute_nearest:.4f})"
        if errors.mean_absolute_trend is not None:
            trend = errors.mean_absolute_trend
            than = "better than" if errors.mean_absolute_compared < trend else "worse than"
            said += f" and {than} a line through the two next smaller ones ({trend:.4f})"
        said += "."
    if found.overfitted:
        over = found.overfitted
        said += (
            f" Its {over.cells} overfitted {'cell is' if over.cells == 1 else 'cells are'} missed by "
            f"{over.mean_absolute:.4f}: the law knows no overfitting."
        )
    return said


def say_advice(found: Advice | None) -> str:
    if found is None:
        return "No advice, as there is no law."
    where = f"For {found.budget:.3g} {found.costs.unit} and {write_count(found.images)} images"
    if found.best is None:
        return f"{where}: no training like those of the table. Would more images help? {_sentence(found)}"
    best = found.best
    said = (
        f"{where}: {best.model} for {best.iterations:,.0f} iterations, predicted loss {best.loss:.4f} "
        f"({interval(best.interval, 4, sign=False)}), the best in {100 * best.share:.0f} % of resamples. "
        f"Would more images help? {_sentence(found)}"
    )
    return said + (f" Mind: {'; '.join(found.limits)}." if found.limits else "")


def _sentence(found: Advice) -> str:
    return f"{found.more_data[0].upper()}{found.more_data[1:]}."


def say_headline(analysis: Analysis) -> str:
    """One or two sentences for the top of the page."""
    parts = []
    whole = analysis.correlations["all"]
    below = analysis.correlations.get("below_boundary")
    if analysis.boundary and below:
        until = " as long as nothing overfits" if analysis.is_boundary_of_overfitting else ""
        tells = "may tell" if _holds_zero(below) else "tells"
        above = analysis.correlations["at_or_above_boundary"]
        after = "it tells nothing"
        if above.pearson is not None and not _holds_zero(above):
            after = f"a higher loss goes with a higher accuracy (r {signed(above.pearson)})"
        parts.append(
            f"The validation loss of pretraining {tells} the finetuned accuracy{until} (r "
            f"{signed(below.pearson)}); from a loss of {analysis.boundary.loss:.3f} on {after}."
        )
    elif whole.pearson is not None and not _holds_zero(whole):
        parts.append(f"Validation loss and finetuned accuracy go together (r {signed(whole.pearson)}).")
    elif whole.pearson is not None:
        parts.append("These cells show no sure relation of validation loss and finetuned accuracy.")
    gains = {name: gain["value"] for name, gain in analysis.doubling.items() if gain}
    if len(gains) > 1:
        first, *rest = sorted(gains, key=lambda name: -gains[name])
        others = listed([f"{FACTOR_NAMES[name]} {gains[name]:.4f}" for name in rest])
        parts.append(f"Doubling {FACTOR_NAMES[first]} lowers the loss by {gains[first]:.4f}, {others}.")
    return " ".join(parts) or "What this table can tell, and what it cannot."


def say_formula(fit: Fit) -> str:
    """The fitted law with its figures."""
    law = fit.law
    symbols = {"parameters": "N", "images": "D", "iterations": "T"}
    powers = [
        f"({symbols[name]}/{write_count(centre)})^−{exponent:.3f}"
        for name, centre, exponent in zip(law.factors, law.centres, law.exponents, strict=True)
    ]
    if law.form == "sum":
        terms = [f"{value:.4f}·{power}" for value, power in zip(law.coefficients, powers, strict=True)]
    else:
        terms = [f"{law.coefficients[0]:.4f}·{'·'.join(powers)}"]
    offsets = [
        f" {signed(value, 4)[0]} {abs(value):.4f} on {name}"
        for name, value in zip(law.corpora[1:], law.offsets[1:], strict=True)
    ]
    return f"L = {law.irreducible:.4f} + {' + '.join(terms)}{''.join(offsets)}"
