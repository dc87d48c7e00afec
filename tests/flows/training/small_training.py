"""A small regression for the training loop, in this process or as one of several."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from flows.params import Distributed, Training
from flows.training import Checkpoints, Job, Result, group_parameters, initialize_processes, train

TARGET = torch.tensor([[1.0, -2.0, 0.5, 3.0]])
DISTRIBUTED = Distributed(rendezvous_timeout_s=60, peer_timeout_s=60, collective_timeout_s=60)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 16)
        self.second = nn.Linear(16, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(nn.functional.dropout(torch.relu(self.first(x)), 0.1, self.training))


class Counting(nn.Module):
    """No noise, sizes that two processes cannot halve, and a buffer that changes as it is trained."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 17)
        self.second = nn.Linear(17, 1)
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            self.calls += 1.0
        return self.second(torch.relu(self.first(x)))


def training(raw: dict[str, Any], **change: Any) -> Training:
    base = {
        **raw["pretrain"]["training"],
        "steps": 30,
        "batch_size": 8,
        "threads": 1,
        "lr": 0.1,
        "warmup_steps": 3,
        "log_every": 5,
        "validate_every": 10,
        "checkpoint_every": 10,
    }
    return Training.model_validate({**base, **change})


def samples(step: int, size: int) -> torch.Tensor:
    """Those of one step, over all processes and micro-steps."""
    return torch.randn(size, 4, generator=torch.Generator().manual_seed(step))


def run(
    folder: Path,
    settings: Training,
    stop_at: int | None = None,
    spoil_at: int | None = None,
    make: Callable[[], nn.Module] = Net,
    **job: Any,
) -> Result:
    """Train from scratch or resume in `folder`; `stop_at` asks to stop after so many steps of it."""
    processes = initialize_processes(settings, DISTRIBUTED)
    taken = 0

    def batches(start: int) -> Iterator[torch.Tensor]:
        nonlocal taken
        parts = settings.accumulation * processes.world_size
        for step in range(start, settings.steps):
            taken += 1
            divided = samples(step, settings.batch_size).chunk(parts)
            yield from divided[processes.rank :: processes.world_size]

    def loss(engine: Any, x: torch.Tensor) -> torch.Tensor:
        value = (engine(x) - x @ TARGET.T).square().mean()
        return value * float("nan") if spoil_at is not None and taken > spoil_at else value

    def validate(engine: Any) -> dict[str, float]:
        x = samples(10_000, 64)
        return {"val_loss": float((engine(x) - x @ TARGET.T).square().mean())}

    torch.manual_seed(0)
    model = make()
    described = Job(
        name="test",
        model=model,
        settings=settings,
        seed=1,
        groups=group_parameters(model, settings.weight_decay, lambda name, parameter: parameter.ndim == 1),
        batches=batches,
        loss=loss,
        validate=validate,
        probe=lambda engine: validate(engine)["val_loss"],
        stop_requested=lambda: stop_at is not None and taken >= stop_at,
        **job,
    )
    checkpoints = Checkpoints(folder, processes)
    with checkpoints.hold():
        return train(described, processes, checkpoints)
