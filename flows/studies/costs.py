"""What a pretraining costs: operations, from the network's shapes; time and memory, as measured.

Operations are those of the model, counted by torch on the meta device (no weights, no arithmetic): one
forward and one backward pass of the pretext's own network, times the images seen. Recomputed activations, the
optimiser and validation are not in it: the figure is the same on every machine and for every way to save
memory.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from flows import pretexts
from flows.imaging import Preprocessing
from flows.params import Model, Params
from flows.training import Processes
from models.pretext.simmim import SimMIM


@dataclass(frozen=True)
class Cost:
    """Of one pretraining, known beforehand."""

    parameters: int
    """Of the backbone."""
    images_seen: int
    """Over all epochs."""
    flops_per_image: int
    """Forward and backward."""

    @property
    def flops(self) -> int:
        return self.flops_per_image * self.images_seen


@dataclass(frozen=True)
class Measured:
    """What the execution of stage `pretrain` took, from its receipt; None where it does not say."""

    seconds: float | None = None
    """Of the last attempt, from the start of the process to its end."""
    device_hours: float | None = None
    """Of all attempts and processes, in steps and validations."""
    peak_memory_bytes: float | None = None
    """Of the GPU if there is one, else of the first process."""


def estimate(checked: Params) -> Cost:
    """
    Raises:
        ConfigError: the sizes in params do not fit one another.
    """
    training = checked.pretrain.training
    parameters, flops_per_image = _count(checked.model, _without_savings(checked).model_dump_json())
    return Cost(parameters, training.steps * training.batch_size, flops_per_image)


def read_receipt(receipt: Mapping[str, Any]) -> Measured:
    return Measured(
        receipt.get("duration_s"),
        receipt.get("device_hours"),
        receipt.get("peak_gpu_memory_bytes", receipt.get("peak_memory_bytes")),
    )


def _without_savings(checked: Params) -> Params:
    """With nothing that computes twice to save memory, and alike for all lengths, subsets and seeds."""
    values = checked.model_dump()
    values["pretrain"]["training"] |= {
        "steps": 1,
        "warmup_steps": 0,
        "activation_checkpointing": False,
        "attention_chunk": 0,
    }
    values["pretrain"]["subset"] = checked.scale.percentages[-1]
    return Params.model_validate({**values, "seed": 0})


@functools.lru_cache(maxsize=64)
def _count(model: Model, settings: str) -> tuple[int, int]:
    """Parameters of the backbone and operations per image."""
    checked = Params.model_validate_json(settings)
    blank = Preprocessing(model.image_size, model.image_size, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    with torch.device("meta"), torch.random.fork_rng(devices=[]):
        network = pretexts.create(checked, blank, Processes(0, 1, torch.device("meta"))).model
        assert isinstance(network, SimMIM)
        image = torch.zeros(1, 3, model.image_size, model.image_size)
        mask = torch.ones(1, network.mask_grid, network.mask_grid, dtype=torch.bool)
        with FlopCounterMode(display=False) as counter:
            network.train()(image, mask).loss.backward()
    parameters = sum(parameter.numel() for parameter in network.backbone.parameters())
    return parameters, counter.get_total_flops()
