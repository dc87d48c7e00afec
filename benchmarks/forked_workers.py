"""Attention workers as real processes that start within milliseconds: for runs that lose many of them.

    python -m benchmarks.forked_workers TOKEN_FILE      reads a port a line, answers with port and process

The process has imported everything, and forks a worker for every line.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[1]
WORKER_BYTES = 1 << 26


class Zygote:
    """Starts attention workers within milliseconds: a process that has imported everything and forks."""

    def __init__(self, token: Path) -> None:
        command = [sys.executable, "-m", "benchmarks.forked_workers", str(token)]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT
        )
        self.pids: dict[int, int] = {}  # port → process

    def start(self, port: int = 0) -> int:
        """A worker on `port`, or on a free one; gives the port."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{port}\n")
        self._process.stdin.flush()
        told = json.loads(self._process.stdout.readline())
        self.pids[told["port"]] = told["pid"]
        return int(told["port"])

    def replace(self, port: int) -> None:
        with suppress(ProcessLookupError):
            os.kill(self.pids[port], signal.SIGKILL)
        for _ in range(200):
            try:
                self.start(port)
                return
            except KeyError:  # the port is free when the dead one is gone
                time.sleep(0.01)
        raise RuntimeError(f"no worker can be started on port {port}")

    def lives(self, port: int) -> bool:
        try:
            return psutil.Process(self.pids[port]).status() not in (
                psutil.STATUS_STOPPED,
                psutil.STATUS_ZOMBIE,
            )
        except psutil.NoSuchProcess:
            return False

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(10)


def zygote(token_file: Path) -> None:
    """Read a port, fork a worker there, say port and process."""
    import torch  # the other side of the pipe needs none of this

    from flows.serving.lamina.attention.session import Session
    from flows.serving.lamina.attention.worker import Server

    torch.set_num_threads(1)
    Session(WORKER_BYTES).prepare()  # so that no child has to
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the dead
    token = token_file.read_bytes()
    children: list[int] = []
    for line in sys.stdin:
        try:
            listener = socket.create_server(("127.0.0.1", int(line)))
        except OSError as error:
            print(json.dumps({"error": str(error)}), flush=True)
            continue
        pid = os.fork()
        if pid == 0:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            Server(listener, token, Session(WORKER_BYTES), drain_timeout_s=0.1).serve()
            os._exit(0)
        children.append(pid)
        port = listener.getsockname()[1]
        listener.close()
        print(json.dumps({"port": port, "pid": pid}), flush=True)
    for pid in children:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


if __name__ == "__main__":
    zygote(Path(sys.argv[1]))
