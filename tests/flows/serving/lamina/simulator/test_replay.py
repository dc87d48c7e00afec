"""The replay against a plain loop over tokens, conservation, determinism, faults, memory."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from simulated_devices import NETWORK, costs, lamina, policy, small_model, trace

from flows.errors import ConfigError
from flows.serving.lamina.simulator.faults import Fault, parse_fault, random_losses
from flows.serving.lamina.simulator.replay import State, iteration_seconds, replay, tokens_made
from flows.serving.lamina.simulator.results import simulate, summarise

REQUESTS = st.lists(st.tuples(st.integers(1, 300), st.integers(1, 40)), min_size=1, max_size=25)
GAPS = st.lists(st.floats(0.0, 0.2), min_size=25, max_size=25)


def token_by_token(work, chosen, max_requests, arrivals, chunked, max_rows):
    """The same rules, one iteration and one request at a time."""
    page, room = chosen.policy.page_tokens, chosen.pool_tokens // chosen.policy.page_tokens
    waiting = list(range(len(work)))
    running, prompts, now, used = {}, {}, 0.0, 0
    first, finished, seconds = {}, {}, []
    need = {i: math.ceil((p + o) / page) for i, (p, o) in enumerate(work)}
    waiting = [i for i in waiting if need[i] <= room]
    while waiting or running or prompts:
        while waiting and arrivals[waiting[0]] <= now:
            i = waiting[0]
            if len(running) + len(prompts) >= max_requests or used + need[i] > room:
                break
            waiting.pop(0)
            used += need[i]
            (prompts if chunked else running)[i] = 0
        if not running and not prompts:
            now = arrivals[waiting[0]]
            continue
        left, taken, attention = max(1, max_rows - len(running)), {}, 0.0
        for i, done in prompts.items():
            size = min(left, work[i][0] - done)
            if size:
                taken[i], left = size, left - size
        windows = chosen.model.window_shares
        for i, made in running.items():
            attention += chosen.token_s * sum(share * min(work[i][0] + made, w) for w, share in windows)
        for i, size in taken.items():
            end = prompts[i] + size
            attention += chosen.chunk_token_s * end + chosen.chunk_pair_s * size * (end - size / 2)
        mean = attention / chosen.token_s / len(running) if running else 1.0
        each = chosen.iteration(len(running), mean, sum(taken.values())).seconds(attention)
        now += each
        seconds.append((each, len(running)))
        for i in list(running):
            first.setdefault(i, now)
            running[i] += 1
            if running[i] == work[i][1]:
                finished[i] = now
                del running[i]
                used -= need[i]
        for i, size in taken.items():
            prompts[i] += size
            if prompts[i] == work[i][0]:
                del prompts[i]
                first[i] = now
                running[i] = 1
                if work[i][1] == 1:
                    finished[i] = now
                    del running[i]
                    used -= need[i]
    return first, finished, seconds


@given(
    work=REQUESTS,
    gaps=GAPS,
    windows=st.sampled_from([0, 64, [64, 0, 128, 0, 0, 0, 64, 0, 0, 0]]),
    n=st.integers(1, 3),
    max_requests=st.integers(1, 12),
    memory_gb=st.sampled_from([0.03, 0.2]),
)
@settings(max_examples=60, deadline=None)
def test_jumps_between_events_give_what_single_steps_give(work, gaps, windows, n, max_requests, memory_gb):
    arrivals = np.cumsum(gaps[: len(work)])
    arrivals -= arrivals[0]
    chosen = costs(
        lamina(1, 2, n, memory_gb=memory_gb, memory_gb_s=5.0),  # attention is most of an iteration
        small_model(windows=windows),
        max_requests=max_requests,
    )
    record = replay(trace(work, arrivals), chosen, saturated=False)
    first, finished, seconds = token_by_token(work, chosen, max_requests, arrivals, False, 0)
    for i in finished:
        assert record.first_token_s[i] == pytest.approx(first[i])
        assert record.finished_s[i] == pytest.approx(finished[i])
    mine, rows = iteration_seconds(record.segments)
    np.testing.assert_allclose(mine, [each for each, _ in seconds])
    assert rows.tolist() == [count for _, count in seconds]
    assert sum(s == State.DONE for s in record.states) == len(finished)


@given(work=REQUESTS, gaps=GAPS, max_rows=st.integers(12, 80), max_requests=st.integers(1, 12))
@settings(max_examples=60, deadline=None)
def test_chunked_prompts_give_what_single_steps_give(work, gaps, max_rows, max_requests):
    arrivals = np.cumsum(gaps[: len(work)])
    arrivals -= arrivals[0]
    slow = lamina(memory_gb_s=5.0)  # attention is most of an iteration
    chosen = costs(slow, prefill="chunked", max_rows=max_rows, max_requests=max_requests)
    record = replay(trace(work, arrivals), chosen, saturated=False)
    first, finished, seconds = token_by_token(work, chosen, max_requests, arrivals, True, max_rows)
    assert [record.finished_s[i] for i in finished] == pytest.approx([finished[i] for i in finished])
    assert [record.first_token_s[i] for i in first] == pytest.approx([first[i] for i in first])
    np.testing.assert_allclose(iteration_seconds(record.segments)[0], [each for each, _ in seconds])


@given(
    work=REQUESTS,
    gaps=GAPS,
    partition=st.sampled_from(["head", "request", "sequence"]),
    prefill=st.sampled_from(["elsewhere", "chunked"]),
    reserve=st.sampled_from(["full", "watermark"]),
    redundancy=st.sampled_from(["none", "parity", "replica"]),
    saturated=st.booleans(),
    losses=st.lists(
        st.tuples(
            st.floats(0.0, 2.0), st.sampled_from(["attention", "model"]), st.integers(0, 3),
            st.sampled_from([0.0, 0.3, None]),
        ),
        max_size=3,
    ),
)  # fmt: skip
@settings(max_examples=150, deadline=None)
def test_no_token_is_lost_or_doubled(work, gaps, partition, prefill, reserve, redundancy, saturated, losses):
    faults = [
        Fault(time, kind, worker, replaced if kind == "attention" else replaced or 0.0)
        for time, kind, worker, replaced in losses
    ]
    set_up = lamina(1, 4, 1, partition, memory_gb=0.02, redundancy=redundancy)
    chosen = costs(
        set_up, prefill=prefill, reserve=reserve, redundancy=redundancy, max_rows=32, queue_deadline_s=0.5,
        max_queued_requests=8,
    )  # fmt: skip
    record = replay(trace(work, np.cumsum(gaps[: len(work)])), chosen, saturated=saturated, faults=faults)
    outputs = np.array([o for _, o in work])
    states = np.array(record.states)
    assert not np.isin(states, [State.WAITING, State.RUNNING]).any()
    assert (np.array(record.generated)[states == State.DONE] == outputs[states == State.DONE]).all()
    assert tokens_made(record.segments) == sum(record.generated)
    assert all(s.pages <= record.pages for s in record.segments)
    starts = [s.start_s for s in record.segments]
    assert starts == sorted(starts)


@given(work=REQUESTS, more=st.floats(1.0, 3.0))
@settings(max_examples=60, deadline=None)
def test_more_memory_never_needs_more_iterations(work, more):
    def iterations(memory_gb):
        chosen = costs(lamina(1, 2, memory_gb=memory_gb))
        return len(iteration_seconds(replay(trace(work), chosen).segments)[0])

    assert iterations(0.02 * more) <= iterations(0.02)


@given(work=REQUESTS, factor=st.floats(1.0, 2.0), n=st.integers(1, 2))
@settings(max_examples=40, deadline=None)
def test_better_efficiencies_never_lower_throughput_or_raise_cost(work, factor, n):
    low, high = (
        simulate(trace(work), small_model(), lamina(1, 2, n).with_efficiencies(f), NETWORK, policy())
        for f in (0.5, 0.5 * factor)
    )
    assert high.tokens_per_s >= low.tokens_per_s * (1 - 1e-12)
    assert high.usd_per_million_tokens <= low.usd_per_million_tokens * (1 + 1e-12)
    assert high.tbt_p99_ms <= low.tbt_p99_ms * (1 + 1e-12)


def test_cost_is_linear_in_hours_and_price():
    work = trace([(50, 20)] * 30)
    once = simulate(work, small_model(), lamina(), NETWORK, policy())
    assert once.usd_per_million_tokens == pytest.approx(
        once.price_per_hour * once.elapsed_s / 3600 / (once.tokens_per_s * once.elapsed_s) * 1e6
    )
    assert once.price_per_hour == 2.0 + 2 * 0.5


def test_equal_input_gives_equal_bytes():
    generator = np.random.default_rng(3)
    work = [tuple(pair) for pair in generator.integers(1, (900, 90), (80, 2)).tolist()]
    requests = trace(work, np.arange(80) / 7)
    faults = random_losses(2, 0.001, 20.0, seed=5)
    runs = [
        repr(summarise(replay(requests, costs(), saturated=False, faults=faults)).to_dict()) for _ in range(2)
    ]
    assert runs[0] == runs[1]
    assert faults == random_losses(2, 0.001, 20.0, seed=5) != random_losses(2, 0.001, 20.0, seed=6)


def test_gaps_between_tokens_are_counted_once_per_request():
    """One request alone for 99 iterations, then 100 together for one that is longer."""
    chosen = costs(lamina(memory_gb_s=5.0), max_requests=100)
    work = trace([(10, 99), *[(1000, 1)] * 100], [0.0] + [1e-3] * 100)
    record = replay(work, chosen, saturated=False)
    seconds, rows = iteration_seconds(record.segments)
    gaps = np.repeat(seconds, rows) * 1e3
    figures = summarise(record)
    assert figures.tbt_p50_ms == pytest.approx(np.sort(gaps)[len(gaps) // 2])
    assert figures.tbt_p50_ms > 2 * np.median(seconds) * 1e3
    assert figures.tbt_mean_ms == pytest.approx(gaps.mean())


def test_what_is_refused_and_why():
    chosen = costs(
        lamina(memory_gb=0.02), small_model(max_context=500), max_queued_requests=2, queue_deadline_s=0.1
    )
    work = [(400, 200), (10, 400), (10, 400), (10, 10), (10, 10), (10, 10)]
    record = replay(trace(work, [0, 0, 0.01, 0.02, 0.03, 0.04]), chosen, saturated=False)
    assert [State(s).name for s in record.states] == [
        "TOO_LARGE", "DONE", "DONE", "DONE", "DONE", "DONE",
    ]  # fmt: skip
    tight = costs(lamina(memory_gb=0.0125), max_queued_requests=2, queue_deadline_s=0.1)
    record = replay(trace([(10, 1000), *[(10, 900)] * 4], [0, 0.01, 0.02, 0.03, 5.0]), tight, saturated=False)
    assert [State(s).name for s in record.states[:4]] == ["DONE", "EXPIRED", "EXPIRED", "QUEUE_FULL"]


def test_first_token_waits_for_the_queue_and_the_prompt():
    figures = summarise(replay(trace([(64, 8)] * 4), costs(max_requests=1), saturated=False))
    one = summarise(replay(trace([(64, 8)]), costs(max_requests=1), saturated=False))
    assert figures.ttft_p99_ms > 2 * 8 * one.tbt_mean_ms
    chunked = summarise(replay(trace([(640, 8)]), costs(prefill="chunked", max_rows=64), saturated=False))
    assert chunked.ttft_mean_ms > 9 * one.ttft_mean_ms
    assert chunked.output_tokens == 8


def test_goodput_counts_requests_that_met_both_slos():
    work, when = [(64, 8)] * 10, np.zeros(10)
    mean = summarise(replay(trace(work, when), costs(max_requests=5), saturated=False))
    met = summarise(
        replay(
            trace(work, when),
            costs(max_requests=5, ttft_slo_ms=mean.ttft_mean_ms, tbt_slo_ms=2 * mean.tbt_mean_ms),
            saturated=False,
        )
    )
    assert met.within_slo == 0.5
    assert met.goodput_requests_per_s == pytest.approx(5 / met.elapsed_s)
    assert mean.within_slo is None


# --- faults


def paused(partition="head", redundancy="none", fault=None, prefill="elsewhere"):
    chosen = costs(
        lamina(1, 2, 1, partition, redundancy=redundancy), redundancy=redundancy, prefill=prefill,
        max_rows=256,
    )  # fmt: skip
    work = trace([(200, 300)] * 8)
    calm = replay(work, chosen, saturated=False)
    hit = replay(work, chosen, saturated=False, faults=[fault or Fault(1.0)])
    assert sum(s == State.DONE for s in hit.states) == 8
    return hit.end_s - calm.end_s, hit, chosen


def test_a_lost_attention_worker_pauses_everybody_with_heads_shared():
    late, hit, _ = paused()
    flops = 2 * 1e9 * 8 * (200 + np.sum(np.cumsum(iteration_seconds(hit.segments)[0]) < 1.0))
    assert late == pytest.approx(0.6 + flops / 50e12, rel=0.02)
    assert max(iteration_seconds(hit.segments)[0]) > 0.6  # the gap that clients see


def test_only_its_requests_wait_with_whole_requests_on_a_worker():
    _, hit, _ = paused("request")
    busy = [s.rows for s in hit.segments if 1.0 <= s.start_s < 1.5]
    assert set(busy) == {4}


def test_parity_rebuilds_faster_than_recomputation_and_a_replica_at_once():
    recompute, parity = paused()[1].pauses_s[0], paused(redundancy="parity")[1].pauses_s[0]
    replica = paused("request", "replica")[1].pauses_s[0]
    assert replica == 0.6 < parity < recompute


def test_a_lost_model_worker_loses_no_keys():
    late, hit, _ = paused(fault=Fault(1.0, "model", 0, 2.0))
    assert hit.pauses_s == [2.6]
    assert late == pytest.approx(2.6, abs=0.01)  # and the iteration that was under way


def test_chunked_requests_go_through_the_batch_again():
    late, hit, _ = paused(prefill="chunked")
    assert late > 0.6
    assert tokens_made(hit.segments) == 8 * 300


def test_without_a_replacement_the_others_go_on_or_the_newest_are_shed():
    chosen = costs(lamina(1, 2, memory_gb=0.05))
    work = trace([(200, 300)] * 10)
    record = replay(work, chosen, saturated=False, faults=[Fault(0.5, "attention", 0, None)])
    states = [State(s).name for s in record.states]
    assert states.count("SHED") > 0
    assert states[0] == "DONE"
    assert states[-1] == "SHED" or "DONE" in states[-1:]
    none = replay(
        work, costs(lamina(1, 1, memory_gb=0.5)), saturated=False, faults=[Fault(0.5, "attention", 0, None)]
    )
    assert set(none.states) == {State.SHED}


def test_pages_by_watermark_admit_more_and_preempt_the_youngest():
    work = trace([(40, 400)] * 12)
    full, marked = (replay(work, costs(lamina(memory_gb=0.012), reserve=r)) for r in ("full", "watermark"))
    assert marked.preemptions > 0 == full.preemptions
    assert max(s.requests for s in marked.segments) > max(s.requests for s in full.segments)
    assert tokens_made(marked.segments) == 12 * 400


@pytest.mark.parametrize(
    "text", ["", "attention", "attention:x", "attention:-1", "attention:nan", "model:3:never", "disk:3:4"]
)
def test_faults_have_to_be_written_right(text):
    with pytest.raises(ConfigError, match="a fault has the form"):
        parse_fault(text)


def test_faults_are_read():
    assert parse_fault("attention:60:never").replacement_s is None
    assert parse_fault("model:60:30") == Fault(60.0, "model", 0, 30.0)
