"""The planner: reasons, Pareto set, verdict; and the truth check that stands before every figure."""

import datetime
import json
from dataclasses import replace

import pytest
from simulated_devices import NETWORK, USUAL, costs, device, lamina, policy, small_model, trace

from flows.errors import ConfigError, DataError, GateFailed
from flows.serve_planning import Question, describe, describe_search, read_question, to_json
from flows.serve_planning_page import write_page
from flows.serving.lamina.simulator import planner, truth
from flows.serving.lamina.simulator.inputs import Hardware

WORK = trace([(300 + 7 * (i % 50), 20 + i % 30) for i in range(120)], [i / 50 for i in range(120)])
SEARCH = USUAL.search.model_copy(
    update={
        "model_devices": [1],
        "attention_devices": [2],
        "homogeneous_devices": [1, 2],
        "batch_shares": [1.0, 0.5],
        "requests": 120,
    }
)


def hardware(**small):
    memory = {"memory_gb": 4.0, "tflops": 20.0, "price_per_hour": 0.5} | small
    return Hardware(devices={"big": device(memory_gb=3.0), "small": device(**memory)})


def plan(devices=None, **changes):
    return planner.plan(
        small_model(), WORK, devices or hardware(), NETWORK, policy(**({"search": SEARCH} | changes))
    )


def test_every_point_is_simulated_or_dropped_for_a_reason():
    found = plan()
    late = found.dropped[planner.SLO_SIMULATED] + found.dropped[planner.IDLE]
    assert found.tried == found.simulated + sum(found.dropped.values()) - late
    assert found.pareto
    for cheaper, faster in zip(found.pareto, found.pareto[1:], strict=False):
        assert cheaper.usd <= faster.usd
        assert cheaper.tbt_ms > faster.tbt_ms
    for point in found.pareto:
        assert point.judged.tokens_per_s.low <= point.figures.tokens_per_s <= point.judged.tokens_per_s.high
        assert point.figures.origin == "simulated"


def test_attention_elsewhere_wins_where_memory_is_cheap_and_loses_where_it_is_dear():
    search = SEARCH.model_copy(update={"homogeneous_devices": [1]})
    cheap = plan(hardware(price_per_hour=0.01, memory_gb=2.0), search=search)  # too small for the weights
    assert cheap.verdict.startswith("Disaggregate: ")
    assert not cheap.pareto[0].candidate.set_up.homogeneous
    dear = plan(hardware(price_per_hour=50.0))
    assert dear.verdict.startswith("Do not disaggregate: with attention elsewhere a token costs ")
    assert dear.pareto[0].candidate.set_up.homogeneous


def test_a_difference_within_the_intervals_is_called_so():
    ours, theirs = plan(hardware(price_per_hour=50.0)), plan(hardware(price_per_hour=50.0))
    assert "too close to call" not in ours.verdict
    usd = theirs.homogeneous.judged.usd_per_million_tokens
    wide = replace(usd, high=1e9)
    judged = replace(theirs.homogeneous.judged, usd_per_million_tokens=wide)
    ours.homogeneous = replace(theirs.homogeneous, judged=judged)
    assert ours.verdict.endswith("too close to call without measured efficiencies.")


def test_reasons_are_counted():
    tiny = plan(Hardware(devices={"tiny": device(memory_gb=1.0)}))
    assert set(tiny.dropped) == {planner.MEMORY}
    assert tiny.verdict.startswith("Nothing that was tried")
    crowded = SEARCH.model_copy(update={"attention_devices": [16], "partitions": ["head"]})
    assert plan(search=crowded).dropped[planner.HEADS] > 0
    assert plan(tbt_slo_ms=1.0).dropped[planner.SLO] > 0
    cheap = SEARCH.model_copy(update={"max_price_per_hour": 2.5})
    assert plan(search=cheap).dropped[planner.PRICE] > 0
    slow = NETWORK.model_copy(update={"gb_s": 0.001})
    found = planner.plan(small_model(), WORK, hardware(), slow, policy(search=SEARCH))
    assert found.dropped[planner.LINK] > 0
    assert found.disaggregated is None


def test_the_slo_holds_on_the_trace():
    loose = plan()
    limit = sorted(point.tbt_ms for point in loose.pareto)[0] * 1.05
    tight = plan(tbt_slo_ms=limit)
    assert tight.pareto
    assert all(point.tbt_ms <= limit for point in tight.pareto)


def test_the_link_has_to_have_the_bandwidth_of_section_2():
    """Without rotation the slowdown is wire bytes over bandwidth over computing time."""
    chosen = costs(lamina(1, 2, 1), overlap=False)
    it = chosen.iteration(64)
    computing = it.model_s + chosen.token_s * 64 * WORK.live_context
    assert planner.link_slowdown(chosen, 64, WORK) == pytest.approx(it.wire_busy_s / computing)
    hidden = planner.link_slowdown(costs(lamina(1, 2, 2)), 8, WORK)
    assert hidden < planner.link_slowdown(chosen, 8, WORK)


