"""AdamW or SGD over parameter groups whose learning rates follow one schedule with a factor each."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import nn

from flows.params import Training


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters that share weight decay and learning-rate factor."""

    lr_scale: float
    weight_decay: float
    names: tuple[str, ...]


def group_parameters(
    model: nn.Module,
    weight_decay: float,
    is_exempt: Callable[[str, nn.Parameter], bool],
    lr_scale: Callable[[str], float] = lambda name: 1.0,
) -> list[ParameterGroup]:
    """Sort the trainable parameters by (lr factor, decay); the order is stable, so that checkpoints fit."""
    groups: dict[tuple[float, float], list[str]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            decay = 0.0 if is_exempt(name, parameter) else weight_decay
            groups.setdefault((lr_scale(name), decay), []).append(name)
    return [ParameterGroup(scale, decay, tuple(names)) for (scale, decay), names in sorted(groups.items())]


def build_optimizer(
    model: nn.Module, groups: Iterable[ParameterGroup], settings: Training
) -> torch.optim.Optimizer:
    """torch's AdamW, or SGD with Nesterov momentum; `lr` is set per step by the loop."""
    parameters = dict(model.named_parameters())
    described = [
        {
            "params": [parameters[name] for name in group.names],
            "weight_decay": group.weight_decay,
            "lr": 0.0,
        }
        for group in groups
    ]
    if settings.optimizer == "sgd":
        momentum = settings.betas[0]
        return torch.optim.SGD(described, momentum=momentum, nesterov=momentum > 0, foreach=True)
    return torch.optim.AdamW(described, betas=settings.betas, eps=1e-8, fused=True)
