"""The verdict on a window of traffic: quiet, too little traffic, or an alarm with its reasons.

Pure: a window, a reference and the limits in, an `Assessment` out. Two kinds of alarm, because they ask for
different things: drift means that other images come in, against which training helps; slow or failing answers
are for a person to look at, and no training mends them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from flows import drift
from flows.drift import DriftTest
from flows.params import Monitor
from flows.serving.statistics import Records
from flows.serving.traffic import Window

Verdict = Literal["quiet", "too little traffic", "alarm"]
PERCENTILES = {"p50_ms": 0.50, "p95_ms": 0.95, "p99_ms": 0.99}


@dataclass(frozen=True)
class FamilyResult:
    """The tests of one family, folded."""

    name: str
    tests: int
    alarmed: int
    strongest: DriftTest  # of those that alarm if any, else of all: the largest effect
    adjusted_p: float  # smallest p-value after Bonferroni over everything that was tested


@dataclass(frozen=True)
class Assessment:
    """What the monitor says about one window."""

    verdict: Verdict
    drift: tuple[str, ...]  # reasons, one sentence each; empty: no drift seen
    degraded: tuple[str, ...]  # reasons from latency and errors
    unjudged: tuple[str, ...]  # what could not be judged, and why
    tests: tuple[DriftTest, ...]
    latency: dict[str, float | None]  # ms by name of PERCENTILES; None without requests
    error_fraction: float | None

    @property
    def reasons(self) -> tuple[str, ...]:
        return self.drift + self.degraded

    def families(self) -> list[FamilyResult]:
        found = []
        for name in dict.fromkeys(test.family for test in self.tests):
            tests = [test for test in self.tests if test.family == name]
            alarmed = [test for test in tests if test.alarmed]
            strongest = max(alarmed or tests, key=lambda test: test.effect)
            adjusted = min(_adjusted(test, self.tests) for test in tests)
            found.append(FamilyResult(name, len(tests), len(alarmed), strongest, adjusted))
        return found

    def to_dict(self) -> dict[str, Any]:
        return {
            "verdict": self.verdict,
            "drift": list(self.drift),
            "degraded": list(self.degraded),
            "unjudged": list(self.unjudged),
            "latency": self.latency,
            "error_fraction": self.error_fraction,
            "tests": [test.to_dict() for test in self.tests],
        }


def _adjusted(test: DriftTest, tests: Sequence[DriftTest]) -> float:
    """The smallest alpha at which `test` would be significant."""
    families = len({other.family for other in tests})
    return min(1.0, test.p_value * families * sum(other.family == test.family for other in tests))


def assess(window: Window, reference: Records | None, settings: Monitor) -> Assessment:
    """Judge `window` against the reference of the served variant; None: the export has none."""
    tests, unjudged = judge_images(window, reference, settings)
    drifted = tuple(explain_family(result, settings) for result in _folded(tests) if result.alarmed)
    latency: dict[str, float | None] = {
        name: None if math.isnan(value := window.latency_ms(fraction)) else round(value, 2)
        for name, fraction in PERCENTILES.items()
    }
    errors = window.errors / window.requests if window.requests else None
    degraded = []
    if window.requests < settings.min_requests:
        unjudged += (
            f"latency and errors: {window.requests} requests, monitor.min_requests is "
            f"{settings.min_requests}",
        )
    else:
        assert errors is not None
        p95 = latency["p95_ms"]
        if p95 is not None and p95 > settings.max_p95_ms:
            degraded.append(
                f"latency: 95 % of the requests took up to {p95:.0f} ms, more than monitor.max_p95_ms "
                f"{settings.max_p95_ms:g}"
            )
        if errors > settings.max_error_fraction:
            degraded.append(
                f"errors: {window.errors} of {window.requests} requests failed ({errors:.1%}), more than "
                f"monitor.max_error_fraction {settings.max_error_fraction:g}"
            )
    verdict: Verdict = "quiet"
    if drifted or degraded:
        verdict = "alarm"
    elif not tests:
        verdict = "too little traffic"
    return Assessment(verdict, drifted, tuple(degraded), unjudged, tests, latency, errors)


def judge_images(
    window: Window, reference: Records | None, settings: Monitor
) -> tuple[tuple[DriftTest, ...], tuple[str, ...]]:
    """The drift tests, or none and why."""
    count = 0 if window.records is None else len(window.records)
    if reference is None:
        return (), ("drift: this export has no reference images; export and register the model again",)
    if window.records is None or count < settings.min_images:
        reason = f"drift: {count} recorded images, monitor.min_images is {settings.min_images}"
        if window.other_records:
            reason += f" ({window.other_records} more belong to another export or variant)"
        return (), (reason,)
    tests = drift.compare(
        reference,
        window.records,
        alpha=settings.alpha,
        min_effect=settings.min_effect,
        families=settings.families,
    )
    return tuple(tests), ()


def _folded(tests: tuple[DriftTest, ...]) -> list[FamilyResult]:
    return Assessment("quiet", (), (), (), tests, {}, None).families()


def explain_family(result: FamilyResult, settings: Monitor) -> str:
    """One sentence on a family that alarms."""
    strongest, where = result.strongest, ""
    what = "the test alarms"
    if result.tests > 1:
        what = f"{result.alarmed} of {result.tests} tests alarm"
        where = f" in {strongest.name}"
    return (
        f"{result.name}: {what}, the largest effect is {strongest.effect:.2f}{where} "
        f"(monitor.min_effect {settings.min_effect:g}), adjusted p {result.adjusted_p:.1e} "
        f"(monitor.alpha {settings.alpha:g})"
    )
