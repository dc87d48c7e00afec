"""How much memory a training step needs on a device: a model of weights, states, activations and workspace.

Weights, gradients and optimiser states follow from the number of parameters and the ZeRO stage. What a step
keeps for its backward pass is not guessed: the network itself runs on the meta device, which computes shapes
and no numbers, and every tensor that autograd saves is counted once, stage by stage. So a change of the
network's code changes the plan with it.

All sizes are bytes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

import models
from models.backbones.swin import Stage, Swin, SwinBlock
from models.pretext.simmim import SimMIM

BUCKET_MIN, BUCKET_MAX, BUCKETS = 1_000_000, 200_000_000, 8
"""Elements of a communication buffer, as `flows.training.distributed` sets it."""
BUCKET_PLAIN = 500_000_000
"""The same without ZeRO, where DeepSpeed's own is not to be set."""
RESERVE = 0.06
"""Of what a device holds, for gaps of the allocator and buffers of libraries: an allowance, not measured."""
ALL_STAGES = 4
"""So many recomputed stages mean all, also where there are fewer."""
ELEMENT = {"fp32": 4, "bf16": 2}


@dataclass(frozen=True)
class Network:
    """What is trained."""

    backbone: str
    image_size: int
    window_size: int
    precision: str = "bf16"  # fp32 | bf16


@dataclass(frozen=True)
class Choice:
    """How it is trained."""

    zero_stage: int = 1
    zero_offload: str = "none"
    checkpointed_stages: int = 0
    attention_chunk: int = 0
    devices: int = 1
    micro_batch: int = 1


@dataclass(frozen=True)
class Footprint:
    """Bytes on one device at the worst moment of a step."""

    weights: float
    gradients: float
    states: float
    buffers: float
    activations: float
    workspace: float
    host: float = 0.0
    """In the memory of the host, for what is offloaded there."""

    @property
    def in_use(self) -> float:
        parts = self.weights + self.gradients + self.states + self.buffers
        return parts + self.activations + self.workspace

    @property
    def total(self) -> float:
        """With the reserve."""
        return self.in_use * (1.0 + RESERVE)


@dataclass(frozen=True)
class Activations:
    """Of one forward pass.

    Attributes:
        kept: per stage, what the backward pass needs; for each image and for the batch as a whole. The first
            entry is what comes before the first stage, the last what comes after the last.
        work: per stage, what one block needs for a moment besides, for each image.
        parameters: of the whole model.
        largest_block: parameters of the largest block.
    """

    kept: tuple[tuple[float, float], ...]
    work: tuple[float, ...]
    parameters: int
    largest_block: int

    def of_batch(self, batch: int) -> float:
        return sum(batch * image + fixed for image, fixed in self.kept)


@contextmanager
def count_saved(model: nn.Module, places: list[nn.Module]) -> Iterator[list[float]]:
    """Bytes that autograd saves within, by place: before the first of `places`, in each, after the last.

    Parameters and whatever shares memory with something counted before do not count again.
    """
    totals = [0.0] * (len(places) + 2)
    here = 0
    seen = {tensor.untyped_storage()._cdata for tensor in (*model.parameters(), *model.buffers())}
    alive: list[Tensor] = []  # else a freed tensor's address could come again

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in seen:
            seen.add(storage._cdata)
            alive.append(tensor.detach())
            totals[here] += storage.nbytes()
        return tensor

    def move(index: int) -> Any:
        def hook(*_: object) -> None:
            nonlocal here
            here = index

        return hook

    handles = [place.register_forward_pre_hook(move(i + 1)) for i, place in enumerate(places)]
    handles.append(places[-1].register_forward_hook(move(len(places) + 1)))
    try:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            yield totals
    finally:
        for handle in handles:
            handle.remove()


