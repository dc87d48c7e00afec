"""Did loading bring back what was saved? A few numbers that any number of processes computes alike.

Libraries have restarted quietly instead of resuming, put partitions in the wrong places and forgotten the
optimiser's moments. So a checkpoint keeps sums over the weights, over both of Adam's moments and over the
buffers, in which every value counts by a factor of its own: values that are missing, zero, of another
parameter or shifted change the sum. And it keeps the probe: the loss of a fixed batch in eval mode.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch

from flows.training.distributed import Processes

MOMENTS = {"exp_avg": "first moments", "exp_avg_sq": "second moments", "momentum_buffer": "momenta"}
SUM_TOLERANCE = 1e-9
"""Of the sum of magnitudes. The values come back bit for bit; only the order of adding them, in double
precision, depends on the number of processes."""
PROBE_TOLERANCE = {"fp32": 1e-4, "bf16": 1e-2}
"""Relative. The same weights give the same loss up to the rounding of matrix products of another shape."""
_CHUNK = 1 << 22

Summary = dict[str, list[float]]


def summarize(engine: Any, processes: Processes) -> Summary:
    """[weighted sum, sum of magnitudes] of each kind of state over all processes; the optimiser's steps."""
    sums = {kind: [0.0, 0.0] for kind in ("weights", *MOMENTS.values(), "buffers", "frozen weights")}
    steps = 0.0
    for kind, index, start, values in _parts(engine, processes):
        if kind == "steps":
            steps = max(steps, float(values))
        else:
            for total, part in enumerate(_weigh(values, index, start)):
                sums[kind][total] += part
    flat = processes.sum([value for pair in sums.values() for value in pair])
    summary = {kind: flat[2 * i : 2 * i + 2] for i, kind in enumerate(sums)}
    summary["optimizer steps"] = [max(processes.gather(steps)), 0.0]
    return summary


def differences(found: Summary, saved: Summary) -> list[str]:
    """What differs, each with both figures; empty if everything came back."""
    return [
        f"{kind} {found[kind][0]:.9g} instead of {saved[kind][0]:.9g}"
        for kind in found.keys() & saved.keys()  # earlier versions summed fewer kinds
        if any(
            not abs(here - there) <= SUM_TOLERANCE * saved[kind][1]
            for here, there in zip(found[kind], saved[kind], strict=True)
        )
    ]


def probe_differs(found: float, saved: float, precision: str) -> bool:
    return not math.isclose(found, saved, rel_tol=PROBE_TOLERANCE[precision], abs_tol=1e-12)


def _parts(engine: Any, processes: Processes) -> Iterator[tuple[str, int, int, torch.Tensor]]:
    """(kind, number of the parameter, position in it, values) of all state that this process answers for."""
    optimizer = engine.optimizer
    for index, parameter in enumerate(engine.module.parameters()):
        if not parameter.requires_grad:
            continue
        if hasattr(
            parameter, "ds_id"
        ):  # ZeRO-3: every process has a part of each parameter, padded at the end
            group, offset, size = optimizer.grad_position[optimizer.get_param_id(parameter)]
            flat = optimizer.fp32_partitioned_groups_flat[group]
            state = optimizer.optimizer.state.get(flat, {})
            start = processes.rank * size
            count = max(0, min(size, parameter.ds_numel - start))
        elif hasattr(
            parameter, "_hp_mapping"
        ):  # ZeRO-1 and 2: a process has a range of all values of a group
            if (mapping := parameter._hp_mapping) is None:
                continue
            flat = optimizer.single_partition_of_fp32_groups[mapping.param_group_index]
            state = optimizer.optimizer.state.get(flat, {})
            start, count = mapping.lp_fragment_address.start, mapping.lp_fragment_address.numel
            offset = mapping.hp_fragment_address.start
        elif processes.is_main:  # not partitioned
            flat, state, start, offset, count = parameter, optimizer.state[parameter], 0, 0, parameter.numel()
        else:
            continue
        for kind, values in (("weights", flat), *((name, state.get(key)) for key, name in MOMENTS.items())):
            if values is not None:
                yield kind, index, start, values.detach().flatten()[offset : offset + count]
        if "step" in state:
            yield "steps", index, 0, torch.as_tensor(state["step"])
    if processes.is_main:
        for index, buffer in enumerate(engine.module.buffers()):
            yield "buffers", index, 0, buffer.detach().flatten()
        for index, parameter in enumerate(engine.module.parameters()):
            if not parameter.requires_grad and not hasattr(parameter, "ds_id"):
                yield "frozen weights", index, 0, parameter.detach().flatten()


def _weigh(values: torch.Tensor, index: int, start: int) -> tuple[float, float]:
    """Sum and sum of magnitudes of values, each times a factor between 1 and 2 for its place."""
    total = magnitude = 0.0
    for first in range(0, len(values), _CHUNK):
        part = torch.nan_to_num(values[first : first + _CHUNK].double(), nan=1.0, posinf=2.0, neginf=-3.0)
        places = torch.arange(
            start + first, start + first + len(part), dtype=torch.float64, device=part.device
        )
        # multiples of the golden ratio spread evenly between whole numbers
        part = part * (1.0 + (places * 0.6180339887498949 + index * 0.4142135623730951).frac())
        total += float(part.sum())
        magnitude += float(part.abs().sum())
    return total, magnitude
