"""Which way of running an iteration is the fastest here: measured at the first start, then read from a file.

Two questions (spec sections 3 and 6). Does Q leave before K and V are computed (`split`), at the price of one
more run per layer? Do two micro-batches take turns, so that the model works while attention of the other half
is computed, at the price of reading the weights twice? Both are answered on the real slices and the real
workers, with rows that decode at one context length; the ways take turns, so that a busy moment hits them
alike. `split` is one answer for the whole service, because graphs of different cut may round differently.
"""

from __future__ import annotations

import hashlib
import json
import statistics
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np

from flows import files
from flows.serving.lamina.engine.memory import KvMemory
from flows.serving.lamina.engine.sequence import Sequence as Request
from flows.serving.lamina.engine.wire import Wire
from flows.serving.lamina.engine.workers import Workers
from flows.serving.lamina.requests import Submit
from flows.serving.lamina.rows import RowTable, Span
from flows.serving.lamina.slices.runner import Run, Slices

SIZES = (1, 4, 16, 48)
CONTEXT = 512
ROUNDS = 5
BUDGET_S = 20.0
CLEARLY = 0.97  # another way has to be at least so much faster than the plain one


@dataclass(frozen=True)
class Point:
    """Median seconds of an iteration of so many decoding rows, by way of running it."""

    rows: int
    context: int
    fused: float
    split: float
    fused_pipelined: float | None
    split_pipelined: float | None

    def of(self, split: bool, pipelined: bool) -> float | None:
        if pipelined:
            return self.split_pipelined if split else self.fused_pipelined
        return self.split if split else self.fused


@dataclass(frozen=True)
class Calibration:
    """What was found for one bundle, set of workers and machine."""

    key: str
    split: bool
    pipelined_from: int | None  # rows from which two micro-batches are faster
    batch_invariant: bool
    points: list[Point] = field(default_factory=list)

    def micro_batches(self, rows: int) -> int:
        return 2 if self.pipelined_from is not None and rows >= self.pipelined_from else 1

    def overlap_gain_s(self, rows: int) -> float:
        """What early queries save in an iteration of so many rows; the nearest size that was measured."""
        if not self.points:
            return 0.0
        point = min(self.points, key=lambda point: abs(point.rows - rows))
        return point.fused - point.split

    def describe(self) -> str:
        """One line for the log."""
        cut = "Q leaves before K and V" if self.split else "Q, K and V leave together"
        turns = (
            f"two micro-batches from {self.pipelined_from} rows"
            if self.pipelined_from is not None
            else "one micro-batch"
        )
        gains = ", ".join(
            f"{point.rows} rows {100 * (1 - point.split / point.fused):+.1f} %" for point in self.points
        )
        return f"{cut}; {turns}; time saved by early Q: {gains or 'not measured'}"


def read(path: Path, key: str) -> Calibration | None:
    """What was found before for the same `key`, or None."""
    with suppress(OSError, ValueError, TypeError, KeyError):
        value = files.read_json(path)
        if value["key"] == key:
            points = [Point(**point) for point in value.pop("points")]
            return Calibration(**value, points=points)
    return None


def write(path: Path, found: Calibration) -> None:
    files.write_json(path, asdict(found))


def measure(
    key: str,
    split: Slices | None,
    fused: Slices | None,
    workers: Workers,
    requests: int,
    batch_invariant: bool,
    micro_batches: int | None,
) -> Calibration:
    """Try the ways that are open.

    Args:
        split, fused: the slices in both cuts, or the one that the settings name.
        requests: that may run at once.
        micro_batches: that the settings name; None: to be found out.
    """
    ways: dict[tuple[bool, bool], Slices] = {}
    for is_split, slices in ((False, fused), (True, split)):
        if slices is not None:
            if micro_batches != 2:
                ways[is_split, False] = slices
            if micro_batches != 1:
                ways[is_split, True] = slices
    points = []
    if len(ways) > 1:
        deadline = time.monotonic() + BUDGET_S
        for rows in [size for size in SIZES if size <= requests]:
            seconds = _time(ways, workers, rows, requests)
            if seconds:
                points.append(_point(rows, seconds))
            if time.monotonic() > deadline:
                break
    use_split = split is not None and (fused is None or _prefers_split(points))
    return Calibration(
        key, use_split, _pipelined_from(points, use_split, micro_batches), batch_invariant, points
    )


