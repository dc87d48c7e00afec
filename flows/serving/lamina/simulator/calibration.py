"""This machine in the terms of the step model: fits of measured points, and how far off they are (spec 10).

Measured is elsewhere (`benchmarks/lamina_calibration.py`); here are the file, the fits and the costs that
`replay` takes. Programs of the model worker are interpolated between the rows at which they were timed.
Attention of one layer, beyond what the wire takes, is c0 + c1·rows + d1·chunk rows + bytes/(W mbu), the
bytes being those of the contexts of decoding rows, and of every row of a prompt chunk. The wire is latency +
bytes/bandwidth. What an iteration takes beyond its parts is o0 + o1·rows. Each fit is made on half of the
points and judged on the other half; coefficients are not negative, so that more work is never faster.
"""

from __future__ import annotations

import datetime
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, ValidationError
from scipy.optimize import nnls

from flows.errors import DataError
from flows.serving.lamina.simulator.inputs import Device, Input, Model, Network, Policy
from flows.serving.lamina.simulator.steps import Costs, Iteration, SetUp

MEDIAN_TARGET, P95_TARGET = 0.10, 0.20
MIN_RUNS = 20

Seconds = Annotated[float, Field(gt=0.0, allow_inf_nan=False)]
Rows = Annotated[int, Field(ge=0)]


class ProgramTime(Input):
    """One program of the slices, one layer."""

    kind: str  # as in the bundle's manifest: qx, kvx, post_qx, post, qx_kvx, post_qx_kvx
    rows: Annotated[int, Field(ge=1)]
    seconds: Seconds  # median
    runs: Annotated[int, Field(ge=MIN_RUNS)]


class AttentionTime(Input):
    """Attention of one layer, from the first byte of Q to the last of the output."""

    rows: Rows  # that decode
    chunk_rows: Rows
    tokens: Rows  # contexts of the rows that decode, together
    pairs: Rows  # of every row of a chunk and the tokens before it
    wire_bytes: Rows
    seconds: Seconds
    runs: Annotated[int, Field(ge=MIN_RUNS)]


class WireTime(Input):
    """Bytes there and back."""

    bytes: Rows
    seconds: Seconds
    runs: Annotated[int, Field(ge=MIN_RUNS)]


class OverheadTime(Input):
    """An iteration of the engine with all that is around it, less the parts above."""

    rows: Annotated[int, Field(ge=1)]
    seconds: Annotated[float, Field(allow_inf_nan=False)]


class Measured(Input):
    """The content of calibration.json."""

    format: Literal[1]
    kind: Literal["lamina simulator"]
    host: str
    date: datetime.datetime
    versions: dict[str, str]
    bundle: str
    bundle_sha256: str
    layers: Annotated[int, Field(ge=1)]
    split: bool
    workers: Annotated[int, Field(ge=0)]  # 0: attention in the engine's process
    partition: Literal["head", "request", "sequence"]
    programs: Annotated[list[ProgramTime], Field(min_length=4)]
    attention: Annotated[list[AttentionTime], Field(min_length=10)]
    wire: list[WireTime]
    overhead: Annotated[list[OverheadTime], Field(min_length=2)]


@dataclass(frozen=True)
class Errors:
    """Relative errors on the points that a fit has not seen."""

    points: int
    median: float
    p95: float

    @property
    def within(self) -> bool:
        return self.median <= MEDIAN_TARGET and self.p95 <= P95_TARGET


@dataclass(frozen=True)
class Fit:
    """What was found. Times are of one layer."""

    programs: dict[str, tuple[tuple[int, float], ...]]  # kind → (rows, seconds), rows rising
    attention: tuple[float, float, float, float, float]  # c0, per row, per chunk row, per token, per pair
    wire: tuple[float, float]  # latency there and back, seconds per byte
    overhead: tuple[float, float]  # per iteration, per row

    def program_seconds(self, kind: str, rows: float) -> float:
        """Between two measured sizes in a straight line, beyond the last one on it."""
        known = self.programs[kind]
        sizes, seconds = [size for size, _ in known], [value for _, value in known]
        if rows <= sizes[-1] or len(known) == 1:
            return float(np.interp(rows, sizes, seconds))
        slope = max(0.0, (seconds[-1] - seconds[-2]) / (sizes[-1] - sizes[-2]))
        return seconds[-1] + slope * (rows - sizes[-1])

    def wire_seconds(self, bytes_: float) -> float:
        return self.wire[0] + self.wire[1] * bytes_

    def attention_seconds(self, point: AttentionTime) -> float:
        features = (1.0, point.rows, point.chunk_rows, point.tokens, point.pairs)
        own = sum(c * x for c, x in zip(self.attention, features, strict=True))
        return own + (self.wire_seconds(point.wire_bytes) if point.wire_bytes else 0.0)


