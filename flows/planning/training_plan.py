"""Which ZeRO stage, micro-batch and devices a training needs: the choices in the order of what they cost.

The first choice that fits is the plan. Sharding optimiser states costs next to nothing, gradients little;
computing activations again costs up to a third of the time; attention in chunks a little more; sharded
parameters are gathered twice a step; offloading waits for the host. Within a choice the largest micro-batch
that fits is taken, because small ones waste the device.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from flows.errors import ConfigError
from flows.planning.memory import Activations, Choice, Footprint, Network, footprint, trace

GIB = 2.0**30
MEASURES = ((0, False), (2, False), (2, True), (4, False), (4, True))
"""(checkpointed stages, attention in chunks), cheapest first."""
CHUNK_WINDOWS = 16


@dataclass(frozen=True)
class Plan:
    """What was chosen, what it needs, and what was rejected before it."""

    choice: Choice
    needs: Footprint
    accumulation: int
    parameters: int
    rejected: tuple[tuple[Choice, float], ...]


def plan_training(network: Network, memory_gb: float, devices: int, batch: int) -> Plan:
    """
    Args:
        memory_gb: of one device, GiB.
        devices: at most; 0 = as few as will do, up to 1024.
        batch: images per optimiser step.

    Raises:
        ConfigError: nothing fits, or the sizes do not fit one another.
    """
    traces: dict[tuple[int, int], Activations] = {}
    rejected: list[tuple[Choice, float]] = []
    limit = memory_gb * GIB
    best = float("inf")
    for choice in _choices(devices, batch):
        key = (choice.checkpointed_stages, choice.attention_chunk)
        if key not in traces:
            try:
                traces[key] = trace(network, choice)
            except ValueError as error:
                raise ConfigError(str(error)) from None
        activations = traces[key]
        needs = footprint(network, choice, activations)
        if needs.total <= limit:
            micro = _largest_micro_batch(network, choice, activations, limit, batch)
            chosen = replace(choice, micro_batch=micro)
            needs = footprint(network, chosen, activations)
            accumulation = batch // (micro * choice.devices)
            return Plan(chosen, needs, accumulation, activations.parameters, tuple(rejected))
        rejected.append((choice, needs.total / GIB))
        best = min(best, needs.total / GIB)
    raise ConfigError(
        f"{network.backbone} at {network.image_size} px does not fit: the least that one device needs is "
        f"{best:.1f} GiB, it has {memory_gb:g}; give more devices, more memory or a smaller image"
    )


def _choices(devices: int, batch: int) -> Iterator[Choice]:
    counts = [devices] if devices else [2**power for power in range(11)]
    for count in counts:
        if batch % count:
            continue
        for stage in (1, 2, 3) if count > 1 else (1,):
            for checkpointed, chunked in MEASURES:
                yield Choice(stage, "none", checkpointed, CHUNK_WINDOWS if chunked else 0, count)
        if devices:  # asked for this many: then the host's memory is the last resort
            yield Choice(2 if count > 1 else 1, "optimizer", 4, CHUNK_WINDOWS, count)
            yield Choice(3, "parameters", 4, CHUNK_WINDOWS, count)


def _largest_micro_batch(
    network: Network, choice: Choice, activations: Activations, limit: float, batch: int
) -> int:
    micro = 1
    while batch % (2 * micro * choice.devices) == 0:
        if footprint(network, replace(choice, micro_batch=2 * micro), activations).total > limit:
            break
        micro *= 2
    return micro


def describe(plan: Plan, network: Network, memory_gb: float) -> list[str]:
    """The plan as lines of text: settings for params.yaml, a table of where the memory goes, the reasons."""
    choice, needs = plan.choice, plan.needs
    flag = {0: "false", 4: "true"}.get(choice.checkpointed_stages, str(choice.checkpointed_stages))
    lines = [
        f"{network.backbone}, {plan.parameters / 1e6:.0f} M parameters, {network.image_size} px, window "
        f"{network.window_size}, {network.precision}, devices of {memory_gb:g} GiB",
        "",
        f"devices                    {choice.devices}",
        f"zero_stage                 {choice.zero_stage}",
        f"zero_offload               {choice.zero_offload}",
        f"activation_checkpointing   {flag}",
        f"attention_chunk            {choice.attention_chunk}",
        f"micro-batch                {choice.micro_batch} images per device",
        f"accumulation               {plan.accumulation}",
        "",
        "each device holds, GiB",
    ]
    for name in ("weights", "gradients", "states", "buffers", "activations", "workspace"):
        lines.append(f"  {name:<24} {getattr(needs, name) / GIB:8.2f}")
    lines.append(f"  {'total with reserve':<24} {needs.total / GIB:8.2f}  of {memory_gb:g}")
    if needs.host:
        lines.append(f"  {'of the host besides':<24} {needs.host / GIB:8.2f}")
    if plan.rejected:
        lines += ["", "tried before and too large, GiB with one image per device"]
        lines += [f"  {_name(choice):<58} {total:8.1f}" for choice, total in plan.rejected[-8:]]
    return lines


def _name(choice: Choice) -> str:
    parts = [f"{choice.devices} device{'s' if choice.devices > 1 else ''}", f"ZeRO {choice.zero_stage}"]
    if choice.zero_offload != "none":
        parts.append(f"{choice.zero_offload} offloaded")
    if choice.checkpointed_stages:
        parts.append(f"{choice.checkpointed_stages} stages recomputed")
    if choice.attention_chunk:
        parts.append("attention in chunks")
    return ", ".join(parts)
