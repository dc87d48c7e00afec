"""The verdict: what alarms, what is too little to judge, and the sentences people read."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
from serving_workspace import ROOT

from flows import params
from flows.assessment import assess
from flows.params import Monitor
from flows.serving.statistics import Records
from flows.serving.traffic import Window, latency_bucket

SETTINGS = params.load(ROOT / "params.yaml").monitor


def records(count: int, shift: float = 0.0) -> Records:
    generator = np.random.default_rng(count)
    confidence = generator.random(count).astype(np.float32)
    return Records(
        pixels=(generator.standard_normal((count, 9)) + shift).astype(np.float32),
        embedding=generator.standard_normal((count, 4)).astype(np.float32),
        predicted=generator.integers(0, 3, count).astype(np.int32),
        confidence=confidence,
        entropy=1 - confidence,
    )


def window(
    images: Records | None = None, latency_ms: float = 20.0, statuses: dict[int, int] | None = None
) -> Window:
    statuses = {200: 100} if statuses is None else statuses
    requests = sum(statuses.values())
    latencies = Counter({latency_bucket(latency_ms): requests}) if requests else Counter()
    return Window(0, 1, "fp32", images, statuses=Counter(statuses), latencies=latencies)


def limits(**changes: Any) -> Monitor:
    return SETTINGS.model_copy(update=changes)


def test_clean_traffic_is_quiet() -> None:
    found = assess(window(records(200)), records(500), SETTINGS)
    assert (found.verdict, found.reasons, found.unjudged) == ("quiet", (), ())
    assert len(found.tests) == 4 + 9 + 1 + 2


def test_a_shift_alarms_and_names_the_family() -> None:
    found = assess(window(records(200, shift=1.0)), records(500), SETTINGS)
    assert found.verdict == "alarm"
    assert len(found.drift) == 1
    assert found.drift[0].startswith("pixels: 9 of 9 tests alarm")
    assert found.degraded == ()
    quiet = assess(window(records(200, shift=1.0)), records(500), limits(families=["embedding"]))
    assert quiet.verdict == "quiet"


@pytest.mark.parametrize("count", [0, 99])
def test_few_images_are_not_judged(count: int) -> None:
    found = assess(window(records(count, shift=9.0) if count else None), records(500), SETTINGS)
    assert (found.verdict, found.tests) == ("too little traffic", ())
    assert found.unjudged == (f"drift: {count} recorded images, monitor.min_images is 100",)


def test_an_export_without_a_reference_says_so() -> None:
    found = assess(window(records(200)), None, SETTINGS)
    assert "no reference images" in found.unjudged[0]


def test_late_and_failing_answers_alarm_without_drift() -> None:
    late = assess(window(latency_ms=1500), records(500), SETTINGS)
    assert (late.verdict, late.drift) == ("alarm", ())
    assert "monitor.max_p95_ms 1000" in late.degraded[0]
    failing = assess(window(statuses={200: 95, 503: 5}), records(500), SETTINGS)
    assert "5 of 100 requests failed (5.0%)" in failing.degraded[0]
    assert failing.error_fraction == 0.05
    refusing = assess(window(statuses={200: 50, 429: 40, 422: 10}), records(500), SETTINGS)
    assert refusing.degraded == ()


def test_few_requests_are_not_judged() -> None:
    found = assess(window(records(200), latency_ms=9999, statuses={500: 19}), records(500), SETTINGS)
    assert found.verdict == "quiet"
    assert found.unjudged == ("latency and errors: 19 requests, monitor.min_requests is 20",)
    none = assess(window(statuses={}), records(500), SETTINGS)
    assert (none.latency["p95_ms"], none.error_fraction) == (None, None)
    assert none.verdict == "too little traffic"
