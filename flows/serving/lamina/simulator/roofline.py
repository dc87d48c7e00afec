"""Closed forms of sections 1, 2 and 6 of the specification (arXiv 2405.01814 v2): what bounds an iteration.

Symbols as in the paper: N parameters, L layers, d hidden size, H query and KV key heads of size hd, e bytes
per element, B rows of the batch, l context, F FLOP/s, W bytes/s. The paper writes wire bytes for H·hd = d;
here they are (2H + 2KV)·hd·e per row and layer, which also holds where H·hd is another number.
"""

from __future__ import annotations

from flows.serving.lamina.simulator.inputs import Device, Model


def at_peak(device: Device) -> Device:
    """The same device at the figures of its data sheet."""
    return device.model_copy(update={"mfu": 1.0, "mbu_w": 1.0, "mbu_a": 1.0})


def ridge_point(device: Device) -> float:
    """FLOP per byte above which arithmetic is the limit, not memory."""
    return device.flops / device.bandwidth


def model_seconds(model: Model, rows: float, device: Device, devices: int) -> float:
    """MTIME(B): everything but attention, all layers: the larger of arithmetic and reading the weights."""
    return max(
        2.0 * model.parameters * rows / (devices * device.flops * device.mfu),
        model.weight_bytes / (devices * device.bandwidth * device.mbu_w),
    )


def model_utilisation(model: Model, rows: float, device: Device) -> float:
    """Share of the FLOP/s that MTIME(B) makes use of: B over the ridge point while weights are the limit."""
    return 2.0 * model.parameters * rows / (device.flops * model_seconds(model, rows, at_peak(device), 1))


def attention_seconds(model: Model, rows: float, context: float, device: Device, devices: int) -> float:
    """ATIME(B, l): attention of all layers, reading keys and values once."""
    return rows * context * model.kv_bytes_per_token / (devices * device.bandwidth * device.mbu_a)


def non_attention_intensity(model: Model, rows: float) -> float:
    """FLOP per byte, 2NB / (e (N + 2Bd))."""
    moved = model.bytes_per_element * (model.parameters + 2.0 * rows * model.hidden_size)
    return 2.0 * model.parameters * rows / moved


def attention_intensity(model: Model) -> float:
    """FLOP per byte, 2G/e whatever batch and context are."""
    return 2.0 * (model.heads / model.kv_heads) / model.bytes_per_element


def wire_bytes_per_row(model: Model) -> float:
    """q, k, v there and the attention output back, all layers."""
    per_layer = (2 * model.heads + 2 * model.kv_heads) * model.head_size * model.bytes_per_element
    return model.layers * per_layer


def min_bandwidth(
    model: Model,
    rows: float,
    context: float,
    compute: Device,
    a: int,
    memory: Device,
    b: int,
    slowdown: float,
) -> float:
    """Bytes/s of the link at which moving the rows costs `slowdown` of the computing time (spec 2)."""
    computing = model_seconds(model, rows, compute, a) + attention_seconds(model, rows, context, memory, b)
    return wire_bytes_per_row(model) * rows / (slowdown * computing)


def latency_floor(model: Model, round_trip_s: float) -> float:
    """Seconds of a token that only round trips take, one per layer."""
    return model.layers * round_trip_s


def requests_that_fit(model: Model, context: int, room_bytes: float) -> int:
    return int(room_bytes // (context * model.kv_bytes_per_token))


def pipelined_cycle(n: int, replicas: int, model_s: float, attention_s: float, wire_s: float) -> float:
    """Seconds per layer with n micro-batches in rotation, from the times of one micro-batch (spec 6).

    The model replicas are busy n·t_m/R of a cycle, the memory devices n·t_a, and a micro-batch needs
    t_m + t_a + t_c: the largest sets the pace. Without rotation n and R are 1 and the last is the sum.
    """
    return max(n * model_s / replicas, n * attention_s, model_s + attention_s + wire_s)
