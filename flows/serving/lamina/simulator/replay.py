"""A trace on a set-up, iteration by iteration, as discrete events (spec 10).

At every boundary: take what arrived, admit in that order while pages fit, step, retire. Between two events (a
request ends, arrives, leaves its window, a prompt is done, a worker is lost) the rows of an iteration do not
change and the context grows by one token per row, so that all iterations up to the next event are one array
operation. Requests are dummies of the right length: nothing is random here, and the same input gives the same
output to the last bit.

*Saturated*: everything is there at the start, as in the paper; what is measured begins when a fifth of the
requests has finished and ends when the queue is empty. *Open loop*: requests come when the trace says so.
"""

from __future__ import annotations

import heapq
import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flows.serving.lamina.simulator.faults import (
    Fault,
    in_order,
    parity_rebuild_seconds,
    recompute_seconds,
)
from flows.serving.lamina.simulator.steps import Costs, Iteration
from flows.serving.lamina.simulator.traces import Trace

WARM_UP = 0.2
"""Share of the requests that have to finish before a saturated replay is measured."""
FEW = 6
"""Up to so many iterations are computed one by one: arrays would take longer."""


class State(IntEnum):
    WAITING = 0
    RUNNING = 1
    DONE = 2
    TOO_LARGE = 3  # for the model or for the room
    QUEUE_FULL = 4
    EXPIRED = 5  # in the queue
    SHED = 6  # after a loss, no room was left


@dataclass
class Segment:
    """Iterations of the same rows."""

    start_s: float
    seconds: NDArray[np.float64]  # of each iteration
    rows: int  # that decode
    extra_tokens: int  # first tokens of prompts that were finished here
    model_busy_s: float
    attention_busy_s: float
    link_busy_s: float
    pages: int  # in use
    requests: int  # that run, prompts included


@dataclass
class Recording:
    """What happened; `results` makes figures of it."""

    trace: Trace
    costs: Costs
    saturated: bool
    pages: int  # of all pools
    segments: list[Segment] = field(default_factory=list)
    first: int = 0  # segment from which on is measured
    last: int | None = None  # and the one behind
    end_s: float = 0.0
    states: list[int] = field(default_factory=list)
    first_token_s: list[float] = field(default_factory=list)
    finished_s: list[float] = field(default_factory=list)
    generated: list[int] = field(default_factory=list)
    preemptions: int = 0
    recoveries: int = 0
    pauses_s: list[float] = field(default_factory=list)


def replay(trace: Trace, costs: Costs, *, saturated: bool = True, faults: Sequence[Fault] = ()) -> Recording:
    """Run all requests of `trace`; with `saturated` their arrival times are not looked at."""
    return _Replay(trace, costs, saturated, faults).run()


