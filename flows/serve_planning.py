"""`trunkline plan serve`: which devices to serve a language model with, from a trace, on a screen of text.

Reads what the user gives, asks `simulator.planner`, prints the best set-ups and why others were dropped, and
writes plan.json. Nothing is predicted before the simulator has been compared with the real engine on this
machine (`simulator.truth`), unless the user says that it may be.
"""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flows import files
from flows.errors import ConfigError
from flows.serving.lamina.simulator import planner, truth
from flows.serving.lamina.simulator.faults import Fault, in_order, parse_fault, random_losses
from flows.serving.lamina.simulator.inputs import (
    Hardware,
    Model,
    Network,
    Policy,
    read_hardware,
    read_model,
    read_network,
    read_policy,
)
from flows.serving.lamina.simulator.planner import Plan, Point
from flows.serving.lamina.simulator.results import Interval
from flows.serving.lamina.simulator.traces import Trace, read_trace

WIDTH = 100
SHOWN = 12
UNCHECKED = "NOT CHECKED: the simulator was not compared with anything that was measured"


@dataclass(frozen=True)
class Question:
    """What the user gave, checked."""

    model: Model
    trace: Trace
    hardware: Hardware
    network: Network
    policy: Policy
    faults: Sequence[str]
    hours_between_losses: float
    seed: int
    basis: str  # the truth check, or that there is none


def read_question(
    model: str,
    trace: Path,
    hardware: Path,
    network: str,
    policy: Path | None,
    *,
    slos_ms: tuple[float, float],
    faults: Sequence[str],
    hours_between_losses: float,
    seed: int,
    truth_check: Path | None,
) -> Question:
    """
    Args:
        slos_ms: for the time between tokens and for the first one; 0: as the policy has it.
        truth_check: its record; None: figures are shown without one.

    Raises:
        ConfigError, DataError: of the files; all are read before anything is simulated.
        GateFailed: no truth check, or one that was not passed.
    """
    chosen = read_policy(policy)
    names = ("tbt_slo_ms", "ttft_slo_ms")
    chosen = chosen.model_copy(
        update={name: value for name, value in zip(names, slos_ms, strict=True) if value}
    )
    for text in faults:
        parse_fault(text)
    question = Question(
        read_model(model), read_trace(trace), read_hardware(hardware), read_network(network), chosen,
        faults, hours_between_losses, seed, UNCHECKED,
    )  # fmt: skip
    if truth_check is None:
        return question
    return Question(**{**question.__dict__, "basis": truth.require_truth(truth_check)})


def answer(question: Question, out: Path, page: Path | None) -> None:
    """Plan, print, write."""
    if out.is_dir():
        raise ConfigError(f"--out {out} is a folder, not a file")
    found = planner.plan(
        question.model,
        question.trace,
        question.hardware,
        question.network,
        question.policy,
        faults_for=lambda workers, span_s: faults_of(question, workers, span_s),
        progress=_progress if sys.stderr.isatty() else lambda done, of: None,
    )
    files.write_json(out, to_json(question, found))
    print("\n".join(describe(question, found)))
    print(f"\nall figures  {out}")
    if page is not None:
        from flows.serve_planning_page import write_page

        write_page(page, question, found)
        print(f"page         {page}")


def faults_of(question: Question, workers: int, span_s: float) -> list[Fault]:
    given = [parse_fault(text) for text in question.faults]
    if not question.hours_between_losses:
        return given
    return in_order([*given, *random_losses(workers, question.hours_between_losses, span_s, question.seed)])


def _progress(done: int, of: int) -> None:
    end = "\r" if done + 1 < of else "\r\033[K"
    print(f"  simulating {done + 1} of {of}", end=end, file=sys.stderr, flush=True)


# --- text


def describe(question: Question, found: Plan) -> list[str]:
    """The screen: what was asked, what was dropped, the Pareto set, the verdict."""
    lines = [*describe_question(question), "", *describe_search(found), ""]
    if found.pareto:
        lines += ["Best set-ups, cheapest first (each is beaten by none in both cost and p99 of the time"]
        lines += ["between tokens); saturated; in brackets: all efficiencies 10 % lower and higher", ""]
        lines += _table(found.pareto[:SHOWN])
        if len(found.pareto) > SHOWN:
            lines.append(f"  … and {len(found.pareto) - SHOWN} more in the file")
        lines += ["", f"The same at the trace's own pace × {question.policy.arrival_scale:g}, simulated", ""]
        lines += _open_loop_table(found.pareto[:SHOWN])
        lines.append("")
    for name, point in (("equal devices", found.homogeneous), ("attention elsewhere", found.disaggregated)):
        if point is not None:
            lines.append(f"cheapest, {name:<20} {point.candidate.label}: ${point.usd:.2f} per million tokens")
    return [*lines, "", *_wrap(found.verdict)]


