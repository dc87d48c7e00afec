"""Batch normalisation over the batch of all processes: torch's SyncBatchNorm, but on any device.

The mean, and then the variance around it, are averaged over the processes by an all-reduce that gradients
flow back through, so that a batch gives the same values and gradients however it is divided (equally: every
process has as many rows). Statistics are kept and computed in fp32, whatever the model around is cast to.

Shape legend: N rows of this process, C channels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn


def world_size() -> int:
    """Number of processes that train together; 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


class SyncBatchNorm1d(nn.BatchNorm1d):
    """(N, C) → (N, C), with the parameters and buffers of torch's ``BatchNorm1d``."""

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.weight.float(), self.bias.float()
        if not self.training or world_size() == 1:
            y = F.batch_norm(
                x.float(),
                self.running_mean,
                self.running_var,
                weight,
                bias,
                self.training,
                *self._constants(),
            )
            return y.to(x.dtype)
        values = x.float()
        mean = _average(values.mean(0))
        variance = _average((values - mean).square().mean(0))
        self._update(mean.detach(), variance.detach(), count=len(x) * world_size())
        y = (values - mean) * torch.rsqrt(variance + self.eps) * weight + bias
        return y.to(x.dtype)

    def _constants(self) -> tuple[float, float]:
        return cast(float, self.momentum), self.eps

    @torch.no_grad()
    def _update(self, mean: Tensor, variance: Tensor, count: int) -> None:
        assert self.running_mean is not None
        assert self.running_var is not None
        unbiased = variance * (count / max(count - 1, 1))
        self.running_mean.lerp_(mean, cast(float, self.momentum))
        self.running_var.lerp_(unbiased, cast(float, self.momentum))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        before_it = self.running_mean, self.running_var
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, before in zip(("running_mean", "running_var"), before_it, strict=True):
            assert before is not None
            self._buffers[name] = move_only(fn)(before)  # in bf16 a running mean would stand still
        return self


class TokenBatchNorm(SyncBatchNorm1d):
    """(…, C) → (…, C): a channel's statistics are over all tokens of all images."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.reshape(-1, x.shape[-1])).reshape(x.shape)


def move_only(fn: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """What ``nn.Module._apply`` would do with ``fn``, without a change of dtype."""

    def move(tensor: Tensor) -> Tensor:
        return tensor.to(fn(tensor.new_empty(0)).device)

    return move


def _average(value: Tensor) -> Tensor:
    return cast(Tensor, _SumOverProcesses.apply(value)) / world_size()  # type: ignore[no-untyped-call]


class _SumOverProcesses(torch.autograd.Function):
    """All-reduce whose gradient is the all-reduce of the gradients: every process's loss depends on it."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        value = value.contiguous().clone()
        dist.all_reduce(value)
        return value

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        gradient = gradient.contiguous().clone()
        dist.all_reduce(gradient)
        return gradient
