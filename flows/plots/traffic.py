"""What servers saw, beside what they were made for."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

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

if TYPE_CHECKING:
    pass

MAX_CLASSES = 24  # bars that fit side by side
CLIPPED = 0.005  # of the values at each end that do not widen a histogram


def effects(rows: Sequence[tuple[str, float, bool]], limit: float, format: Format = "png") -> bytes:
    """Strength of each drift test: a dot per test in the row of its family; those that alarm are filled.

    Args:
        rows: family, effect 0-1, whether it alarms.
        limit: effects below never alarm.
    """
    families = list(dict.fromkeys(family for family, _, _ in rows))
    figure = new_figure(7.6, 0.95 + 0.42 * len(families))
    axes = figure.add_subplot()
    style_axes(axes, "", "effect: distance of the window from the reference", "", grid="x")
    for family, effect, alarmed in rows:
        axes.plot(
            [effect],
            [families.index(family)],
            marker="o",
            markersize=7,
            color=SERIES[4] if alarmed else SERIES[0],
            alpha=0.85,
            markerfacecolor=SERIES[4] if alarmed else "none",
        )
    axes.axvline(limit, color=MUTED, linewidth=1.2, linestyle=(0, (4, 3)))
    axes.annotate(
        "monitor.min_effect",
        (limit, 1.0),
        xycoords=("data", "axes fraction"),
        xytext=(4, -2),
        textcoords="offset points",
        va="top",
        fontsize=8,
        color=MUTED,
    )
    axes.set_yticks(range(len(families)), families, fontsize=10, color=INK)
    axes.set_ylim(len(families) - 0.5, -0.75)
    axes.set_xlim(0, max(0.3, 1.08 * max((effect for _, effect, _ in rows), default=0.0)))
    axes.spines["left"].set_visible(False)
    plain_ticks(axes.xaxis)
    return render(figure, format, "effects")


def distributions(
    pairs: Mapping[str, tuple[NDArray[np.float32], NDArray[np.float32]]],
    names: tuple[str, str],
    format: Format = "png",
    columns: int = 3,
) -> bytes:
    """Small histograms of two samples each, as shares of their images.

    Args:
        pairs: title to the two samples (n,) and (m,).
        names: what the two samples are.
    """
    columns = min(columns, len(pairs))
    rows = math.ceil(len(pairs) / columns)
    figure = new_figure(3.05 * columns, 1.75 * rows + 0.35)
    cells = figure.subplots(rows, columns, squeeze=False)
    for axes in cells.flat[len(pairs) :]:
        axes.set_axis_off()
    for index, (axes, (title, (first, second))) in enumerate(zip(cells.flat, pairs.items(), strict=False)):
        style_axes(axes, "", "", "images, %" if index % columns == 0 else "", grid="y")
        axes.set_title(title, loc="left", fontsize=9.5, color=INK, pad=6)
        ends = np.quantile(np.concatenate([first, second]), [CLIPPED, 1 - CLIPPED])
        low, high = float(ends[0]), float(ends[1])
        if not low < high:
            low, high = low - 0.5, high + 0.5
        edges = np.linspace(low, high, 25)
        for sample, name, colour in zip((first, second), names, (MUTED, SERIES[1]), strict=True):
            counts, _ = np.histogram(np.clip(sample, low, high), bins=edges)
            shares = 100 * counts / max(1, len(sample))
            if colour == MUTED:
                axes.stairs(shares, edges, fill=True, color=colour, alpha=0.35, label=name)
            else:
                axes.stairs(shares, edges, color=colour, linewidth=1.8, label=name)
        plain_ticks(axes.xaxis)
        axes.locator_params(axis="x", nbins=4)
        axes.locator_params(axis="y", nbins=4)
    handles, labels = cells.flat[0].get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside upper right", ncols=2, frameon=False, fontsize=9, labelcolor=INK
    )
    return render(figure, format, "distributions")


def class_shares(
    classes: Sequence[str],
    first: NDArray[np.float64],
    second: NDArray[np.float64],
    names: tuple[str, str],
    format: Format = "png",
) -> bytes:
    """Shares (0-1) of the predicted classes in two samples; of many classes those that differ most."""
    order = list(range(len(classes)))
    if len(classes) > MAX_CLASSES:
        order = np.sort(np.argsort(-np.abs(first - second), kind="stable")[:MAX_CLASSES]).tolist()
    figure = new_figure(7.6, 2.9)
    axes = figure.add_subplot()
    style_axes(axes, "", "", "predictions, %", grid="y")
    places = np.arange(len(order))
    axes.bar(places - 0.2, 100 * first[order], width=0.36, color=MUTED, alpha=0.5, label=names[0])
    axes.bar(places + 0.2, 100 * second[order], width=0.36, color=SERIES[1], label=names[1])
    labels = [_shorten(classes[index]) for index in order]
    crowded = sum(len(label) for label in labels) > 70
    axes.set_xticks(
        places,
        labels,
        rotation=40 if crowded else 0,
        ha="right" if crowded else "center",
        fontsize=9,
        color=INK,
        parse_math=False,
    )
    draw_legend(axes, ncols=2)
    return render(figure, format, "classes")


def _shorten(text: str, letters: int = 18) -> str:
    return text if len(text) <= letters else text[: letters - 1] + "…"


def traffic_history(
    hours_ago: Sequence[float],
    effects_by_family: Mapping[str, Sequence[float]],
    p95_ms: Sequence[float],
    limits: tuple[float, float],
    format: Format = "png",
) -> bytes:
    """Largest effect per family and slow latency of the latest reports; NaN leaves a gap.

    Args:
        hours_ago: of each report, descending to 0.
        limits: of the effect and of the latency in ms.
    """
    figure = new_figure(9.2, 2.9)
    left, right = figure.subplots(1, 2)
    style_axes(left, "Largest effect", "hours ago", "")
    style_axes(right, "Latency, 95 % of the requests", "hours ago", "ms")
    for colour, (family, values) in zip(SERIES, effects_by_family.items(), strict=False):
        left.plot(hours_ago, values, color=colour, linewidth=1.6, marker="o", markersize=3.5, label=family)
    right.plot(hours_ago, p95_ms, color=SERIES[0], linewidth=1.6, marker="o", markersize=3.5)
    for axes, limit in zip((left, right), limits, strict=True):
        axes.axhline(limit, color=MUTED, linewidth=1.2, linestyle=(0, (4, 3)))
        axes.set_xlim(max([*hours_ago, 1.0]) * 1.02, -0.02 * max([*hours_ago, 1.0]))
        axes.set_ylim(bottom=0)
        plain_ticks(axes.yaxis)
    draw_legend(left)
    return render(figure, format, "history")
