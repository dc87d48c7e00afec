"""Parallel coordinates of a sweep: where each point crosses each axis, and what is written there.

Positions run from 0 (bottom) to 1 (top). The picture and the page draw the same ones.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from flows.plots import CoordinateAxis, CoordinateLine, Coordinates
from flows.sweeps.points import SweepFile
from flows.sweeps.results import Row, describe, rank, shorten, show

FEW = 7  # distinct numbers up to which each gets a tick
CLOSE = 0.045  # ticks nearer than this would overprint one another
LOG_FROM = 30.0  # a grid whose largest value is so many times its smallest is drawn on a logarithmic axis
SPREAD = 0.06  # height over which lines through one category fan out


def coordinates(rows: Sequence[Row], sweep: SweepFile) -> Coordinates:
    """Of the points that have ended, the best one last (on top); failed ones have no value."""
    drawn = [
        row
        for row in reversed(rank(rows, sweep))
        if row.value is not None or row.status in ("failed", "impossible")
    ]
    names = list(shorten(dict.fromkeys(sweep.keys)))
    axes, heights = [], []
    for key, name in zip(sweep.keys, names, strict=True):
        axis, positions = _axis(name, [row.settings[key] for row in drawn], log=sweep.is_log(key))
        axes.append(axis)
        heights.append(positions)
    values = [row.value for row in drawn if row.value is not None]
    metric, tops = _axis(sweep.metric, values, flip=sweep.direction == "minimize", spread=False)
    ends = iter(tops)
    lines = [
        CoordinateLine(
            label=row.name,
            heights=tuple(positions[index] for positions in heights),
            end=next(ends) if row.value is not None else None,
        )
        for index, row in enumerate(drawn)
    ]
    return Coordinates(tuple(axes), metric, tuple(lines))


def _axis(
    label: str, values: Sequence[Any], *, log: bool = False, flip: bool = False, spread: bool = True
) -> tuple[CoordinateAxis, list[float]]:
    numbers = [value for value in values if isinstance(value, int | float) and not isinstance(value, bool)]
    if len(numbers) < len(values):
        return _categories(label, values)
    if not numbers:
        return CoordinateAxis(label, ()), []
    distinct = sorted(set(numbers))
    low, high = distinct[0], distinct[-1]
    few = len(distinct) <= FEW
    log = low > 0 and high > low and (log or (few and high / low >= LOG_FROM))

    def height(value: float) -> float:
        if high == low:
            return 0.5
        part = math.log(value / low) / math.log(high / low) if log else (value - low) / (high - low)
        return 1 - part if flip else part

    marks = distinct if few else [low, *(_decades(low, high) if log else _round_steps(low, high)), high]
    ticks = _apart([(height(mark), show(_short(mark))) for mark in marks], ends=not few or len(distinct) > 1)
    repeated = few and spread and len(numbers) > len(distinct)
    heights = [height(number) for number in numbers]
    return CoordinateAxis(label + (" (log)" if log else ""), ticks), _fan_out(
        heights
    ) if repeated else heights


def _short(number: float) -> float:
    return float(f"{number:.4g}") if isinstance(number, float) else number


def _categories(label: str, values: Sequence[Any]) -> tuple[CoordinateAxis, list[float]]:
    texts = [value if isinstance(value, str) else json.dumps(value) for value in values]
    distinct = sorted(set(texts))
    height = {
        text: index / (len(distinct) - 1) if len(distinct) > 1 else 0.5 for index, text in enumerate(distinct)
    }
    ticks = tuple((height[text], text or '""') for text in distinct)
    return CoordinateAxis(label, ticks), _fan_out([height[text] for text in texts])


def _fan_out(heights: Sequence[float]) -> list[float]:
    """Lines through one tick side by side around it, without leaving the axis."""
    members: dict[float, list[int]] = {}
    for index, height in enumerate(heights):
        members.setdefault(height, []).append(index)
    spread = list(heights)
    gap = min((b - a for a, b in pairwise(sorted(members))), default=1.0)
    width = min(SPREAD, gap / 3)
    for height, indices in members.items():
        lowest = min(max(height - width / 2, 0.0), 1.0 - width)
        for place, index in enumerate(indices):
            if len(indices) > 1:
                spread[index] = lowest + width * place / (len(indices) - 1)
    return spread


def _decades(low: float, high: float) -> list[float]:
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    factors = (1, 2, 5) if len(decades) <= 3 else (1,)
    return [m for m in (float(f"{f}e{d}") for d in decades for f in factors) if low < m < high]


def _round_steps(low: float, high: float) -> list[float]:
    rough = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough)
    first = math.floor(low / step) + 1
    marks = [number * step for number in range(first, first + 12)]
    return [float(f"{mark:.12g}") for mark in marks if low < mark < high]


def _apart(ticks: Sequence[tuple[float, str]], ends: bool) -> tuple[tuple[float, str], ...]:
    """Without ticks that would overprint; the two ends stay."""
    if not ends or len(ticks) < 2:
        return tuple(ticks)
    ordered = sorted(ticks)
    kept = [ordered[0]]
    for tick in ordered[1:-1]:
        if tick[0] - kept[-1][0] >= CLOSE and ordered[-1][0] - tick[0] >= CLOSE:
            kept.append(tick)
    return (*kept, ordered[-1])


def page_data(found: Coordinates, rows: Sequence[Row]) -> Mapping[str, Any]:
    """What the page's script draws, as JSON."""
    by_name = {row.name: row for row in rows}
    return {
        "axes": [
            {"label": a.label, "ticks": [list(tick) for tick in a.ticks]} for a in (*found.axes, found.metric)
        ],
        "lines": [
            {
                "name": line.label,
                "at": [*line.heights, line.end],
                "text": _text(by_name[line.label]),
            }
            for line in found.lines
        ],
    }


def _text(row: Row) -> str:
    result = f"{row.value:.4g}" if row.value is not None else f"{row.status}: {row.reason.splitlines()[0]}"
    return f": {describe(row.settings)} → {result}"