def _point(rows: int, seconds: dict[tuple[bool, bool], float]) -> Point:
    plain = next(value for (_, pipelined), value in seconds.items() if not pipelined or len(seconds) == 1)
    return Point(
        rows, CONTEXT, seconds.get((False, False), plain), seconds.get((True, False), plain),
        seconds.get((False, True)), seconds.get((True, True)),
    )  # fmt: skip


def _prefers_split(points: list[Point]) -> bool:
    """By the mean of relative times over all sizes, in the better of both turns each."""
    if not points:
        return False

    def best(point: Point, split: bool) -> float:
        found = [point.of(split, pipelined) for pipelined in (False, True)]
        return min(value for value in found if value is not None)

    return statistics.fmean(best(point, True) / best(point, False) for point in points) < CLEARLY


def _pipelined_from(points: list[Point], split: bool, micro_batches: int | None) -> int | None:
    if micro_batches is not None:
        return 2 if micro_batches == 2 else None
    found = None
    for point in sorted(points, key=lambda point: -point.rows):
        plain, pipelined = point.of(split, False), point.of(split, True)
        if plain is None or pipelined is None or pipelined >= CLEARLY * plain:
            break
        found = point.rows
    return found


def _time(
    ways: dict[tuple[bool, bool], Slices], workers: Workers, rows: int, requests: int
) -> dict[tuple[bool, bool], float]:
    """Median seconds of each way; nothing if the workers have no room for so many rows."""
    slices = next(iter(ways.values()))
    manifest = slices.bundle.manifest
    context = min(CONTEXT, manifest.max_context - 1)
    memory = KvMemory(workers.partition, workers.pages, requests)
    held = []
    for index in range(rows):
        request = Request(Submit(id=f"calibration-{index}", prompt=(0,), max_tokens=context, arrived=0.0), 0)
        if not memory.admit(request, context + 1):
            break
        held.append(request)
    taken: dict[tuple[bool, bool], list[float]] = {way: [] for way in ways}
    iterations = count(1)
    try:
        if len(held) < rows:
            return {}
        spans = [Span(request.slot, context) for request in held]
        deltas = tuple(delta for request in held if (delta := memory.deltas(request)) is not None)
        workers.link.assign(deltas)
        for round_ in range(ROUNDS + 1):
            for (is_split, pipelined), found in ways.items():
                if pipelined and rows < 2:
                    continue
                groups = [spans[::2], spans[1::2]] if pipelined else [spans]
                seconds = _iterate(found, workers, groups, next(iterations))
                if round_:  # the first warms up
                    taken[is_split, pipelined].append(seconds)
    finally:
        workers.link.free([request.slot for request in held])
        for request in held:
            memory.release(request)
        memory.forgotten()
    return {way: statistics.median(values) for way, values in taken.items() if values}


def _iterate(slices: Slices, workers: Workers, groups: list[list[Span]], iteration: int) -> float:
    began = time.perf_counter()
    active: list[Run] = []
    for micro_batch, spans in enumerate(groups):
        table = RowTable(tuple(spans))
        workers.link.plan(table, iteration, micro_batch)
        ids = np.zeros(table.rows, np.int64)
        active.append(
            slices.start(ids, table.positions, Wire(workers.link, iteration, micro_batch), table.last_rows)
        )
    while active:
        active = [run for run in active if run.step()]
    return time.perf_counter() - began


def key_of(bundle_digest: str, settings: dict[str, Any], machine: dict[str, Any]) -> str:
    """What a calibration depends on, in one word: bundle, settings of the cluster, machine."""
    value = json.dumps([bundle_digest, settings, machine], sort_keys=True)
    return hashlib.sha256(value.encode()).hexdigest()
