"""Start a training stage on as many processes as params.yaml says: `python -m flows.launch pretrain …`.

One process trains right here; several go through torchrun's agent, which starts this module again as its
workers. On several machines give torchrun's usual arguments in `TRUNKLINE_TORCHRUN` (for example "--nnodes 2
--node-rank 0 --nproc-per-node 8 --master-addr HOST --master-port 29500") and start the same command on each.
The exit code is that of the process that failed first of its own accord.
"""

from __future__ import annotations

import importlib
import logging
import os
import shlex
import signal
import sys
from typing import TYPE_CHECKING

from flows import params
from flows.errors import Interrupted, TrunklineError
from flows.params import Training
from flows.stage import is_main_process, stop_when_orphaned

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure


def process_count(settings: Training) -> int:
    if settings.processes != "auto":
        return settings.processes
    import torch

    return max(1, torch.cuda.device_count())


def main(argv: list[str] | None = None) -> int:
    stage, *arguments = sys.argv[1:] if argv is None else argv
    _stop_early_without_a_trace(stage)
    stop_when_orphaned()
    if "TORCHELASTIC_RUN_ID" in os.environ:  # a worker of the agent below
        return run_here(stage, arguments)
    try:
        settings: Training = getattr(params.load(), stage).training
    except TrunklineError as error:
        print(f"error: {stage}: {error}", file=sys.stderr)
        return error.exit_code
    # waiting threads that spin make a shared machine ten times slower; OpenMP reads this when torch is loaded
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    count = process_count(settings)
    torchrun = shlex.split(os.environ.get("TRUNKLINE_TORCHRUN", ""))
    if count == 1 and not torchrun:
        return run_here(stage, arguments)
    return run_agent(torchrun or ["--standalone", "--nproc-per-node", str(count)], stage, arguments)


def run_here(stage: str, arguments: list[str]) -> int:
    """The stage in this process; its import takes seconds (torch, DeepSpeed)."""
    return int(importlib.import_module(f"flows.stages.{stage}").main(arguments))


def run_agent(torchrun: list[str], stage: str, arguments: list[str]) -> int:
    """torchrun's agent in this process, so that its exceptions become one line and an exit code."""
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import parse_args, run

    if "LOGLEVEL" not in os.environ:  # the agent comments on every failure; ours is said in one line
        for name in list(logging.root.manager.loggerDict):
            if name.startswith("torch.distributed.elastic"):
                logging.getLogger(name).setLevel(logging.CRITICAL)
    # torchrun would warn without it; the stage sets torch's threads from params
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    try:
        parsed = parse_args(  # type: ignore[no-untyped-call]  # torch leaves both untyped
            ["--max-restarts", "0", *torchrun, "-m", "flows.launch", stage, *arguments]
        )
        run(parsed)  # type: ignore[no-untyped-call]
    except ChildFailedError as error:
        failure = _cause(list(error.failures.values()))
        if message := _message(failure, stage):
            print(f"error: {message}", file=sys.stderr, flush=True)
        return 128 - failure.exitcode if failure.exitcode < 0 else failure.exitcode
    except SignalException:
        return Interrupted.exit_code
    return 0


def _cause(failures: list[ProcessFailure]) -> ProcessFailure:
    """The first failure; one process that ends interrupts all others, so an interruption is rather a
    consequence."""
    return min(failures, key=lambda failure: (failure.exitcode == Interrupted.exit_code, failure.timestamp))


def _message(failure: ProcessFailure, stage: str) -> str:
    """What is still to be said: a worker's mistake (see flows.stage) or its violent end; a bug has shown its
    trace."""
    if isinstance(failure.message, dict):
        return str(failure.message["message"])
    if failure.exitcode < 0:
        return (
            f"{stage}: training process {failure.local_rank} was ended by "
            f"{signal.Signals(-failure.exitcode).name}; "
            "the same command continues from the last checkpoint"
        )
    return ""


def _stop_early_without_a_trace(stage: str) -> None:
    """Until the stage, or the agent, has its own handlers there is nothing to save."""

    def stop(signum: int, frame: object) -> None:
        if is_main_process():
            print(f"error: {stage}: stopped before it began", file=sys.stderr, flush=True)
        os._exit(Interrupted.exit_code)

    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, stop)


if __name__ == "__main__":
    raise SystemExit(main())
