"""Who runs, who waits, and which rows the next iteration has (spec section 15).

Waiting requests are ordered by priority, which improves by one step for every `ageing_s` of waiting, then by
arrival. An iteration holds one row of every request that decodes, and pieces of prompts in the rows that are
left. Nothing here knows of workers or files.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence

from flows.params import Lamina
from flows.serving.lamina.engine.memory import KvMemory
from flows.serving.lamina.engine.sequence import Sequence as Request
from flows.serving.lamina.engine.step_time import StepTime
from flows.serving.lamina.requests import Rejected
from flows.serving.lamina.rows import RowKind, Span

DRAIN_WINDOW = 64  # requests that have ended, from which Retry-After is told
MAX_RETRY_AFTER_S = 60.0


class Scheduler:
    """The waiting and the running requests."""

    def __init__(self, settings: Lamina, max_context: int, step_time: StepTime) -> None:
        self._settings, self._max_context, self._step_time = settings, max_context, step_time
        self.waiting: list[Request] = []
        self.running: list[Request] = []
        self.preemptions = 0
        self._ended: deque[float] = deque(maxlen=DRAIN_WINDOW)

    @property
    def waiting_tokens(self) -> int:
        return sum(len(request.tokens) for request in self.waiting)

    def refuse(self, request: Request, memory: KvMemory) -> Rejected | None:
        """Why a request may not even wait, or None."""
        longest = len(request.submit.prompt) + request.submit.max_tokens
        if longest > self._max_context:
            return Rejected(
                id=request.id, status=400, code="context_length_exceeded",
                message=f"{len(request.submit.prompt)} tokens of prompt and {request.submit.max_tokens} of "
                f"answer are {longest}; this model takes {self._max_context} together",
            )  # fmt: skip
        if not memory.ever_fits(request.longest):
            return Rejected(
                id=request.id, status=400, code="context_length_exceeded",
                message=f"{longest} tokens do not fit the memory for keys and values on the attention "
                "workers; ask for less or give them more (kv.mb_per_worker)",
            )  # fmt: skip
        admit = self._settings.admit
        full = len(self.waiting) >= max(admit.max_queued_requests, 1 if not self.running else 0)
        tokens = self.waiting_tokens + len(request.tokens)
        if full or (self.waiting and tokens > admit.max_queued_tokens):
            return Rejected(
                id=request.id, status=429, code="queue_full",
                message=f"{len(self.waiting)} requests with {self.waiting_tokens} tokens are waiting already",
                retry_after_s=self.retry_after_s(),
            )  # fmt: skip
        return None

    def retry_after_s(self) -> float:
        """How long the queue takes to empty, at the rate at which requests have ended lately."""
        now = time.monotonic()
        if len(self._ended) < 2:
            return 1.0
        rate = len(self._ended) / max(now - self._ended[0], 1e-3)
        return min(MAX_RETRY_AFTER_S, max(1.0, len(self.waiting) / rate))

    def admit(self, memory: KvMemory) -> list[Request]:
        """Start waiting requests, in order, as far as slots, pages and the promised time per token allow."""
        sched = self._settings.sched
        started = []
        for request in sorted(self.waiting, key=self._urgency):
            if len(self.running) >= sched.max_requests or not self._fast_enough(request):
                break
            full = self._settings.kv.reserve == "full"
            tokens = request.longest if full else len(request.tokens)
            if not memory.admit(request, tokens, 0 if full else len(self.running)):
                break  # smaller ones behind it must not starve it
            self.waiting.remove(request)
            self.running.append(request)
            started.append(request)
        return started

    def rows(self, memory: KvMemory, preempt: Callable[[Request], None]) -> list[tuple[Request, Span]]:
        """What every running request contributes to the next iteration: decoding ones first."""
        room = self._settings.sched.max_rows
        chosen: list[tuple[Request, Span]] = []
        by_age = sorted(self.running, key=lambda request: (request.pending > 1, request.order))
        for request in by_age:
            if room == 0:
                break
            if not request.running:
                continue  # preempted for one before it
            count = min(request.pending, room)
            if not self._make_room(request, request.computed + count, memory, preempt, chosen):
                continue
            kind = RowKind.DECODE if count == 1 else RowKind.CHUNK
            chosen.append((request, Span(request.slot, request.computed, count, kind)))
            room -= count
        return [(request, span) for request, span in chosen if request.running]

    def preempt(self, request: Request) -> None:
        """Back to the queue, where it keeps its place by arrival; its rows are computed again later."""
        self.running.remove(request)
        self.waiting.append(request)
        self.preemptions += 1

    def end(self, request: Request) -> None:
        """A request has ended, wherever it was."""
        for group in (self.running, self.waiting):
            if request in group:
                group.remove(request)
        self._ended.append(time.monotonic())

    def _make_room(
        self,
        request: Request,
        tokens: int,
        memory: KvMemory,
        preempt: Callable[[Request], None],
        chosen: Sequence[tuple[Request, Span]],
    ) -> bool:
        while not memory.grow(request, tokens):
            if memory.released:
                return False  # there is room once the workers have forgotten
            youngest = max(self.running, key=lambda other: other.order)
            if youngest is request:
                if len(self.running) > 1:
                    preempt(request)
                return False
            preempt(youngest)
        return True

    def _urgency(self, request: Request) -> tuple[float, int]:
        waited = time.monotonic() - request.queued_at
        return request.submit.priority - waited // self._settings.sched.ageing_s, request.order

    def _fast_enough(self, request: Request) -> bool:
        limit_s = self._settings.sched.tbt_slo_ms / 1000
        if not limit_s or not self.running:
            return True
        rows = len(self.running) + 1
        attended = sum(len(other.tokens) for other in self.running) + len(request.tokens)
        predicted = self._step_time.predict(rows, attended)
        return predicted is None or predicted <= limit_s


def halves(rows: Sequence[tuple[Request, Span]]) -> tuple[list[tuple[Request, Span]], ...]:
    """Two micro-batches with about as many rows and keys each: the largest goes first, to the smaller one."""
    parts: tuple[list[tuple[Request, Span]], ...] = ([], [])
    loads = [0.0, 0.0]
    ordered = sorted(rows, key=lambda item: -_weight(item[1]))
    for item in ordered:
        index = loads.index(min(loads))
        parts[index].append(item)
        loads[index] += _weight(item[1])
    return tuple(part for part in parts if part)


def _weight(span: Span) -> float:
    return span.length * (256.0 + span.end)  # a row's products cost about as much as so many keys
