"""Start a training stage on as many processes as params.yaml says: `python -m flows.launch pretrain …`.

One process runs directly; several go through torchrun's agent. On several machines give torchrun's usual
arguments in `TRUNKLINE_TORCHRUN` (for example "--nnodes 2 --node-rank 0 --nproc-per-node 8 --master-addr HOST
--master-port 29500") and start the same command on each. The exit code is the first failed process's.
"""

from __future__ import annotations

import os
import shlex
import sys

from flows import params
from flows.errors import Interrupted, TrunklineError
from flows.params import Training


def process_count(settings: Training) -> int:
    if settings.processes != "auto":
        return settings.processes
    import torch

    return max(1, torch.cuda.device_count())


def main(argv: list[str] | None = None) -> int:
    stage, *arguments = sys.argv[1:] if argv is None else argv
    module = f"flows.stages.{stage}"
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
        os.execv(sys.executable, [sys.executable, "-m", module, *arguments])
    return run_agent(torchrun or ["--standalone", "--nproc-per-node", str(count)], module, arguments)


def run_agent(torchrun: list[str], module: str, arguments: list[str]) -> int:
    """torchrun's agent in this process, so that its exceptions become an exit code, not a stack trace."""
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import elastic_launch
    from torch.distributed.run import config_from_args, parse_args

    # torchrun would warn; the stage sets torch's threads from params
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    parsed = parse_args(  # type: ignore[no-untyped-call]  # torch leaves it untyped
        ["--max-restarts", "0", *torchrun, "-m", module, *arguments]
    )
    config, command, command_arguments = config_from_args(parsed)
    try:
        elastic_launch(config=config, entrypoint=command)(*command_arguments)
    except ChildFailedError as error:
        return int(error.get_first_failure()[1].exitcode)
    except SignalException:
        return Interrupted.exit_code
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