def describe_question(question: Question) -> list[str]:
    model, trace, policy = question.model, question.trace, question.policy
    requests = min(len(trace), policy.search.requests)
    dates = sorted({device.price_date for device in question.hardware.devices.values()})
    window = f"{dates[0]}" if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"
    slos = [
        f"{name} {value:g} ms"
        for name, value in (("between tokens", policy.tbt_slo_ms), ("first token", policy.ttft_slo_ms))
        if value
    ]
    prefill = "on other devices, not counted" if policy.prefill == "elsewhere" else "in chunks, in the batch"
    prices = ", ".join(f"{name} ${d.price_per_hour:.2f}/h" for name, d in question.hardware.devices.items())
    first = trace.first(requests)
    facts = {
        "model": f"{model.name}: {model.weight_bytes / 1e9:.1f} GB of weights, "
        f"{model.kv_bytes_per_token / 1e3:,.0f} kB of keys and values per token",
        "trace": f"{trace.name}: first {requests:,} of {len(trace):,} requests, mean prompt "
        f"{first.mean_prompt:,.0f}, mean answer {first.mean_output:,.0f} tokens",
        "network": f"{question.network.name or 'unnamed'}: {question.network.one_way_us:g} µs one way, "
        f"{question.network.gb_s:g} GB/s",
        "prices": f"of {window}: {prices}",
        "SLO": ", ".join(slos) or "none asked for",
        "prefill": prefill,
    }
    lines = [*_wrap(f"SIMULATED: no figure below was measured. {question.basis}"), ""]
    for name, text in facts.items():
        lines += _wrap(f"{name:<10} {text}", " " * 11)
    return lines


def describe_search(found: Plan) -> list[str]:
    lines = []
    if found.too_long:
        lines += [f"{found.too_long} requests are longer than the model's positions and were left out", ""]
    lines += [f"{found.tried} points tried, {found.simulated} simulated; dropped:"]
    lines += [
        f"  {count:>5}  {reason}" for reason, count in sorted(found.dropped.items(), key=lambda x: -x[1])
    ]
    return lines


def _table(points: Sequence[Point]) -> list[str]:
    width = max(len("set-up"), *(len(point.candidate.label) for point in points))
    lines = [f"{'set-up':<{width}} {'$/M tokens':>20} {'p99 ms':>15} {'tokens/s':>9} {'B':>5}"]
    for point in points:
        assert point.judged
        lines.append(
            f"{point.candidate.label:<{width}} {_interval(point.judged.usd_per_million_tokens, 2):>20} "
            f"{_interval(point.judged.tbt_p99_ms, 0):>15} {point.figures.tokens_per_s:>9,.0f} "
            f"{point.figures.mean_batch:>5.0f}"
        )
    return lines


def _open_loop_table(points: Sequence[Point]) -> list[str]:
    width = max(len("set-up"), *(len(point.candidate.label) for point in points))
    lines = [
        f"{'':<{width}} {'first token':>15} {'between':>9} {'within':>7} {'lost':>5} {'busy: model':>11}",
        f"{'set-up':<{width}} {'p50/p99 s':>15} {'p99 ms':>9} {'SLO':>7} {'':>5} {'attn, link':>11}",
    ]
    for point in points:
        assert point.open_loop
        f = point.open_loop
        first = (
            "-" if f.ttft_p50_ms is None else f"{f.ttft_p50_ms / 1e3:.2f}/{(f.ttft_p99_ms or 0) / 1e3:.2f}"
        )
        between = "-" if f.tbt_p99_ms is None else f"{f.tbt_p99_ms:.0f}"
        within = "-" if f.within_slo is None else f"{f.within_slo:.1%}"
        lost = f.too_large + f.queue_full + f.expired + f.shed
        use = f"{f.model_utilisation:.0%} {f.attention_utilisation:.0%} {f.link_utilisation:.0%}"
        lines.append(
            f"{point.candidate.label:<{width}} {first:>15} {between:>9} {within:>7} {lost:>5} {use:>11}"
        )
    return lines


def _interval(value: Interval, digits: int) -> str:
    return f"{value.value:.{digits}f} [{value.low:.{digits}f}-{value.high:.{digits}f}]"


def _wrap(text: str, indent: str = "") -> list[str]:
    return textwrap.wrap(text, WIDTH, subsequent_indent=indent, break_on_hyphens=False, drop_whitespace=True)


# --- file


def to_json(question: Question, found: Plan) -> dict[str, Any]:
    """All that was given and found; equal input gives equal bytes."""
    return {
        "format": 1,
        "origin": "simulated",
        "basis": question.basis,
        "model": question.model.model_dump(mode="json"),
        "trace": {"name": question.trace.name, "requests": len(question.trace)},
        "hardware": question.hardware.model_dump(mode="json"),
        "network": question.network.model_dump(mode="json"),
        "policy": question.policy.model_dump(mode="json"),
        "faults": {
            "given": list(question.faults),
            "hours_between_losses": question.hours_between_losses,
            "seed": question.seed,
        },
        "too_long": found.too_long,
        "tried": found.tried,
        "simulated": found.simulated,
        "dropped": dict(sorted(found.dropped.items())),
        "verdict": found.verdict,
        "pareto": [_point(point) for point in found.pareto],
        "cheapest_homogeneous": _point(found.homogeneous),
        "cheapest_disaggregated": _point(found.disaggregated),
    }


def _point(point: Point | None) -> dict[str, Any] | None:
    if point is None:
        return None
    set_up, judged = point.candidate.set_up, point.judged
    assert judged is not None
    assert point.open_loop is not None
    return {
        "label": point.candidate.label,
        "compute": {"device": set_up.compute_name, "count": set_up.a, "replicas": set_up.replicas},
        "memory": None if set_up.homogeneous else {"device": set_up.memory_name, "count": set_up.b},
        "micro_batches": set_up.micro_batches,
        "partition": None if set_up.homogeneous else set_up.partition,
        "max_requests": point.candidate.max_requests,
        "intervals": {
            name: vars(getattr(judged, name))
            for name in ("tokens_per_s", "tbt_p99_ms", "usd_per_million_tokens")
        },
        "saturated": point.figures.to_dict(),
        "open_loop": point.open_loop.to_dict(),
    }
