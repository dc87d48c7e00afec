"""Parts that more than one backbone is made of: patches, their merging, the MLP and stochastic depth."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch.nn.functional as F
from torch import Tensor, nn


class PatchEmbed(nn.Module):
    """Non-overlapping patches, projected and (Swin) normalised: (B, 3, S, S) → (B, S/p, S/p, C).

    Images whose sides are no multiples of the patch get zeros at the right and the bottom.
    """

    def __init__(self, patch_size: int, dim: int, in_channels: int = 3, norm: bool = True) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.in_channels = in_channels
        self.proj = nn.Conv2d(in_channels, dim, kernel_size=patch_size, stride=patch_size)
        self.norm = nn.LayerNorm(dim) if norm else None

    def forward(self, images: Tensor) -> Tensor:
        p = self.patch_size
        height, width = images.shape[-2:]
        x = F.pad(images, (0, -width % p, 0, -height % p)) if height % p or width % p else images
        rows, columns = -(-height // p), -(-width // p)
        # A convolution whose stride is its kernel is a matrix product over patches, and faster as one.
        x = x.to(self.proj.weight.dtype).reshape(-1, self.in_channels, rows, p, columns, p)
        x = x.permute(0, 2, 4, 1, 3, 5).reshape(-1, rows, columns, self.in_channels * p * p)
        x = F.linear(x, self.proj.weight.flatten(1), self.proj.bias)
        return x if self.norm is None else cast(Tensor, self.norm(x))


class PatchMerging(nn.Module):
    """Four neighbours → one token of twice the width: (B, H, W, C) → (B, ⌈H/2⌉, ⌈W/2⌉, 2C).

    V1 normalises the 4C channels and then reduces; V2 (``norm_first=False``) reduces first and normalises the
    2C channels. Odd maps get one row or column of zeros.
    """

    def __init__(self, dim: int, norm_first: bool) -> None:
        super().__init__()
        self.norm_first = norm_first
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False)
        self.norm = nn.LayerNorm(4 * dim if norm_first else 2 * dim)

    def forward(self, x: Tensor) -> Tensor:
        height, width, dim = x.shape[1:]
        if height % 2 or width % 2:
            x = F.pad(x, (0, 0, 0, width % 2, 0, height % 2))
        rows, columns = -(-height // 2), -(-width // 2)
        # Channel order (row, column): (0,0), (1,0), (0,1), (1,1).
        x = x.reshape(-1, rows, 2, columns, 2, dim).permute(0, 1, 3, 4, 2, 5)
        x = x.reshape(-1, rows, columns, 4 * dim)
        return cast(Tensor, self.reduction(self.norm(x)) if self.norm_first else self.norm(self.reduction(x)))


class Mlp(nn.Module):
    """Linear, GELU, Linear."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.fc2(F.gelu(self.fc1(x))))


class DropPath(nn.Module):
    """Stochastic depth (arXiv 1603.09382): drops a residual branch per sample, keeps its expectation."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        if self.rate == 0.0 or not self.training:
            return x
        keep = 1.0 - self.rate
        return x * x.new_empty((x.shape[0], *(1,) * (x.ndim - 1))).bernoulli_(keep).div_(keep)

    def extra_repr(self) -> str:
        return f"rate={self.rate:.3f}"


def drop_path_rates(last: float, blocks: int) -> list[float]:
    """One rate per block, rising linearly from 0 to ``last``.

    Raises:
        ValueError: ``last`` is no rate.
    """
    if not 0.0 <= last < 1.0:
        raise ValueError(f"drop_path is {last}, but must lie in 0 <= x < 1.")
    return [last * i / max(blocks - 1, 1) for i in range(blocks)]


def stages_chosen(choice: bool | int | Sequence[bool], stages: int) -> tuple[bool, ...]:
    """One flag per stage: all or none (a bool), the first so many (an int), or each one's own.

    Raises:
        ValueError: the choice is not one for so many stages.
    """
    if isinstance(choice, bool):
        return (choice,) * stages
    if isinstance(choice, int):
        if not 0 <= choice <= stages:
            raise ValueError(f"activation_checkpointing is {choice}, but there are {stages} stages.")
        return tuple(stage < choice for stage in range(stages))
    if len(choice) != stages:
        raise ValueError(
            f"activation_checkpointing has {len(choice)} entries, but each of {stages} stages needs one."
        )
    return tuple(bool(flag) for flag in choice)


def maps_chosen(indices: Sequence[int] | None, count: int) -> list[int]:
    """Which of ``count`` maps are wanted, in ascending order; None = all.

    Raises:
        ValueError: none is, or there is no such map, or the order is another.
    """
    chosen = list(range(count)) if indices is None else list(indices)
    if not chosen or chosen != sorted(set(chosen)) or chosen[0] < 0 or chosen[-1] >= count:
        raise ValueError(
            f"indices are {chosen}, but must ascend within 0 to {count - 1}: there are {count} maps."
        )
    return chosen
