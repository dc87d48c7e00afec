"""Every picture of the pipeline, in one style. Functions of numbers that return PNG or SVG bytes.

Matplotlib is used through its object interface only: no pyplot, no global figure, no display. It is imported
when the first picture is drawn, so that starting the command line stays quick. SVG text stays text, and all
inks are among `COLOURS`: the HTML report maps them to its two themes. Equal input gives equal bytes.
"""

from __future__ import annotations

import csv
import io
import math
import threading
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from models.classification.metrics import Interval, ReliabilityBin

Format = Literal["png", "svg"]

INK, MUTED, GRID = "#24292f", "#6e7781", "#d8dee4"
SERIES = ("#3a6ea5", "#c8773a", "#5b8c5a", "#8a6bab", "#b5525c", "#4f9a9f")
COLOURS = (INK, MUTED, GRID, *SERIES)
"""Every colour that text, lines and marks may have."""

PNG_DPI = 144
_drawing = threading.Lock()  # matplotlib's settings are per process, and Prefect draws from threads


# ------------------------------------------------------------------------------------------ frame


def _figure(width: float, height: float) -> Any:
    """An empty figure of `width` x `height` inches that draws without a display."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _render(figure: Any, format: Format, name: str) -> bytes:
    from matplotlib import rc_context

    buffer = io.BytesIO()
    # SVG: text as text; the salt (instead of a random one) and no date make the bytes reproducible
    settings = {"svg.fonttype": "none", "svg.hashsalt": name}
    metadata = {"Date": None, "Creator": None} if format == "svg" else {"Software": None}
    with _drawing, rc_context(settings), warnings.catch_warnings():
        # class names in scripts that the bundled font lacks: boxes in PNG, the reader's own fonts in SVG
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        colour = "none" if format == "svg" else "white"
        figure.savefig(buffer, format=format, dpi=PNG_DPI, facecolor=colour, metadata=metadata)
    return buffer.getvalue()


def _style(axes: Any, title: str = "", xlabel: str = "", ylabel: str = "", grid: str = "both") -> None:
    """The house style: title left, two spines, a light grid behind the data, units on the axes."""
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(GRID)
    axes.set_facecolor("none")
    axes.tick_params(colors=MUTED, labelsize=9, length=0, pad=4)
    axes.tick_params(which="minor", length=0, labelbottom=False, labelleft=False)
    if grid != "none":
        axes.grid(True, axis=grid, color=GRID, linewidth=0.7)
    axes.set_axisbelow(True)
    if title:
        axes.set_title(title, loc="left", fontsize=11, fontweight="bold", color=INK, pad=10)
    axes.set_xlabel(xlabel, fontsize=9.5, color=MUTED)
    axes.set_ylabel(ylabel, fontsize=9.5, color=MUTED)


def _legend(axes: Any, **options: Any) -> None:
    legend = axes.legend(frameon=False, fontsize=9, labelcolor=INK, handlelength=1.6, **options)
    legend.set_zorder(5)


def _plain_ticks(axis: Any) -> None:
    """Numbers such as 0.001 and 20,000 instead of offsets and powers of ten."""
    from matplotlib.ticker import FuncFormatter

    axis.set_major_formatter(FuncFormatter(lambda value, _: _number(value)))


def _number(value: float) -> str:
    """At most four significant digits, thousands separated."""
    if value and abs(value) < 1e-4:
        return f"{value:.2g}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def format_duration(seconds: float) -> str:
    """`3.2 s`, `4 min 05 s`, `2 h 07 min`."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


# ------------------------------------------------------------------------------------------ training


@dataclass(frozen=True)
class History:
    """Curves of one training run, column name to values; both have a `step` column unless empty."""

    train: Mapping[str, Sequence[float]] = field(default_factory=dict)
    validation: Mapping[str, Sequence[float]] = field(default_factory=dict)

    @classmethod
    def read(cls, folder: Path) -> History:
        """`curves.csv` and `validation.csv` of a training stage; a missing file is an empty table."""
        return cls(_read_columns(folder / "curves.csv"), _read_columns(folder / "validation.csv"))


def _read_columns(path: Path) -> dict[str, list[float]]:
    if not path.is_file():
        return {}
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    # an empty cell (a value that is not logged at this step) becomes a gap in the line
    return {name: [float(row[name] or "nan") for row in rows] for name in rows[0]} if rows else {}


@dataclass(frozen=True)
class _Panel:
    title: str
    unit: str
    train: str = ""
    validation: str = ""


_PANELS = (
    _Panel("Loss", "loss", "train_loss", "val_loss"),
    _Panel("Validation accuracy", "top-1, %", "", "val_top1"),
    _Panel("Learning rate", "of the top layer", "lr"),
    _Panel("Gradient norm", "before clipping", "grad_norm"),
    _Panel("Throughput", "images/s", "images_per_s"),
    _Panel("Memory", "MB", "memory_mb"),
)


