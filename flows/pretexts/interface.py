"""What a pretraining stage asks of a pretext: a model, a loss, how good it is, and how to describe it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, Generic, TypeVar

import torch
from torch import nn

from flows.params import Params, Training
from flows.training import Processes, micro_batch_size

BatchT = TypeVar("BatchT")
DataT = TypeVar("DataT")


class Pretext(ABC, Generic[BatchT, DataT]):
    """Holds the model that is trained; every method that takes `engine` calls that, the engine around it.

    `BatchT` is a micro-batch, `DataT` what is judged on: a data set of images, a split of text.
    """

    model: nn.Module

    def __init__(self, params: Params, training: Training, processes: Processes) -> None:
        self.params, self.processes = params, processes
        self.micro_batch = micro_batch_size(training, processes.world_size)

    @abstractmethod
    def loss(self, engine: Any, batch: BatchT) -> torch.Tensor:
        """Of a micro-batch of the training sequence; the mean over processes and micro-steps is minimised."""

    @abstractmethod
    def loss_on(self, data: DataT, engine: Any) -> float:
        """Of all of `data`, in eval mode, on all processes."""

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """What the stage's output says of it beside model and data."""

    def measures(self, data: DataT) -> dict[str, float]:
        """What else is worth knowing of the task itself, for the stage's metrics."""
        return {}
