"""Parallel coordinates of a sweep's points."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from flows.plots.frame import (
    INK,
    SERIES,
    new_figure,
    render,
    style_axes,
)

if TYPE_CHECKING:
    pass


@dataclass(frozen=True)
class CoordinateAxis:
    """One axis of parallel coordinates: what is written at which height, 0 (bottom) to 1 (top)."""

    label: str
    ticks: Sequence[tuple[float, str]]


@dataclass(frozen=True)
class CoordinateLine:
    label: str
    heights: Sequence[float]
    end: float | None
    """On the axis of the metric, 1 is best; None if the point failed."""


@dataclass(frozen=True)
class Coordinates:
    axes: Sequence[CoordinateAxis]
    metric: CoordinateAxis
    lines: Sequence[CoordinateLine]
    """The last one is drawn on top."""


FAILED_AT = -0.1  # height at which lines of failed points end


def parallel_coordinates(found: Coordinates, title: str = "") -> bytes:
    """PNG: one line per point over the axes it sets to the metric, which gives the colour (dark is best)."""
    from matplotlib import colormaps
    from matplotlib.patheffects import withStroke

    axes_number = len(found.axes) + 1
    labels = [_break_label(axis.label) for axis in (*found.axes, found.metric)]
    figure = new_figure(max(6.4, 1.75 * axes_number + 0.6), 4.6)
    axes = figure.add_subplot()
    style_axes(axes, title, grid="none")
    if title:
        axes.title.set_position((0, 1.0))
    for spine in axes.spines.values():
        spine.set_visible(False)
    colours = colormaps["viridis_r"]
    for line in found.lines:
        failed = line.end is None
        heights = [*line.heights, FAILED_AT if line.end is None else line.end]
        axes.plot(
            range(axes_number),
            heights,
            color=SERIES[4] if line.end is None else colours(0.1 + 0.9 * line.end),
            linewidth=0.9 if line.end is None else 1.0 + 1.4 * line.end**2,
            linestyle=(0, (2, 2.5)) if failed else "solid",
            alpha=0.6 if failed else 0.9,
            solid_capstyle="round",
            zorder=2 if failed else 3,
        )
    if any(line.end is None for line in found.lines):
        axes.annotate(
            "failed",
            (axes_number - 1, FAILED_AT),
            xytext=(7, 0),
            textcoords="offset points",
            va="center",
            fontsize=8.5,
            color=SERIES[4],
        )
    outline = [withStroke(linewidth=2.6, foreground="white")]
    for index, axis in enumerate((*found.axes, found.metric)):
        axes.plot([index, index], [0, 1], color=INK, linewidth=1.0, zorder=4)
        last = index == axes_number - 1
        for height, text in axis.ticks:
            axes.plot([index - 0.012, index + 0.012], [height, height], color=INK, linewidth=0.8, zorder=4)
            axes.annotate(
                text if len(text) <= 16 else text[:15] + "…",
                (index, height),
                xytext=(7 if last else -6, 0),
                textcoords="offset points",
                ha="left" if last else "right",
                va="center",
                fontsize=8.5,
                color=INK,
                zorder=6,
                path_effects=outline,
                parse_math=False,
            )
    axes.set_xticks(range(axes_number), labels, fontsize=9, color=INK, parse_math=False)
    axes.xaxis.tick_top()
    axes.tick_params(axis="x", length=0, pad=8)
    axes.set_yticks([])
    axes.set_xlim(-0.45, axes_number - 0.55)
    axes.set_ylim(FAILED_AT - 0.04, 1.03)
    return render(figure, "png", "parallel-coordinates")


def _break_label(text: str, width: int = 15) -> str:
    """A dotted key in lines that fit beside their neighbours'."""
    lines = [""]
    for part in (
        text.replace(".", ".\0").replace("_", "_\0").replace("-", "-\0").replace(" ", " \0").split("\0")
    ):
        if lines[-1] and len(lines[-1]) + len(part.rstrip()) > width:
            lines.append("")
        lines[-1] += part
    return "\n".join(lines)
