"""Which devices, how many, and how: every set-up that is possible, the few that are worth it (spec 10).

Enumerate devices × (a, b) × micro-batches × partition × batch; drop what misses memory, bandwidth (spec 2) or
the SLO and count why; simulate the rest on the trace, saturated; keep the Pareto set of dollars per million
tokens against the 99th percentile of the time between tokens. A set-up of equal devices is a candidate like
any other, and wins where it wins.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

from flows.errors import ConfigError
from flows.serving.lamina.simulator.faults import Fault
from flows.serving.lamina.simulator.inputs import Hardware, Model, Network, Policy
from flows.serving.lamina.simulator.replay import replay
from flows.serving.lamina.simulator.results import (
    Figures,
    Judged,
    cost_per_million,
    judge,
    simulate,
    summarise,
)
from flows.serving.lamina.simulator.steps import Costs, SetUp
from flows.serving.lamina.simulator.traces import Trace

MARGIN = 1.3
"""A set-up whose closed form is worse than a simulated one by more than this in both figures is left out."""
MEMORY, HEADS, ROOM = "weights do not fit", "more workers than heads of keys", "no room for keys and values"
LINK, SLO, SLO_SIMULATED = (
    "link too slow for the batch",
    "SLO missed at the smallest batch",
    "SLO missed on the trace",
)
PRICE, BEATEN = "over the price limit", f"worse by over {MARGIN - 1:.0%} in both figures (closed form)"
IDLE = "served nothing"

FaultsFor = Callable[[int, float], Sequence[Fault]]


@dataclass(frozen=True)
class Candidate:
    set_up: SetUp
    max_requests: int  # at once; 0: as memory allows

    @property
    def label(self) -> str:
        batch = f" B≤{self.max_requests}" if self.max_requests else ""
        return f"{self.set_up.label}{batch}"


@dataclass(frozen=True)
class Point:
    """A candidate that was simulated."""

    candidate: Candidate
    figures: Figures
    judged: Judged | None = None  # with intervals, of what is reported
    open_loop: Figures | None = None  # the trace at its own pace

    @property
    def usd(self) -> float:
        return self.figures.usd_per_million_tokens or float("inf")

    @property
    def tbt_ms(self) -> float:
        return self.figures.tbt_p99_ms or float("inf")


@dataclass
class Plan:
    too_long: int = 0  # requests that the model has no positions for; they are left out
    tried: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    simulated: int = 0
    pareto: list[Point] = field(default_factory=list)  # cheapest first
    homogeneous: Point | None = None  # the cheapest of its kind that meets the SLO
    disaggregated: Point | None = None

    @property
    def verdict(self) -> str:
        """In one sentence, which kind wins, and by how much with the uncertainty of the efficiencies."""
        ours, theirs = self.disaggregated, self.homogeneous
        if ours is None and theirs is None:
            return "Nothing that was tried can serve this: see the reasons above."
        if ours is None:
            return "Do not disaggregate: only equal devices can serve this."
        if theirs is None:
            return "Disaggregate: equal devices cannot serve this within what was tried."
        assert ours.judged is not None
        assert theirs.judged is not None
        mine, other = ours.judged.usd_per_million_tokens, theirs.judged.usd_per_million_tokens
        cheaper = ours.usd < theirs.usd
        apart = mine.high < other.low if cheaper else other.high < mine.low
        sure = "" if apart else " The intervals overlap: too close to call without measured efficiencies."
        if cheaper:
            gain = theirs.usd / ours.usd - 1.0
            return f"Disaggregate: {gain:.0%} more tokens per dollar than the best of equal devices.{sure}"
        more = ours.usd / theirs.usd - 1.0
        return (
            f"Do not disaggregate: with attention elsewhere a token costs {more:.0%} more than on equal "
            f"devices.{sure}"
        )


def plan(
    model: Model,
    trace: Trace,
    hardware: Hardware,
    network: Network,
    policy: Policy,
    *,
    faults_for: FaultsFor = lambda workers, span_s: [],
    progress: Callable[[int, int], None] = lambda done, of: None,
) -> Plan:
    """
    Args:
        faults_for: what is lost while the trace runs at its own pace, given the memory devices and seconds.

    Raises:
        ConfigError: no request of the trace is short enough for the model.
    """
    trace = trace.first(policy.search.requests)
    asked, trace = len(trace), _short_enough(model, trace, policy)
    found = Plan(too_long=asked - len(trace))
    candidates: list[tuple[float, float, Candidate]] = []
    for set_up in enumerate_set_ups(hardware, policy):
        for candidate, reason in _candidates(model, trace, set_up, network, policy):
            found.tried += 1
            if candidate is None:
                found.dropped[reason] += 1
            else:
                candidates.append((*_closed_form(model, trace, candidate, network, policy), candidate))
    points: list[Point] = []
    candidates.sort(key=lambda entry: entry[:2])
    for done, (usd, tbt_ms, candidate) in enumerate(candidates):
        progress(done, len(candidates))
        same_kind = [p for p in points if p.candidate.set_up.homogeneous == candidate.set_up.homogeneous]
        if any(p.usd * MARGIN < usd and p.tbt_ms * MARGIN < tbt_ms for p in same_kind):
            found.dropped[BEATEN] += 1
            continue
        figures = simulate(trace, model, candidate.set_up, network, limited(policy, candidate))
        found.simulated += 1
        if not figures.tokens_per_s:
            found.dropped[IDLE] += 1
        elif policy.tbt_slo_ms and (figures.tbt_p99_ms or 0.0) > policy.tbt_slo_ms:
            found.dropped[SLO_SIMULATED] += 1
        else:
            points.append(Point(candidate, figures))
    best = {
        kind: min(
            (p for p in points if p.candidate.set_up.homogeneous == kind), key=_preference, default=None
        )
        for kind in (True, False)
    }
    wanted = pareto(points)
    judged = {
        id(point): _judged(point, model, trace, network, policy, faults_for)
        for point in {id(p): p for p in (*wanted, *best.values()) if p is not None}.values()
    }
    found.pareto = [judged[id(point)] for point in wanted]
    found.homogeneous, found.disaggregated = (
        judged[id(point)] if (point := best[kind]) else None for kind in (True, False)
    )
    return found


def enumerate_set_ups(hardware: Hardware, policy: Policy) -> Iterator[SetUp]:
    """All of `policy.search`, in a fixed order. A replica of keys needs whole requests on a worker."""
    search = policy.search
    for name, device in hardware.devices.items():
        for a in search.homogeneous_devices:
            yield SetUp(name, device, a)
        for other, memory in hardware.devices.items():
            for a in search.model_devices:
                for b in search.attention_devices:
                    for partition in search.partitions:
                        if policy.redundancy == "replica" and (partition != "request" or b < 2):
                            continue
                        if policy.redundancy == "parity" and (partition != "head" or b < 2):
                            continue
                        if b == 1 and partition != search.partitions[0]:
                            continue  # with one worker there is nothing to share
                        for n in search.micro_batches:
                            yield SetUp(name, device, a, other, memory, b, n, partition, policy.redundancy)


def limited(policy: Policy, candidate: Candidate) -> Policy:
    return policy.model_copy(update={"max_requests": candidate.max_requests})


def pareto(points: list[Point]) -> list[Point]:
    """Those that no other beats in one figure without losing in the other; cheapest first."""
    kept: list[Point] = []
    for point in sorted(points, key=_preference):
        if not kept or point.tbt_ms < kept[-1].tbt_ms:
            kept.append(point)
    return kept


def _preference(point: Point) -> tuple[float, float, float, str]:
    return point.usd, point.tbt_ms, point.figures.price_per_hour, point.candidate.label


def _candidates(
    model: Model, trace: Trace, set_up: SetUp, network: Network, policy: Policy
) -> Iterator[tuple[Candidate | None, str]]:
    """Each batch of a set-up, or why it is dropped."""
    shares = policy.search.batch_shares
    reason = _impossible(model, set_up, policy)
    costs = None
    if not reason:
        try:
            costs = Costs(model, set_up, network, policy)
        except ConfigError:
            reason = MEMORY
    if costs is None:
        yield from ((None, reason) for _ in shares)
        return
    length = float((trace.prompt + trace.output).mean())
    batch = int(costs.pool_tokens / (length + policy.page_tokens / 2)) * costs.pools
    if batch < 1:
        yield from ((None, ROOM) for _ in shares)
        return
    tried = set()
    for share in shares:
        rows = max(1, int(batch * share))
        if rows in tried:
            continue
        tried.add(rows)
        candidate = Candidate(set_up, 0 if share == 1.0 else rows)
        smallest = costs.iteration(1).seconds(costs.token_s * trace.live_context)
        if policy.tbt_slo_ms and smallest * 1e3 > policy.tbt_slo_ms:
            yield None, SLO
        elif not set_up.homogeneous and link_slowdown(costs, rows, trace) > policy.bandwidth_slowdown:
            yield None, LINK
        else:
            yield candidate, ""


def _impossible(model: Model, set_up: SetUp, policy: Policy) -> str:
    limit = policy.search.max_price_per_hour
    if limit and set_up.price_per_hour > limit:
        return PRICE
    if not set_up.homogeneous and set_up.partition == "head" and set_up.b > model.kv_heads:
        return HEADS
    if set_up.homogeneous and set_up.compute.room_bytes * set_up.a < model.weight_bytes:
        return MEMORY
    return ""


def link_slowdown(costs: Costs, rows: int, trace: Trace) -> float:
    """By how much the link's bandwidth prolongs an iteration.

    Without rotation that is wire bytes over bandwidth over computing time: above alpha, the bandwidth is
    below the minimum of spec 2. With rotation, moving bytes costs nothing while other batches hide it.
    """
    cost = costs.iteration(rows, trace.live_context)
    attention_s = costs.token_s * rows / costs.pools * trace.live_context
    unlimited = cost._replace(wire_s=0.0, wire_busy_s=0.0, credit_s=0.0, overhead_s=0.0)
    limited = unlimited._replace(wire_s=cost.wire_busy_s)
    return limited.seconds(attention_s) / unlimited.seconds(attention_s) - 1.0


def _closed_form(
    model: Model, trace: Trace, candidate: Candidate, network: Network, policy: Policy
) -> tuple[float, float]:
    """Dollars per million tokens and ms between tokens at the mean batch and context; to sort by."""
    costs = Costs(model, candidate.set_up, network, policy)
    length = float((trace.prompt + trace.output).mean())
    rows = candidate.max_requests or max(1, int(costs.pool_tokens / length) * costs.pools)
    per_pool = rows / costs.pools
    seconds = costs.iteration(rows, trace.live_context).seconds(costs.token_s * per_pool * trace.live_context)
    return cost_per_million(costs.price_per_hour, seconds, rows), seconds * 1e3


def _judged(
    point: Point, model: Model, trace: Trace, network: Network, policy: Policy, faults_for: FaultsFor
) -> Point:
    chosen = limited(policy, point.candidate)
    judged = judge(trace, model, point.candidate.set_up, network, chosen, point.figures)
    costs = Costs(model, point.candidate.set_up, network, chosen)
    trace = trace.faster(policy.arrival_scale)
    faults = faults_for(point.candidate.set_up.b, trace.span_s)
    pace = replay(trace, costs, saturated=False, faults=faults)
    return replace(point, judged=judged, open_loop=summarise(pace))


def _short_enough(model: Model, trace: Trace, policy: Policy) -> Trace:
    """Requests that the model has positions for."""
    fits = trace.prompt + trace.output <= model.max_context
    if not policy.enforce_max_context or bool(fits.all()):
        return trace
    if not fits.any():
        raise ConfigError(
            f"every request of {trace.name} is longer than the {model.max_context} positions of "
            f"{model.name}; take another model, or in the policy `enforce_max_context: false` for dummies"
        )
    return Trace(trace.name, trace.arrival_s[fits], trace.prompt[fits], trace.output[fits])