def curves(runs: Mapping[str, History], format: Format = "png") -> bytes:
    """One panel per recorded quantity over optimiser steps; one colour per run.

    Known columns: train_loss, lr, grad_norm, images_per_s, memory_mb; val_loss, val_top1 (a fraction).

    Raises:
        ValueError: no run has any of them.
    """
    panels = _panels_of(runs)
    if not panels:
        raise ValueError("no curve to draw: the runs have none of the known columns")
    columns = min(len(panels), 3)
    rows = math.ceil(len(panels) / columns)
    figure = _figure(3.9 * columns, 2.75 * rows)
    for index, panel in enumerate(panels):
        _draw_panel(figure.add_subplot(rows, columns, index + 1), panel, runs)
    return _render(figure, format, "curves")


def curve_panels(runs: Mapping[str, History], format: Format = "png") -> dict[str, bytes]:
    """The panels of `curves` as pictures of their own, by title; none if nothing was recorded."""
    pictures = {}
    for panel in _panels_of(runs):
        figure = _figure(3.7, 2.55)
        _draw_panel(figure.add_subplot(), panel, runs)
        pictures[panel.title] = _render(figure, format, panel.title)
    return pictures


def _panels_of(runs: Mapping[str, History]) -> list[_Panel]:
    return [
        panel
        for panel in _PANELS
        if any(panel.train in run.train or panel.validation in run.validation for run in runs.values())
    ]


def _draw_panel(axes: Any, panel: _Panel, runs: Mapping[str, History]) -> None:
    _style(axes, panel.title, "optimiser step", panel.unit)
    for colour, (name, run) in zip(SERIES, runs.items(), strict=False):
        _draw_run(axes, panel, run, colour, f"{name}: " if len(runs) > 1 else "")
    _plain_ticks(axes.xaxis)
    _plain_ticks(axes.yaxis)
    if panel.train in ("images_per_s", "memory_mb"):
        axes.set_ylim(0, 1.12 * axes.get_ylim()[1])
    if (panel.train and panel.validation) or len(runs) > 1:
        _legend(axes)


def _draw_run(axes: Any, panel: _Panel, run: History, colour: str, prefix: str) -> None:
    both = bool(panel.train and panel.validation)
    if panel.train in run.train:
        axes.plot(
            run.train["step"],
            run.train[panel.train],
            color=colour,
            linewidth=1.2 if both else 1.6,
            alpha=0.55 if both else 1.0,
            label=f"{prefix}train" if both else prefix.removesuffix(": "),
        )
    if panel.validation in run.validation:
        scale = 100.0 if panel.validation == "val_top1" else 1.0
        axes.plot(
            run.validation["step"],
            [scale * value for value in run.validation[panel.validation]],
            color=colour,
            linewidth=1.8,
            marker="o",
            markersize=4,
            label=f"{prefix}validation" if both else prefix.removesuffix(": "),
        )


# ------------------------------------------------------------------------------------------ evaluation

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
    figure = _figure(side + margin, side + margin)
    axes = figure.add_subplot()
    _style(axes, "", "predicted", "actual", grid="none")
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
    return _render(figure, format, "confusion")


def reliability(
    tables: Mapping[str, Sequence[ReliabilityBin]], notes: Mapping[str, str], format: Format = "png"
) -> bytes:
    """Reliability diagrams side by side: accuracy per confidence bin against the diagonal, counts below."""
    figure = _figure(4.3 * len(tables), 4.2)
    grid = figure.add_gridspec(2, len(tables), height_ratios=(4, 1))
    for index, (name, table) in enumerate(tables.items()):
        colour = SERIES[index % len(SERIES)]
        upper = figure.add_subplot(grid[0, index])
        _style(upper, f"{name}  {notes.get(name, '')}".rstrip(), "", "accuracy, %")
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
        _style(lower, "", "confidence, %", "images", grid="y")
        lower.bar(centres, [row.count for row in filled], widths, color=colour, alpha=0.45)
        lower.locator_params(axis="y", nbins=3)
        _plain_ticks(lower.yaxis)
        if index == 0:
            handles = upper.get_legend_handles_labels()[0]
    look = {"frameon": False, "fontsize": 9, "labelcolor": INK}
    figure.legend(handles=handles, loc="outside lower left", ncols=3, **look)
    return _render(figure, format, "reliability")


def comparison(values: Mapping[str, Interval], xlabel: str, format: Format = "png") -> bytes:
    """Fractions with their 95 % intervals as dots and whiskers, in percent, one row each.

    Dots, not bars: the axis then may start where the data is, and small differences remain visible.
    """
    figure = _figure(6.4, 0.95 + 0.52 * len(values))
    axes = figure.add_subplot()
    _style(axes, "", xlabel, "", grid="x")
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
    _plain_ticks(axes.xaxis)
    return _render(figure, format, "comparison")


