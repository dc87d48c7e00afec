"""The time of one iteration on a set-up: the step model of spec 10, sequential, rotational, or homogeneous.

`replay` asks `Costs` how long an iteration of so many rows takes as a function of the seconds its attention
needs; those grow linearly while a batch decodes, so that many iterations are one array operation.

All times here are of all layers together. With n micro-batches each has B/n rows.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from flows.errors import ConfigError
from flows.serving.lamina.attention.partition import share_heads, slowdown
from flows.serving.lamina.simulator.inputs import Device, Model, Network, Partition, Policy
from flows.serving.lamina.simulator.roofline import model_seconds, wire_bytes_per_row

BLOCK_TOKENS = 1024
"""A request's tokens lie on several workers in blocks of so many with the sequence partition (spec 4)."""


@dataclass(frozen=True)
class SetUp:
    """Which devices, how many, and how they work together; without memory devices, equal ones as usual."""

    compute_name: str
    compute: Device
    a: int
    memory_name: str = ""
    memory: Device | None = None
    b: int = 0
    micro_batches: int = 1
    partition: Partition = "head"
    redundancy: str = "none"

    @property
    def replicas(self) -> int:
        """Of the model: n micro-batches rotate over n - 1 (spec 6)."""
        return max(1, self.micro_batches - 1)

    @property
    def homogeneous(self) -> bool:
        return self.memory is None

    @property
    def price_per_hour(self) -> float:
        price = self.compute.price_per_hour * self.a * self.replicas
        if self.memory is not None:
            price += self.memory.price_per_hour * (self.b + (self.redundancy == "parity"))
        return price

    @property
    def label(self) -> str:
        if self.memory is None:
            return f"{self.a}×{self.compute_name}"
        replicas = f"{self.replicas}×" if self.replicas > 1 else ""
        mode = "sequential" if self.micro_batches == 1 else f"n={self.micro_batches}"
        return f"{replicas}{self.a}×{self.compute_name}+{self.b}×{self.memory_name} {self.partition} {mode}"

    def with_efficiencies(self, factor: float) -> SetUp:
        memory = self.memory.scaled(factor) if self.memory else None
        return replace(self, compute=self.compute.scaled(factor), memory=memory)


class Iteration(NamedTuple):
    """One iteration of fixed rows; attention seconds are still to be said."""

    n: int
    replicas: int
    model_s: float  # of one micro-batch
    attention_fixed_s: float  # of one micro-batch, whatever the contexts are
    wire_s: float  # of one micro-batch
    wire_busy_s: float  # of that, moving bytes
    credit_s: float  # at most hidden by sending Q early, of one micro-batch
    overhead_s: float

    def seconds(self, attention_s: float) -> float:
        """Given the seconds of attention over all rows: C = max(…) of spec 10."""
        each = self.attention_fixed_s + attention_s / self.n
        hidden = min(self.credit_s, each)
        return self.overhead_s + max(
            self.n * self.model_s / self.replicas,
            self.n * each,
            self.model_s + each + self.wire_s - hidden,
        )

    def seconds_of(self, attention_s: NDArray[np.float64]) -> NDArray[np.float64]:
        each = self.attention_fixed_s + attention_s / self.n
        row = self.model_s + self.wire_s + each - np.minimum(self.credit_s, each)
        bound = np.maximum(row, self.n * each)
        longest: NDArray[np.float64] = np.maximum(bound, self.n * self.model_s / self.replicas)
        return longest + self.overhead_s


