"""Curves of training: loss, learning rate, gradient norm, accuracy, throughput, memory."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flows.plots.frame import (
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
    _Panel("Neighbours' accuracy", "top-1 of kNN, %", "", "knn_top1"),
    _Panel("Learning rate", "of the top layer", "lr"),
    _Panel("Gradient norm", "before clipping", "grad_norm"),
    _Panel("Throughput", "images/s", "images_per_s"),
    _Panel("Throughput", "tokens/s", "tokens_per_s"),
    _Panel("Memory", "MB", "memory_mb"),
)


def curves(runs: Mapping[str, History], format: Format = "png") -> bytes:
    """One panel per recorded quantity over optimiser steps; one colour per run.

    Known columns: train_loss, lr, grad_norm, images_per_s, tokens_per_s, memory_mb; val_loss, val_top1 and
    knn_top1 (fractions).

    Raises:
        ValueError: no run has any of them.
    """
    panels = _panels_of(runs)
    if not panels:
        raise ValueError("no curve to draw: the runs have none of the known columns")
    columns = min(len(panels), 3)
    rows = math.ceil(len(panels) / columns)
    figure = new_figure(3.9 * columns, 2.75 * rows)
    for index, panel in enumerate(panels):
        _draw_panel(figure.add_subplot(rows, columns, index + 1), panel, runs)
    return render(figure, format, "curves")


def curve_panels(runs: Mapping[str, History], format: Format = "png") -> dict[str, bytes]:
    """The panels of `curves` as pictures of their own, by title; none if nothing was recorded."""
    pictures = {}
    for panel in _panels_of(runs):
        figure = new_figure(3.7, 2.55)
        _draw_panel(figure.add_subplot(), panel, runs)
        pictures[panel.title] = render(figure, format, panel.title)
    return pictures


def _panels_of(runs: Mapping[str, History]) -> list[_Panel]:
    return [
        panel
        for panel in _PANELS
        if any(panel.train in run.train or panel.validation in run.validation for run in runs.values())
    ]


def _draw_panel(axes: Any, panel: _Panel, runs: Mapping[str, History]) -> None:
    style_axes(axes, panel.title, "optimiser step", panel.unit)
    for colour, (name, run) in zip(SERIES, runs.items(), strict=False):
        _draw_run(axes, panel, run, colour, f"{name}: " if len(runs) > 1 else "")
    plain_ticks(axes.xaxis)
    plain_ticks(axes.yaxis)
    if panel.train in ("images_per_s", "tokens_per_s", "memory_mb"):
        axes.set_ylim(0, 1.12 * axes.get_ylim()[1])
    if (panel.train and panel.validation) or len(runs) > 1:
        draw_legend(axes)


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
        scale = 100.0 if panel.validation.endswith("_top1") else 1.0
        axes.plot(
            run.validation["step"],
            [scale * value for value in run.validation[panel.validation]],
            color=colour,
            linewidth=1.8,
            marker="o",
            markersize=4,
            label=f"{prefix}validation" if both else prefix.removesuffix(": "),
        )
