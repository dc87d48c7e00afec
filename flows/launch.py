"""Start a training stage on as many processes as params.yaml says: `python -m flows.launch pretrain …`.

One process trains right here; several go through torchrun's agent, which starts this module again as its
workers. On several machines give torchrun's usual arguments in `TRUNKLINE_TORCHRUN` (for example "--nnodes 2
--node-rank 0 --nproc-per-node 8 --master-addr HOST --master-port 29500") and start the same command on each
(docs/cluster.md); their number of processes counts then, whatever params.yaml says. The exit code is that of
the process that failed first of its own accord.
"""

from __future__ import annotations

import importlib
import logging
import os
import shlex
import signal
import socket
import sys
import threading
import time
from typing import TYPE_CHECKING, Any

import psutil

from flows import params
from flows.errors import ConfigError, Interrupted, ResourceError, TrunklineError
from flows.params import Params, Training
from flows.stage import is_main_process, stop_when_orphaned

if TYPE_CHECKING:
    import argparse

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
        return launch(params.load(), stage, arguments)
    except TrunklineError as error:
        print(f"error: {stage}: {error}", file=sys.stderr, flush=True)
        return error.exit_code


def launch(checked: Params, stage: str, arguments: list[str]) -> int:
    """
    Raises:
        ConfigError, ResourceError, Interrupted: the machines did not find one another.
    """
    # waiting threads that spin make a shared machine ten times slower; OpenMP reads this when torch is loaded
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    count = process_count(getattr(checked, stage).training)
    torchrun = shlex.split(os.environ.get("TRUNKLINE_TORCHRUN", ""))
    if count == 1 and not torchrun:
        return run_here(stage, arguments)
    return run_agent(
        torchrun or ["--standalone", "--nproc-per-node", str(count)],
        stage,
        arguments,
        checked.distributed.rendezvous_timeout_s,
    )


def run_here(stage: str, arguments: list[str]) -> int:
    """The stage in this process; its import takes seconds (torch, DeepSpeed)."""
    return int(importlib.import_module(f"flows.stages.{stage}").main(arguments))


def run_agent(torchrun: list[str], stage: str, arguments: list[str], timeout_s: int) -> int:
    """torchrun's agent in this process, so that its exceptions become one line and an exit code.

    Args:
        timeout_s: how long to wait for the other machines.
    """
    # read when torch is loaded: it would warn of every connection from an address without a name
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    from torch.distributed import DistError
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import RendezvousError
    from torch.distributed.run import parse_args, run

    if "LOGLEVEL" not in os.environ:  # the agent comments on every failure; ours is said in one line
        for name in list(logging.root.manager.loggerDict):
            if name.startswith("torch.distributed.elastic"):
                logging.getLogger(name).setLevel(logging.CRITICAL)
    # torchrun would warn without it; the stage sets torch's threads from params
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    waiting = f"timeout={timeout_s},join_timeout={timeout_s}"
    parsed = parse_args(  # type: ignore[no-untyped-call]  # torch leaves both untyped
        ["--max-restarts", "0", "--rdzv-conf", waiting, *torchrun, "-m", "flows.launch", stage, *arguments]
    )
    if parsed.nnodes not in ("1", "1:1"):
        _prepare_network(parsed, timeout_s)
        _stop_also_while_waiting(stage)
    try:
        run(parsed)  # type: ignore[no-untyped-call]
    except ChildFailedError as error:
        failure = _cause(list(error.failures.values()))
        if message := _message(failure, stage):
            print(f"error: {message}", file=sys.stderr, flush=True)
        if failure.exitcode == -signal.SIGTERM:
            return Interrupted.exit_code
        return 128 - failure.exitcode if failure.exitcode < 0 else failure.exitcode
    except SignalException:
        return Interrupted.exit_code
    except (DistError, RendezvousError) as error:
        raise _explain_rendezvous(error, parsed, timeout_s) from error
    return 0


