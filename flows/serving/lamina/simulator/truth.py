"""Does the simulator tell the truth where it can be checked? This machine, simulated and measured (spec 10).

A record holds runs of the real engine on this machine beside their simulation from the calibration of the
same machine. Mean time between tokens and throughput within 15 % each: the check is passed, and the planner
may print what it predicts for hardware that is not here. It says nothing about that hardware's own figures.
"""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, ValidationError

from flows import files
from flows.errors import DataError, GateFailed
from flows.serving.lamina.simulator.inputs import Input

TOLERANCE = 0.15
DEFAULT_RECORD = Path("artifacts/lamina_truth_check.json")
COMMAND = "python -m benchmarks.lamina_calibration BUNDLE"

Figure = Annotated[float, Field(gt=0.0, allow_inf_nan=False)]


class Comparison(Input):
    """One run."""

    name: str
    requests: Annotated[int, Field(ge=1)]
    tokens: Annotated[int, Field(ge=1)]
    measured_tbt_ms: Figure
    simulated_tbt_ms: Figure
    measured_tokens_per_s: Figure
    simulated_tokens_per_s: Figure

    @property
    def tbt_error(self) -> float:
        return self.simulated_tbt_ms / self.measured_tbt_ms - 1.0

    @property
    def throughput_error(self) -> float:
        return self.simulated_tokens_per_s / self.measured_tokens_per_s - 1.0

    @property
    def passed(self) -> bool:
        return max(abs(self.tbt_error), abs(self.throughput_error)) <= TOLERANCE


class TruthCheck(Input):
    format: Literal[1]
    host: str
    date: datetime.datetime
    bundle: str
    calibration_sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
    engine: str  # what was run
    comparisons: Annotated[list[Comparison], Field(min_length=1, max_length=1000)]

    @property
    def passed(self) -> bool:
        return all(comparison.passed for comparison in self.comparisons)

    @property
    def worst(self) -> float:
        return max(max(abs(c.tbt_error), abs(c.throughput_error)) for c in self.comparisons)

    def describe(self, path: Path) -> str:
        return (
            f"The simulator itself was compared with what was measured: {path} "
            f"(sha256 {files.sha256_file(path)[:12]}, {self.date:%Y-%m-%d}, {self.host}): "
            f"{len(self.comparisons)} runs of {self.engine}, furthest off {self.worst:.1%} of {TOLERANCE:.0%}"
        )


def read_record(path: Path) -> TruthCheck:
    """
    Raises:
        DataError: no such file, or no record.
    """
    try:
        return TruthCheck.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        raise DataError(f"there is no truth check at {path}; make one: {COMMAND}") from None
    except (ValidationError, OSError, ValueError) as error:
        raise DataError(
            f"{path} is no truth check ({str(error).splitlines()[0]}); make one: {COMMAND}"
        ) from None


def require_truth(path: Path) -> str:
    """The line that names the check a prediction rests on.

    Raises:
        GateFailed: there is none, or it was not passed; without it no figure for other hardware is shown.
    """
    try:
        record = read_record(path)
    except DataError as error:
        raise GateFailed(
            f"no prediction without a truth check: {error}; --without-truth-check shows unchecked figures"
        ) from None
    if not record.passed:
        raise GateFailed(
            f"no prediction: the truth check {path} is off by {record.worst:.0%} (allowed: {TOLERANCE:.0%}); "
            f"repeat it on a quiet machine ({COMMAND}); --without-truth-check shows unchecked figures"
        )
    return record.describe(path)
