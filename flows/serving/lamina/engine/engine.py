"""The loop: take messages, choose rows, run one iteration, journal its tokens, send them (spec 11, 14, 15).

One thread does everything, so that between two iterations nothing moves. An iteration changes nothing until
it has ended: if a worker is lost in the middle, the same rows are simply run again. What makes the text go on
unchanged is below: rows do not depend on what runs beside them, keys and values are written to addresses, and
a token's randomness is a function of its index.
"""

from __future__ import annotations

import queue
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from itertools import islice

import numpy as np
from numpy.typing import NDArray

from flows.errors import DataError, ResourceError, TrunklineError
from flows.params import Lamina
from flows.serving.lamina.attention.pool import WorkerLost
from flows.serving.lamina.engine.calibration import Calibration
from flows.serving.lamina.engine.journal import Journal, JournalFull, Remembered
from flows.serving.lamina.engine.memory import KvMemory
from flows.serving.lamina.engine.metrics import EngineMetrics
from flows.serving.lamina.engine.sampling import Choice, NotFinite, choose
from flows.serving.lamina.engine.scheduler import Scheduler, halves
from flows.serving.lamina.engine.sequence import Sequence as Request
from flows.serving.lamina.engine.step_time import StepTime
from flows.serving.lamina.engine.wire import Wire
from flows.serving.lamina.engine.workers import Change, Workers
from flows.serving.lamina.requests import (
    Accepted,
    Cancel,
    Drain,
    Finished,
    Follow,
    Heartbeat,
    Message,
    Rejected,
    Submit,
    ToEngine,
    WorkersMoved,
)
from flows.serving.lamina.rows import RowTable, Span, TableDelta
from flows.serving.lamina.slices.runner import Slices

IDLE_S = 0.05
RESTORE_S = 1.0  # how often missing workers are looked for
KEPT_ENDED = 1024  # requests that have ended and may still be followed
KEPT_IN_JOURNAL = 64  # of them, when the journal is written anew
MAX_CONTRADICTIONS = 3
CHECK_EVERY = 256  # iterations between two checks of the page tables
Rows = Sequence[tuple[Request, Span]]


