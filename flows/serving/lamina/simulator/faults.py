"""What a lost worker costs: the recovery models of spec 14.

A fault hits at a moment; the iteration under way is lost. What follows depends on what was lost and how keys
and values are protected: recompute them from tokens, rebuild them by parity, or switch to a replica.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import numpy as np

from flows.errors import ConfigError
from flows.serving.lamina.simulator.inputs import Device, Model

DETECTION_S = 0.6
"""Three heartbeats of 200 ms (spec 14); a closed connection is seen at once, a stopped process is not."""


@dataclass(frozen=True)
class Fault:
    """A worker that is lost."""

    time_s: float
    kind: Literal["attention", "model"] = "attention"
    worker: int = 0  # which attention worker
    replacement_s: float | None = 0.0  # until another takes its place; None: never
    detection_s: float = DETECTION_S


def parse_fault(text: str) -> Fault:
    """`attention:TIME_S[:REPLACEMENT_S|never]` or `model:TIME_S:REPLACEMENT_S`.

    Raises:
        ConfigError: anything else.
    """
    kind, _, rest = text.partition(":")
    time, _, replacement = rest.partition(":")
    try:
        replacement_s = None if replacement == "never" else float(replacement or 0.0)
        fault = Fault(float(time), kind, 0, replacement_s)  # type: ignore[arg-type]
        numbers = [fault.time_s, fault.replacement_s or 0.0]
        if kind not in ("attention", "model") or not all(0.0 <= number < 1e9 for number in numbers):
            raise ValueError(text)
        if kind == "model" and replacement_s is None:
            raise ValueError(text)
    except ValueError:
        raise ConfigError(
            f"a fault has the form attention:SECONDS, attention:SECONDS:SECONDS_UNTIL_REPLACED, "
            f"attention:SECONDS:never or model:SECONDS:SECONDS_UNTIL_REPLACED, got {text!r}"
        ) from None
    return fault


def random_losses(workers: int, hours_between: float, span_s: float, seed: int) -> list[Fault]:
    """Losses of attention workers at exponential intervals, each worker for itself."""
    generator = np.random.default_rng(seed)
    faults = []
    for worker in range(workers):
        moment = generator.exponential(hours_between * 3600.0)
        while moment < span_s:
            faults.append(Fault(float(moment), "attention", worker))
            moment += generator.exponential(hours_between * 3600.0)
    return in_order(faults)


def recompute_flops(model: Model, tokens: float) -> float:
    """A prefill of all tokens that were lost, attention not counted: 2N per token."""
    return 2.0 * model.parameters * tokens


def recompute_seconds(model: Model, tokens: float, compute: Device, a: int) -> float:
    return recompute_flops(model, tokens) / (a * compute.flops * compute.mfu)


def parity_rebuild_seconds(kv_bytes: float, b: int, gb_s: float, *, chained: bool) -> float:
    """Every survivor sends its shard, and the parity worker too: hop by hop, or all into one NIC."""
    shard = kv_bytes / b
    return shard / (gb_s * 1e9) * (1 if chained else b)


def in_order(faults: Iterable[Fault]) -> list[Fault]:
    """By time; of several at one moment, attention workers first, by number."""
    return sorted(faults, key=lambda fault: (fault.time_s, fault.kind, fault.worker))
