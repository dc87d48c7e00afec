"""Dynamic batching: what waits is run together; one bounded queue, counted in images, is all that may wait.

One thread owns the network. While it runs a batch, requests gather; when it is done it takes as many images
as a batch holds, in order of arrival. Requests are split where a batch is full and joined again, so that
their size does not matter. Nothing waits for company on an idle server, and after a busy batch only while
other requests are known to be on their way, `max_wait_s` at most.

The invariant: every admitted request is answered exactly once, with rows of its own images computed by the
model it was prepared for. A batch that fails is repeated request by request, so that a bad one fails alone.
"""

from __future__ import annotations

import asyncio
import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Images = NDArray[np.float32]
LOGITS = "logits"
SMOOTHING = 0.2  # weight of the newest batch in the measured throughput
MAX_RETRY_AFTER_S = 60


class BatchModel(Protocol):
    """What the batcher needs of a loaded model."""

    max_batch: int
    max_wait_s: float

    def run(self, images: Images) -> dict[str, Images]:
        """Every output by name, rows in the order of `images`."""


class QueueFull(Exception):
    """The queue has no room for a request; it has after about `retry_after_s`."""

    def __init__(self, retry_after_s: int) -> None:
        super().__init__(f"try again in {retry_after_s} s")
        self.retry_after_s = retry_after_s


class Expired(Exception):
    """The deadline passed before the answer was there."""


class Stopped(Exception):
    """The server stopped before the request was computed."""


@dataclass(eq=False)
class Work:
    """The images of one request on their way through the batcher."""

    model: BatchModel
    images: Images  # (n, 3, S, S)
    deadline: float  # time.monotonic()
    loop: asyncio.AbstractEventLoop
    future: asyncio.Future[Images]  # logits (n, classes)
    submitted: float = 0.0
    started: float = 0.0  # when its first batch began to run
    compute_s: float = 0.0  # of all batches it was part of
    batch_size: int = 0  # images of the largest of them
    behind: bool = False  # it came while a batch was running
    taken: int = 0  # images that are in a batch or computed
    done: int = 0  # images that are computed
    logits: Images | None = None
    failure: Exception | None = None

    def fill(self, rows: Images, start: int) -> None:
        if len(rows) == len(self.images):
            self.logits = rows
        else:
            if self.logits is None:
                self.logits = np.empty((len(self.images), *rows.shape[1:]), dtype=rows.dtype)
            self.logits[start : start + len(rows)] = rows
        self.done += len(rows)

    @property
    def finished(self) -> bool:
        return self.failure is not None or self.done == len(self.images)


@dataclass(frozen=True)
class Part:
    """Images start…start+count of one request, in one batch."""

    work: Work
    start: int
    count: int

    @property
    def images(self) -> Images:
        return self.work.images[self.start : self.start + self.count]


@dataclass(frozen=True)
class Batch:
    """What has been run, as listeners see it."""

    model: BatchModel
    images: Images
    outputs: dict[str, Images]
    seconds: float
    waited_s: list[float] = field(default_factory=list)  # of the requests whose first images these were