def fit(measured: Measured, keep: Callable[[int], bool] = lambda index: True) -> Fit:
    """
    Args:
        keep: which points to use, by their index in each list.
    """
    programs: dict[str, list[tuple[int, float]]] = {}
    for kind in sorted({point.kind for point in measured.programs}):
        points = sorted((p for p in measured.programs if p.kind == kind), key=lambda point: point.rows)
        # without its ends a table cannot be interpolated
        used = [p for index, p in enumerate(points) if keep(index) or p in (points[0], points[-1])]
        programs[kind] = [(point.rows, point.seconds) for point in used]
    wired = [point for index, point in enumerate(measured.wire) if keep(index)]
    wire = _non_negative([(1.0, float(p.bytes)) for p in wired], [p.seconds for p in wired])
    seen = [point for index, point in enumerate(_shuffled(measured.attention)) if keep(index)]
    known = Fit({}, (0.0,) * 5, (wire[0], wire[1]), (0.0, 0.0))
    rest = [p.seconds - (known.wire_seconds(p.wire_bytes) if p.wire_bytes else 0.0) for p in seen]
    attention = _non_negative(
        [(1.0, float(p.rows), float(p.chunk_rows), float(p.tokens), float(p.pairs)) for p in seen],
        rest,
        [p.seconds for p in seen],
    )
    extra = [point for index, point in enumerate(measured.overhead) if keep(index)] or measured.overhead
    overhead = _non_negative(
        [(1.0, float(p.rows)) for p in extra], [p.seconds for p in extra], [1.0] * len(extra)
    )
    return Fit(
        {kind: tuple(points) for kind, points in programs.items()},
        tuple(attention),  # type: ignore[arg-type]
        (wire[0], wire[1]),
        (overhead[0], overhead[1]),
    )


def held_out_errors(measured: Measured) -> dict[str, Errors]:
    """Of fits on every other point, on the points between them; the two halves change places."""
    found: dict[str, list[float]] = {"programs": [], "attention": [], "wire": []}
    for half in (0, 1):
        fitted = fit(measured, lambda index, half=half: index % 2 == half)  # type: ignore[misc]
        for kind in fitted.programs:
            points = sorted((p for p in measured.programs if p.kind == kind), key=lambda point: point.rows)
            found["programs"] += [
                abs(fitted.program_seconds(kind, p.rows) / p.seconds - 1.0)
                for index, p in enumerate(points)
                if index % 2 != half and p not in (points[0], points[-1])
            ]
        found["attention"] += [
            abs(fitted.attention_seconds(p) / p.seconds - 1.0)
            for index, p in enumerate(_shuffled(measured.attention))
            if index % 2 != half
        ]
        found["wire"] += [
            abs(fitted.wire_seconds(p.bytes) / p.seconds - 1.0)
            for index, p in enumerate(measured.wire)
            if index % 2 != half
        ]
    return {
        name: Errors(len(errors), statistics.median(errors), float(np.percentile(errors, 95)))
        for name, errors in found.items()
        if errors
    }


def _shuffled(points: Sequence[AttentionTime]) -> list[AttentionTime]:
    """In an order that has nothing to do with the grid: every other point is then like all of them."""
    return [points[index] for index in np.random.default_rng(0).permutation(len(points))]


def _non_negative(
    features: Sequence[Sequence[float]], seconds: Sequence[float], scale: Sequence[float] | None = None
) -> list[float]:
    """Least squares of relative errors with coefficients that are not negative."""
    if not seconds:
        return [0.0, 0.0]
    table = np.array(features, dtype=np.float64)
    target = np.array(seconds, dtype=np.float64)
    weight = 1.0 / np.maximum(np.array(scale if scale is not None else seconds, dtype=np.float64), 1e-9)
    columns = np.maximum(np.abs(table).max(axis=0), 1e-12)
    solution: NDArray[np.float64] = nnls(table / columns * weight[:, None], target * weight)[0]
    return [float(value) for value in solution / columns]