def test_traces_that_are_too_long_are_refused():
    with pytest.raises(ConfigError, match="longer than the 100 positions"):
        planner.plan(small_model(max_context=100), WORK, hardware(), NETWORK, policy(search=SEARCH))
    some = planner.plan(small_model(max_context=500), WORK, hardware(), NETWORK, policy(search=SEARCH))
    assert some.too_long == (WORK.prompt + WORK.output > 500).sum() > 0
    assert some.pareto[0].figures.requests == 120 - some.too_long
    assert any(line.startswith(f"{some.too_long} requests are longer") for line in describe_search(some))


# --- what the user sees


def question(**changes):
    values = {
        "model": small_model(), "trace": WORK, "hardware": hardware(), "network": NETWORK,
        "policy": policy(search=SEARCH, tbt_slo_ms=50.0, ttft_slo_ms=500.0), "faults": ["attention:1"],
        "hours_between_losses": 0.0, "seed": 0, "basis": "NOT CHECKED",
    }  # fmt: skip
    return Question(**(values | changes))


def test_the_screen_says_simulated_names_dates_and_fits():
    asked = question()
    found = plan(tbt_slo_ms=50.0, ttft_slo_ms=500.0)
    lines = describe(asked, found)
    assert max(map(len, lines)) <= 100
    text = "\n".join(lines)
    assert lines[0].startswith("SIMULATED: no figure below was measured. NOT CHECKED")
    assert "of 2026-01-01" in text
    assert found.verdict.split(":")[0] in text
    assert found.pareto[0].candidate.label in text


def test_the_file_is_the_same_each_time():
    texts = {json.dumps(to_json(question(), plan()), allow_nan=False) for _ in range(2)}
    assert len(texts) == 1
    value = json.loads(texts.pop())
    assert value["origin"] == value["pareto"][0]["saturated"]["origin"] == "simulated"
    assert value["pareto"][0]["open_loop"]["mode"] == "open loop"


def record(**changes):
    comparison = {
        "name": "a", "requests": 3, "tokens": 30, "measured_tbt_ms": 10.0, "simulated_tbt_ms": 11.0,
        "measured_tokens_per_s": 100.0, "simulated_tokens_per_s": 95.0,
    }  # fmt: skip
    return truth.TruthCheck(
        format=1,
        host="a machine",
        date=datetime.datetime(2026, 1, 2, tzinfo=datetime.UTC),
        bundle="small",
        calibration_sha256="0" * 64,
        engine="the engine",
        comparisons=[truth.Comparison(**(comparison | changes))],
    )


@pytest.fixture
def files_of_a_user(tmp_path, root):
    csv = tmp_path / "trace.csv"
    csv.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46,374,44\n")
    return {
        "model": "llama3-70b", "trace": csv, "hardware": root / "benchmarks/planner/hardware.yaml",
        "network": "nccl", "policy": None, "slos_ms": (0.0, 0.0), "faults": [], "hours_between_losses": 0.0,
        "seed": 0,
    }  # fmt: skip


def test_no_prediction_without_a_truth_check(tmp_path, files_of_a_user):
    path = tmp_path / "truth.json"
    with pytest.raises(GateFailed, match=r"no prediction without a truth check: there is no .*truth\.json"):
        read_question(**files_of_a_user, truth_check=path)
    path.write_text("{")
    with pytest.raises(GateFailed, match="is no truth check"):
        read_question(**files_of_a_user, truth_check=path)
    path.write_text(record(simulated_tbt_ms=12.0).model_dump_json())
    with pytest.raises(GateFailed, match="off by 20%"):
        read_question(**files_of_a_user, truth_check=path)
    path.write_text(record().model_dump_json())
    basis = read_question(**files_of_a_user, truth_check=path).basis
    assert "truth.json (sha256 " in basis
    assert "2026-01-02, a machine" in basis
    assert read_question(**files_of_a_user, truth_check=None).basis.startswith("NOT CHECKED")


def test_mistakes_come_before_any_simulation(files_of_a_user):
    with pytest.raises(ConfigError, match="a fault has the form"):
        read_question(**(files_of_a_user | {"faults": ["disk:1"]}), truth_check=None)
    with pytest.raises(DataError, match="does not exist"):
        read_question(**(files_of_a_user | {"trace": files_of_a_user["trace"] / "x"}), truth_check=None)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0.0, -1.0])
def test_a_record_holds_only_figures(value):
    with pytest.raises(ValueError, match="measured_tbt_ms"):
        record(measured_tbt_ms=value)


def test_the_page_needs_nothing_from_elsewhere(tmp_path):
    path = tmp_path / "plan.html"
    found = plan(tbt_slo_ms=50.0, ttft_slo_ms=500.0)
    write_page(path, question(), found)
    text = path.read_text()
    assert "simulated, nothing on this page was measured" in text
    assert "<svg" in text
    assert found.pareto[0].candidate.label in text
    assert "http://" not in text.replace("http://www.w3.org/", "")
