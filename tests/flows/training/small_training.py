"""A small regression for the training loop, in this process or in several that are forked from a prepared
one."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pickle
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from flows import ports
from flows.params import Distributed, Training
from flows.training import Checkpoints, Job, Result, group_parameters, initialize_processes, train

TARGET = torch.tensor([[1.0, -2.0, 0.5, 3.0]])
DISTRIBUTED = Distributed(rendezvous_timeout_s=60, peer_timeout_s=60, collective_timeout_s=60)
PATIENCE_S = 120.0


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


# ---- several processes ----

_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(["flows.training"])  # torch and DeepSpeed are imported once


def in_processes(count: int, work: Callable[..., Any], *arguments: Any) -> list[Any]:
    """`work(*arguments)` in `count` processes that are connected as torchrun connects them; their answers by
    rank. An exception is an answer."""
    port = ports.free_port()
    ends = [_SERVER.Pipe(duplex=False) for _ in range(count)]
    started = [
        _SERVER.Process(target=_member, args=(rank, count, port, writer, work, arguments))
        for rank, (_, writer) in enumerate(ends)
    ]
    for process in started:
        process.start()
    answers = []
    try:
        for process, (reader, writer) in zip(started, ends, strict=True):
            writer.close()
            assert reader.poll(PATIENCE_S), "no answer"
            try:
                answers.append(pickle.loads(reader.recv_bytes()))
            except EOFError:
                process.join(PATIENCE_S)
                answers.append(process.exitcode)
    finally:
        for process in started:
            process.join(PATIENCE_S if answers else 0)
            if process.is_alive():
                process.kill()
    return answers


def _member(
    rank: int, count: int, port: int, answer: Any, work: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    try:
        value = work(*arguments)
    except Exception as error:
        value = error
    answer.send_bytes(pickle.dumps(value))  # as a plain pickle: torch would send tensors by reference
    with contextlib.suppress(Exception):
        dist.destroy_process_group()
    answer.close()
    os.kill(os.getpid(), signal.SIGKILL)  # a process that was forked with torch in it may hang at its exit