class MeasuredCosts(Costs):
    """The costs of this machine, for `replay`; without rotation, and without a price."""

    def __init__(self, measured: Measured, fitted: Fit, model: Model, tokens: int, policy: Policy) -> None:
        """
        Args:
            tokens: keys and values that a worker's memory takes, or all workers' together with heads shared.
        """
        self.model, self.policy, self.measured, self.fit = model, policy, measured, fitted
        workers = max(1, measured.workers)
        self.set_up = SetUp(
            "this machine", _UNPRICED, 1, "this machine", _UNPRICED, workers, 1, measured.partition
        )  # fmt: skip
        self.network = Network(one_way_us=fitted.wire[0] / 2e-6, gb_s=1.0)
        self.pools = workers if measured.partition == "request" else 1
        self.pool_tokens = tokens
        # a pool that is one of several has all of its workers' share
        self.token_s = fitted.attention[3] * measured.layers * self.pools
        self.chunk_token_s = 0.0
        self.chunk_pair_s = fitted.attention[4] * measured.layers * self.pools
        self._cache: dict[tuple[int, int, int], Iteration] = {}

    def _iteration(self, rows: int, chunk: int, holders: int) -> Iteration:
        layers, fitted = self.measured.layers, self.fit
        total = rows + chunk
        last = rows + bool(chunk)  # only rows whose token is wanted go through the last step
        names = ("qx", "post_qx", "kvx") if self.measured.split else ("qx_kvx", "post_qx_kvx", "")
        first, middle, keys = (name if name in fitted.programs else "" for name in names)
        model_s = fitted.program_seconds("post", last)
        for name, count in ((first, 1), (middle, layers - 1), (keys, layers)):
            model_s += count * fitted.program_seconds(name, total) if name else 0.0
        own = fitted.attention[0] + fitted.attention[1] * rows + fitted.attention[2] * chunk
        moving = fitted.wire[1] * self.wire_bytes_per_row(holders) * total if self.measured.workers else 0.0
        wire_s = layers * fitted.wire[0] + moving if self.measured.workers else 0.0
        overhead = fitted.overhead[0] + fitted.overhead[1] * total
        return Iteration(1, 1, model_s, layers * own, wire_s, moving, 0.0, overhead)

    def without_worker(self) -> Costs | None:
        return None


_UNPRICED = Device(
    tflops=1.0, memory_gb=1.0, memory_gb_s=1.0, price_per_hour=0.0, price_date=datetime.date.min,
    mfu=1.0, mbu_w=1.0, mbu_a=1.0,
)  # fmt: skip


def read_calibration(path: Path) -> Measured:
    """
    Raises:
        DataError: no such file, or another content.
    """
    try:
        return Measured.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        raise DataError(
            f"{path} does not exist; `python -m benchmarks.lamina_calibration` writes it"
        ) from None
    except (ValidationError, ValueError, OSError) as error:
        raise DataError(f"{path} is no calibration of the simulator: {str(error).splitlines()[0]}") from None


def describe_errors(errors: dict[str, Errors]) -> list[str]:
    rows = ["| part | points | median error | p95 | target 10 %, 20 % |", "|---|---|---|---|---|"]
    for name, error in errors.items():
        met = "met" if error.within else "missed"
        rows.append(f"| {name} | {error.points} | {error.median:.1%} | {error.p95:.1%} | {met} |")
    return rows


def to_model(manifest: Any) -> Model:
    """The shapes of an exported bundle, as the simulator wants them."""
    stored = sum(math.prod(tensor.shape) for tensor in manifest.tensors)
    return Model(
        name=manifest.name, parameters=stored, layers=manifest.layers, hidden_size=manifest.hidden_size,
        heads=manifest.heads, kv_heads=manifest.kv_heads, head_size=manifest.head_size,
        bytes_per_element=4.0, vocab_size=manifest.vocab_size, max_context=manifest.max_context,
        windows=[layer.window for layer in manifest.attention],
    )  # fmt: skip
