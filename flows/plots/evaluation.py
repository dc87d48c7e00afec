"""What a classifier gets right: confusion, calibration, comparison with intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from flows.plots.frame import (
    GRID,
    INK,
    MUTED,
    SERIES,
    Format,
    new_figure,
    plain_ticks,
    render,
    style_axes,
)

if TYPE_CHECKING:
    from models.classification.metrics import Interval, ReliabilityBin

_COUNTS_UP_TO = 32  # classes; above, the numbers in the cells would be smaller than can be read


def confusion(counts: NDArray[np.int64], classes: Sequence[str], format: Format = "png") -> bytes:
    """Confusion matrix (C, C), label in rows: colour is the share of the row, text the count.

    Colour is transparent at zero, so that the picture suits any background. From 2 to about 100 classes the
    labels stay legible: the figure grows, and counts are left out above 32 classes.
    """
    from matplotlib.colors import to_rgb

    number = len(classes)
    side = min(max(0.42 * number, 2.6), 15.0) if number <= _COUNTS_UP_TO else min(0.15 * number, 30.0)
    labels = [name if len(name) <= 18 else name[:17] + "…" for name in classes]
    margin = 0.9 + 0.07 * max(len(label) for label in labels)
    figure = new_figure(side + margin, side + margin)
    axes = figure.add_subplot()
    style_axes(axes, "", "predicted", "actual", grid="none")
    share = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    pixels = np.empty((number, number, 4))
    pixels[..., :3] = to_rgb(SERIES[0])
    # the root lifts rare mistakes, which are what one looks for, above the background
    pixels[..., 3] = np.sqrt(share)
    axes.imshow(pixels, interpolation="nearest", extent=(0, number, number, 0))
    positions = np.arange(number) + 0.5
    # a class may be called $x$: names are not formulas
    look = {"fontsize": 9.0 if number <= _COUNTS_UP_TO else 6.5, "color": INK, "parse_math": False}
    turned = max(len(label) for label in labels) > 3
    axes.set_xticks(positions, labels, rotation=90 if turned else 0, **look)
    axes.set_yticks(positions, labels, **look)
    axes.set_xticks(np.arange(number + 1), minor=True)
    axes.set_yticks(np.arange(number + 1), minor=True)
    axes.grid(True, which="minor", color=GRID, linewidth=0.6)
    for spine in axes.spines.values():
        spine.set_visible(False)
    if number <= _COUNTS_UP_TO:
        for row, column in zip(*np.nonzero(counts), strict=True):
            axes.text(
                column + 0.5,
                row + 0.5,
                str(counts[row, column]),
                ha="center",
                va="center",
                fontsize=8.5 if counts.max() < 1000 else 7,
                color="white" if share[row, column] > 0.35 else INK,
            )
    return render(figure, format, "confusion")


def reliability(
    tables: Mapping[str, Sequence[ReliabilityBin]], notes: Mapping[str, str], format: Format = "png"
) -> bytes:
    """Reliability diagrams side by side: accuracy per confidence bin against the diagonal, counts below."""
    figure = new_figure(4.3 * len(tables), 4.2)
    grid = figure.add_gridspec(2, len(tables), height_ratios=(4, 1))
    for index, (name, table) in enumerate(tables.items()):
        colour = SERIES[index % len(SERIES)]
        upper = figure.add_subplot(grid[0, index])
        style_axes(upper, f"{name}  {notes.get(name, '')}".rstrip(), "", "accuracy, %")
        upper.plot([0, 100], [0, 100], color=MUTED, linewidth=1.2, linestyle=(0, (4, 3)), label="perfect")
        filled = [row for row in table if row.count]
        centres = [50 * (row.lower + row.upper) for row in filled]
        widths = [94 * (row.upper - row.lower) for row in filled]
        upper.bar(
            centres, [100 * r.accuracy for r in filled], widths, color=colour, alpha=0.8, label="accuracy"
        )
        upper.plot(
            [100 * row.confidence for row in filled],
            [100 * row.accuracy for row in filled],
            linestyle="none",
            marker="o",
            markersize=4,
            color=INK,
            label="mean confidence",
        )
        upper.set_xlim(0, 100)
        upper.set_ylim(0, 103)
        upper.tick_params(labelbottom=False)
        lower = figure.add_subplot(grid[1, index], sharex=upper)
        style_axes(lower, "", "confidence, %", "images", grid="y")
        lower.bar(centres, [row.count for row in filled], widths, color=colour, alpha=0.45)
        lower.locator_params(axis="y", nbins=3)
        plain_ticks(lower.yaxis)
        if index == 0:
            handles = upper.get_legend_handles_labels()[0]
    look = {"frameon": False, "fontsize": 9, "labelcolor": INK}
    figure.legend(handles=handles, loc="outside lower left", ncols=3, **look)
    return render(figure, format, "reliability")


def comparison(values: Mapping[str, Interval], xlabel: str, format: Format = "png") -> bytes:
    """Fractions with their 95 % intervals as dots and whiskers, in percent, one row each.

    Dots, not bars: the axis then may start where the data is, and small differences remain visible.
    """
    figure = new_figure(6.4, 0.95 + 0.52 * len(values))
    axes = figure.add_subplot()
    style_axes(axes, "", xlabel, "", grid="x")
    for index, (colour, item) in enumerate(zip(SERIES, values.values(), strict=False)):
        axes.plot([100 * item.low, 100 * item.high], [index, index], color=colour, linewidth=3, alpha=0.45)
        axes.plot([100 * item.value], [index], marker="o", markersize=9, color=colour)
        axes.annotate(
            f"{100 * item.value:.1f}",
            (100 * item.value, index),
            xytext=(0, 9),
            textcoords="offset points",
            ha="center",
            fontsize=10,
            fontweight="bold",
            color=INK,
        )
    axes.set_yticks(range(len(values)), list(values), fontsize=10, color=INK)
    axes.set_ylim(len(values) - 0.5, -0.75)
    axes.spines["left"].set_visible(False)
    plain_ticks(axes.xaxis)
    return render(figure, format, "comparison")
