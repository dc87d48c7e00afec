"""Pictures of a data-scaling study: losses over data, size and time, accuracy over loss, prediction.

Every mark carries what it stands for: in SVG as a title that a browser shows under the pointer.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from xml.sax.saxutils import escape

from flows.plots.frame import (
    INK,
    MUTED,
    SERIES,
    Format,
    new_figure,
    render,
    style_axes,
)

MARKERS = "osD^vP"
MOST_NAMED = 18
"""Entries of a legend; the titles of the marks name the rest."""


@dataclass(frozen=True)
class Mark:
    """One cell in a picture."""

    x: float
    y: float
    hint: str
    is_struck: bool = False
    """Drawn hollow with a cross: overfitted."""
    is_hollow: bool = False
    """Of an overfitted series, though not past its minimum."""
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Group:
    """Marks of one colour, in the order in which they are joined."""

    label: str
    marks: Sequence[Mark]


@dataclass(frozen=True)
class Panel:
    title: str
    groups: Sequence[Group]


def study_lines(
    panels: Sequence[Panel], xlabel: str, ylabel: str, name: str, format: Format = "png", is_log: bool = True
) -> bytes:
    """Panels beside one another with one vertical scale; a line per group, overfitted cells struck out."""
    labels = _labels([group for panel in panels for group in panel.groups])
    columns = min(len(panels), 3)
    rows = -(-len(panels) // columns)
    figure = new_figure(max(3.4 * columns + 0.9, 5.6), 3.3 * rows + 0.55)
    grid = figure.subplots(rows, columns, sharey=True, squeeze=False)
    hints: dict[str, str] = {}
    for at, axes in enumerate(grid.flat):
        if at >= len(panels):
            axes.set_visible(False)
            continue
        panel = panels[at]
        first = at % columns == 0
        style_axes(axes, panel.title, xlabel, ylabel if first else "")
        if is_log:
            axes.set_xscale("log")
        for group in panel.groups:
            _draw_group(axes, group, labels, hints, f"{name}-{at}", is_joined=True)
        _count_ticks(axes, [mark.x for panel in panels for group in panel.groups for mark in group.marks])
        axes.margins(x=0.08)
    _legend(figure, labels, [mark for panel in panels for g in panel.groups for mark in g.marks])
    return _finish(figure, format, name, hints)


def study_scatter(
    groups: Sequence[Group],
    boundary: float | None,
    line: tuple[float, float] | None,
    format: Format = "png",
) -> bytes:
    """Accuracy over loss. `line`: slope and intercept of the rule below the boundary."""
    labels = _labels(groups)
    figure = new_figure(7.6, 4.5)
    axes = figure.subplots()
    style_axes(axes, "", "validation loss", "finetuned accuracy, %")
    hints: dict[str, str] = {}
    marks = [mark for group in groups for mark in group.marks]
    if line:
        low = min(mark.x for mark in marks)
        high = boundary if boundary is not None else max(mark.x for mark in marks)
        axes.plot([low, high], [line[0] * x + line[1] for x in (low, high)], color=MUTED, lw=1.4, zorder=1.5)
    if boundary is not None:
        axes.axvline(boundary, color=INK, lw=1, ls=(0, (4, 3)), zorder=1.5)
        axes.annotate(
            f"the relation ends at {boundary:.3f}",
            (boundary, 1),
            xytext=(5, 0),
            xycoords=("data", "axes fraction"),
            textcoords="offset points",
            va="top",
            fontsize=9,
            color=INK,
        )
    for group in groups:
        _draw_group(axes, group, labels, hints, "scatter", is_joined=False)
    _legend(figure, labels, marks)
    return _finish(figure, format, "study-scatter", hints)


def study_predictions(
    groups: Sequence[Group], nearest: Sequence[Mark], compared_with: str, format: Format = "png"
) -> bytes:
    """Predicted over true loss, with intervals; `nearest` is what the rule `compared_with` predicts."""
    labels = _labels(groups)
    figure = new_figure(6.0, 6.0)
    axes = figure.subplots()
    axes.set_aspect("equal")
    style_axes(axes, "", "true validation loss", "predicted validation loss")
    hints: dict[str, str] = {}
    marks = [mark for group in groups for mark in group.marks]
    values = [value for mark in marks for value in (mark.x, mark.y)] + [mark.y for mark in nearest]
    pad = 0.06 * (max(values) - min(values) or 0.01)
    ends = (min(values) - pad, max(values) + pad)
    axes.plot(ends, ends, color=MUTED, lw=1.1, zorder=1.2)
    axes.set_xlim(*ends)
    axes.set_ylim(*ends)
    for at, mark in enumerate(nearest):
        _draw_mark(axes, mark, MUTED, "_", f"nearest-{at}", hints)
    for group in groups:
        for mark in group.marks:
            if mark.low is not None and mark.high is not None:
                axes.plot(
                    [mark.x, mark.x], [mark.low, mark.high], color=labels[group.label][0], lw=1.6, alpha=0.6
                )
        _draw_group(axes, group, labels, hints, "prediction", is_joined=False)
    extra = [(compared_with, MUTED, "_")] if nearest else []
    _legend(figure, labels, marks, extra)
    return _finish(figure, format, "study-predictions", hints)


# ------------------------------------------------------------------------------------------- parts


def _labels(groups: Sequence[Group]) -> dict[str, tuple[str, str]]:
    """Colour and marker of every label, the same in all panels."""
    names = list(dict.fromkeys(group.label for group in groups))
    return {
        name: (SERIES[at % len(SERIES)], MARKERS[(at + at // len(SERIES)) % len(MARKERS)])
        for at, name in enumerate(names)
    }


def _draw_group(
    axes: Any,
    group: Group,
    labels: dict[str, tuple[str, str]],
    hints: dict[str, str],
    prefix: str,
    is_joined: bool,
) -> None:
    colour, marker = labels[group.label]
    if is_joined and len(group.marks) > 1:
        axes.plot([m.x for m in group.marks], [m.y for m in group.marks], color=colour, lw=1.5, alpha=0.75)
    for mark in group.marks:
        _draw_mark(axes, mark, colour, marker, f"{prefix}-{len(hints)}", hints)


def _draw_mark(axes: Any, mark: Mark, colour: str, marker: str, gid: str, hints: dict[str, str]) -> None:
    size = 9 if marker == "_" else 6
    face = "none" if mark.is_struck or mark.is_hollow else colour
    drawn = axes.plot(
        [mark.x], [mark.y], ls="none", marker=marker, ms=size, mfc=face, mec=colour, mew=1.5, zorder=3
    )
    drawn[0].set_gid(gid)
    hints[gid] = mark.hint
    if mark.is_struck:
        struck = axes.plot([mark.x], [mark.y], ls="none", marker="x", ms=8, mec=INK, mew=1.2, zorder=3.5)
        struck[0].set_gid(f"{gid}-x")
        hints[f"{gid}-x"] = mark.hint


def _legend(
    figure: Any,
    labels: dict[str, tuple[str, str]],
    marks: Sequence[Mark],
    extra: Sequence[tuple[str, str, str]] = (),
) -> None:
    from matplotlib.lines import Line2D

    entries = [(name, colour, marker) for name, (colour, marker) in labels.items()][:MOST_NAMED]
    handles = [
        Line2D([], [], ls="none", marker=marker, color=colour, ms=6, mew=1.5, label=name)
        for name, colour, marker in (*entries, *extra)
    ]
    if any(mark.is_struck for mark in marks):
        handles.append(Line2D([], [], ls="none", marker="x", color=INK, ms=7, label="overfitted"))
    if any(mark.is_hollow and not mark.is_struck for mark in marks):
        label = "of such a series, before its rise"
        handles.append(Line2D([], [], ls="none", marker="o", mfc="none", mec=INK, ms=6, label=label))
    legend = figure.legend(
        handles=handles,
        loc="outside upper left",
        ncols=_columns(handles, figure.get_figwidth()),
        frameon=False,
        fontsize=9,
        labelcolor=INK,
        handletextpad=0.3,
        columnspacing=1.2,
    )
    legend.set_zorder(5)


def _columns(handles: Sequence[Any], width: float) -> int:
    """As many columns as fit into `width` inches, in rows of even length."""
    column = max(0.45 + 0.085 * len(handle.get_label()) for handle in handles)
    whole = sum(0.45 + 0.085 * len(handle.get_label()) for handle in handles)
    if whole <= width:
        return len(handles)
    rows = -(-len(handles) // max(1, int(width / column)))
    return -(-len(handles) // rows)


def _count_ticks(axes: Any, values: Sequence[float]) -> None:
    """The values themselves as ticks where there is room: a study has a handful."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    found = sorted(set(values))
    kept: list[float] = []
    wide = found[-1] / found[0]
    for value in found:
        if not kept or (value / kept[-1]) > wide**0.1:
            kept.append(value)
    axes.xaxis.set_major_locator(FixedLocator(kept))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: write_count(value)))


def write_count(value: float) -> str:
    """`128k`, `1.28M`, `1.06B`."""
    for unit, factor in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= factor:
            return f"{value / factor:.3g}{unit}"
    return f"{value:.3g}"


def _finish(figure: Any, format: Format, name: str, hints: dict[str, str]) -> bytes:
    data = render(figure, format, name)
    if format != "svg":
        return data

    def add_title(found: re.Match[str]) -> str:
        return f"{found[0]}<title>{escape(hints[found[1]])}</title>"

    ids = "|".join(re.escape(gid) for gid in sorted(hints, key=len, reverse=True))
    return re.sub(rf'<g id="({ids})">', add_title, data.decode()).encode() if hints else data
