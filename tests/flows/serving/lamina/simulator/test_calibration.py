"""Fits of measured points: they find what made the points, and say honestly how far off they are."""

import datetime

import numpy as np
import pytest
from simulated_devices import policy, small_model, trace

from flows.errors import DataError
from flows.serving.lamina.simulator.calibration import (
    AttentionTime,
    Measured,
    MeasuredCosts,
    OverheadTime,
    ProgramTime,
    WireTime,
    fit,
    held_out_errors,
    read_calibration,
)
from flows.serving.lamina.simulator.replay import replay
from flows.serving.lamina.simulator.results import summarise

KINDS = {"qx_kvx": (1e-4, 2e-6), "post_qx_kvx": (3e-4, 1e-5), "post": (2e-4, 2e-5)}
C0, C1, D1, PER_TOKEN, PER_PAIR = 5e-5, 2e-6, 3e-6, 4e-9, 6e-9
LATENCY, PER_BYTE = 6e-5, 1e-9


def measured(noise=0.0, **changes):
    generator = np.random.default_rng(0)

    def seconds(value):
        return float(value * np.exp(noise * generator.standard_normal()))

    programs = [
        ProgramTime(kind=kind, rows=rows, seconds=seconds(base + slope * rows), runs=20)
        for kind, (base, slope) in KINDS.items()
        for rows in (1, 2, 4, 8, 16, 32, 64, 128)
    ]
    attention = []
    for rows in (1, 2, 4, 8, 16, 32):
        for context in (16, 64, 256, 1024):
            for chunk in (0, 64):
                moved, pairs = (rows + chunk) * 6144, chunk * context
                value = C0 + C1 * rows + D1 * chunk + PER_TOKEN * rows * context + PER_PAIR * pairs
                value += LATENCY + PER_BYTE * moved
                attention.append(
                    AttentionTime(
                        rows=rows,
                        chunk_rows=chunk,
                        tokens=rows * context,
                        pairs=pairs,
                        wire_bytes=moved,
                        seconds=seconds(value),
                        runs=20,
                    )
                )
    wire = [
        WireTime(bytes=size, seconds=seconds(LATENCY + PER_BYTE * size), runs=20)
        for size in (64, 1024, 16384, 65536, 1 << 20, 1 << 22)
    ]
    overhead = [OverheadTime(rows=rows, seconds=1e-3 + 2e-5 * rows) for rows in (1, 2, 4, 8)]
    values = {
        "format": 1, "kind": "lamina simulator", "host": "a machine",
        "date": datetime.datetime(2026, 1, 2, tzinfo=datetime.UTC), "versions": {}, "bundle": "small",
        "bundle_sha256": "0", "layers": 10, "split": False, "workers": 2, "partition": "head",
        "programs": programs, "attention": attention, "wire": wire, "overhead": overhead,
    }  # fmt: skip
    return Measured(**(values | changes))


def test_fits_find_the_coefficients():
    found = fit(measured())
    assert found.attention == pytest.approx((C0, C1, D1, PER_TOKEN, PER_PAIR), rel=1e-3)
    assert found.wire == pytest.approx((LATENCY, PER_BYTE), rel=1e-6)
    assert found.overhead == pytest.approx((1e-3, 2e-5), rel=1e-6)
    assert found.program_seconds("post", 12) == pytest.approx(2e-4 + 12 * 2e-5)
    assert found.program_seconds("post", 1000) == pytest.approx(2e-4 + 1000 * 2e-5)  # beyond the table


def test_errors_are_of_points_that_were_not_fitted():
    assert all(error.within for error in held_out_errors(measured()).values())
    noisy = held_out_errors(measured(noise=0.3))
    assert not noisy["attention"].within
    # what each half was fitted on would look better
    whole = fit(measured(noise=0.3))
    own = [abs(whole.attention_seconds(p) / p.seconds - 1) for p in measured(noise=0.3).attention]
    assert noisy["attention"].p95 > np.percentile(own, 95)


def test_more_work_is_never_predicted_faster():
    falling = measured().model_copy(
        update={
            "attention": [p.model_copy(update={"seconds": 1e-3 / (1 + p.rows)}) for p in measured().attention]
        }
    )
    assert min(fit(falling).attention) >= 0.0


def test_a_replay_takes_what_the_parts_take():
    points, model = measured(), small_model()
    costs = MeasuredCosts(points, fit(points), model, 100_000, policy(prefill="chunked", max_rows=64))
    one = costs.iteration(3, 100, 20)
    wire = 23 * 2 * (16 + 8) * 64 * model.bytes_per_element * 10
    assert one.model_s == pytest.approx(
        1e-4 + 23 * 2e-6 + 9 * (3e-4 + 23 * 1e-5) + 2e-4 + 4 * 2e-5  # 3 rows and the end of the prompt
    )
    assert one.wire_s == pytest.approx(10 * LATENCY + PER_BYTE * wire)
    assert one.attention_fixed_s == pytest.approx(10 * (C0 + 3 * C1 + 20 * D1), rel=1e-3)
    assert one.overhead_s == pytest.approx(1e-3 + 23 * 2e-5)
    figures = summarise(replay(trace([(30, 10)] * 6), costs, saturated=False))
    assert figures.done == 6
    assert figures.output_tokens == 60


def test_without_workers_nothing_goes_over_a_wire():
    points = measured(workers=0, wire=[], attention=[
        p.model_copy(update={"wire_bytes": 0}) for p in measured().attention
    ])  # fmt: skip
    costs = MeasuredCosts(points, fit(points), small_model(), 100_000, policy())
    assert costs.iteration(4).wire_s == 0.0


def test_other_files_are_refused(tmp_path):
    path = tmp_path / "calibration.json"
    path.write_text(measured().model_dump_json())
    assert read_calibration(path) == measured()
    with pytest.raises(DataError, match="does not exist"):
        read_calibration(tmp_path / "none.json")
    for text in ("", "{}", '{"format": 2}', measured().model_dump_json().replace("0.0", "NaN", 1)[:-9]):
        path.write_text(text)
        with pytest.raises(DataError, match="is no calibration"):
            read_calibration(path)
