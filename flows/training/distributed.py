"""Processes, devices and the DeepSpeed engine.

One process needs nothing; several come from torchrun (`flows.launch`) and read its environment variables.
"""

from __future__ import annotations

import ctypes
import datetime
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn

from flows.errors import ConfigError
from flows.params import Distributed, Training

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed warns that it found nothing better

# DeepSpeed's autotuner, which nobody uses here, would import MLflow: a second in every training process
if "mlflow" not in sys.modules:
    sys.modules["mlflow"] = None  # type: ignore[assignment]  # an import of it fails

import deepspeed  # reads the accelerator at import
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

if sys.modules["mlflow"] is None:
    del sys.modules["mlflow"]

Value = TypeVar("Value")

BUCKET_MIN, BUCKET_MAX = 1_000_000, 200_000_000
"""Elements of a communication buffer. DeepSpeed's default of 5e8 is 2 GB, even for a million parameters."""
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of malloc.h
BUCKETS = 8
"""So many buffers make up a model: one of its whole size would undo half of what ZeRO 2 and 3 save."""


@dataclass(frozen=True)
class Processes:
    """This process among those that train together."""

    rank: int
    world_size: int
    device: torch.device
    local_rank: int = 0
    machine: int = 0
    machines: int = 1

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def is_first_here(self) -> bool:
        """The one that does for its machine what is to be done once."""
        return self.local_rank == 0

    def barrier(self) -> None:
        if self.world_size > 1:
            dist.barrier()

    def sum(self, values: list[float]) -> list[float]:
        """Element-wise sum over all processes, in double precision."""
        if self.world_size == 1:
            return values
        # float64 is not available on every accelerator's collective; gloo on the CPU has it
        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor)
        return [float(value) for value in tensor.tolist()]

    def any(self, flag: bool) -> bool:
        return self.sum([float(flag)])[0] > 0

    def share(self, value: Value) -> Value:
        """The main process's `value`, on all processes."""
        if self.world_size == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=0, device=self.device)
        return values[0]

    def gather(self, value: Value) -> list[Value]:
        """`value` of every process, by rank, on all processes."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values


def initialize_processes(settings: Training, distributed: Distributed) -> Processes:
    """Join the process group (gloo on the CPU, nccl on GPUs) and set threads and device.

    Raises:
        PeerLost: the other processes did not come in time (through flows.errors.explain).
    """
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # DeepSpeed's to change; torch would say it at every step
    warnings.filterwarnings("ignore", r".*torch\.distributed\.\w+` is deprecated", FutureWarning)
    # DeepSpeed would probe for compilers and build a C++ extension for low-latency inference reductions at
    # the first use: 80 s, and an error without a compiler. Training uses none of its compiled operators.
    deepspeed.ops.__compatible_ops__ = {}
    os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed insists on it, also for one process

    rank = int(os.environ.get("RANK", "0"))
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    local_rank = int(os.environ["LOCAL_RANK"])
    use_cuda = torch.cuda.is_available()
    if use_cuda:
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
        torch.backends.cuda.matmul.allow_tf32 = True
    else:
        device = torch.device("cpu")
        local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        torch.set_num_threads(settings.threads or max(1, len(os.sched_getaffinity(0)) // local))
        torch.use_deterministic_algorithms(True)
        # A young network's gradients underflow, and processors handle denormal numbers many times slower.
        torch.set_flush_denormal(True)
        keep_freed_memory()
        # else DeepSpeed's buffers are filled every step (the module is an object at run time)
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    if not dist.is_initialized():
        backend = "nccl" if use_cuda else "gloo"
        if world_size == 1:
            store = dist.HashStore()  # type: ignore[attr-defined]  # public, but not in torch's __all__
            dist.init_process_group(backend, store=store, rank=0, world_size=1)
        else:
            patience = datetime.timedelta(seconds=distributed.collective_timeout_s)
            dist.init_process_group(backend, timeout=patience)
    deepspeed.init_distributed(dist_backend="nccl" if use_cuda else "gloo", verbose=False)
    return Processes(
        rank,
        world_size,
        device,
        local_rank,
        machine=int(os.environ.get("GROUP_RANK", "0")),
        machines=int(os.environ.get("GROUP_WORLD_SIZE", "1")),
    )


def keep_freed_memory() -> None:
    """Let glibc keep large blocks for the next tensor. By default it gives each back to the system, and a
    step spends 6 % of its time on getting the same pages again (SwinV2-T, 192 pixels; same peak).

    Whoever set the threshold in the environment knows better; other C libraries have no such switch.
    """
    if "MALLOC_MMAP_THRESHOLD_" in os.environ:
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, 2**30)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def resolve_precision(settings: Training) -> str:
    if settings.precision != "auto":
        return settings.precision
    return "bf16" if torch.cuda.is_available() and torch.cuda.is_bf16_supported() else "fp32"


def micro_batch_size(settings: Training, world_size: int) -> int:
    """Images per process and forward pass.

    Raises:
        ConfigError: batch_size is not divisible by processes x accumulation.
    """
    parts = world_size * settings.accumulation
    if settings.batch_size % parts:
        raise ConfigError(
            f"batch_size {settings.batch_size} is not divisible by {world_size} processes x accumulation "
            f"{settings.accumulation}; start another number of processes or change one of the others"
        )
    return settings.batch_size // parts


def deepspeed_config(settings: Training, world_size: int, parameters: int) -> dict[str, Any]:
    """The one place where DeepSpeed's configuration is derived from params.yaml and the model's size."""
    bucket = max(BUCKET_MIN, min(parameters // BUCKETS, BUCKET_MAX))
    bucket -= bucket % 1000  # DeepSpeed refuses odd ones
    is_bf16 = resolve_precision(settings) == "bf16"
    zero: dict[str, Any] = {
        # without ZeRO, DeepSpeed keeps no fp32 copy of bf16 weights: small updates would be rounded away
        "stage": max(settings.zero_stage, 1) if is_bf16 else settings.zero_stage,
        "reduce_bucket_size": bucket,
        "allgather_bucket_size": bucket,
        # ZeRO 3: DeepSpeed's 1e9 would keep all weights of most models gathered for a whole step
        "stage3_max_live_parameters": bucket,
        "stage3_max_reuse_distance": bucket,
        "stage3_prefetch_bucket_size": bucket // 2,
    }
    if settings.zero_offload != "none":
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    if settings.zero_offload == "parameters":
        zero["offload_param"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    return {
        "train_batch_size": settings.batch_size,
        "train_micro_batch_size_per_gpu": micro_batch_size(settings, world_size),
        "gradient_accumulation_steps": settings.accumulation,
        "gradient_clipping": settings.clip_grad,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        # torch's AdamW also where DeepSpeed would like its own CPU Adam, which needs a C++ compiler
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": is_bf16},
        "steps_per_print": 2**31,
    }


def build_engine(
    model: nn.Module, optimizer: torch.optim.Optimizer, settings: Training, processes: Processes
) -> Any:
    """DeepSpeed engine around `model` (moved to the device) and `optimizer`."""
    engine, *_ = deepspeed.initialize(
        model=model.to(processes.device),
        optimizer=optimizer,
        config=deepspeed_config(settings, processes.world_size, sum(p.numel() for p in model.parameters())),
        dist_init_required=False,
    )
    return engine


def full_state_dict(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Plain fp32 weights from a ZeRO checkpoint folder (its parts of all processes must be there)."""
    with silenced():
        weights: dict[str, torch.Tensor] = get_fp32_state_dict_from_zero_checkpoint(
            str(checkpoint.parent), tag=checkpoint.name
        )
    return weights


@contextmanager
def silenced() -> Iterator[None]:
    """DeepSpeed's tools narrate what they do and draw progress bars."""
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        yield
