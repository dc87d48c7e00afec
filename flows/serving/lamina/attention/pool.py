"""The engine's side: one object for all attention workers of a model.

    with AttentionPool(addresses, token, partition, model) as pool:
        pool.plan(table)
        for layer in range(layers):
            pool.send_q(layer, q)            # leaves before k and v are computed
            pool.send_kv(layer, k, v)
            out = pool.receive(layer)

Answers are gathered in worker order. A worker that is gone or silent is one `WorkerLost`, one that says no is
one `DataError`; both name it. Then that iteration is over, and a pool with a higher epoch takes over.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
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
    pack_range,
    pack_tensors,
    unpack_json,
    unpack_tensors,
)
from flows.serving.lamina.attention.parity import parity
from flows.serving.lamina.attention.partition import Partition, Share, cut_keys, cut_queries, join
from flows.serving.lamina.attention.session import LayerSettings, WorkerSettings
from flows.serving.lamina.attention.transport import Connection, Dial, LinkClosed, LinkTimeout, dial
from flows.serving.lamina.rows import RowKind, RowTable, Span, TableDelta

T = TypeVar("T")
Address = tuple[str, int]

MIN_DEADLINE_S = 0.25
SEND_TIMEOUT_S = 2.0  # a worker that takes nothing for so long does not live
DEADLINE_FACTOR = 5.0
CONFIG_S = 15.0  # pages are allocated and the arithmetic is tried out
SMOOTHING = 0.1
REBUILD_TOKENS = 1024
BASE_WORK = 4096.0  # keys; what a layer costs beside them is about what so many cost


def name_of(address: Address | None) -> str:
    return "none" if address is None else f"{address[0]}:{address[1]}"


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
    """The micro-batch under way: who takes part, and how much there is to do."""

    header: Header
    rows: int
    shares: dict[int, Share]
    work: float  # keys that a layer compares, and a constant for what does not depend on them
    began: dict[int, float] = field(default_factory=dict)  # layer → when its queries left


class AttentionPool:
    """Connections to all workers.

    Args:
        addresses: host and port of each worker; their order is the order of the partition. None: it is not
            there, and no row may concern it. With parity the last one keeps that.
        pages: of each worker.
        epoch: above that of every pool before; workers drop what older ones send.
        layer_timeout_s: for one layer; None is max(250 ms, 5 times what is usual for as much work), and the
            connect timeout for the first layer.
    """

    def __init__(
        self,
        addresses: Sequence[Address | None],
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
        seconds_per_work: float | None = None,
        with_parity: bool = False,
    ) -> None:
        wanted = partition.workers + with_parity
        if len(addresses) != wanted:
            raise DataError(f"{len(addresses)} addresses, this partition needs {wanted} workers")
        if model.heads % model.kv_heads:
            raise DataError(f"{model.heads} query heads do not divide over {model.kv_heads} heads of keys")
        self.partition, self.model, self.epoch = partition, model, epoch
        self.parity_worker = partition.workers if with_parity else None
        self.seconds_per_work = seconds_per_work  # smoothed, of a layer
        self.longest_layer_s = 0.0  # so far
        self.batch_invariant = True
        self.stores = [""] * len(addresses)  # of each worker: what it calls its pages; new ones, new name
        self.pids = [0] * len(addresses)
        self.names = [f"attention worker {j} ({name_of(address)})" for j, address in enumerate(addresses)]
        self._timeout_s, self._connect_s = layer_timeout_s, connect_timeout_s
        self._current: dict[tuple[int, int], _Current] = {}
        self._links: list[Connection | None] = [None] * len(addresses)
        try:
            for worker, address in enumerate(addresses):
                if address is None:
                    continue
                self._links[worker] = self._guard(worker, partial(dial, *address, connect_timeout_s))
                welcome = unpack_json(self._ask(worker, Header(FrameType.HELLO, epoch), token))
                self.pids[worker] = int(welcome.get("pid", 0))
                settings = WorkerSettings(
                    layers=list(model.layers), kv_heads=self._heads(worker),
                    group=model.heads // model.kv_heads, head_dim=model.head_dim, pages=pages,
                    block_tokens=block_tokens, partials=partition.partials, debug=debug,
                )  # fmt: skip
                config = Header(FrameType.CONFIG, epoch)
                sizes = pack_json(settings.model_dump())
                answer = unpack_json(self._ask(worker, config, sizes, max(connect_timeout_s, CONFIG_S)))
                self.batch_invariant &= bool(answer.get("batch_invariant"))
                self.stores[worker] = str(answer.get("store", ""))
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def deadline_s(self, work: float) -> float:
        """What a layer with so much work may take now."""
        if self._timeout_s is not None:
            return self._timeout_s
        if self.seconds_per_work is None:
            return self._connect_s
        return max(MIN_DEADLINE_S, DEADLINE_FACTOR * self.seconds_per_work * work)

    # --- an iteration

    def plan(self, table: RowTable, iteration: int = 0, micro_batch: int = 0) -> None:
        """Say which rows come next, and where their pages are."""
        header = Header(FrameType.PLAN, self.epoch, iteration, micro_batch=micro_batch)
        shares = {}
        for worker, share in enumerate(self.partition.split(table)):
            if share.table.rows or share.table.deltas:
                self._send(worker, header._replace(rows=share.table.rows), share.table.encode())
            if share.table.rows:
                shares[worker] = share
        for key in [key for key in self._current if key[0] < iteration - 1]:
            del self._current[key]
        if self.parity_worker is not None:
            self._send(self.parity_worker, header._replace(rows=table.rows), table.encode())
        work = BASE_WORK + sum(span.length * span.end for span in table.spans)
        self._current[header.key] = _Current(header, table.rows, shares, work)

    def send_q(self, layer: int, q: NDArray[np.float32], iteration: int = 0, micro_batch: int = 0) -> None:
        """Send queries (rows, H, hd), so that workers begin with the tokens they have."""
        current = self._planned(iteration, micro_batch)
        self._require(q, (current.rows, self.model.heads, self.model.head_dim), "q")
        current.began[layer] = time.monotonic()
        for worker, share in current.shares.items():
            self._send_tensors(
                worker, FrameType.Q, current, layer, cut_queries(share, q, self.model.kv_heads)
            )

    def send_kv(
        self,
        layer: int,
        k: NDArray[np.float32],
        v: NDArray[np.float32],
        iteration: int = 0,
        micro_batch: int = 0,
    ) -> None:
        """Send keys and values of the rows, (rows, KV, hd)."""
        current = self._planned(iteration, micro_batch)
        for name, array in (("k", k), ("v", v)):
            self._require(array, (current.rows, self.model.kv_heads, self.model.head_dim), name)
        for worker, share in current.shares.items():
            self._send_tensors(worker, FrameType.KV, current, layer, cut_keys(share, k), cut_keys(share, v))
        if self.parity_worker is not None:
            heads = self._heads(self.parity_worker)
            both = [parity([cut_keys(share, x) for share in current.shares.values()], heads) for x in (k, v)]
            self._send_tensors(self.parity_worker, FrameType.PREFILL_KV, current, layer, *both)

    def receive(self, layer: int, iteration: int = 0, micro_batch: int = 0) -> NDArray[np.float32]:
        """Wait for the attention output (rows, H, hd) of what was sent."""
        current = self._planned(iteration, micro_batch)
        deadline = time.monotonic() + self.deadline_s(current.work)
        answers = {}
        group, hd = self.model.heads // self.model.kv_heads, self.model.head_dim
        expected = current.header._replace(type=FrameType.OUT, layer=layer)
        for worker, share in current.shares.items():
            frame = self._receive(worker, expected, deadline)
            rows = share.table.rows
            heads = (share.kv_heads.stop - share.kv_heads.start) * group
            shapes: list[tuple[int, ...]] = [(rows, heads, hd)]
            if self.partition.partials:
                shapes.append((rows, heads))
            answers[worker] = self._guard(worker, lambda f=frame, s=shapes: unpack_tensors(f, *s))  # type: ignore[misc]
        if self.parity_worker is not None and layer == len(self.model.layers) - 1:
            # only now is every layer of these positions protected
            self._receive(self.parity_worker, expected._replace(type=FrameType.PREFILL_KV), deadline)
        began = current.began.pop(layer, None)
        if began is not None:
            took = time.monotonic() - began
            self.longest_layer_s = max(self.longest_layer_s, took)
            rate = took / current.work
            usual = self.seconds_per_work
            self.seconds_per_work = rate if usual is None else usual + SMOOTHING * (rate - usual)
        return join(current.shares, answers, (current.rows, self.model.heads, hd), self.model.kv_heads)

    def kv(
        self,
        layer: int,
        k: NDArray[np.float32],
        v: NDArray[np.float32],
        iteration: int = 0,
        micro_batch: int = 0,
    ) -> NDArray[np.float32]:
        """`send_kv` and `receive`, for who has nothing to do in between."""
        self.send_kv(layer, k, v, iteration, micro_batch)
        return self.receive(layer, iteration, micro_batch)

    # --- control

    def assign(self, deltas: Iterable[TableDelta]) -> None:
        """Change block tables outside an iteration."""
        table = RowTable((), tuple(deltas))
        header = Header(FrameType.ALLOC, self.epoch)
        for worker, share in enumerate(self.partition.split(table)):
            if share.table.deltas:
                self._ask(worker, header, share.table.encode())
        if self.parity_worker is not None and table.deltas:
            self._ask(self.parity_worker, header, table.encode())

    def rebuild(self, lost: int, lengths: Mapping[int, int], iteration: int) -> int:
        """Give a worker of a head-level partition, or the one with parity, what it held, from all others.

        Args:
            lengths: of each slot, how many positions are to be rebuilt. Its block table must be known.
            iteration: a number that no plan has.

        Returns:
            Bytes that were read.
        """
        if self.parity_worker is None:
            raise DataError("nothing can be rebuilt without parity")
        others = [worker for worker in self._present() if worker != lost]
        layers, read = range(len(self.model.layers)), 0
        for slot, length in lengths.items():
            for start in range(0, length, REBUILD_TOKENS):
                end = min(length, start + REBUILD_TOKENS)
                table = RowTable((Span(slot, start, end - start, RowKind.CHUNK),))
                header = Header(FrameType.PLAN, self.epoch, iteration, rows=table.rows)
                self._send(lost, header, table.encode())
                for layer in layers:
                    ask = Header(FrameType.READ_KV, self.epoch, layer=layer)
                    for worker in others:
                        self._send(worker, ask, pack_range(slot, start, end))
                    shards: list[list[NDArray[np.float32]]] = []
                    for worker in others:
                        frame = self._receive(worker, ask, time.monotonic() + self._connect_s)
                        shape = (end - start, self._heads(worker), self.model.head_dim)
                        shards.append(unpack_tensors(frame, shape, shape))
                        read += len(frame.payload)
                    heads = self._heads(lost)
                    widest = max(map(self._heads, self._present()))
                    both = [parity(column, widest)[:, :heads] for column in zip(*shards, strict=True)]
                    current = _Current(header, table.rows, {}, 0.0)
                    self._send_tensors(lost, FrameType.PREFILL_KV, current, layer, *both)
                done = Header(FrameType.PREFILL_KV, self.epoch, iteration, layer=layers[-1])
                self._receive(lost, done, time.monotonic() + self._connect_s)
        return read

    def free(self, slots: Sequence[int]) -> None:
        """Forget requests on all workers. Their pages may be given out again afterwards."""
        payload = np.array(slots, "<u4").tobytes()
        for worker in self._present():
            self._ask(worker, Header(FrameType.FREE, self.epoch), payload)

    def abort(self, iteration: int, micro_batch: int = 0) -> None:
        """Give an iteration up; what it wrote is written again by the next."""
        self._current.pop((iteration, micro_batch), None)
        for worker in self._present():
            self._ask(worker, Header(FrameType.ABORT, self.epoch, iteration, micro_batch=micro_batch))

    def ping(self, worker: int) -> float:
        """Seconds of a round trip."""
        began = time.monotonic()
        self._ask(worker, Header(FrameType.PING, self.epoch))
        return time.monotonic() - began

    def stats(self, worker: int) -> dict[str, Any]:
        """What a worker says of itself, and what this side sent and received."""
        stats = unpack_json(self._ask(worker, Header(FrameType.STATS, self.epoch)))
        link = self._link(worker)
        return stats | {"sent_bytes": link.sent_bytes, "received_bytes": link.received_bytes}

    def drain(self) -> None:
        """Ask all workers to end."""
        for worker in self._present():
            self._ask(worker, Header(FrameType.DRAIN, self.epoch))

    def close(self) -> None:
        for link in self._links:
            if link is not None:
                link.close()
        self._links = [None] * len(self._links)

    def traffic(self) -> list[tuple[int, int]]:
        """Bytes sent to and received from each worker."""
        return [(link.sent_bytes, link.received_bytes) if link else (0, 0) for link in self._links]

    # --- one worker

    def _heads(self, worker: int) -> int:
        """Heads of keys and values that a worker stores."""
        every = [self.partition.kv_heads(j) for j in range(self.partition.workers)]
        counts: list[int] = [heads.stop - heads.start for heads in every]
        return max(counts) if worker == self.parity_worker else counts[worker]

    def _present(self) -> list[int]:
        return [worker for worker, link in enumerate(self._links) if link is not None]

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
        key = current.header
        header = Header(
            kind, self.epoch, key.iteration, layer, key.micro_batch, NumberType.FLOAT32, len(arrays[0])
        )
        self._send(worker, header, pack_tensors(*arrays))

    def _send(self, worker: int, header: Header, payload: bytes | memoryview = b"") -> None:
        within_s = self._timeout_s or SEND_TIMEOUT_S
        self._guard(worker, lambda: self._link(worker).send(header, payload, max(within_s, 1.0)))

    def _ask(self, worker: int, header: Header, payload: bytes = b"", within_s: float | None = None) -> Frame:
        self._send(worker, header, payload)
        return self._receive(worker, header, time.monotonic() + (within_s or self._connect_s))

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

    def _link(self, worker: int) -> Connection:
        link = self._links[worker]
        if link is None:
            raise LinkClosed("there is no connection to it")
        return link

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
