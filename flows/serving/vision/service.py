"""What the routes do with the model: admission, deadlines, the way through the batcher, switching versions.

The invariant: a request is answered by the model that was current when it was admitted, also when another one
takes its place meanwhile. `switch` replaces the model for requests that come later; the old one is released
with the last request that holds it.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from starlette.requests import ClientDisconnect, Request

from flows.params import Serve
from flows.serving.bodies import CLOSE, RequestError
from flows.serving.rollout_state import RolloutState, utc, utc_now
from flows.serving.vision.access_log import OFF, AccessLog
from flows.serving.vision.batching import Batch, Batcher, Expired, QueueFull, Stopped, Work
from flows.serving.vision.metrics import Metrics
from flows.serving.vision.model import LoadedModel, Release, load_model
from flows.serving.vision.observing import BatchInfo, Observer, OnBatch, OnRequest

TIMEOUT_HEADER = "X-Request-Timeout-Ms"
WATCH_AFTER_S = 0.02  # a request that waits longer than this is watched for its client going away
CLOSE_S = 2.0  # for threads to end
T = TypeVar("T")


@dataclass(frozen=True)
class Limits:
    """Bounds on requests; see section `serve` of params.yaml."""

    max_upload_bytes: int
    max_request_images: int
    max_pixels: int
    queue_images: int
    max_requests: int  # with a body, held at once
    timeout_s: float
    max_timeout_s: float

    @classmethod
    def of(cls, settings: Serve, max_pixels: int) -> Limits:
        return cls(
            max_upload_bytes=settings.max_upload_mb * 1024 * 1024,
            max_request_images=settings.max_request_images,
            max_pixels=max_pixels,
            queue_images=settings.queue_images,
            max_requests=settings.max_requests,
            timeout_s=settings.timeout_ms / 1e3,
            max_timeout_s=settings.max_timeout_ms / 1e3,
        )


@dataclass
class Exchange:
    """One request and what is known about its answer: for the metrics, the access log and headers."""

    id: str
    started: float  # time.monotonic()
    route: str = "other"  # the path's template
    model: LoadedModel | None = None
    deadline: float = math.inf
    status: int = 0
    sent_bytes: int = 0
    input_s: float = 0.0
    queue_s: float = 0.0
    compute_s: float = 0.0
    batch_size: int = 0
    approaching: bool = False  # admitted, not in the queue yet


class VisionService:
    """The model in use and everything that requests share."""

    def __init__(
        self,
        model: LoadedModel,
        limits: Limits,
        *,
        access_log: AccessLog | None = None,
        on_batch: OnBatch | None = None,
        on_request: OnRequest | None = None,
    ) -> None:
        self.model = model
        self.limits = limits
        self.metrics = Metrics()
        self.access_log = access_log or AccessLog(OFF, 0, 0)
        self.on_request = on_request
        self.observer = Observer(on_batch) if on_batch is not None else None
        self.batcher = Batcher(limits.queue_images, self._count_batch)
        self.rollout = RolloutState(None, "fixed", "", utc_now())
        self.draining = False
        self.in_flight = 0
        # more threads than cores only adds memory: each holds a decoded image or a parsed tensor
        self._workers = ThreadPoolExecutor(max(2, model.session.threads), "decoder")
        self._publish()
        self.metrics.watch("queue_images", "Images that wait.", lambda: self.batcher.queued_images)
        self.metrics.watch(
            "requests_in_flight", "Requests with a body being answered.", lambda: self.in_flight
        )
        self.metrics.watch("access_log_dropped", "Lines not written.", lambda: self.access_log.dropped)
        self.metrics.watch("batches_unobserved", "Batches kept from on_batch.", self._unobserved)

    @property
    def ready(self) -> bool:
        return not self.draining

    # ---- one request ----

    @contextmanager
    def admitted(self, exchange: Exchange) -> Iterator[None]:
        """A place among the requests that may hold memory.

        Raises:
            RequestError: 503 when the server is stopping, 429 when all places are taken.
        """
        if self.draining:
            self.metrics.rejected.labels("stopping").inc()
            raise RequestError(503, "the server is stopping; ask another one", CLOSE)
        if self.in_flight >= self.limits.max_requests:
            self.metrics.rejected.labels("too_many_requests").inc()
            raise RequestError(
                429,
                f"{self.limits.max_requests} requests are being answered; try again shortly",
                {"Retry-After": str(self.batcher.retry_after_s()), **CLOSE},
            )
        self.in_flight += 1
        self.batcher.approaching += 1
        exchange.approaching = True
        try:
            yield
        finally:
            self.in_flight -= 1
            self._arrive(exchange)

    def _arrive(self, exchange: Exchange) -> None:
        if exchange.approaching:
            exchange.approaching = False
            self.batcher.approaching -= 1

    def set_deadline(self, request: Request, exchange: Exchange) -> None:
        """From header `X-Request-Timeout-Ms`, cut at the maximum, or the default; it counts from the start.

        Raises:
            RequestError: 400, not a positive number.
        """
        timeout_s, text = self.limits.timeout_s, request.headers.get(TIMEOUT_HEADER)
        if text is not None:
            try:
                timeout_s = float(text) / 1e3
            except ValueError:
                timeout_s = math.nan
            if not 0 < timeout_s < math.inf:
                raise RequestError(
                    400,
                    f"{TIMEOUT_HEADER} must be a positive number of milliseconds, got {text[:40]!r}",
                    CLOSE,
                )
        exchange.deadline = exchange.started + min(timeout_s, self.limits.max_timeout_s)

    async def work(self, function: Callable[[], T]) -> T:
        """Run `function` in a worker thread."""
        return await asyncio.get_running_loop().run_in_executor(self._workers, function)

    async def compute(
        self, request: Request, exchange: Exchange, images: NDArray[np.float32]
    ) -> NDArray[np.float32]:
        """Logits, float32 (n, classes), of preprocessed images, float32 (n, 3, S, S).

        Raises:
            RequestError: 429 no room in the queue, 504 the deadline passed, 503 the server stopped.
            ClientDisconnect: nobody waits for the answer any more.
        """
        loop, model = asyncio.get_running_loop(), exchange.model
        assert model is not None
        work = Work(model, images, exchange.deadline, loop, loop.create_future())
        exchange.input_s = time.monotonic() - exchange.started
        try:
            if exchange.deadline <= time.monotonic():
                raise Expired
            self.batcher.submit(work)
            self._arrive(exchange)
            logits = await self._wait(request, work)
        except Expired:
            self.metrics.expired.inc()
            model.counts.add_failure()
            allowed_ms = (exchange.deadline - exchange.started) * 1e3
            raise RequestError(504, f"the deadline of {allowed_ms:g} ms passed") from None
        except QueueFull as full:
            self.metrics.rejected.labels("queue_full").inc()
            model.counts.add_failure()
            raise RequestError(
                429,
                f"no room for {len(images)} images, {self.batcher.queued_images} are waiting; {full}",
                {"Retry-After": str(full.retry_after_s)},
            ) from None
        except Stopped:
            self.metrics.rejected.labels("stopping").inc()
            raise RequestError(503, "the server is stopping; ask another one", CLOSE) from None
        except ClientDisconnect:
            self.metrics.cancelled.inc()
            raise
        except Exception:
            model.counts.add_failure()
            raise
        exchange.queue_s = work.started - work.submitted
        exchange.compute_s, exchange.batch_size = work.compute_s, work.batch_size
        self.metrics.queue_seconds.observe(exchange.queue_s)
        model.counts.add_request(exchange.input_s, exchange.queue_s, exchange.compute_s)
        return logits

    async def _wait(self, request: Request, work: Work) -> NDArray[np.float32]:
        """The result of `work`; on the deadline, a vanished client or a cancelled task it is given up."""
        loop, watcher = asyncio.get_running_loop(), _Watcher(request, work)
        expiry = loop.call_later(max(0.0, work.deadline - time.monotonic()), _fail, work.future, Expired())
        watch = loop.call_later(WATCH_AFTER_S, watcher.start)
        try:
            return await work.future
        finally:
            expiry.cancel()
            watch.cancel()
            watcher.stop()
            if not work.finished:
                self.batcher.drop(work)

    # ---- all requests ----

    def switch(self, model: LoadedModel) -> None:
        """Serve `model` from the next request on; safe from any thread."""
        self.model = model
        self.metrics.switches.labels("switched").inc()
        self._publish()

    def load(self, release: Release, settings: Serve) -> LoadedModel:
        """`release`, ready to take over; see `load_model` for what it raises."""
        return load_model(release, settings, self.limits.max_pixels)

    def stop_admitting(self) -> None:
        """Not ready, no new work; what was admitted is answered."""
        self.draining = True

    def close(self) -> None:
        """Answer what still waits with 503 and end the threads."""
        self.draining = True
        self.batcher.close(CLOSE_S)
        self._workers.shutdown(wait=False, cancel_futures=True)
        if self.observer is not None:
            self.observer.close(CLOSE_S)
        self.access_log.close(CLOSE_S)

    def _publish(self) -> None:
        model = self.model
        self.metrics.serve_model(
            model.info.name,
            model.info.version,
            model.digest,
            model.info.variant,
            model.session.provider,
            model.loaded,
        )

    def _count_batch(self, batch: Batch) -> None:
        model = batch.model
        assert isinstance(model, LoadedModel)
        self.metrics.batch_seconds.observe(batch.seconds)
        self.metrics.batch_images.observe(len(batch.images))
        model.counts.add_batch(len(batch.images), batch.seconds)
        if self.observer is not None:
            info = BatchInfo(
                model.info.name, model.info.version, model.digest, model.info.variant, time.time()
            )
            self.observer.offer(batch.images, batch.outputs, info)

    def _unobserved(self) -> float:
        return self.observer.dropped + self.observer.failed if self.observer else 0

    # ---- what it says about itself ----

    def health(self) -> dict[str, Any]:
        model = self.model
        return {
            "status": "ok" if self.ready else "stopping",
            "model": model.info.name,
            "version": model.info.version,
            "variant": model.info.variant,
            "digest": model.digest,
            "digests": {name: variant.digest for name, variant in model.manifest.variants.items()},
            "data_digest": model.manifest.data_digest,
            "git_commit": model.info.git_commit,
            "providers": list(model.session.providers),
            "threads": model.session.threads,
            "max_batch": model.max_batch,
            "max_wait_ms": round(model.max_wait_s * 1e3, 3),
            "placement": model.placement,
            "loaded": utc(model.loaded),
            "rollout": vars(self.rollout),
        }

    def check_name(self, name: str, version: str | None) -> LoadedModel:
        """The model in use.

        Raises:
            RequestError: 404, another model or version than the served one.
        """
        model = self.model
        if name != model.info.name:
            raise RequestError(
                404, f"unknown model {name[:80]!r}; this server has {model.info.name!r}", CLOSE
            )
        if version is not None and version != model.info.version:
            raise RequestError(
                404,
                f"unknown version {version[:80]!r} of {name!r}; this server has {model.info.version!r}",
                CLOSE,
            )
        return model


class _Watcher:
    """Reads a request's channel for the one thing that can still come: the client's disconnection."""

    def __init__(self, request: Request, work: Work) -> None:
        self._request = request
        self._work = work
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._task = asyncio.get_running_loop().create_task(self._watch())

    def stop(self) -> None:
        if self._task is not None:
            self._task.cancel()

    async def _watch(self) -> None:
        while (await self._request.receive())["type"] != "http.disconnect":
            continue
        _fail(self._work.future, ClientDisconnect())


def _fail(future: asyncio.Future[Any], error: Exception) -> None:
    if not future.done():
        future.set_exception(error)
