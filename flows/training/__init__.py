"""The one training loop and its DeepSpeed engine. Only this package imports deepspeed."""

from flows.training.checkpoints import Checkpoints, fingerprint
from flows.training.distributed import Processes, initialize_processes
from flows.training.loop import Job, Result, Row, train
from flows.training.optimizer import ParameterGroup, group_parameters

__all__ = [
    "Checkpoints",
    "Job",
    "ParameterGroup",
    "Processes",
    "Result",
    "Row",
    "fingerprint",
    "group_parameters",
    "initialize_processes",
    "train",
]