# ------------------------------------------------------------------------------------------ speed and cost


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

    figure = _figure(9.2, 3.4)
    left, right = figure.subplots(1, 2)
    _style(left, "Time per call", "batch size, images", "ms: median, band to p95")
    _style(right, "Throughput", "batch size, images", "images/s")
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
        _plain_ticks(axes.xaxis)
        _plain_ticks(axes.yaxis)
    _legend(left)
    return _render(figure, format, "latency")


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
    figure = _figure(7.6, 3.5)
    axes = figure.add_subplot()
    _style(axes, "", "absolute error of a logit against PyTorch (exact ones at 1e-9)", "logits, %")
    for colour, (name, values) in zip(SERIES, drawn.items(), strict=False):
        label = f"{name}: mean {values.mean():.1e}, max {values.max():.1e}"
        share = np.full(len(values), 100.0 / len(values))
        axes.hist(values, bins=edges, weights=share, color=colour, alpha=0.75, label=label)
        what, limit = limits.get(name, ("", 0.0))
        if limit > 0:
            axes.axvline(limit, color=colour, linewidth=1.4, linestyle=(0, (4, 3)))
            axes.annotate(
                f"limit of the {what} {_number(limit)}",
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
    _legend(axes, loc="upper left")
    return _render(figure, format, "errors")


def durations(seconds: Mapping[str, float], executed: Sequence[str] | None, format: Format = "png") -> bytes:
    """Horizontal bars of seconds per stage in the given order; stages that were not executed are faint."""
    figure = _figure(7.2, 0.8 + 0.33 * len(seconds))
    axes = figure.add_subplot()
    _style(axes, "", "duration, s", "", grid="x")
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
    _plain_ticks(axes.xaxis)
    return _render(figure, format, "durations")


# ------------------------------------------------------------------------------------------ images


def image_grid(
    images: Sequence[NDArray[np.uint8]], captions: Sequence[str], columns: int = 8, title: str = ""
) -> bytes:
    """PNG of RGB images (H, W, 3) uint8, each under its caption (a line break makes two lines).

    Raises:
        ValueError: no image, or not one caption for each.
    """
    if not images or len(images) != len(captions):
        raise ValueError(f"need one caption per image, got {len(images)} images and {len(captions)} captions")
    columns = min(columns, len(images))
    rows = math.ceil(len(images) / columns)
    lines = 1 + max(caption.count("\n") for caption in captions)
    top = 0.45 if title else 0.05
    height = rows * (1.3 + 0.19 * lines) + top
    figure = _figure(1.42 * columns, height)
    figure.set_layout_engine("none")
    if title:
        figure.text(0.008, 1 - 0.14 / height, title, fontsize=11, fontweight="bold", color=INK, va="top")
    cells = figure.subplots(
        rows,
        columns,
        squeeze=False,
        gridspec_kw={
            "left": 0.01,
            "right": 0.99,
            "bottom": 0.04 / height,
            "top": 1 - (top + 0.19 * lines) / height,
            "hspace": 0.17 * lines + 0.06,
            "wspace": 0.1,
        },
    )
    for axes in cells.flat:
        axes.set_axis_off()
    for axes, image, caption in zip(cells.flat, images, captions, strict=False):
        axes.imshow(image)
        axes.set_title(caption, fontsize=8.5, color=INK, pad=3, parse_math=False)
    return _render(figure, "png", "images")


def reconstruction_grid(
    inputs: NDArray[np.uint8], masked: NDArray[np.uint8], reconstructions: NDArray[np.uint8]
) -> bytes:
    """PNG of masked image modelling: input, masked input and reconstruction side by side, one image per row.

    From four images on the rows go into two blocks beside each other, which suits screens better.

    Args:
        inputs, masked, reconstructions: (N, S, S, 3) uint8 each, N >= 1.
    """
    stacked = np.stack([inputs, masked, reconstructions], axis=1)  # (N, 3, S, S, 3)
    number, blocks = len(stacked), 1 if len(stacked) < 4 else 2
    rows = math.ceil(number / blocks)
    columns = 3 * blocks + (blocks - 1)  # a narrow empty column between the blocks
    widths = [0.18 if column == 3 else 1.0 for column in range(columns)]
    cell, top = 1.35, 0.36
    figure = _figure(cell * sum(widths), cell * rows + top)
    figure.set_layout_engine("none")
    cells = figure.subplots(
        rows,
        columns,
        squeeze=False,
        gridspec_kw={
            "left": 0.01,
            "right": 0.99,
            "bottom": 0.01,
            "top": 1 - top / (cell * rows + top),
            "hspace": 0.06,
            "wspace": 0.06,
            "width_ratios": widths,
        },
    )
    for axes in cells.flat:
        axes.set_axis_off()
    for index, triple in enumerate(stacked):
        block, row = divmod(index, rows)
        for column, (image, title) in enumerate(
            zip(triple, ("input", "masked", "reconstruction"), strict=True)
        ):
            axes = cells[row, 4 * block + column]
            axes.imshow(image)
            if row == 0:
                axes.set_title(title, fontsize=10, color=INK, pad=6)
    return _render(figure, "png", "reconstructions")


# ------------------------------------------------------------------------------------------ sweeps


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
    figure = _figure(max(6.4, 1.75 * axes_number + 0.6), 4.6)
    axes = figure.add_subplot()
    _style(axes, title, grid="none")
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
    return _render(figure, "png", "parallel-coordinates")


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
