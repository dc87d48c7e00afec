"""study.html: what a study found, in one file that makes no request and needs no script.

Conclusions first, each with its figures; then pictures, the advice, tables, the method and its limits.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import Any

from markupsafe import Markup

from flows import markup
from flows.plots import format_duration, write_count
from flows.studies import figures, words
from flows.studies.analysis import LOSSES, Analysis, Judged
from flows.studies.held_out import HeldOut
from flows.studies.overfitting import MEANING
from flows.studies.scaling_law import FACTORS

LABELS = {
    "loss_over_data": "Validation loss over training images, one line per model, one panel per length",
    "loss_over_size": "Validation loss over model size, one line per data set, one panel per length",
    "gap_over_time": "Validation minus train loss over iterations, a line per model, a panel per data set",
    "accuracy_over_loss": "Finetuned accuracy over validation loss, overfitted cells struck out",
    "held_out": "Predicted over true validation loss of the model that was held out",
}
GROUPS = {"all": "all", "below_boundary": "below the boundary", "at_or_above_boundary": "at or above it"}


def render_page(analysis: Analysis) -> str:
    environment = markup.templates(
        count=write_count, signed=words.signed, interval=words.interval, number=markup.format_number
    )
    pictures = {
        name: markup.inline_svg(data, name.replace("_", "-"), LABELS[name])
        for name, data in figures.draw(analysis, "svg").items()
    }
    return environment.get_template("study.html.j2").render(
        generated=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        a=analysis,
        said=words.conclude(analysis),
        headline=words.say_headline(analysis),
        tiles=_tiles(analysis),
        pictures=pictures,
        groups=GROUPS,
        models=sorted({(found.cell.parameters, found.cell.model) for found in analysis.cells}),
        losses=LOSSES,
        costs=_costs(analysis),
        grid=_grid(analysis),
        factors=FACTORS,
        factor_names=words.FACTOR_NAMES,
        exponents={name: analysis.fit.exponent(name) for name in FACTORS} if analysis.fit else {},
        irreducible=analysis.fit.irreducible() if analysis.fit else {},
        doubling=analysis.doubling,
        checks=_checks(analysis),
        meaning=MEANING,
        formula=_formula(analysis),
    )


def _formula(analysis: Analysis) -> Markup:
    """Exponents raised; a line breaks between terms only."""
    if not analysis.fit:
        return Markup()
    text = str(Markup.escape(words.say_formula(analysis.fit)))
    raised = re.sub(r"\^(−[\d.]+)", r"<sup>\1</sup>", text)
    return Markup(" + ".join(f"<span>{term}</span>" for term in raised.split(" + ")))


def _tiles(analysis: Analysis) -> list[dict[str, str]]:
    """At most four figures that a reader should take home."""
    tiles = []
    whole = analysis.correlations["all"]
    if whole.pearson is not None and whole.spearman is not None:
        below = analysis.correlations.get("below_boundary", whole)
        where = f"below a loss of {analysis.boundary.loss:.3f}" if analysis.boundary else "over all cells"
        note = f"{where}; {words.signed(whole.pearson)} over all" if analysis.boundary else where
        tiles.append(
            {"label": "Loss and accuracy", "value": f"r = {words.signed(below.pearson)}", "note": note}
        )
    judged = [series for series in analysis.series if series.is_overfitted is not None]
    tiles.append(
        {
            "label": "Overfitted",
            "value": f"{len(analysis.overfitted)} of {len(judged)}" if judged else "unknown",
            "note": "series end with a higher loss than they begin with" if judged else "one length only",
        }
    )
    if analysis.held_out and (errors := analysis.held_out.fitted):
        nearest = errors.mean_absolute_nearest
        tiles.append(
            {
                "label": f"Held out: {analysis.held_out.what.rpartition(', ')[2]}",
                "value": f"± {errors.mean_absolute:.4f}",
                "note": "mean error of the law"
                + (f"; next smaller model: {nearest:.4f}" if nearest is not None else ""),
            }
        )
    if analysis.advice and (best := analysis.advice.best):
        tiles.append(
            {
                "label": f"Advice for {write_count(analysis.advice.images)} images",
                "value": f"{best.model} · {write_count(best.iterations)} it.",
                "note": f"predicted loss {best.loss:.4f}; best in {100 * best.share:.0f} % of resamples",
            }
        )
    return tiles


def _costs(analysis: Analysis) -> list[dict[str, Any]]:
    """Columns of what cells cost, as far as the table has them: heading, value per cell, sum."""
    columns: list[tuple[str, str, Callable[[float], str], bool]] = [
        ("flops", "FLOPs", lambda value: f"{value:.2e}", True),
        ("seconds", "time", format_duration, True),
        ("device_hours", "device-hours", lambda value: f"{value:.3g}", True),
        ("peak_memory_bytes", "memory", markup.format_size, False),
    ]
    shown = []
    for name, heading, write, is_summed in columns:
        values = [getattr(found.cell, name) for found in analysis.cells]
        known = [value for value in values if value is not None]
        if known:
            shown.append(
                {
                    "heading": heading,
                    "values": ["" if value is None else write(value) for value in values],
                    "total": write(sum(known)) if is_summed else f"at most {write(max(known))}",
                }
            )
    return shown


def _grid(analysis: Analysis) -> list[dict[str, Any]]:
    """A table per length as the paper has it: models down, data across."""
    data = list(dict.fromkeys((found.images, found.data) for found in sorted(analysis.series, key=_images)))
    models = list(dict.fromkeys(found.model for found in analysis.series))
    tables = []
    for length in sorted({found.cell.iterations for found in analysis.cells})[-figures.MAX_PANELS :]:
        at: dict[tuple[str, float], list[Judged]] = {}
        for found in analysis.cells:
            if found.cell.iterations == length:
                at.setdefault(found.cell.series, []).append(found)
        rows = [(model, [at.get((model, images), []) for images, _ in data]) for model in models]
        tables.append({"length": length, "data": [label for _, label in data], "rows": rows})
    return tables


def _images(series: Any) -> float:
    return float(series.images)


def _checks(analysis: Analysis) -> Sequence[HeldOut]:
    return [analysis.held_out, *analysis.held_out_others] if analysis.held_out else []
