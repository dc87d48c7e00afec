"""Figures of a replay: speed, latency, use of devices, money; and their interval (spec 10).

Every efficiency of every device is a guess until it is measured, so a figure comes with what it would be if
all of them were 10 % lower and 10 % higher. An iteration gets no slower when an efficiency rises, so these
two corners bound every combination in between.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flows.serving.lamina.simulator.faults import Fault
from flows.serving.lamina.simulator.inputs import Model, Network, Policy
from flows.serving.lamina.simulator.replay import (
    Recording,
    State,
    iteration_seconds,
    replay,
    split_busy,
    tokens_made,
)
from flows.serving.lamina.simulator.steps import Costs, SetUp
from flows.serving.lamina.simulator.traces import Trace

UNCERTAINTY = 0.1
SIMULATED = "simulated"


@dataclass(frozen=True)
class Figures:
    """None: there was nothing to measure, or no SLO was asked for."""

    origin: str
    mode: str  # saturated | open loop
    tokens_per_s: float
    mean_batch: float
    max_batch: int
    tbt_mean_ms: float | None
    tbt_p50_ms: float | None
    tbt_p99_ms: float | None
    ttft_mean_ms: float | None
    ttft_p50_ms: float | None
    ttft_p99_ms: float | None
    goodput_requests_per_s: float | None  # requests that met both SLOs
    within_slo: float | None  # share of the requests that came
    model_utilisation: float
    attention_utilisation: float
    link_utilisation: float
    kv_occupancy_mean: float
    kv_occupancy_max: float
    price_per_hour: float
    usd_per_million_tokens: float | None
    elapsed_s: float
    requests: int
    done: int
    too_large: int
    queue_full: int
    expired: int
    shed: int
    preemptions: int
    recoveries: int
    longest_pause_s: float
    prompt_tokens: int
    output_tokens: int

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Interval:
    """Of one figure over the uncertainty of the efficiencies."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Judged:
    """Figures of a set-up with the intervals of the three that a choice is made by."""

    figures: Figures
    tokens_per_s: Interval
    tbt_p99_ms: Interval
    usd_per_million_tokens: Interval


def summarise(record: Recording) -> Figures:
    segments = record.segments[record.first : record.last] or record.segments
    seconds, rows = iteration_seconds(segments)
    elapsed = math.fsum(seconds)
    if not record.saturated:  # idle time counts where requests set the pace
        elapsed = record.end_s
    tokens = tokens_made(segments)
    weights = np.array([float(np.sum(segment.seconds)) for segment in segments])
    pages = np.array([segment.pages for segment in segments])
    busy = split_busy(segments)
    states = np.array(record.states)
    done = states == State.DONE
    arrival = np.zeros(len(states)) if record.saturated else record.trace.arrival_s
    first, finished = np.array(record.first_token_s), np.array(record.finished_s)
    ttft = 1e3 * (first - arrival)[done] if not record.saturated else np.empty(0)
    price = record.costs.price_per_hour
    good = _within_slo(record, first - arrival, finished - first, done)
    return Figures(
        origin=SIMULATED,
        mode="saturated" if record.saturated else "open loop",
        tokens_per_s=tokens / elapsed if elapsed else 0.0,
        mean_batch=float(np.dot(rows, seconds) / elapsed) if elapsed else 0.0,
        max_batch=int(rows.max(initial=0)),
        tbt_mean_ms=_percent(seconds, rows, None),
        tbt_p50_ms=_percent(seconds, rows, 0.5),
        tbt_p99_ms=_percent(seconds, rows, 0.99),
        ttft_mean_ms=float(ttft.mean()) if len(ttft) else None,
        ttft_p50_ms=float(np.percentile(ttft, 50)) if len(ttft) else None,
        ttft_p99_ms=float(np.percentile(ttft, 99)) if len(ttft) else None,
        goodput_requests_per_s=None if good is None or not elapsed else good / elapsed,
        within_slo=None if good is None else good / max(1, len(states)),
        model_utilisation=_share(busy[0], elapsed),
        attention_utilisation=_share(busy[1], elapsed),
        link_utilisation=_share(busy[2], elapsed),
        kv_occupancy_mean=float(np.dot(pages, weights) / weights.sum() / record.pages) if len(pages) else 0.0,
        kv_occupancy_max=float(pages.max(initial=0) / record.pages),
        price_per_hour=price,
        usd_per_million_tokens=cost_per_million(price, elapsed, tokens) if tokens else None,
        elapsed_s=elapsed,
        requests=len(states),
        done=int(done.sum()),
        too_large=int((states == State.TOO_LARGE).sum()),
        queue_full=int((states == State.QUEUE_FULL).sum()),
        expired=int((states == State.EXPIRED).sum()),
        shed=int((states == State.SHED).sum()),
        preemptions=record.preemptions,
        recoveries=record.recoveries,
        longest_pause_s=max(record.pauses_s, default=0.0),
        prompt_tokens=int(record.trace.prompt[done].sum()),
        output_tokens=int(sum(record.generated)),
    )


