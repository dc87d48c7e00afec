"""What an attention worker does with a frame: `Session.handle` gives the answer, sockets are elsewhere.

One iteration: PLAN says which rows come; for every layer Q starts the attention over what is stored already,
KV is written to its pages, adds the rows' own tokens and the chunk's, and is answered by OUT. All of it may
be repeated: the same frames again give the same bytes and the same answer. A frame of an older epoch is
dropped without a word, which fences an engine that only seemed dead.
"""

from __future__ import annotations

import math
import secrets
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from flows.errors import DataError
from flows.serving.lamina.attention.frames import (
    Frame,
    FrameError,
    FrameType,
    Header,
    NumberType,
    pack_json,
    pack_tensors,
    unpack_json,
    unpack_range,
    unpack_tensors,
)
from flows.serving.lamina.attention.memory import Floats
from flows.serving.lamina.attention.store import PageStore, page_bytes
from flows.serving.lamina.rows import PAGE_TOKENS, RowTable
from models.ops.partial_attention import AttentionRule

MAX_READ = 4096  # positions in one READ_KV
MAX_PLANS = 4
"""Plans kept: two iterations in flight, two micro-batches each. The oldest makes room."""


class LayerSettings(BaseModel):
    """How one layer attends, as the bundle's manifest says."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)
    scale: float = Field(gt=0, allow_inf_nan=False)
    window: int = Field(default=0, ge=0)
    soft_cap: float = Field(default=0.0, ge=0, allow_inf_nan=False)


class WorkerSettings(BaseModel):
    """All that a worker has to know of a model: the CONFIG frame."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)
    layers: list[LayerSettings] = Field(min_length=1, max_length=4096)
    kv_heads: int = Field(ge=1, le=4096)  # of this worker
    group: int = Field(ge=1, le=4096)  # query heads to each of them
    head_dim: int = Field(ge=1, le=4096)
    pages: int = Field(ge=1, le=1 << 31)
    block_tokens: int = Field(default=1024, ge=PAGE_TOKENS, le=1 << 20, multiple_of=PAGE_TOKENS)
    partials: bool = False  # other workers hold other tokens of the same rows: answer with log-sum-exp
    debug: bool = False

    @property
    def bytes(self) -> int:
        per_block = self.block_tokens // PAGE_TOKENS
        pages = -(-self.pages // per_block) * per_block  # whole arenas
        return pages * page_bytes(len(self.layers), self.kv_heads, self.head_dim)


class Attention(Protocol):
    """How a worker computes: `fused.FusedAttention` on a CPU, `products.ProductAttention` elsewhere."""

    def layout(self, table: RowTable, own: NDArray[np.int64]) -> Any: ...

    def is_late(self, layer: int, layout: Any) -> bool: ...

    def begin(self, layer: int, q: Floats, layout: Any) -> Any: ...

    def write(self, layer: int, layout: Any, k: Floats, v: Floats) -> None: ...

    def finish(
        self, layer: int, layout: Any, begun: Any, k: Floats, v: Floats
    ) -> tuple[Floats, Floats | None]: ...


@dataclass
class Plan:
    """The rows of one micro-batch and how far each layer is."""

    table: RowTable
    own: NDArray[np.int64]  # rows whose own token is stored here
    layout: Any  # what attention made of it
    releases: int  # of the store, when `layout` was true
    early: dict[int, Any] = field(default_factory=dict)  # layer → what was begun when its queries came


class Session:
    """State of one worker: pages, plans, epoch.

    Args:
        max_bytes: for keys and values; a CONFIG that needs more is refused.
        threads: how many compute at the same time; each does other requests or heads.
        device: "cpu", or where torch has the keys and values.
        kernel: "torch" computes with torch on the CPU too, to compare.
    """

    def __init__(
        self,
        max_bytes: int,
        threads: int = 1,
        device: str = "cpu",
        kernel: Literal["fused", "torch"] = "fused",
    ) -> None:
        self.max_bytes, self.device = max_bytes, device
        self.fused = device == "cpu" and kernel == "fused"
        self.epoch = 0
        self.draining = False
        self.copy_bytes_per_s = 0.0  # of this worker's memory, for whoever divides the work
        self.settings: WorkerSettings | None = None
        self.counts: Counter[str] = Counter()
        self._rules: list[AttentionRule] = []
        self._store: PageStore | None = None
        self._store_id = ""  # by which an engine knows the pages that it has filled
        self._plans: dict[tuple[int, int], Plan] = {}
        self._unwritten: Callable[[], None] | None = None
        self._attention: Attention | None = None
        self._threads = threads
        self._pool = ThreadPoolExecutor(threads, "attention") if threads > 1 else None
        self._handlers: dict[FrameType, Callable[[Frame], Frame | None]] = {
            FrameType.CONFIG: self._configure,
            FrameType.PLAN: self._plan,
            FrameType.Q: self._attend,
            FrameType.KV: self._finish,
            FrameType.PREFILL_KV: self._keep,
            FrameType.READ_KV: self._read,
            FrameType.ALLOC: self._assign,
            FrameType.FREE: self._free,
            FrameType.ABORT: self._abort,
            FrameType.STATS: self._stats,
        }

    @property
    def busy(self) -> bool:
        """Whether an iteration is under way."""
        return bool(self._plans)

    def prepare(self) -> None:
        """Load the kernel, which a machine has to compile once, so that no CONFIG has to wait for it."""
        if self.fused:
            from flows.serving.lamina.attention.kernel import compile_kernels

            compile_kernels()

    def handle(self, frame: Frame) -> Frame | None:
        """The answer to a frame, or None if it has none.

        Raises:
            DataError, FrameError: the frame cannot be obeyed; nothing was changed.
        """
        header = frame.header
        if header.epoch < self.epoch:
            self.counts["stale"] += 1
            return None
        if header.epoch > self.epoch:
            raise FrameError(
                f"frame of epoch {header.epoch}, this worker is in {self.epoch}; send HELLO first"
            )
        self.settle()
        handler = self._handlers.get(header.type)
        if handler is None:
            raise FrameError(f"a worker does not take {header.type.name} frames")
        self.counts[header.type.name.lower()] += 1
        return handler(frame)

    def settle(self) -> None:
        """Write what the last answer left unwritten: an answer does not wait for it, the next frame does."""
        unwritten, self._unwritten = self._unwritten, None
        if unwritten is not None:
            unwritten()

    def enter_epoch(self, epoch: int) -> None:
        """What older engines send counts no more; plans of theirs are forgotten, pages are kept."""
        if epoch > self.epoch:
            self.epoch = epoch
            self._plans.clear()

    # --- control plane

    def _configure(self, frame: Frame) -> Frame:
        try:
            settings = WorkerSettings.model_validate(unpack_json(frame))
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"])
            raise DataError(f"CONFIG: {where}: {first['msg']}") from None
        if settings.bytes > self.max_bytes:
            per_page = page_bytes(len(settings.layers), settings.kv_heads, settings.head_dim)
            raise DataError(
                f"CONFIG asks for {settings.bytes} bytes of pages, this worker may use {self.max_bytes}: "
                f"at most {self.max_bytes // per_page} pages of {per_page} bytes"
            )
        if settings != self.settings:
            self._plans.clear()
            self._store = self._attention = None  # the old pages go before the new ones come
            self._store = PageStore(
                len(settings.layers), settings.pages, settings.kv_heads, settings.head_dim,
                settings.block_tokens, settings.debug, None if self.fused else self.device,
            )  # fmt: skip
            self._rules = [
                AttentionRule(layer.scale, layer.window, layer.soft_cap) for layer in settings.layers
            ]
            self._attention = self._attend_with(settings, self._store)
            self.settings = settings
            self._store_id = secrets.token_hex(8)
        about = {
            "bytes": settings.bytes,
            "store": self._store_id,
            "batch_invariant": self._is_batch_invariant(settings),
        }
        return _answer(frame, pack_json(about))

    def _attend_with(self, settings: WorkerSettings, store: PageStore) -> Attention:
        if self.fused:
            from flows.serving.lamina.attention.fused import FusedAttention  # loads a compiler

            sizes = (settings.kv_heads, settings.group, settings.head_dim)
            return FusedAttention(
                store, self._rules, sizes, partials=settings.partials, pool=self._pool, threads=self._threads
            )
        from flows.serving.lamina.attention.products import ProductAttention

        return ProductAttention(store, self._rules, self.device, partials=settings.partials, pool=self._pool)

    def _is_batch_invariant(self, settings: WorkerSettings) -> bool:
        if self.fused:
            from flows.serving.lamina.attention import fused

            return fused.is_batch_invariant(settings.group, settings.head_dim)
        from flows.serving.lamina.attention import products

        return products.is_batch_invariant(settings.group, settings.head_dim)

    def _assign(self, frame: Frame) -> Frame:
        for delta in RowTable.decode(frame.payload).deltas:
            self._ready()[1].assign(delta)
        return _answer(frame)

    def _free(self, frame: Frame) -> Frame:
        if len(frame.payload) % 4:
            raise FrameError(f"a FREE frame of {len(frame.payload)} bytes is not a list of slots")
        for slot in np.frombuffer(frame.payload, "<u4").tolist():
            self._ready()[1].free(slot)
        return _answer(frame)

    def _abort(self, frame: Frame) -> Frame:
        self._plans.pop(frame.header.key, None)
        return _answer(frame)

    def _stats(self, frame: Frame) -> Frame:
        store = self._store
        return _answer(
            frame,
            pack_json(
                {
                    "epoch": self.epoch,
                    "draining": self.draining,
                    "copy_bytes_per_s": self.copy_bytes_per_s,
                    "pages": store.pages if store else 0,
                    "pages_used": len(store.owners) if store else 0,
                    "slots": len(store.tables) if store else 0,
                    "bytes": store.bytes if store else 0,
                    "plans": len(self._plans),
                    "frames": dict(self.counts),
                }
            ),
        )

    # --- data plane

    def _plan(self, frame: Frame) -> None:
        if self.draining:
            raise DataError("this worker is draining and takes no further iteration")
        settings, store = self._ready()
        table = RowTable.decode(frame.payload)
        for delta in table.deltas:
            store.assign(delta)
        own = np.arange(table.rows)
        if settings.partials:
            places = zip(table.slots.tolist(), table.positions.tolist(), strict=True)
            own = np.flatnonzero([store.holds(slot, position, position + 1) for slot, position in places])
        self._plans.pop(frame.header.key, None)
        while len(self._plans) >= MAX_PLANS:
            self._plans.pop(min(self._plans))
        layout = self._computing().layout(table, own)
        self._plans[frame.header.key] = Plan(table, own, layout, store.releases)

    def _attend(self, frame: Frame) -> None:
        settings, _ = self._ready()
        plan, layer = self._planned(frame)
        rows = plan.table.rows
        (q,) = unpack_tensors(frame, (rows, settings.kv_heads, settings.group, settings.head_dim))
        plan.early[layer] = self._computing().begin(layer, q, plan.layout)

    def _finish(self, frame: Frame) -> Frame:
        plan, layer = self._planned(frame)
        if layer not in plan.early:
            raise DataError(f"KV of layer {layer} came before its Q")
        k, v = self._keys_and_values(frame, plan)
        attention = self._computing()
        if len(plan.own):
            self._unwritten = partial(attention.write, layer, plan.layout, k, v)
        if attention.is_late(layer, plan.layout):  # a chunk attends to its own tokens
            self.settle()
        out, log_sum = attention.finish(layer, plan.layout, plan.early.pop(layer), k, v)
        if layer == len(self._rules) - 1:
            self._plans.pop(frame.header.key)
        header = frame.header._replace(type=FrameType.OUT, rows=plan.table.rows)
        return Frame(header, pack_tensors(out) if log_sum is None else pack_tensors(out, log_sum))

    def _keep(self, frame: Frame) -> Frame | None:
        """Store keys and values; the last layer's frame is answered, when all of them are stored."""
        plan, layer = self._planned(frame)
        k, v = self._keys_and_values(frame, plan)
        self._computing().write(layer, plan.layout, k, v)
        if layer < len(self._rules) - 1:
            return None
        self._plans.pop(frame.header.key)
        return _answer(frame)

    def _read(self, frame: Frame) -> Frame:
        """Keys and values (tokens, KV, hd) each, of positions of one request that are stored here."""
        _, store = self._ready()
        slot, start, end = unpack_range(frame)
        if start >= end or end - start > MAX_READ or frame.header.layer >= len(self._rules):
            raise DataError(
                f"READ_KV of positions {start} to {end}, layer {frame.header.layer}: no such range"
            )
        slots, positions = np.full(end - start, slot), np.arange(start, end)
        payload = pack_tensors(*store.memory.take(frame.header.layer, store.locate(slots, positions)))
        return Frame(frame.header._replace(number_type=NumberType.FLOAT32, rows=end - start), payload)

    def _keys_and_values(self, frame: Frame, plan: Plan) -> list[Floats]:
        settings, _ = self._ready()
        shape = (len(plan.own), settings.kv_heads, settings.head_dim)
        return unpack_tensors(frame, shape, shape)

    def _planned(self, frame: Frame) -> tuple[Plan, int]:
        header = frame.header
        plan = self._plans.get(header.key)
        if plan is None:
            raise DataError(
                f"{header.type.name} of iteration {header.iteration}, micro-batch {header.micro_batch}, "
                "which has no PLAN here"
            )
        if header.layer >= len(self._rules):
            raise DataError(f"layer {header.layer} of {len(self._rules)}")
        store = self._ready()[1]
        if plan.releases != store.releases:  # pages went: the rows may have to do without theirs
            plan.layout = self._computing().layout(plan.table, plan.own)
            plan.releases = store.releases
        return plan, header.layer

    def _computing(self) -> Attention:
        if self._attention is None:
            raise DataError("this worker was not configured; send CONFIG first")
        return self._attention

    def _ready(self) -> tuple[WorkerSettings, PageStore]:
        if self.settings is None or self._store is None:
            raise DataError("this worker was not configured; send CONFIG first")
        return self.settings, self._store


def _answer(frame: Frame, payload: bytes = b"") -> Frame:
    return Frame(frame.header._replace(number_type=NumberType.NONE), payload)


def error_frame(header: Header | None, text: str) -> Frame:
    """What a peer is told before the connection ends."""
    base = header or Header(FrameType.ERROR)
    return Frame(base._replace(type=FrameType.ERROR, number_type=NumberType.NONE), pack_json({"error": text}))


def default_scale(head_dim: int) -> float:
    """The usual 1 / sqrt(hd)."""
    return 1 / math.sqrt(head_dim)