class Batcher:
    """The queue and the thread behind it. `submit` and `drop` are safe from any thread."""

    def __init__(self, queue_images: int, on_batch: Callable[[Batch], None] | None = None) -> None:
        """
        Args:
            queue_images: images that may wait, over all requests.
            on_batch: told of every batch, in the batcher's thread, so it has to be quick.
        """
        self.queue_images = queue_images
        self._on_batch = on_batch
        self._queue: deque[Work] = deque()
        self._changed = threading.Condition()
        self._queued = 0  # images
        self._running = False
        self._closed = False
        self._thread: threading.Thread | None = None
        self._images_per_s = 0.0
        self.approaching = 0  # requests being read or decoded, which will be submitted soon

    @property
    def queued_images(self) -> int:
        return self._queued

    @property
    def is_idle(self) -> bool:
        return not self._queued and not self._running

    def retry_after_s(self) -> int:
        """How long the present queue takes, from the throughput of recent batches; at least 1."""
        if not self._images_per_s:
            return 1
        return max(1, min(MAX_RETRY_AFTER_S, math.ceil(self._queued / self._images_per_s)))

    def submit(self, work: Work) -> None:
        """
        Raises:
            QueueFull: there is no room for all of its images.
            Stopped: the batcher was closed.
        """
        with self._changed:
            if self._closed:
                raise Stopped
            if self._queued + len(work.images) > self.queue_images:
                raise QueueFull(self.retry_after_s())
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="batcher", daemon=True)
                self._thread.start()
            work.submitted, work.behind = time.monotonic(), self._running
            self._queue.append(work)
            self._queued += len(work.images)
            self._changed.notify()

    def drop(self, work: Work) -> None:
        """Give up `work`: what is still queued of it is not computed and makes room at once."""
        with self._changed:
            if work.taken < len(work.images):
                self._queue.remove(work)
                self._queued -= len(work.images) - work.taken
                work.taken = len(work.images)

    def close(self, timeout_s: float) -> None:
        """Fail what is queued with `Stopped`; the running batch may end within `timeout_s`."""
        with self._changed:
            self._closed = True
            left = list(self._queue)
            self._queue.clear()
            self._queued = 0
            for work in left:
                work.taken, work.failure = len(work.images), Stopped()
            self._changed.notify()
        answer(left)
        if self._thread is not None:
            self._thread.join(timeout_s)

    # ---- the thread ----

    def _work(self) -> None:
        while (parts := self._next_batch()) is not None:
            finished = self._run(parts)
            del parts  # a replaced model must not be kept alive by the batch that ran last
            answer(finished)
            del finished

    def _next_batch(self) -> list[Part] | None:
        """Wait for work and take a batch of it; None when the batcher is closed."""
        with self._changed:
            self._running = False
            while True:
                while not self._queue and not self._closed:
                    self._changed.wait()
                if self._closed:
                    return None
                self._wait_for_company()
                if parts := self._take():
                    self._running = True
                    return parts

    def _wait_for_company(self) -> None:
        while self._queue and not self._closed:
            oldest = self._queue[0]
            until = oldest.submitted + oldest.model.max_wait_s
            left = min(until, oldest.deadline) - time.monotonic()
            alone = not oldest.behind or self.approaching <= 0
            if alone or left <= 0 or self._queued >= oldest.model.max_batch:
                return
            self._changed.wait(left)

    def _take(self) -> list[Part]:
        """The next images in order of arrival, of one model; what is past its deadline is thrown out."""
        parts: list[Part] = []
        late: list[Work] = []
        room, now = 0, time.monotonic()
        while self._queue:
            work = self._queue[0]
            waiting = len(work.images) - work.taken
            if work.deadline <= now:
                work.failure = Expired()
                late.append(work)
                count = waiting
            elif not parts or (room and work.model is parts[0].work.model):
                room = room if parts else work.model.max_batch
                count = min(room, waiting)
                parts.append(Part(work, work.taken, count))
                room -= count
            else:
                break
            work.taken += count
            self._queued -= count
            if work.taken == len(work.images):
                self._queue.popleft()
        answer(late)
        return parts

    def _run(self, parts: list[Part]) -> list[Work]:
        """Run a batch and hand out its rows; the requests that are complete now."""
        model = parts[0].work.model
        images = parts[0].images if len(parts) == 1 else np.concatenate([part.images for part in parts])
        started = time.monotonic()
        waited = []
        for part in parts:
            if not part.work.started:
                part.work.started = started
                waited.append(started - part.work.submitted)
        try:
            outputs = model.run(images)
        except Exception as error:
            if len(parts) == 1:
                parts[0].work.failure = error
                self.drop(parts[0].work)  # the images that did not fit into this batch
                return [parts[0].work]
            return [work for part in parts for work in self._run([part])]
        seconds = time.monotonic() - started
        self._measure(len(images) / max(seconds, 1e-6))
        position = 0
        for part in parts:
            part.work.compute_s += seconds
            part.work.batch_size = max(part.work.batch_size, len(images))
            part.work.fill(outputs[LOGITS][position : position + part.count], part.start)
            position += part.count
        if self._on_batch is not None:
            try:
                self._on_batch(Batch(model, images, outputs, seconds, waited))
            except Exception as error:  # a bug there must not end this thread
                logging.getLogger("trunkline.serving").error("counting a batch failed", exc_info=error)
        return [part.work for part in parts if part.work.finished]

    def _measure(self, images_per_s: float) -> None:
        before = self._images_per_s or images_per_s
        self._images_per_s = before + SMOOTHING * (images_per_s - before)


def answer(finished: list[Work]) -> None:
    """Resolve the futures of `finished` in their event loops, with one wake-up each."""
    by_loop: dict[asyncio.AbstractEventLoop, list[Work]] = {}
    for work in finished:
        by_loop.setdefault(work.loop, []).append(work)
    for loop, works in by_loop.items():
        try:
            loop.call_soon_threadsafe(_resolve, works)
        except RuntimeError:  # the loop was closed: nobody waits any more
            continue


def _resolve(works: list[Work]) -> None:
    for work in works:
        if work.future.done():
            continue
        if work.failure is not None:
            work.future.set_exception(work.failure)
        else:
            assert work.logits is not None
            work.future.set_result(work.logits)