def cost_per_million(price_per_hour: float, seconds: float, tokens: float) -> float:
    """Dollars for a million tokens of the answer."""
    return price_per_hour * seconds / 3600.0 / tokens * 1e6


def simulate(
    trace: Trace,
    model: Model,
    set_up: SetUp,
    network: Network,
    policy: Policy,
    *,
    saturated: bool = True,
    faults: Sequence[Fault] = (),
) -> Figures:
    costs = Costs(model, set_up, network, policy)
    return summarise(replay(trace, costs, saturated=saturated, faults=faults))


def judge(
    trace: Trace, model: Model, set_up: SetUp, network: Network, policy: Policy, figures: Figures
) -> Judged:
    """The interval of `figures`, which is the saturated replay of the same."""
    ends = [
        simulate(trace, model, set_up.with_efficiencies(1.0 + change), network, policy)
        for change in (-UNCERTAINTY, UNCERTAINTY)
    ]

    def interval(name: str) -> Interval:
        value = float(getattr(figures, name) or 0.0)
        others = [float(getattr(end, name) or 0.0) for end in ends]
        return Interval(value, min(value, *others), max(value, *others))

    return Judged(
        figures, interval("tokens_per_s"), interval("tbt_p99_ms"), interval("usd_per_million_tokens")
    )


def _percent(seconds: NDArray[np.float64], rows: NDArray[np.int64], quantile: float | None) -> float | None:
    """Milliseconds between two tokens of a request: each iteration counts once per row that decodes."""
    total = int(rows.sum())
    if not total:
        return None
    if quantile is None:
        return float(1e3 * np.dot(seconds, rows) / total)
    order = np.argsort(seconds, kind="stable")
    reached = np.searchsorted(np.cumsum(rows[order]), quantile * total)
    return float(1e3 * seconds[order][min(int(reached), len(order) - 1)])


def _share(busy_s: float, elapsed_s: float) -> float:
    return min(1.0, busy_s / elapsed_s) if elapsed_s else 0.0


def _within_slo(
    record: Recording, ttft_s: NDArray[np.float64], rest_s: NDArray[np.float64], done: NDArray[np.bool_]
) -> int | None:
    """Requests with a first token in time, and the mean of what comes between the others in time."""
    policy = record.costs.policy
    if not policy.tbt_slo_ms and not policy.ttft_slo_ms:
        return None
    good = done.copy()
    if policy.ttft_slo_ms and not record.saturated:
        good &= np.nan_to_num(ttft_s, nan=np.inf) <= policy.ttft_slo_ms / 1e3
    if policy.tbt_slo_ms:
        gaps = np.maximum(record.trace.output - 1, 1)
        good &= np.nan_to_num(rest_s, nan=np.inf) / gaps <= policy.tbt_slo_ms / 1e3
    return int(good.sum())