def trace(network: Network, choice: Choice) -> Activations:
    """Run SimMIM with this backbone on the meta device, on one image and on two; where stages are recomputed,
    once more without, because what a block keeps is then needed while the block is in turn.

    Raises:
        ValueError: the backbone is unknown or its sizes do not fit one another.
    """
    with torch.device("meta"):
        backbone = models.create(
            network.backbone,
            image_size=network.image_size,
            window_size=network.window_size,
            activation_checkpointing=choice.checkpointed_stages
            if choice.checkpointed_stages < ALL_STAGES
            else True,
            attention_chunk=choice.attention_chunk,
        )
        if not isinstance(backbone, Swin):
            raise ValueError(f"{network.backbone} has no stages of windows; the planner knows Swin V1 and V2")
        model = SimMIM(backbone, backbone.stride, window_size=network.window_size)
    dtype = torch.float32 if network.precision == "fp32" else torch.bfloat16
    model.to(dtype).train()
    stages = cast("list[Stage]", list(backbone.layers))
    one, two = (_saved_by(model, stages, batch) for batch in (1, 2))
    kept = [(b - a, 2 * a - b) for a, b in zip(one, two, strict=True)]
    plain = trace(network, replace(choice, checkpointed_stages=0)) if choice.checkpointed_stages else None
    element = ELEMENT[network.precision]
    work = []
    side = -(-network.image_size // backbone.patch_size)
    for index, stage in enumerate(stages):
        dim = backbone.embed_dim * 2**index
        window, heads = stage.windows.window, cast(SwinBlock, stage.blocks[0]).attn.num_heads
        tokens = side**2
        padded = (-(-side // window) * window) ** 2
        logits = float(padded * window**2 * heads * element)
        if choice.attention_chunk and index < 2:
            windows = padded // window**2
            logits *= min(1.0, choice.attention_chunk / windows) * 4 / element  # chunks keep fp32
        # gradients within the attention, or within the MLP, whose saved tensors are gone by then
        backward = max(2 * logits + 6 * padded * dim * 4, 8.0 * tokens * dim * element)
        if stage.activation_checkpointing:  # each block keeps its input, and one block is computed again
            assert plain is not None
            whole = plain.kept[index + 1][0] / len(stage.blocks)
            image, fixed = kept[index + 1]
            kept[index + 1] = (image + len(stage.blocks) * tokens * dim * element, fixed)
            backward += whole
        work.append(backward)
        side = -(-side // 2)
    blocks = [block for stage in stages for block in stage.blocks]
    largest = max(sum(parameter.numel() for parameter in block.parameters()) for block in blocks)
    total = sum(parameter.numel() for parameter in model.parameters())
    return Activations(tuple(kept), tuple(work), total, largest)


def _saved_by(model: SimMIM, stages: list[Stage], batch: int) -> list[float]:
    side = model.backbone.image_size
    dtype = next(model.parameters()).dtype
    images = torch.empty(batch, 3, side, side, device="meta", dtype=dtype)
    mask = torch.empty(batch, model.mask_grid, model.mask_grid, device="meta", dtype=torch.bool)
    with count_saved(model, list(stages)) as totals:
        model(images, mask)
    return totals


def footprint(network: Network, choice: Choice, activations: Activations) -> Footprint:
    """What one device needs."""
    element, count, shards = ELEMENT[network.precision], activations.parameters, choice.devices
    stage = max(choice.zero_stage, 1) if network.precision == "bf16" else choice.zero_stage
    weights, gradients = float(element * count), float(element * count)
    # ZeRO keeps a copy of the weights of its shard, also where they are fp32 already
    states = 8.0 * count + (4.0 * count if network.precision == "bf16" or stage > 0 else 0.0)
    # one communication buffer where there is someone to talk to
    bucket = float(max(BUCKET_MIN, min(count // BUCKETS, BUCKET_MAX)) if stage else min(count, BUCKET_PLAIN))
    buffers = element * bucket if shards > 1 else 0.0
    shard_gradient = 4.0 * count / shards if stage >= 1 else 0.0  # in fp32, as the optimiser reads it
    if stage >= 1:
        states /= shards
    if stage >= 2:
        gradients /= shards
    gathered = element * min(float(count), activations.largest_block + bucket)
    if stage == 3:
        weights = weights / shards + gathered
    host = 0.0
    if choice.zero_offload != "none":
        host = states + 2 * shard_gradient  # where it is gathered, and where the optimiser reads it
        states, shard_gradient = 0.0, 0.0
    if choice.zero_offload == "parameters":
        host += float(element * count) / shards
        weights = gathered
    buffers += shard_gradient
    kept = [choice.micro_batch * image + fixed for image, fixed in activations.kept]
    work = [choice.micro_batch * image for image in activations.work]
    # The backward pass frees stages from the last on; the worst moment is the most of what is left plus work.
    moments = [sum(kept[: index + 2]) + needed for index, needed in enumerate(work)]
    worst = max(moments[-1] + kept[-1], *moments)
    workspace = max(work[moments.index(max(moments))], 0.0)
    return Footprint(weights, gradients, states, buffers, worst - workspace, workspace, host)