class Costs:
    """What a model on a set-up costs; the figures of one worker where workers hold different requests.

    Attributes:
        pools: groups of workers whose room is separate: one per worker if whole requests lie on a worker.
        pool_tokens: keys and values that fit in one of them.
        token_s: attention seconds per token of live context, of the worker that is slowest.
        chunk_token_s: the same per token of context that a prompt chunk reads.
        chunk_pair_s: arithmetic of a prompt chunk per row and token of its context.
    """

    def __init__(self, model: Model, set_up: SetUp, network: Network, policy: Policy) -> None:
        self.model, self.set_up, self.network, self.policy = model, set_up, network, policy
        memory = set_up.memory or set_up.compute
        holders = set_up.b if set_up.memory else set_up.a
        room = memory.room_bytes * holders
        if set_up.homogeneous:
            room -= model.weight_bytes
        elif set_up.compute.room_bytes * set_up.a < model.weight_bytes:
            raise ConfigError(
                f"{model.name} has {model.weight_bytes / 1e9:.1f} GB of weights, {set_up.a} "
                f"{set_up.compute_name} have room for {set_up.compute.room_bytes * set_up.a / 1e9:.1f}"
            )
        uneven = 1.0
        if set_up.homogeneous and set_up.a > model.kv_heads:
            uneven = set_up.a / model.kv_heads  # heads of keys are kept more than once
        elif set_up.homogeneous or set_up.partition == "head":
            equal = [1.0] * holders
            uneven = slowdown(share_heads(model.kv_heads, equal), equal)
        self.pools = set_up.b if set_up.partition == "request" and set_up.memory else 1
        workers = holders / self.pools  # of a pool
        copies = 2 if set_up.redundancy == "replica" else 1
        tokens = room / self.pools / uneven / copies / model.kv_bytes_per_token
        self.pool_tokens = max(0, int(tokens))
        reading = model.kv_bytes_per_token / (memory.bandwidth * memory.mbu_a)
        pair_flops = 4.0 * model.layers * model.heads * model.head_size
        computing = pair_flops / (memory.flops * memory.mfu)
        self.token_s = max(reading, computing) * uneven / workers
        self.chunk_token_s = reading * uneven / workers
        self.chunk_pair_s = computing * uneven / workers
        self._cache: dict[tuple[int, int, int], Iteration] = {}

    @property
    def price_per_hour(self) -> float:
        return self.set_up.price_per_hour

    @cached_property
    def link_bandwidth(self) -> float:
        return self.network.bandwidth(self.set_up.a * self.set_up.replicas, self.set_up.b)

    def iteration(self, rows: int, context: float = BLOCK_TOKENS, chunk: int = 0) -> Iteration:
        """
        Args:
            rows: that decode.
            chunk: rows of prompts beside them.
            context: mean, tells how many workers a request lies on where its tokens are spread.
        """
        holders = 1
        if self.set_up.partition == "sequence":
            holders = max(1, min(self.set_up.b, -(-int(context) // BLOCK_TOKENS)))
        key = (rows, chunk, holders)
        if key not in self._cache:
            self._cache[key] = self._iteration(rows, chunk, holders)
        return self._cache[key]

    def _iteration(self, rows: int, chunk: int, holders: int) -> Iteration:
        model, set_up, policy = self.model, self.set_up, self.policy
        each = (rows + chunk) / set_up.micro_batches
        model_s = model_seconds(model, each, set_up.compute, set_up.a)
        if set_up.a > 1:
            model_s += model.layers * policy.collectives_per_layer * set_up.compute.collective_us * 1e-6
        if set_up.homogeneous:
            overhead = policy.homogeneous_step_overhead_ms * 1e-3
            return Iteration(1, 1, model_s, 0.0, 0.0, 0.0, 0.0, overhead)
        moving = self.wire_bytes_per_row(holders) * each / self.link_bandwidth
        wire_s = model.layers * self.network.round_trip_s + moving
        credit = 0.0
        if policy.overlap:
            credit = self._kv_seconds(each) + self._kv_bytes() * model.layers * each / self.link_bandwidth
        overhead = policy.step_overhead_ms * 1e-3
        return Iteration(
            set_up.micro_batches, set_up.replicas, model_s, 0.0, wire_s, moving, credit, overhead
        )  # fmt: skip

    def _kv_bytes(self) -> float:
        """K and V of a row in one layer."""
        return 2.0 * self.model.kv_heads * self.model.head_size * self.model.bytes_per_element

    def _kv_seconds(self, rows: float) -> float:
        """Projecting K and V in all layers: attention to older tokens hides it (spec 4)."""
        model, set_up = self.model, self.set_up
        weights = model.layers * model.hidden_size * 2.0 * model.kv_heads * model.head_size
        device = set_up.compute
        return max(
            2.0 * weights * rows / (set_up.a * device.flops * device.mfu),
            weights * model.bytes_per_element / (set_up.a * device.bandwidth * device.mbu_w),
        )

    def wire_bytes_per_row(self, holders: int = 1) -> float:
        """Of all layers, there and back, with what the partition and the redundancy add (spec 5, 14)."""
        model = self.model
        q = model.heads * model.head_size * model.bytes_per_element
        total = wire_bytes_per_row(model)
        if holders > 1 or self.set_up.partition == "sequence":
            partial = model.heads * (model.head_size + 1) * 4.0  # FP32, with its log-sum-exp
            total = model.layers * (q * holders + self._kv_bytes() + partial * holders)
        if self.set_up.redundancy == "parity":
            total += model.layers * self._kv_bytes() / self.set_up.b
        elif self.set_up.redundancy == "replica":
            total += model.layers * self._kv_bytes()
        return total

    def without_worker(self) -> Costs | None:
        """The same with one memory device less; None if that does not go."""
        if self.set_up.b < 2:
            return None
        return Costs(self.model, replace(self.set_up, b=self.set_up.b - 1), self.network, self.policy)
