"""The step model: what bounds an iteration, and that better devices never make it slower."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from simulated_devices import (
    NETWORK,
    costs,
    device,
    lamina,
    policy,
    small_model,
)

from flows.errors import ConfigError
from flows.serving.lamina.simulator.inputs import Network, read_hardware, read_model, read_network
from flows.serving.lamina.simulator.roofline import pipelined_cycle
from flows.serving.lamina.simulator.steps import Costs, SetUp

PARTITIONS = st.sampled_from(["head", "request", "sequence"])


@given(
    rows=st.integers(1, 500),
    context=st.integers(1, 20_000),
    n=st.integers(1, 4),
    partition=PARTITIONS,
    name=st.sampled_from(["mfu", "mbu_w", "mbu_a", "tflops", "memory_gb_s", "link", "latency"]),
)
@settings(max_examples=150, deadline=None)
def test_better_hardware_never_hurts(rows, context, n, partition, name):
    set_up = lamina(1, 2, n, partition)
    network = NETWORK
    if name == "link":
        better, network = set_up, Network(one_way_us=10.0, gb_s=30.0)
    elif name == "latency":
        better, network = set_up, Network(one_way_us=2.0, gb_s=20.0)
    else:
        factor = 1.3
        changed = [
            d.model_copy(update={name: getattr(d, name) * factor}) for d in (set_up.compute, set_up.memory)
        ]
        better = SetUp("big", changed[0], 1, "small", changed[1], 2, n, partition)
    slow, fast = costs(set_up, overlap=False), costs(better, network=network, overlap=False)
    seconds = [c.iteration(rows, context).seconds(c.token_s * rows * context / c.pools) for c in (slow, fast)]
    assert seconds[1] <= seconds[0] * (1 + 1e-12)


@given(rows=st.integers(2, 400), context=st.integers(1, 50_000))
@settings(max_examples=100, deadline=None)
def test_rotation_pays_only_where_attention_and_wire_outlast_the_model(rows, context):
    """Spec 6: while weights are the limit, two halves take max(2 t_m, t_a, …) against t_m + t_a + t_c."""
    alone, turns = (costs(lamina(1, 2, n), overlap=False) for n in (1, 2))
    one, two = alone.iteration(rows), turns.iteration(rows)
    if one.model_s != two.model_s:
        return  # arithmetic is the limit: halves are faster
    attention = alone.token_s * rows * context
    faster = two.seconds(attention) < one.seconds(attention) - 1e-12
    half_wire = two.wire_s + attention / 2
    assert faster == (
        attention + one.wire_s > one.model_s + 1e-12 and one.wire_s + attention > half_wire + 1e-12
    )


def test_iterations_follow_the_cycle_of_section_6():
    for n in (1, 2, 3):
        c = costs(lamina(1, 2, n), overlap=False)
        it = c.iteration(90)
        attention = 0.004
        expected = pipelined_cycle(n, max(1, n - 1), it.model_s, attention / n, it.wire_s)
        assert it.seconds(attention) == pytest.approx(expected + 2e-3)


def test_overlap_hides_at_most_what_attention_takes():
    on, off = costs(overlap=True), costs(overlap=False)
    for context in (0, 10, 10_000):
        attention = on.token_s * 8 * context
        saved = off.iteration(8).seconds(attention) - on.iteration(8).seconds(attention)
        assert 0 <= saved <= attention + 1e-15
    it = on.iteration(8)
    assert saved == pytest.approx(it.credit_s)


def test_the_papers_example_of_the_overlap(root):
    """Spec 4: 65B at (2, 4), B = 60: projecting K and V takes 50 µs a layer, sending them 21."""
    found = read_hardware(root / "benchmarks/planner/hardware.yaml").devices
    set_up = SetUp("h100", found["h100"], 2, "h20", found["h20"], 4)
    c = Costs(read_model("llama-65b"), set_up, read_network("fhbn"), policy())
    credit = c.iteration(60).credit_s
    assert c._kv_seconds(60) / 80 == pytest.approx(50e-6, rel=0.01)
    assert credit / 80 - c._kv_seconds(60) / 80 == pytest.approx(21e-6, rel=0.03)
    assert credit == pytest.approx(5.7e-3, rel=0.01)


def test_heads_that_do_not_divide_are_as_slow_as_the_fullest_worker():
    three = costs(lamina(1, 3))  # 8 heads: 3, 3, 2
    even = costs(lamina(1, 3, 1, "sequence"))
    assert three.token_s == pytest.approx(even.token_s * 9 / 8)
    assert three.pool_tokens == pytest.approx(even.pool_tokens * 8 / 9, abs=1)
    with pytest.raises(ConfigError, match="8 heads of keys"):
        costs(lamina(1, 9))


def test_what_partitions_put_on_the_wire():
    per_layer = {p: costs(lamina(1, 4, 1, p)).wire_bytes_per_row() / 10 for p in ("head", "request")}
    assert per_layer == {"head": 6144, "request": 6144}
    spread = costs(lamina(1, 4, 1, "sequence"))
    # q in 2 bytes to each holder, partial output in FP32 with its log-sum-exp from each, k and v once
    assert spread.wire_bytes_per_row(3) / 10 == 3 * 2048 + 2048 + 3 * 16 * 65 * 4
    short, long = spread.iteration(4, 900), spread.iteration(4, 4000)
    assert short.wire_s < long.wire_s


def test_redundancy_costs_what_section_14_says():
    plain, parity = costs(lamina(1, 4)), costs(lamina(1, 4, redundancy="parity"))
    assert parity.price_per_hour == plain.price_per_hour + 0.5
    assert parity.wire_bytes_per_row() - plain.wire_bytes_per_row() == 10 * 2048 / 4
    halved = costs(lamina(1, 4, 1, "request", redundancy="replica"))
    assert halved.pool_tokens == costs(lamina(1, 4, 1, "request")).pool_tokens // 2


def test_equal_devices_share_memory_between_weights_and_keys():
    c = costs(SetUp("big", device(memory_gb=10.0, reserved_gb=1.0), 2))
    assert c.pool_tokens == int((2 * (9.0 - 1.0) - 2.0) * 1e9 / small_model().kv_bytes_per_token)
    assert c.iteration(4).wire_s == 0
    with pytest.raises(ConfigError, match="room for"):
        costs(SetUp("big", device(memory_gb=1.0), 1, "small", device(), 2))


def test_the_side_with_fewer_nics_sets_the_bandwidth():
    shared = Network(one_way_us=1.0, gb_s=10.0, attention_devices_per_nic=4)
    assert shared.bandwidth(2, 4) == 10e9
    assert shared.bandwidth(2, 8) == 20e9
    assert NETWORK.bandwidth(4, 2) == 40e9
