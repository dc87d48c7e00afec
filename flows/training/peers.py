"""Machines that train together notice when one of them falls silent.

A process that is killed closes its connections, and the others know at once. A machine that loses power, or
the network, closes nothing: the others would wait in a collective call, which cannot be broken off, until its
timeout. So each machine counts up in torchrun's store, and whoever has seen no progress of another for
`distributed.peer_timeout_s` ends. An outage that is shorter does no harm.
"""

from __future__ import annotations

import datetime
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch.distributed as dist

from flows.errors import PeerLost
from flows.training.distributed import Processes

BEATS = 10
"""Signs of life per `peer_timeout_s`."""
GRACE_S = 5.0
"""Time to end of one's own accord when the store is gone, for a reason of one's own to be told first."""


@contextmanager
def watch_peers(
    processes: Processes, timeout_s: float, on_lost: Callable[[PeerLost], None]
) -> Iterator[None]:
    """Call `on_lost`, which must end this process, from a thread when another machine is silent.

    Does nothing on one machine, where torchrun's agent sees all processes.
    """
    if processes.machines == 1:
        yield
        return
    watch = _Watch(processes, timeout_s, on_lost)
    processes.barrier()
    watch.start()
    try:
        yield
    finally:
        watch.stop()


class _Watch:
    """Two threads: one that may hang in the store, and one that only looks at the clock."""

    def __init__(self, processes: Processes, timeout_s: float, on_lost: Callable[[PeerLost], None]) -> None:
        self._processes, self._timeout_s, self._on_lost = processes, timeout_s, on_lost
        # of its own: the process group's connection may be waiting in a call
        store = dist.TCPStore(  # type: ignore[attr-defined]  # public, but not in torch's __all__
            os.environ["MASTER_ADDR"],
            int(os.environ["MASTER_PORT"]),
            is_master=False,
            timeout=datetime.timedelta(seconds=timeout_s),
        )
        self._store = dist.PrefixStore("trunkline/alive", store)  # type: ignore[attr-defined]
        self._counts: list[bytes] = []
        self._seen: list[float] = []
        self._gone_since: float | None = None
        self._stop = threading.Event()
        self._beat(0)  # all keys exist once all processes have come here

    def start(self) -> None:
        self._seen = [time.monotonic()] * self._processes.machines
        self._counts = [b""] * self._processes.machines
        for target in (self._keep_beating, self._keep_watching):
            threading.Thread(target=target, daemon=True, name=target.__name__).start()

    def stop(self) -> None:
        self._stop.set()

    def _beat(self, count: int) -> None:
        if self._processes.is_first_here:
            self._store.set(str(self._processes.machine), str(count))

    def _keep_beating(self) -> None:
        keys = [str(machine) for machine in range(self._processes.machines)]
        count = 0
        try:
            while not self._stop.wait(self._timeout_s / BEATS):
                count += 1
                self._beat(count)
                for machine, found in enumerate(self._store.multi_get(keys)):
                    if found != self._counts[machine]:
                        self._counts[machine], self._seen[machine] = found, time.monotonic()
        except RuntimeError:  # the connection is closed: the machine that keeps the store has ended
            self._gone_since = time.monotonic()

    def _keep_watching(self) -> None:
        while not self._stop.wait(0.5):
            now = time.monotonic()
            silent = [
                str(machine)
                for machine, seen in enumerate(self._seen)
                if machine != self._processes.machine and now - seen > self._timeout_s
            ]
            if self._gone_since is not None and now - self._gone_since > GRACE_S:
                silent = ["0"]
            if silent:
                self._on_lost(
                    PeerLost(
                        f"machine {', '.join(silent)} of 0-{self._processes.machines - 1} has not been heard "
                        f"of for {now - min(self._seen):.0f} s; start the same command on all machines "
                        "again, it continues from the last checkpoint"
                    )
                )
                return
