"""Latency by batch size, errors of an export, seconds per stage."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from flows.plots.frame import (
    INK,
    MUTED,
    SERIES,
    Format,
    draw_legend,
    format_duration,
    new_figure,
    plain_ticks,
    render,
    style_axes,
    write_number,
)

if TYPE_CHECKING:
    pass


@dataclass(frozen=True)
class Latency:
    """One line of the latency picture: milliseconds per call over batch size, with the slow tail if known."""

    label: str
    batch_sizes: Sequence[int]
    median_ms: Sequence[float]
    tail_ms: Sequence[float] | None = None  # 95th percentile


def latency(series: Sequence[Latency], format: Format = "png") -> bytes:
    """Time per call and images per second over batch size, logarithmic axes."""
    from matplotlib.ticker import FixedLocator, LogLocator, NullLocator

    figure = new_figure(9.2, 3.4)
    left, right = figure.subplots(1, 2)
    style_axes(left, "Time per call", "batch size, images", "ms: median, band to p95")
    style_axes(right, "Throughput", "batch size, images", "images/s")
    for index, line in enumerate(series):
        look = {"color": SERIES[index % len(SERIES)], "linewidth": 1.8, "marker": "o", "markersize": 4.5}
        left.plot(line.batch_sizes, line.median_ms, label=line.label, **look)
        if line.tail_ms is not None:
            left.fill_between(line.batch_sizes, line.median_ms, line.tail_ms, color=look["color"], alpha=0.15)
        rate = [1000 * size / time for size, time in zip(line.batch_sizes, line.median_ms, strict=True)]
        right.plot(line.batch_sizes, rate, label=line.label, **look)
    sizes = sorted({size for line in series for size in line.batch_sizes})
    for axes in (left, right):
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.xaxis.set_major_locator(FixedLocator(sizes))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0), numticks=12))
        axes.yaxis.set_minor_locator(NullLocator())
        plain_ticks(axes.xaxis)
        plain_ticks(axes.yaxis)
    draw_legend(left)
    return render(figure, format, "latency")


def error_histogram(
    errors: Mapping[str, NDArray[np.float64]],
    limits: Mapping[str, tuple[str, float]],
    format: Format = "png",
) -> bytes:
    """Distribution of |logit error| of exported variants against PyTorch, logarithmic, with their limits.

    Args:
        errors: variant to absolute errors, any shape.
        limits: variant to what is limited (max, mean) and the limit.
    """
    smallest = 1e-9  # where exact zeros are drawn
    drawn = {name: np.maximum(values.ravel(), smallest) for name, values in errors.items()}
    ends = [end for values in drawn.values() for end in (values.min(), values.max())]
    ends += [limit for _, limit in limits.values() if limit > 0]
    edges = np.geomspace(min(ends) / 2, max(ends) * 2, 90).tolist()
    figure = new_figure(7.6, 3.5)
    axes = figure.add_subplot()
    style_axes(axes, "", "absolute error of a logit against PyTorch (exact ones at 1e-9)", "logits, %")
    for colour, (name, values) in zip(SERIES, drawn.items(), strict=False):
        label = f"{name}: mean {values.mean():.1e}, max {values.max():.1e}"
        share = np.full(len(values), 100.0 / len(values))
        axes.hist(values, bins=edges, weights=share, color=colour, alpha=0.75, label=label)
        what, limit = limits.get(name, ("", 0.0))
        if limit > 0:
            axes.axvline(limit, color=colour, linewidth=1.4, linestyle=(0, (4, 3)))
            axes.annotate(
                f"limit of the {what} {write_number(limit)}",
                (limit, 0.97),
                xycoords=("data", "axes fraction"),
                xytext=(4, 0),
                textcoords="offset points",
                rotation=90,
                ha="left",
                va="top",
                fontsize=8,
                color=colour,
            )
    axes.set_xscale("log")
    draw_legend(axes, loc="upper left")
    return render(figure, format, "errors")


def durations(seconds: Mapping[str, float], executed: Sequence[str] | None, format: Format = "png") -> bytes:
    """Horizontal bars of seconds per stage in the given order; stages that were not executed are faint."""
    figure = new_figure(7.2, 0.8 + 0.33 * len(seconds))
    axes = figure.add_subplot()
    style_axes(axes, "", "duration, s", "", grid="x")
    for index, (label, value) in enumerate(seconds.items()):
        fresh = executed is None or label in executed
        axes.barh(index, value, height=0.62, color=SERIES[0], alpha=0.9 if fresh else 0.35)
        axes.annotate(
            format_duration(value),
            (value, index),
            xytext=(5, 0),
            textcoords="offset points",
            va="center",
            fontsize=9,
            color=MUTED,
        )
    axes.set_yticks(range(len(seconds)), list(seconds), fontsize=9.5, color=INK)
    axes.set_ylim(len(seconds) - 0.4, -0.6)
    axes.set_xlim(0, 1.16 * max(seconds.values(), default=1.0))
    axes.spines["left"].set_visible(False)
    plain_ticks(axes.xaxis)
    return render(figure, format, "durations")
