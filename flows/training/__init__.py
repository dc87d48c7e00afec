"""The one training loop and its DeepSpeed engine. Only this package imports deepspeed."""

from flows.training.checkpoints import Checkpoints, fingerprint, settings_that_name
from flows.training.distributed import Processes, initialize_processes, micro_batch_size
from flows.training.loop import Job, Result, Row, train
from flows.training.optimizer import ParameterGroup, group_parameters
from flows.training.peers import watch_peers

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
    "micro_batch_size",
    "settings_that_name",
    "train",
    "watch_peers",
]
