"""MoBY (arXiv 2105.04553): two views of an image predict each other's keys against queues of older ones.

An online network (backbone, projector, predictor) answers for one view, a target network (backbone,
projector, without gradient) gives the key of the other; the target follows the online one as an exponential
moving average whose momentum rises to 1 along a cosine over the whole run. Drop path is the online network's
alone. The keys of all processes join the queues after they have been compared.

What survives a checkpoint: the target's weights, both queues and the number of steps that have begun, so
that a resumed run goes on with the momentum where it stood. They stay in fp32 when the model is cast to bf16:
an average that moves by a thousandth would stand still there.

Shape legend: B images of this process, W processes, D channels of a key, K length of a queue.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from typing import NamedTuple, Self, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from models.backbones.interface import Backbone
from models.batch_norm import SyncBatchNorm1d, move_only, world_size


class MoBYOutput(NamedTuple):
    """Attributes:
    loss: fp32 scalar, mean over the batch of the sum of both directions; chance is 2·ln(K + 1).
    losses: the same per image, (B,).
    """

    loss: Tensor
    losses: Tensor


class MoBY(nn.Module):
    """Online and target network with their queues.

    Args:
        backbone: the network to pretrain.
        target_backbone: the same network with drop path 0; its weights become those of ``backbone``.
        queue_size: K, keys that each queue holds.
        batch_size: images per optimiser step over all processes; divides ``queue_size``.
        steps: of the whole run, over which the momentum rises.
        momentum: of the first step.
        temperature: τ of the softmax.
        hidden_dim, key_dim: of projector and predictor.

    Raises:
        ValueError: the queue does not hold whole batches, or the two backbones differ.
    """

    queue_1: Tensor  # keys of first views, (D, K), the newest first
    queue_2: Tensor
    step: Tensor  # optimiser steps that have begun, int64

    def __init__(
        self,
        backbone: Backbone,
        target_backbone: Backbone,
        *,
        queue_size: int,
        batch_size: int,
        steps: int,
        momentum: float = 0.99,
        temperature: float = 0.2,
        hidden_dim: int = 4096,
        key_dim: int = 256,
    ) -> None:
        super().__init__()
        if queue_size < 1 or queue_size % batch_size:
            raise ValueError(
                f"queue_size is {queue_size}, but must be a multiple of the {batch_size} images of a step: "
                "whole batches enter and leave a queue."
            )
        self.momentum, self.steps, self.temperature = momentum, steps, temperature
        self.backbone = backbone
        self.projector = Head(backbone.num_features, hidden_dim, key_dim)
        self.predictor = Head(key_dim, hidden_dim, key_dim)
        self.target_backbone = target_backbone
        self.target_projector = copy.deepcopy(self.projector)
        for _, target in self._pairs():
            target.requires_grad_(False)
        for name in ("queue_1", "queue_2"):
            self.register_buffer(name, F.normalize(torch.randn(key_dim, queue_size), dim=0))
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))
        self.restart()

    def forward(self, view_1: Tensor, view_2: Tensor, begins_step: bool = True) -> MoBYOutput:
        """Two views (B, 3, S, S) of the same images, normalised floats.

        In training, ``begins_step`` says that an optimiser step begins here: the target then moves first. In
        eval mode nothing moves, and neither are keys gathered nor queues filled.
        """
        if self.training and begins_step:
            self._begin_step()
        query_1, query_2 = self._queries(view_1), self._queries(view_2)
        key_1, key_2 = self._keys(view_1), self._keys(view_2)
        losses = self._contrast(query_1, key_2, self.queue_2) + self._contrast(query_2, key_1, self.queue_1)
        if self.training:
            enqueue(self.queue_1, gather(key_1))
            enqueue(self.queue_2, gather(key_2))
        return MoBYOutput(losses.mean(), losses)

    @torch.no_grad()
    def restart(self) -> None:
        """Begin a run with the present online weights: the target is a copy of them."""
        for online, target in self._pairs():
            target.copy_(online)
        self.step.zero_()

    @torch.no_grad()
    def _begin_step(self) -> None:
        momentum = momentum_at(int(self.step), self.steps, self.momentum)
        for online, target in self._pairs():
            target.lerp_(online.to(target.dtype), 1.0 - momentum)
        self.step += 1

    def _pairs(self) -> Iterator[tuple[Tensor, nn.Parameter]]:
        online = (*self.backbone.parameters(), *self.projector.parameters())
        target = (*self.target_backbone.parameters(), *self.target_projector.parameters())
        yield from zip(online, target, strict=True)

    def _queries(self, view: Tensor) -> Tensor:
        projected = self.projector(self.backbone.embedding(view))
        return F.normalize(self.predictor(projected).float(), dim=1)

    @torch.no_grad()
    def _keys(self, view: Tensor) -> Tensor:
        precision = self.projector.linear_out.weight.dtype
        # in fp32 by weights, in the online network's precision by products
        with torch.autocast(view.device.type, precision, enabled=precision != torch.float32):
            projected = self.target_projector(self.target_backbone.embedding(view))
        return F.normalize(projected.float(), dim=1)

    def _contrast(self, queries: Tensor, keys: Tensor, queue: Tensor) -> Tensor:
        """Cross-entropy (B,) of the own key among it and the queue."""
        positive = (queries * keys).sum(1, keepdim=True)
        logits = torch.cat([positive, queries @ queue.clone()], dim=1) / self.temperature  # the queue changes
        return F.cross_entropy(logits, torch.zeros_like(logits[:, 0], dtype=torch.int64), reduction="none")

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        for name, child in self.named_children():
            child._apply(move_only(fn) if name.startswith("target_") else fn)  # type: ignore[no-untyped-call]
        super()._apply(move_only(fn), False)  # type: ignore[no-untyped-call]
        return self


class Head(nn.Module):
    """Linear, batch norm over all processes, ReLU, Linear. The names are those of the released weights, whose
    hidden layer counts from 1."""

    def __init__(self, dim: int, hidden_dim: int, out_dim: int) -> None:
        super().__init__()
        self.linear_hidden = nn.Sequential(
            nn.Identity(), nn.Linear(dim, hidden_dim), SyncBatchNorm1d(hidden_dim), nn.ReLU(inplace=True)
        )
        self.linear_out = nn.Linear(hidden_dim, out_dim)

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.linear_out(self.linear_hidden(x)))


def momentum_at(step: int, steps: int, start: float) -> float:
    """Momentum of step ``step`` (from 0) of ``steps``: ``start`` at first, 1 after the last one."""
    return 1.0 - (1.0 - start) * (math.cos(math.pi * min(step, steps) / steps) + 1.0) / 2.0


@torch.no_grad()
def enqueue(queue: Tensor, keys: Tensor) -> None:
    """Put ``keys`` (N, D) at the front of ``queue`` (D, K); the oldest ones leave at its end."""
    queue.copy_(torch.cat([keys.T.to(queue.dtype), queue], dim=1)[:, : queue.shape[1]])


@torch.no_grad()
def gather(keys: Tensor) -> Tensor:
    """(B, D) of every process → (W·B, D), by process, on all of them."""
    if world_size() == 1:
        return keys
    parts = [torch.empty_like(keys) for _ in range(world_size())]
    dist.all_gather(parts, keys.contiguous())
    return torch.cat(parts)
