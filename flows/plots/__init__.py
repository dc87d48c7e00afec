"""Every picture of the pipeline, in one style. Functions of numbers that return PNG or SVG bytes.

Matplotlib is used through its object interface only: no pyplot, no global figure, no display. It is imported
when the first picture is drawn, so that starting the command line stays quick. SVG text stays text, and all
inks are among `COLOURS`: the HTML report maps them to its two themes. Equal input gives equal bytes.
"""

from __future__ import annotations

from flows.plots.costs import CostPoint, costs
from flows.plots.evaluation import comparison, confusion, reliability
from flows.plots.frame import COLOURS, GRID, INK, MUTED, SERIES, Format, format_duration
from flows.plots.images import image_grid, triple_grid
from flows.plots.speed import Latency, durations, error_histogram, latency
from flows.plots.study import Group, Mark, Panel, study_lines, study_predictions, study_scatter, write_count
from flows.plots.sweeps import FAILED_AT, CoordinateAxis, CoordinateLine, Coordinates, parallel_coordinates
from flows.plots.traffic import CLIPPED, MAX_CLASSES, class_shares, distributions, effects, traffic_history
from flows.plots.training import History, curve_panels, curves

__all__ = [
    "CLIPPED",
    "COLOURS",
    "FAILED_AT",
    "GRID",
    "INK",
    "MAX_CLASSES",
    "MUTED",
    "SERIES",
    "CoordinateAxis",
    "CoordinateLine",
    "Coordinates",
    "CostPoint",
    "Format",
    "Group",
    "History",
    "Latency",
    "Mark",
    "Panel",
    "class_shares",
    "comparison",
    "confusion",
    "costs",
    "curve_panels",
    "curves",
    "distributions",
    "durations",
    "effects",
    "error_histogram",
    "format_duration",
    "image_grid",
    "latency",
    "parallel_coordinates",
    "reliability",
    "study_lines",
    "study_predictions",
    "study_scatter",
    "traffic_history",
    "triple_grid",
    "write_count",
]
