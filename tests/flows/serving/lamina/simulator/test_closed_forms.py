"""Every figure of the specification's sections 1, 2, 5, 6, 7 and 14 that is marked as calculated."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from simulated_devices import small_model

from flows.serving.lamina.attention.partition import share_heads, slowdown
from flows.serving.lamina.simulator import faults, roofline
from flows.serving.lamina.simulator.inputs import read_hardware, read_model, read_network


@pytest.fixture(scope="module")
def devices(root):
    found = read_hardware(root / "benchmarks/planner/hardware.yaml").devices
    return {name: roofline.at_peak(device) for name, device in found.items()}


@pytest.fixture(scope="module")
def models():
    found = {name: read_model(name) for name in ("llama-33b", "llama-65b", "llama3-70b")}
    # section 1 rounds
    return found | {"rounded": found["llama3-70b"].model_copy(update={"parameters": 70_000_000_000})}


def test_ridge_points(devices):
    found = {name: round(roofline.ridge_point(device)) for name, device in devices.items()}
    assert found == {"h100": 295, "h20": 37, "tpu-v6e": 560}


def test_model_time_of_one_h100(devices, models):
    times = {
        rows: round(roofline.model_seconds(models["rounded"], rows, devices["h100"], 1) * 1e3, 1)
        for rows in (1, 295, 300, 512, 800, 1024)
    }
    assert times == {1: 41.8, 295: 41.8, 300: 42.5, 512: 72.5, 800: 113.2, 1024: 145.0}
    use = [roofline.model_utilisation(models["rounded"], rows, devices["h100"]) for rows in (32, 64, 100)]
    assert [round(share, 2) for share in use] == [0.11, 0.22, 0.34]


def test_arithmetic_intensity(models):
    assert roofline.attention_intensity(models["llama3-70b"]) == 8
    assert roofline.attention_intensity(models["llama-65b"]) == 1
    few, many = (roofline.non_attention_intensity(models["llama3-70b"], rows) for rows in (1, 512))
    assert few == pytest.approx(1.0, rel=1e-3)
    assert many == pytest.approx(512.0, rel=1e-3)


def test_keys_and_values_per_token(models):
    assert models["llama-33b"].kv_bytes_per_token == 1_597_440
    assert models["llama-65b"].kv_bytes_per_token == 2_621_440
    assert models["llama3-70b"].kv_bytes_per_token == 327_680
    assert roofline.requests_that_fit(models["llama3-70b"], 8192, 80e9) == 29
    assert 8192 * models["llama3-70b"].kv_bytes_per_token == pytest.approx(2.68e9, rel=2e-3)


def test_wire_bytes(models):
    found = [roofline.wire_bytes_per_row(models[name]) for name in ("llama-33b", "llama-65b", "llama3-70b")]
    assert found == [3_194_880, 5_242_880, 2_949_120]
    # the paper's (2 + 2/G) e d L is the special case H hd = d
    model = models["llama3-70b"]
    assert found[2] == (2 + 2 / 8) * 2 * model.hidden_size * model.layers
    wide = small_model(head_size=128)
    assert roofline.wire_bytes_per_row(wide) == (2 * 16 + 2 * 8) * 128 * 2 * 10


@pytest.mark.parametrize(
    ("rows", "expected"),
    [(100, (25.2, 19.6, 13.5, 8.4)), (200, (39.1, 27.1, 16.8, 9.5)), (300, (47.7, 30.9, 18.1, 9.9))],
)
def test_least_bandwidth(devices, models, rows, expected):
    found = [
        roofline.min_bandwidth(models["rounded"], rows, length, devices["h100"], 1, devices["h20"], 1, 0.2)
        for length in (2048, 4096, 8192, 16384)
    ]
    assert [value / 1e9 for value in found] == pytest.approx(expected, rel=0.01)


def test_latency_floors(models):
    found = [
        roofline.latency_floor(models["llama3-70b"], read_network(name).round_trip_s) * 1e3
        for name in ("fhbn", "nccl")
    ]
    assert [round(value, 2) for value in found] == [2.64, 5.33]


@given(
    n=st.integers(2, 8),
    model_s=st.floats(1e-6, 1.0),
)
def test_rotation_has_no_bubbles_where_attention_is_tuned_to_it(n, model_s):
    """Spec 6: with t_a = t_m/(n-1) and n-1 replicas, everything is busy all the time."""
    attention_s = model_s / (n - 1)
    cycle = roofline.pipelined_cycle(n, n - 1, model_s, attention_s, 0.0)
    assert math.isclose(cycle, model_s + attention_s)
    assert math.isclose(cycle, n * attention_s)
    assert math.isclose(cycle, n * model_s / (n - 1))


def test_heads_of_uneven_workers():
    assert share_heads(8, [1.0] * 6) == [2, 2, 1, 1, 1, 1]
    assert slowdown([2, 2, 1, 1, 1, 1], [1.0] * 6) == 1.5  # as if there were four
    assert slowdown(share_heads(8, [3.0, 1.0]), [3.0, 1.0]) == 1.0


def test_recovery_times(models, root):
    """Spec 14: 70B at (2, 4), 730 requests with 1,227 tokens on average."""
    model = models["llama3-70b"]
    tokens = 730 * 1227
    h100 = read_hardware(root / "benchmarks/planner/hardware.yaml").devices["h100"]
    half = h100.model_copy(update={"mfu": 0.5})
    assert faults.recompute_flops(model, tokens) == pytest.approx(1.23e17, rel=0.01)
    assert faults.recompute_seconds(model, tokens, half, 2) == pytest.approx(125, rel=0.01)
    kept = tokens * model.kv_bytes_per_token
    assert kept == pytest.approx(293e9, rel=0.01)
    chained, one_nic = (faults.parity_rebuild_seconds(kept, 4, 45.7, chained=c) for c in (True, False))
    assert (chained, one_nic) == (pytest.approx(1.6, rel=0.01), pytest.approx(6.4, rel=0.01))