class _Replay:
    def __init__(self, trace: Trace, costs: Costs, saturated: bool, faults: Sequence[Fault]) -> None:
        self.policy, self.costs, self.saturated = costs.policy, costs, saturated
        self.chunked = self.policy.prefill == "chunked"
        count = len(trace)
        self.prompt: list[int] = trace.prompt.tolist()
        self.output: list[int] = trace.output.tolist()
        self.arrival: list[float] = [0.0] * count if saturated else trace.arrival_s.tolist()
        self.made = [0] * count  # tokens generated before the present admission
        self.pool = [0] * count
        self.held = [0] * count  # pages
        self.begun = [0] * count  # iteration of the present admission's first decode
        self.context = [0] * count  # at that iteration
        self.version = [0] * count  # events of an older one are void
        self.page = self.policy.page_tokens
        self.capacity = [costs.pool_tokens // self.page] * costs.pools
        self.used = [0] * costs.pools
        self.live = [0.0] * costs.pools  # tokens that attention reads in the next iteration
        self.slope = [0.0] * costs.pools  # by which that grows per iteration
        self.shares = costs.model.window_shares
        self.now, self.iteration = 0.0, 0
        self.coming = 0  # next request to arrive
        self.queue: deque[int] = deque()
        self.running: dict[int, None] = {}  # decoding, in order of admission
        self.prefilling: deque[list[int]] = deque()  # [request, rows done, rows in all]
        self.returning: list[tuple[float, int]] = []  # lost, being recomputed elsewhere
        self.fresh: list[int] = []  # that get a token for the first time
        self.events: list[tuple[int, int, int, int, float]] = []  # iteration, request, version, ends, slope
        self.faults = deque(in_order(faults))
        self.blocked_until = 0.0  # no iteration begins before: a loss is being dealt with
        self.finished = 0
        self.record = Recording(trace, costs, saturated, sum(self.capacity))
        self.record.states = [State.WAITING] * count
        self.record.first_token_s = [math.nan] * count
        self.record.finished_s = [math.nan] * count
        self.record.generated = [0] * count

    def run(self) -> Recording:
        while True:
            self._arrive()
            if self.faults and self.faults[0].time_s <= self.now:
                self._lose(self.faults.popleft())
                continue
            self._return()
            self._admit()
            if self.saturated and not self.queue and self.record.last is None:
                self.record.last = len(self.record.segments)
            if self.running or self.prefilling:
                self._step()
            elif not self._wait():
                break
        self.record.end_s = self.now
        self.record.pages = max(self.record.pages, 1)
        return self.record

    # --- boundary: arrivals, admission, ends

    def _arrive(self) -> None:
        policy = self.policy
        limit = policy.max_queued_requests
        while self.coming < len(self.arrival) and self.arrival[self.coming] <= self.now:
            request = self.coming
            self.coming += 1
            total = self.prompt[request] + self.output[request]
            self._expire(self.arrival[request])
            too_long = policy.enforce_max_context and total > self.costs.model.max_context
            if not any(self.capacity):
                self.record.states[request] = State.SHED
            elif too_long or self._pages(total) > max(self.capacity):
                self.record.states[request] = State.TOO_LARGE
            elif limit and not self.saturated and len(self.queue) >= limit:
                self.record.states[request] = State.QUEUE_FULL
            else:
                self.queue.append(request)
        self._expire(self.now)

    def _expire(self, moment: float) -> None:
        patience = self.policy.queue_deadline_s
        if not patience or self.saturated:
            return
        while self.queue and not self.made[self.queue[0]] and self.arrival[self.queue[0]] + patience < moment:
            self.record.states[self.queue.popleft()] = State.EXPIRED

    def _return(self) -> None:
        while self.returning and self.returning[0][0] <= self.now:
            _, request = heapq.heappop(self.returning)
            self._start(request)  # its pages were kept

    def _admit(self) -> None:
        policy = self.policy
        at_once = policy.max_requests or math.inf
        if self.chunked:
            at_once = min(at_once, policy.max_rows)
        while self.queue:
            if len(self.running) + len(self.prefilling) + len(self.returning) >= at_once:
                return
            request = self.queue[0]
            full = policy.reserve == "full"
            total = self.prompt[request] + (self.output[request] if full else self.made[request] + 1)
            pages = self._pages(total)
            pool = min(range(len(self.used)), key=lambda j: self.used[j] - self.capacity[j])
            spared = 0 if full or not self.used[pool] else int(policy.watermark * self.capacity[pool])
            if self.used[pool] + pages + spared > self.capacity[pool]:
                if any(self.used) or pages <= max(self.capacity):
                    return
                self.record.states[self.queue.popleft()] = State.SHED  # room was lost meanwhile
                continue
            self.queue.popleft()
            self.pool[request], self.held[request] = pool, pages
            self.used[pool] += pages
            self.record.states[request] = State.RUNNING
            self._start(request)

    def _start(self, request: int) -> None:
        if self.chunked:
            self.prefilling.append([request, 0, self.prompt[request] + self.made[request]])
        else:
            self._decode(request)

    def _decode(self, request: int) -> None:
        """From the next iteration on, `request` has a row."""
        context = self.prompt[request] + self.made[request]
        pool, remaining = self.pool[request], self.output[request] - self.made[request]
        self.running[request] = None
        self.begun[request], self.context[request] = self.iteration, context
        if math.isnan(self.record.first_token_s[request]):
            self.fresh.append(request)
        for window, share in self.shares:
            self.live[pool] += share * min(context, window)
            if context < window:
                self.slope[pool] += share
                if context + remaining > window:
                    self._schedule(int(window) - context, request, share)
        self._schedule(remaining, request, 0.0)

    def _schedule(self, iterations: int, request: int, share: float) -> None:
        event = (self.iteration + iterations, request, self.version[request], int(not share), share)
        heapq.heappush(self.events, event)

    def _happen(self) -> None:
        """Events of this boundary: a request leaves a window or ends."""
        while self.events and self.events[0][0] <= self.iteration:
            _, request, version, ends, share = heapq.heappop(self.events)
            if version != self.version[request]:
                continue
            if ends:
                self._stop(request)
                self._release(request)
                self._finish(request)
            else:
                self.slope[self.pool[request]] -= share

    def _stop(self, request: int) -> None:
        """No more rows for `request`; what it has is kept in `made`."""
        del self.running[request]
        pool, steps = self.pool[request], self.iteration - self.begun[request]
        self.made[request] += steps
        self.version[request] += 1
        context = self.context[request] + steps
        for window, share in self.shares:
            self.live[pool] -= share * min(context, window)
            if context < window:
                self.slope[pool] -= share
        if not self.running:
            self.live, self.slope = [0.0] * len(self.live), [0.0] * len(self.live)

    def _release(self, request: int) -> None:
        self.used[self.pool[request]] -= self.held[request]
        self.held[request] = 0

    def _finish(self, request: int) -> None:
        self.record.states[request] = State.DONE
        self.record.finished_s[request] = self.now
        self.record.generated[request] = self.made[request]
        self.finished += 1
        if self.saturated and not self.record.first and self.finished >= WARM_UP * len(self.arrival):
            self.record.first = len(self.record.segments)

    def _wait(self) -> bool:
        """Nothing runs: pass the time until something comes."""
        moments = [moment for moment, _ in self.returning[:1]]
        if self.coming < len(self.arrival):
            moments.append(self.arrival[self.coming])
        if not moments:
            return False
        if self.faults:
            moments.append(self.faults[0].time_s)
        self.now = max(self.now, min(moments))
        return True

    # --- iterations

    def _step(self) -> None:
        """Iterations up to the next event."""
        count = 1 << 40
        if self.policy.reserve == "watermark" and self.running:
            count = self._until_full()
        rows, chunk = len(self.running), 0
        if not rows and not self.prefilling:
            return  # all were preempted
        while self.events and self.events[0][2] != self.version[self.events[0][1]]:
            heapq.heappop(self.events)
        if self.events:
            count = min(count, self.events[0][0] - self.iteration)
        parts: list[tuple[list[int], int]] = []
        if self.prefilling:
            parts, count = self._chunks(max(1, self.policy.max_rows - rows), count)
            chunk = sum(size for _, size in parts)
        cost = self.costs.iteration(rows, sum(self.live) / rows if rows else 1.0, chunk)
        begin, growth = self._attention(parts)
        start = max(self.now, self.blocked_until)
        until, strike = self._next_moments()
        seconds, attention_s = self._durations(cost, begin, growth, count, start, until, strike)
        done = len(seconds)
        if not done:  # the iteration under way is hit
            self.now = max(self.now, strike)
            return
        for request in self.fresh:
            self.record.first_token_s[request] = start + float(seconds[0])
        self.fresh.clear()
        seconds[0] += start - self.now
        began, self.now = self.now, start + float(seconds.sum()) - (start - self.now)
        self.iteration += done
        ended = self._grow(parts, done)
        self.record.segments.append(
            Segment(
                began, seconds, rows, ended,
                done * cost.n * cost.model_s / cost.replicas,
                done * cost.n * cost.attention_fixed_s + attention_s,
                done * cost.n * cost.wire_busy_s,
                sum(self.used), rows + len(self.prefilling),
            )
        )  # fmt: skip
        for pool in range(len(self.live)):
            self.live[pool] += self.slope[pool] * done
        self._settle(parts)
        self._happen()

    def _attention(self, parts: list[tuple[list[int], int]]) -> tuple[list[float], list[float]]:
        """Attention seconds of the next iteration and by how much they grow, per pool."""
        costs = self.costs
        begin = [live * costs.token_s for live in self.live]
        growth = [slope * costs.token_s for slope in self.slope]
        for (request, done, _), size in parts:
            pool = self.pool[request]
            seen = sum(share * min(done + size, window) for window, share in self.shares)
            more = sum(share for window, share in self.shares if done + size < window)
            pairs = max(0.0, seen - more * size / 2)  # mean context of its rows
            begin[pool] += costs.chunk_token_s * seen + costs.chunk_pair_s * size * pairs
            growth[pool] += more * size * (costs.chunk_token_s + costs.chunk_pair_s * size)
        return begin, growth

    def _durations(
        self,
        cost: Iteration,
        begin: list[float],
        growth: list[float],
        count: int,
        start: float,
        until: float,
        strike: float,
    ) -> tuple[NDArray[np.float64], float]:
        """Seconds of the iterations that are to be done, at most `count`, and of the attention in them.

        The last one may pass `until`, none may pass `strike`.
        """
        least = cost.seconds(max(begin))
        for moment in (until, strike):
            if moment < math.inf:
                count = min(count, max(0, int((moment - start) / least)) + 2)
        if count <= FEW:
            values: list[float] = []
            total = 0.0
            for index in range(count):
                attention = max(b + g * index for b, g in zip(begin, growth, strict=True))
                each = cost.seconds(attention)
                if start + each > strike:
                    break
                values.append(each)
                total += attention
                start += each
                if start >= until:
                    break
            return np.array(values), total
        steps = np.arange(count, dtype=np.float64)
        lines = [b + g * steps for b, g in zip(begin, growth, strict=True)]
        attention_s = lines[0] if len(lines) == 1 else np.maximum.reduce(lines)
        seconds = cost.seconds_of(attention_s)
        if until < math.inf or strike < math.inf:
            ends = start + np.cumsum(seconds)
            keep = min(
                int(np.searchsorted(ends, until, side="left")) + 1,
                int(np.searchsorted(ends, strike, side="right")),
            )
            seconds, attention_s = seconds[:keep], attention_s[:keep]
        return seconds, float(attention_s.sum())

    def _next_moments(self) -> tuple[float, float]:
        """When iterations have to be looked at again, and when one is hit by a fault."""
        until = self.returning[0][0] if self.returning else math.inf
        if not self.queue and self.coming < len(self.arrival):
            until = min(until, self.arrival[self.coming])
        return until, self.faults[0].time_s if self.faults else math.inf

    def _chunks(self, room: int, count: int) -> tuple[list[tuple[list[int], int]], int]:
        """Prompt rows of the next iteration, and for how many iterations they are the same."""
        head = self.prefilling[0]
        left = head[2] - head[1]
        if left > room:
            return [(head, room)], min(count, (left - 1) // room)
        parts: list[tuple[list[int], int]] = []
        for part in self.prefilling:
            size = min(room, part[2] - part[1])
            if not size:
                break
            parts.append((part, size))
            room -= size
        return parts, 1

    def _grow(self, parts: list[tuple[list[int], int]], done: int) -> int:
        ended = 0
        for part, size in parts:
            part[1] += size * done
            ended += part[1] == part[2]
        return ended

    def _settle(self, parts: list[tuple[list[int], int]]) -> None:
        """Prompts that are done give a first token and begin to decode."""
        for part, _ in parts:
            request = part[0]
            if part[1] < part[2]:
                continue
            self.prefilling.popleft()
            if math.isnan(self.record.first_token_s[request]):
                self.record.first_token_s[request] = self.now
            self.made[request] += 1
            if self.made[request] == self.output[request]:
                self._release(request)
                self._finish(request)
            else:
                self._decode(request)

    # --- pages by watermark

    def _until_full(self) -> int:
        """Iterations until the pages that are really used do not suffice; preempts if that is now."""
        while self.running:
            requests = list(self.running)
            pools = np.array([self.pool[request] for request in requests])
            context = np.array([self._context_now(request) for request in requests])
            others = [0] * len(self.used)  # pages of requests that do not decode now
            for request in [part[0] for part in self.prefilling] + [request for _, request in self.returning]:
                others[self.pool[request]] += self.held[request]
            room = np.array(self.capacity) - others

            def missing(
                ahead: int, context: Any = context, pools: Any = pools, room: Any = room
            ) -> NDArray[np.float64]:
                pages = -(-(context + ahead) // self.page)
                needed: NDArray[np.float64] = np.bincount(pools, pages, len(room)) - room
                return needed

            if (missing(1) <= 0).all():
                low, high = 1, 1 << 24
                while low < high:
                    middle = (low + high + 1) // 2
                    low, high = (middle, high) if (missing(middle) <= 0).all() else (low, middle - 1)
                now = -(-(context + 1) // self.page)
                for request, pages in zip(requests, now.tolist(), strict=True):
                    self.used[self.pool[request]] += pages - self.held[request]
                    self.held[request] = pages
                return low
            full = int(np.argmax(missing(1)))
            self._preempt([request for request in requests if self.pool[request] == full][-1])
        return 1

    def _preempt(self, request: int) -> None:
        self._stop(request)
        self._release(request)
        self.record.states[request] = State.WAITING
        self.record.preemptions += 1
        if request in self.fresh:
            self.fresh.remove(request)
        self.queue.appendleft(request)
        if not self.chunked:
            self._block(self._recompute_s([request]))

    # --- faults

    def _lose(self, fault: Fault) -> None:
        policy, set_up = self.policy, self.costs.set_up
        self.record.recoveries += 1
        wait = fault.detection_s + (fault.replacement_s or 0.0)
        if fault.kind == "model" and not set_up.homogeneous:
            self._pause(wait)  # no keys are lost, the iteration is sent again
            return
        whole = set_up.homogeneous or set_up.partition != "request"
        pool = 0 if whole else fault.worker % len(self.used)
        if fault.replacement_s is None and not self._shrink(pool, whole):
            return
        if policy.redundancy == "replica" and not whole:
            self._pause(fault.detection_s)
            return
        lost = [request for request in self.running if whole or self.pool[request] == pool]
        prompts = [part for part in self.prefilling if whole or self.pool[part[0]] == pool]
        if policy.redundancy == "parity" and whole and not set_up.homogeneous:
            tokens = sum(map(self._context_now, lost)) + sum(part[1] for part in prompts)
            kept = tokens * self.costs.model.kv_bytes_per_token
            self._pause(wait + parity_rebuild_seconds(kept, set_up.b, self.costs.network.gb_s, chained=True))
            return
        if whole and not self.chunked:
            self._pause(wait + self._recompute_s(lost))
            return
        for part in prompts:
            part[1] = 0
        recompute_s = self._recompute_s(lost)
        for request in lost:
            self._stop(request)
        self.fresh = [request for request in self.fresh if request not in set(lost)]
        if self.chunked:
            # they are prompts again, before those that wait for their first token
            again = [[request, 0, self.prompt[request] + self.made[request]] for request in lost]
            self.prefilling.extendleft(reversed(again))
            if whole:
                self._pause(wait)
        else:
            self.record.pauses_s.append(wait + recompute_s)
            for request in lost:
                heapq.heappush(self.returning, (self.now + wait + recompute_s, request))

    def _pause(self, seconds: float) -> None:
        self.record.pauses_s.append(seconds)
        self._block(seconds)

    def _block(self, seconds: float) -> None:
        self.blocked_until = max(self.now, self.blocked_until) + seconds

    def _shrink(self, pool: int, whole: bool) -> bool:
        """Go on without the worker; who has no room left is ended, newest first. False: none has."""
        smaller = self.costs.without_worker()
        if smaller is None:
            self.capacity = [0] * len(self.capacity)
        elif whole:
            self.costs = smaller
            self.capacity = [smaller.pool_tokens // self.page]
        else:
            self.capacity[pool] = 0
        alive = any(self.capacity)
        for part in [*reversed(self.prefilling)]:
            if self._is_over(part[0]):
                self.prefilling.remove(part)
                self._give_up(part[0], again=alive and not whole)
        for request in [*reversed(self.running)]:
            if self._is_over(request):
                self._stop(request)
                self._give_up(request, again=alive and not whole)
        for request in [*self.queue]:
            if self._pages(self.prompt[request] + self.output[request]) > max(self.capacity):
                self.queue.remove(request)
                self.record.states[request] = State.SHED
                self.record.generated[request] = self.made[request]
        return alive

    def _is_over(self, request: int) -> bool:
        return self.used[self.pool[request]] > self.capacity[self.pool[request]]

    def _give_up(self, request: int, *, again: bool) -> None:
        """A request whose worker is gone: to the others, through the queue, or the end of it."""
        self._release(request)
        if request in self.fresh:
            self.fresh.remove(request)
        if again:
            self.record.states[request] = State.WAITING
            self.queue.appendleft(request)
            if not self.chunked:
                self._block(self._recompute_s([request]))
        else:
            self.record.states[request] = State.SHED
            self.record.generated[request] = self.made[request]

    def _recompute_s(self, requests: Sequence[int]) -> float:
        set_up = self.costs.set_up
        tokens = sum(self._context_now(request) for request in requests)
        return recompute_seconds(self.costs.model, tokens, set_up.compute, set_up.a * set_up.replicas)

    def _context_now(self, request: int) -> int:
        if request in self.running:
            return self.context[request] + self.iteration - self.begun[request]
        return self.prompt[request] + self.made[request]

    def _pages(self, tokens: int) -> int:
        return -(-tokens // self.page)


def tokens_made(segments: Sequence[Segment]) -> int:
    return sum(segment.rows * len(segment.seconds) + segment.extra_tokens for segment in segments)


def split_busy(segments: Sequence[Segment]) -> tuple[float, float, float]:
    return (
        math.fsum(segment.model_busy_s for segment in segments),
        math.fsum(segment.attention_busy_s for segment in segments),
        math.fsum(segment.link_busy_s for segment in segments),
    )


def iteration_seconds(segments: Sequence[Segment]) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Seconds and decoding rows of each iteration."""
    if not segments:
        return np.empty(0), np.empty(0, np.int64)
    seconds = np.concatenate([segment.seconds for segment in segments])
    lengths = [len(segment.seconds) for segment in segments]
    rows = np.repeat(np.array([segment.rows for segment in segments], dtype=np.int64), lengths)
    return seconds, rows
