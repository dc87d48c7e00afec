"""Several connected processes without torchrun and its seconds: forked from one with all imports done."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pickle
import signal
from collections.abc import Callable
from typing import Any

import torch.distributed as dist

from flows import ports

PATIENCE_S = 120.0

_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(["flows.stages.pretrain", "torch._dynamo"])


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