class Engine:
    """
    Args:
        send: takes every message for the HTTP process; must not block.
    """

    def __init__(
        self,
        slices: Slices,
        settings: Lamina,
        workers: Workers,
        journal: Journal,
        calibration: Calibration,
        send: Callable[[Message], None],
    ) -> None:
        manifest = slices.bundle.manifest
        self.slices, self.settings, self.workers, self.journal = slices, settings, workers, journal
        self.calibration, self.metrics = calibration, EngineMetrics()
        self.inbox: queue.SimpleQueue[ToEngine] = queue.SimpleQueue()
        self.max_context = min(settings.model.max_context or manifest.max_context, manifest.max_context)
        self.step_time = StepTime()
        self.scheduler = Scheduler(settings, self.max_context, self.step_time)
        self.memory = self._new_memory()
        self.state = "loading"
        self.draining = False
        self.stopped = False
        self.iteration = 0
        self.tokens_generated = 0
        self._send = send
        self._ends = frozenset(manifest.eos_token_ids)
        self._requests: dict[str, Request] = {}
        self._ended: dict[str, tuple[Request, Finished]] = {}
        self._orders = 0
        self._progress = time.monotonic()
        self._restored = time.monotonic()
        self._contradictions = 0
        self._traffic: list[tuple[int, int]] = []

    # --- life

    def run(self) -> None:
        """Until drained or told to stop."""
        self._remember()
        self.state = "ready"
        while not self.stopped:
            self.turn()

    def turn(self) -> None:
        """One round of the loop."""
        idle = not (self.scheduler.running or self.scheduler.waiting)
        if not self.scheduler.running:
            self._progress = time.monotonic()  # nothing can stand still; what starts next has all its time
        self._take_messages(IDLE_S if idle else 0.0)
        if self.draining and not (self.scheduler.running or self.scheduler.waiting):
            self.stopped = True
            return
        self._expire()
        try:
            self._forget_released()
            self.scheduler.admit(self.memory)
            rows = self.scheduler.rows(self.memory, self._preempt)
            if rows:
                self._commit(rows, self._iterate(rows))
            elif self.scheduler.waiting and not self.memory.released:
                time.sleep(IDLE_S)  # nobody can start, and nobody runs who would make room
        except (WorkerLost, DataError) as error:
            self._recover(error)
        self._look_for_missing()

    def heartbeat(self) -> Heartbeat:
        """What is going on; called by another thread."""
        running = len(self.scheduler.running)
        state = "draining" if self.draining and self.state == "ready" else self.state
        missing = [f"attention worker {j} is missing" for j, up in enumerate(self.workers.up) if not up]
        return Heartbeat(
            state=state,  # type: ignore[arg-type]
            reasons=tuple(missing),
            epoch=self.workers.epoch,
            iterations=self.iteration,
            running=running,
            waiting=len(self.scheduler.waiting),
            waiting_tokens=self.scheduler.waiting_tokens,
            pages=self.memory.total,
            pages_used=self.memory.used,
            tokens_generated=self.tokens_generated,
            preemptions=self.scheduler.preemptions,
            since_progress_s=max(0.0, time.monotonic() - self._progress) if running else 0.0,
            workers_up=tuple(self.workers.up),
            batch_invariant=self.calibration.batch_invariant,
        )

    def render_metrics(self) -> str:
        """Prometheus text; called by another thread."""
        self.metrics.pages.labels("used").set(self.memory.used)
        self.metrics.pages.labels("free").set(self.memory.total - self.memory.used)
        return self.metrics.render()

    # --- messages

    def _take_messages(self, wait_s: float) -> None:
        try:
            message = self.inbox.get(timeout=wait_s) if wait_s else self.inbox.get_nowait()
            while True:
                self._obey(message)
                message = self.inbox.get_nowait()
        except queue.Empty:
            return

    def _obey(self, message: ToEngine) -> None:
        if isinstance(message, Submit):
            self._submit(message)
        elif isinstance(message, Cancel):
            request = self._requests.get(message.id)
            if request is not None:
                self._end(request, request.finished(message.reason))
        elif isinstance(message, Follow):
            self._follow(message)
        elif isinstance(message, Drain):
            self.draining = True
        elif isinstance(message, WorkersMoved):
            self.workers.move(message.addresses)

    def _submit(self, submit: Submit) -> None:
        request = Request(submit, self._orders)
        rejected = self._refusal(request)
        if rejected is None:
            try:
                self.journal.submitted(submit)
            except JournalFull as error:
                rejected = Rejected(
                    id=submit.id, status=503, code="journal_full", message=str(error), retry_after_s=10.0
                )
        if rejected is not None:
            self._send(rejected)
            return
        self._orders += 1
        self._requests[submit.id] = request
        self.scheduler.waiting.append(request)
        self._send(Accepted(id=submit.id))
        self.scheduler.admit(self.memory)  # the next one is not refused for a queue that nobody stands in

    def _refusal(self, request: Request) -> Rejected | None:
        vocabulary = self.slices.bundle.manifest.vocab_size
        if request.id in self._requests or request.id in self._ended:
            message = "a request with this id is known already"
            return Rejected(id=request.id, status=409, code="duplicate_id", message=message)
        if self.draining:
            message = "the server is shutting down"
            return Rejected(id=request.id, status=503, code="draining", message=message, retry_after_s=5.0)
        if (largest := max(request.submit.prompt)) >= vocabulary:
            message = f"token {largest} is outside the vocabulary of {vocabulary}"
            return Rejected(id=request.id, status=400, code="invalid_token", message=message)
        return self.scheduler.refuse(request, self.memory)

    def _follow(self, message: Follow) -> None:
        request = self._requests.get(message.id)
        ended = self._ended.get(message.id)
        known = request or (ended and ended[0])
        if not known:
            text = "the engine does not know this request"
            self._send(
                Finished(id=message.id, reason="error", code="unknown_request", message=text, status=404)
            )
            return
        for index in range(message.index, len(known.choices)):
            self._send(known.event(index))
        if ended:
            self._send(ended[1])

    def _remember(self) -> None:
        """Take up what the journal promised."""
        for remembered in self.journal.requests.values():
            request = Request(remembered.submit, self._orders, choices=list(remembered.choices))
            request.tokens += [choice.token for choice in request.choices]
            request.recoveries = remembered.restarts + 1  # this start is one, too
            self._orders += 1
            if remembered.finished is not None:
                self._ended[request.id] = request, remembered.finished
                continue
            self._requests[request.id] = request
            self.scheduler.waiting.append(request)
            self.metrics.recoveries.labels("journal").inc()
            request.replayed = len(request.tokens) - 1 if request.choices else 0
            self.metrics.replayed.inc(request.replayed)
            if request.choices and (finished := self._natural_end(request)):
                self._end(request, finished)  # only the last line was missing
            elif request.recoveries > self.settings.recover.max_recoveries:
                self._fail(request, "recovery_failed", "the request was interrupted too often", 503)
        self.journal.requests.clear()

    # --- an iteration

    def _iterate(self, rows: Rows) -> dict[Request, NDArray[np.float32]]:
        """Run the rows; logits (vocabulary,) of each request whose last pending row was among them."""
        self.iteration += 1
        began = time.perf_counter()
        count = sum(span.length for _, span in rows)
        parts = self._micro_batches(rows, count)
        pool = self.workers.link
        runs = []
        for micro_batch, part in enumerate(parts):
            table = RowTable(tuple(span for _, span in part), tuple(self._deltas(part)))
            pool.plan(table, self.iteration, micro_batch)
            ids = np.fromiter((token for request, span in part for token in _tokens(request, span)), np.int64)
            last = table.last_rows
            ends = [span.end == len(request.tokens) for request, span in part]
            attention = Wire(pool, self.iteration, micro_batch)
            wanted = last[np.array(ends, bool)]
            runs.append(self.slices.start(ids, table.positions, attention, wanted))
            now = time.monotonic()
            for request, _ in part:
                request.started_at = request.started_at or now
        active = list(runs)
        while active:
            active = [run for run in active if run.step()]
        logits: dict[Request, NDArray[np.float32]] = {}
        for part, run in zip(parts, runs, strict=True):
            asked = [request for request, span in part if span.end == len(request.tokens)]
            logits.update(zip(asked, run.logits, strict=True))
        seconds = time.perf_counter() - began
        self._observe(rows, count, seconds, [run.seconds for run in runs])
        return logits

    def _micro_batches(self, rows: Rows, count: int) -> Sequence[Rows]:
        setting = self.settings.sched.micro_batches
        wanted = self.calibration.micro_batches(count) if setting == "auto" else setting
        return halves(rows) if wanted == 2 and len(rows) > 1 else [rows]

    def _deltas(self, part: Rows) -> list[TableDelta]:
        found = (self.memory.deltas(request) for request, _ in part)
        return [delta for delta in found if delta is not None]

    def _observe(self, rows: Rows, count: int, seconds: float, parts: list[dict[str, float]]) -> None:
        attended = sum(span.length * span.end for _, span in rows)
        self.step_time.observe(count, attended, seconds)
        self.metrics.iteration_seconds.observe(seconds)
        self.metrics.iteration_rows.observe(count)
        self.metrics.micro_batches.set(len(parts))
        for part in parts:
            self.metrics.layers(part, len(self.workers.model.layers))
        if self.slices.split:
            self.metrics.overlap_saved.inc(max(0.0, self.calibration.overlap_gain_s(count)))
        traffic = self.workers.link.traffic()
        for worker, ((sent, received), (sent_before, received_before)) in enumerate(
            zip(traffic, self._traffic or [(0, 0)] * len(traffic), strict=True)
        ):
            self.metrics.link_bytes.labels(str(worker), "out").inc(max(0, sent - sent_before))
            self.metrics.link_bytes.labels(str(worker), "in").inc(max(0, received - received_before))
        self._traffic = traffic

    def _commit(self, rows: Rows, logits: dict[Request, NDArray[np.float32]]) -> None:
        """The iteration has ended: what it stored counts, its tokens are journalled, then sent."""
        self.workers.completed()
        self._contradictions = 0
        self._progress = time.monotonic()
        for request, span in rows:
            request.computed += span.length
            request.table_sent = self.memory.entries(request)
        chosen: list[tuple[Request, Choice]] = []
        for request, row in logits.items():
            try:
                chosen.append((request, choose(row, request.submit.sampling, request.generated)))
            except NotFinite as error:
                self._fail(request, "numeric_error", str(error), 500)
        try:
            self.journal.chose([(request.id, request.generated, choice) for request, choice in chosen])
        except JournalFull as error:
            for request, _ in chosen:
                self._fail(request, "journal_full", str(error), 503)
            return
        for request, choice in chosen:
            request.append(choice)
            self.tokens_generated += 1
            self._send(request.event(request.generated - 1))
            if finished := self._natural_end(request):
                self._end(request, finished)
        self.journal.compact(self._worth_keeping())
        if self.iteration % CHECK_EVERY == 0:
            self.memory.check({request.slot: request for request in self.scheduler.running})

    def _worth_keeping(self) -> Iterator[Remembered]:
        """What a new journal has: what is open, and ends that the HTTP process may not have been told yet."""
        recent = islice(reversed(self._ended.values()), KEPT_IN_JOURNAL)
        for request, finished in reversed(list(recent)):
            yield Remembered(request.submit, request.choices, finished)
        for request in self._requests.values():
            yield Remembered(request.submit, request.choices)

    def _natural_end(self, request: Request) -> Finished | None:
        last = request.tokens[-1]
        ends = self._ends if not request.submit.ignore_eos else frozenset()
        if last in ends or last in request.submit.stop_token_ids:
            return request.finished("stop")
        return request.finished("length") if request.generated >= request.submit.max_tokens else None

    # --- ends

    def _expire(self) -> None:
        now = time.time()
        for request in [request for request in self._requests.values() if request.expired(now)]:
            where = "while it waited" if request.started_at is None else "before it was finished"
            self._fail(request, "deadline_exceeded", f"the request's deadline passed {where}", 504)

    def _fail(self, request: Request, code: str, message: str, status: int) -> None:
        self._end(request, request.finished("error", code, message, status))

    def _end(self, request: Request, finished: Finished) -> None:
        self.memory.release(request)
        self.scheduler.end(request)
        self._requests.pop(request.id, None)
        self._ended[request.id] = request, finished
        for old in list(islice(self._ended, max(0, len(self._ended) - KEPT_ENDED))):
            del self._ended[old]
        with suppress(JournalFull):  # an engine that starts again would compute the same end once more
            self.journal.finished([finished])
        self._send(finished)

    def _preempt(self, request: Request) -> None:
        self._lose(request)
        self.memory.release(request)
        self.scheduler.preempt(request)
        self.metrics.preemptions.inc()

    def _lose(self, request: Request) -> None:
        self.metrics.replayed.inc(request.computed)
        request.lose()

    def _forget_released(self) -> None:
        if released := self.memory.released:
            self.workers.link.free(released)
            self.memory.forgotten()

    # --- losses

    def _recover(self, error: TrunklineError) -> None:
        """Until the next iteration can begin, whatever else is lost meanwhile."""
        began = time.monotonic()
        self.state = "recovering"
        lost: set[int] = set()  # also of attempts that did not come to their end
        rebuilt = contradiction = False
        while True:
            if not isinstance(
                error, WorkerLost
            ):  # a worker and this engine disagree: nothing there is believed
                contradiction = True
                self._contradictions += 1
                if self._contradictions > MAX_CONTRADICTIONS:
                    raise ResourceError(f"attention workers refuse again and again: {error}")
            change = self.workers.reconnect(error, self._meanwhile)
            lost, rebuilt = change.lost | lost, change.rebuilt or rebuilt
            change.lost, change.rebuilt = lost, rebuilt
            if contradiction:
                change.lost |= set(range(self.workers.partition.workers))
            try:
                self._settle(change)
                break
            except (WorkerLost, DataError) as another:
                error = another
        self._traffic = []
        self.metrics.recovery_seconds.observe(time.monotonic() - began)
        self.state = "ready"

    def _settle(self, change: Change) -> None:
        """Bring requests and workers in line with who is there now."""
        pool = self.workers.link
        policy = "rebuild" if change.rebuilt else "recompute" if change.lost else "resend"
        if not change.rebuilt and self.workers.parity and len(change.lost) == 1:
            policy = "parity"
            self._rebuild(*change.lost)
        elif change.rebuilt:
            for request in list(self.scheduler.running):
                self._count_recovery(request)
                if request.running:
                    self._preempt(request)
            self.memory = self._new_memory()
            pool.free(range(self.settings.sched.max_requests))
        else:
            self.memory.down = self.workers.down
            for request in list(self.scheduler.running):
                if not self.memory.lost_by(request, change.lost):
                    request.table_sent = 0  # the same entries once more change nothing
                    continue
                self._count_recovery(request)
                if not request.running:
                    continue
                if self.memory.lost_by(request, self.workers.down):
                    self._preempt(request)
                else:
                    self._lose(request)
            self._free_others()
        self.metrics.recoveries.labels(policy).inc()

    def _rebuild(self, lost: int) -> None:
        """One worker's keys and values from those of all others and the parity."""
        self._free_others()
        pool = self.workers.link
        for request in self.scheduler.running:
            request.table_sent = 0
        pool.assign(self._deltas([(request, Span(request.slot, 0)) for request in self.scheduler.running]))
        lengths = {request.slot: request.computed for request in self.scheduler.running if request.computed}
        self.iteration += 1
        pool.rebuild(lost, lengths, self.iteration)

    def _free_others(self) -> None:
        """Let the workers forget every slot that nobody runs in."""
        running = {request.slot for request in self.scheduler.running}
        free = [slot for slot in range(self.settings.sched.max_requests) if slot not in running]
        self.workers.link.free(free)
        self.memory.forgotten()

    def _count_recovery(self, request: Request) -> None:
        if not request.computed:
            return
        request.recoveries += 1
        if request.recoveries > self.settings.recover.max_recoveries:
            message = f"attention workers were lost {request.recoveries} times during this request"
            self._fail(request, "recovery_failed", message, 503)

    def _meanwhile(self) -> None:
        self._take_messages(0.0)
        self._expire()

    def _look_for_missing(self) -> None:
        now = time.monotonic()
        if not self.workers.degraded or now - self._restored < RESTORE_S:
            return
        self._restored = now
        if self.scheduler.running and self.settings.cluster.partition != "request":
            return  # another partition costs everything that runs
        change = self.workers.restore()
        if change is not None:
            try:
                self._settle(change)
            except (WorkerLost, DataError) as error:
                self._recover(error)

    def _new_memory(self) -> KvMemory:
        workers = self.workers
        return KvMemory(workers.partition, workers.pages, self.settings.sched.max_requests)


def _tokens(request: Request, span: Span) -> Sequence[int]:
    return request.tokens[span.position : span.end]
