"""What tokens cost against how long one takes: points with intervals, the best ones joined."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from flows.plots.frame import (
    INK,
    MUTED,
    SERIES,
    Format,
    draw_legend,
    new_figure,
    plain_ticks,
    render,
    style_axes,
)


@dataclass(frozen=True)
class CostPoint:
    """Value, low and high of dollars per million tokens and of milliseconds between tokens."""

    label: str
    kind: str
    usd: tuple[float, float, float]
    milliseconds: tuple[float, float, float]
    joined: bool = True  # one of those that no other beats


def costs(points: Sequence[CostPoint], format: Format = "png") -> bytes:
    """The cheapest that is as fast, from left to right; one colour per kind."""
    figure = new_figure(8.6, 4.2)
    axes = figure.subplots()
    style_axes(axes, "", "p99 between tokens, ms", "$ per million tokens")
    ordered = sorted((p for p in points if p.joined), key=lambda point: point.milliseconds[0])
    line = [p.milliseconds[0] for p in ordered], [p.usd[0] for p in ordered]
    axes.plot(*line, color=MUTED, linewidth=1.0, zorder=1)
    for index, kind in enumerate(dict.fromkeys(point.kind for point in points)):
        chosen = [point for point in points if point.kind == kind]
        axes.errorbar(
            [p.milliseconds[0] for p in chosen],
            [p.usd[0] for p in chosen],
            xerr=[[p.milliseconds[0] - p.milliseconds[1] for p in chosen],
                  [p.milliseconds[2] - p.milliseconds[0] for p in chosen]],
            yerr=[[p.usd[0] - p.usd[1] for p in chosen], [p.usd[2] - p.usd[0] for p in chosen]],
            fmt="o", color=SERIES[index % len(SERIES)], markersize=6, linewidth=1.2, label=kind,
        )  # fmt: skip
    for point in points:
        axes.annotate(
            point.label, (point.milliseconds[0], point.usd[0]), xytext=(7, 6), textcoords="offset points",
            fontsize=8.5, color=INK,
        )  # fmt: skip
    for axis in (axes.xaxis, axes.yaxis):
        plain_ticks(axis)
    axes.set_ylim(bottom=0)
    axes.margins(x=0.15)
    draw_legend(axes, loc="upper right")
    return render(figure, format, "costs")
