"""The engine's side: one object for all attention workers of a model.

    with AttentionPool(addresses, token, partition, model) as pool:
        pool.plan(table)
        for layer in range(layers):
            pool.attend(layer, q)            # leaves before k and v are computed
            out = pool.kv(layer, k, v)

Answers are gathered in worker order. A worker that is gone or silent is one `WorkerLost`, one that says no is
one `DataError`; both name it. Then that iteration is over, and a pool with a higher epoch takes over.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Self, TypeVar

import numpy as np
from numpy.typing import NDArray

from flows.errors import DataError, ResourceError
from flows.serving.lamina.attention.frames import (
    Frame,
    FrameError,
    FrameType,
    Header,
    NumberType,
    pack_json,
    pack_tensors,
    unpack_json,
    unpack_tensors,
)
from flows.serving.lamina.attention.partition import Partition, Share, cut_keys, cut_queries, join
from flows.serving.lamina.attention.session import LayerSettings, WorkerSettings
from flows.serving.lamina.attention.transport import Dial, Link, LinkClosed, LinkTimeout, dial
from flows.serving.lamina.rows import RowTable, TableDelta

T = TypeVar("T")

MIN_DEADLINE_S = 0.25
DEADLINE_FACTOR = 5.0
SMOOTHING = 0.1


class WorkerLost(ResourceError):
    """An attention worker is gone or silent; `worker` is its number."""

    def __init__(self, worker: int, message: str) -> None:
        super().__init__(message)
        self.worker = worker


@dataclass(frozen=True)
class ModelShape:
    """What attention has to know of a model."""

    layers: Sequence[LayerSettings]
    heads: int
    kv_heads: int
    head_dim: int


@dataclass
class _Current:
    """The micro-batch under way: who takes part."""

    header: Header
    rows: int
    shares: dict[int, Share]


class AttentionPool:
    """Connections to all workers.

    Args:
        addresses: host and port of each worker; their order is the order of the partition.
        pages: of each worker.
        epoch: above that of every pool before; workers drop what older ones send.
        layer_timeout_s: for one layer; None is max(250 ms, 5 times the smoothed time of a layer), and the
            connect timeout for the first layer.
    """

    def __init__(
        self,
        addresses: Sequence[tuple[str, int]],
        token: bytes,
        partition: Partition,
        model: ModelShape,
        pages: int,
        *,
        epoch: int = 1,
        block_tokens: int = 1024,
        layer_timeout_s: float | None = None,
        connect_timeout_s: float = 10.0,
        debug: bool = False,
        dial: Dial = dial,
    ) -> None:
        if len(addresses) != partition.workers:
            raise DataError(f"{len(addresses)} addresses for a partition over {partition.workers} workers")
        if model.heads % model.kv_heads:
            raise DataError(f"{model.heads} query heads do not divide over {model.kv_heads} heads of keys")
        self.partition, self.model, self.epoch = partition, model, epoch
        self.layer_s: float | None = None  # smoothed time of a layer
        self.batch_invariant = True
        self.names = [f"attention worker {j} ({host}:{port})" for j, (host, port) in enumerate(addresses)]
        self._timeout_s, self._connect_s = layer_timeout_s, connect_timeout_s
        self._current: dict[tuple[int, int], _Current] = {}
        self._began: dict[tuple[int, int, int], float] = {}
        self._links: list[Link] = []
        try:
            for worker, (host, port) in enumerate(addresses):
                self._links.append(self._guard(worker, lambda h=host, p=port: dial(h, p, connect_timeout_s)))  # type: ignore[misc]
                self._ask(worker, Header(FrameType.HELLO, epoch), token)
                heads = partition.kv_heads(worker)
                settings = WorkerSettings(
                    layers=list(model.layers), kv_heads=heads.stop - heads.start,
                    group=model.heads // model.kv_heads, head_dim=model.head_dim, pages=pages,
                    block_tokens=block_tokens, partials=partition.partials, debug=debug,
                )  # fmt: skip
                answer = self._ask(worker, Header(FrameType.CONFIG, epoch), pack_json(settings.model_dump()))
                self.batch_invariant &= bool(unpack_json(answer).get("batch_invariant"))
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def deadline_s(self) -> float:
        """What a layer may take now."""
        if self._timeout_s is not None:
            return self._timeout_s
        if self.layer_s is None:
            return self._connect_s
        return max(MIN_DEADLINE_S, DEADLINE_FACTOR * self.layer_s)

    # --- an iteration

    def plan(self, table: RowTable, iteration: int = 0, micro_batch: int = 0) -> None:
        """Say which rows come next, and where their pages are."""
        header = Header(FrameType.PLAN, self.epoch, iteration, micro_batch=micro_batch)
        shares = {}
        for worker, share in enumerate(self.partition.split(table)):
            if share.table.rows or share.table.deltas:
                self._send(worker, replace(header, rows=share.table.rows), share.table.encode())
            if share.table.rows:
                shares[worker] = share
        for key in [key for key in self._current if key[0] < iteration - 1]:
            del self._current[key]
        self._current[header.key] = _Current(header, table.rows, shares)

    def attend(self, layer: int, q: NDArray[np.float32], iteration: int = 0, micro_batch: int = 0) -> None:
        """Send queries (rows, H, hd), so that workers begin with the tokens they have."""
        current = self._planned(iteration, micro_batch)
        self._require(q, (current.rows, self.model.heads, self.model.head_dim), "q")
        self._began[(iteration, micro_batch, layer)] = time.monotonic()
        for worker, share in current.shares.items():
            self._send_tensors(
                worker, FrameType.Q, current, layer, cut_queries(share, q, self.model.kv_heads)
            )

    def kv(
        self,
        layer: int,
        k: NDArray[np.float32],
        v: NDArray[np.float32],
        iteration: int = 0,
        micro_batch: int = 0,
    ) -> NDArray[np.float32]:
        """Send keys and values (rows, KV, hd); gives the attention output (rows, H, hd)."""
        current = self._planned(iteration, micro_batch)
        for name, array in (("k", k), ("v", v)):
            self._require(array, (current.rows, self.model.kv_heads, self.model.head_dim), name)
        for worker, share in current.shares.items():
            self._send_tensors(worker, FrameType.KV, current, layer, cut_keys(share, k), cut_keys(share, v))
        deadline = time.monotonic() + self.deadline_s
        answers = {}
        group, hd = self.model.heads // self.model.kv_heads, self.model.head_dim
        expected = replace(current.header, type=FrameType.OUT, layer=layer)
        for worker, share in current.shares.items():
            frame = self._receive(worker, expected, deadline)
            rows = share.table.rows
            heads = (share.kv_heads.stop - share.kv_heads.start) * group
            shapes: list[tuple[int, ...]] = [(rows, heads, hd)]
            if self.partition.partials:
                shapes.append((rows, heads))
            answers[worker] = self._guard(worker, lambda f=frame, s=shapes: unpack_tensors(f, *s))  # type: ignore[misc]
        began = self._began.pop((iteration, micro_batch, layer), None)
        if began is not None:
            took = time.monotonic() - began
            self.layer_s = took if self.layer_s is None else self.layer_s + SMOOTHING * (took - self.layer_s)
        return join(current.shares, answers, (current.rows, self.model.heads, hd), self.model.kv_heads)

    # --- control

    def assign(self, deltas: Iterable[TableDelta]) -> None:
        """Change block tables outside an iteration."""
        for worker, share in enumerate(self.partition.split(RowTable((), tuple(deltas)))):
            if share.table.deltas:
                self._ask(worker, Header(FrameType.ALLOC, self.epoch), share.table.encode())

    def free(self, slots: Sequence[int]) -> None:
        """Forget requests on all workers. Their pages may be given out again afterwards."""
        payload = np.array(slots, "<u4").tobytes()
        for worker in range(len(self._links)):
            self._ask(worker, Header(FrameType.FREE, self.epoch), payload)

    def abort(self, iteration: int, micro_batch: int = 0) -> None:
        """Give an iteration up; what it wrote is written again by the next."""
        self._current.pop((iteration, micro_batch), None)
        for worker in range(len(self._links)):
            self._ask(worker, Header(FrameType.ABORT, self.epoch, iteration, micro_batch=micro_batch))

    def ping(self, worker: int) -> float:
        """Seconds of a round trip."""
        began = time.monotonic()
        self._ask(worker, Header(FrameType.PING, self.epoch))
        return time.monotonic() - began

    def stats(self, worker: int) -> dict[str, Any]:
        """What a worker says of itself, and what this side sent and received."""
        stats = unpack_json(self._ask(worker, Header(FrameType.STATS, self.epoch)))
        link = self._links[worker]
        return stats | {"sent_bytes": link.sent_bytes, "received_bytes": link.received_bytes}

    def drain(self) -> None:
        """Ask all workers to end."""
        for worker in range(len(self._links)):
            self._ask(worker, Header(FrameType.DRAIN, self.epoch))

    def close(self) -> None:
        for link in self._links:
            link.close()
        self._links = []

    # --- one worker

    def _planned(self, iteration: int, micro_batch: int) -> _Current:
        try:
            return self._current[(iteration, micro_batch)]
        except KeyError:
            raise DataError(f"iteration {iteration}, micro-batch {micro_batch} was not planned") from None

    def _require(self, array: NDArray[np.float32], shape: tuple[int, ...], name: str) -> None:
        if array.shape != shape or array.dtype != np.float32:
            raise DataError(f"{name} is {array.dtype} {array.shape}, expected float32 {shape}")

    def _send_tensors(
        self, worker: int, kind: FrameType, current: _Current, layer: int, *arrays: NDArray[np.float32]
    ) -> None:
        header = replace(
            current.header, type=kind, layer=layer, rows=len(arrays[0]), number_type=NumberType.FLOAT32
        )
        self._send(worker, header, pack_tensors(*arrays))

    def _send(self, worker: int, header: Header, payload: bytes | memoryview = b"") -> None:
        self._guard(worker, lambda: self._link(worker).send(header, payload, max(self.deadline_s, 1.0)))

    def _ask(self, worker: int, header: Header, payload: bytes = b"") -> Frame:
        self._send(worker, header, payload)
        return self._receive(worker, header, time.monotonic() + self._connect_s)

    def _receive(self, worker: int, expected: Header, deadline: float) -> Frame:
        """The awaited frame; those that were awaited by an iteration given up are passed over."""
        began = time.monotonic()
        while True:
            remaining = max(deadline - time.monotonic(), 1e-3)
            frame = self._guard(worker, partial(self._link(worker).receive, remaining), deadline - began)
            header = frame.header
            if header.type is FrameType.ERROR:
                if 0 < header.iteration < expected.iteration:
                    continue  # about an iteration that was given up
                raise DataError(f"{self.names[worker]}: {unpack_json(frame).get('error', 'no reason given')}")
            same = (header.type, *header.key, header.layer) == (expected.type, *expected.key, expected.layer)
            if same and header.epoch == expected.epoch:
                return frame

    def _link(self, worker: int) -> Link:
        if worker >= len(self._links):
            raise LinkClosed("this pool is closed")
        return self._links[worker]

    def _guard(self, worker: int, operation: Callable[[], T], within_s: float | None = None) -> T:
        try:
            return operation()
        except LinkTimeout:
            patience = "in time" if within_s is None else f"within {within_s * 1e3:.0f} ms"
            raise WorkerLost(worker, f"{self.names[worker]} gave no answer {patience}") from None
        except LinkClosed as error:
            raise WorkerLost(worker, f"{self.names[worker]} is lost: {error}") from None
        except FrameError as error:
            raise WorkerLost(
                worker, f"{self.names[worker]} sent bytes that cannot be used: {error}"
            ) from None