def _prepare_network(parsed: argparse.Namespace, timeout_s: int) -> None:
    """Wait for the first machine, and let gloo use the interface that leads there: it would take the one of
    this machine's own name, often the loopback one.

    torch would wait for it as well, but deaf to signals and with a stack trace at the end.

    Raises:
        ConfigError: there is no such name.
        Interrupted: it does not answer.
    """
    host = parsed.rdzv_endpoint.rpartition(":")[0] or parsed.master_addr
    deadline = time.monotonic() + timeout_s
    address = _resolve(host, parsed.master_port, deadline)
    try:
        with socket.socket(address[0], socket.SOCK_DGRAM) as probe:
            probe.connect(address[4])  # sends nothing: it only chooses the way
            mine = probe.getsockname()[0]
    except OSError:
        mine = ""  # no way there yet
    for name, entries in psutil.net_if_addrs().items():
        if any(entry.address.partition("%")[0] == mine for entry in entries):
            os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
    if parsed.rdzv_backend == "static" and parsed.node_rank != 0:
        while not _answers(address):
            if time.monotonic() > deadline:
                raise _not_together(parsed, timeout_s)
            time.sleep(0.5)


def _resolve(host: str, port: int, deadline: float) -> tuple[Any, ...]:
    while True:
        try:
            return socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        except socket.gaierror as error:  # a cluster may know a name only once its machine has started
            if time.monotonic() > deadline:
                raise ConfigError(
                    f"the first machine's name {host} cannot be resolved ({error.strerror}); correct it in "
                    "TRUNKLINE_TORCHRUN"
                ) from None
        time.sleep(0.5)


def _answers(address: tuple[Any, ...]) -> bool:
    with socket.socket(address[0], socket.SOCK_STREAM) as attempt:
        attempt.settimeout(5.0)
        return attempt.connect_ex(address[4]) == 0


def _stop_also_while_waiting(stage: str) -> None:
    """Python's handlers do not run while torch waits for the other machines, in one call of up to minutes."""
    reader, writer = socket.socketpair()
    writer.setblocking(False)
    signal.set_wakeup_fd(writer.fileno())  # written to as soon as a signal arrives

    def watch(writer: socket.socket) -> None:  # which would be closed if nobody held it
        while number := reader.recv(1):
            if number[0] not in (signal.SIGINT, signal.SIGTERM):
                continue
            time.sleep(1.0)
            if not psutil.Process().children():  # no training yet that could be asked to stop
                print(f"error: {stage}: stopped before it began", file=sys.stderr, flush=True)
                os._exit(Interrupted.exit_code)

    threading.Thread(target=watch, args=(writer,), daemon=True, name="stop-while-waiting").start()


def _explain_rendezvous(error: Exception, parsed: argparse.Namespace, timeout_s: int) -> TrunklineError:
    if "EADDRINUSE" in str(error):
        return ResourceError(f"port {_meeting_place(parsed)} is in use; choose another --master-port")
    return _not_together(parsed, timeout_s)


def _not_together(parsed: argparse.Namespace, timeout_s: int) -> Interrupted:
    return Interrupted(
        f"the {parsed.nnodes} machines did not find one another at {_meeting_place(parsed)} within "
        f"{timeout_s} s (distributed.rendezvous_timeout_s); is the address right, does the first machine "
        "listen there, have all been started?"
    )


def _meeting_place(parsed: argparse.Namespace) -> str:
    return str(parsed.rdzv_endpoint) or f"{parsed.master_addr}:{parsed.master_port}"


def _cause(failures: list[ProcessFailure]) -> ProcessFailure:
    """The first failure; one process that ends interrupts all others, and the agent terminates what is left,
    so an interruption is rather a consequence."""
    consequences = (Interrupted.exit_code, -signal.SIGTERM)
    return min(failures, key=lambda failure: (failure.exitcode in consequences, failure.timestamp))


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
