"""What Ray runs on a worker's host: it holds the worker's process and port there, and starts it again.

Tensors never come through here: the engine talks to the process by tcp. Ray hears of the address, and brings
the token, which is written to a private file on this host and nowhere else.
"""

from __future__ import annotations

import os
import socket
import threading
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field

import psutil

from flows.errors import ConfigError, ResourceError
from flows.serving.lamina.cluster.fleet import TICK_S, Address, says_its_port, worker_command
from flows.serving.lamina.cluster.keeper import Keeper
from flows.serving.lamina.cluster.ports import hold_port, hold_port_in
from flows.serving.lamina.cluster.run_folder import run_folder

MAX_SAID = 100
NODE = "node"
DRAIN_S = 1.0


@dataclass(frozen=True)
class Placed:
    """What a host is asked for."""

    name: str
    bind: str
    ports: tuple[int, int] | None
    max_bytes: int
    threads: int
    device: str
    previous: Address | None  # taken again, where that is possible


@dataclass(frozen=True)
class Status:
    address: Address
    pid: int
    ready: bool
    early: int = 0  # endings in a row soon after a start
    said: list[str] = field(default_factory=list)
    ending: str = ""  # why it is not ready, if it ended
    code: int = 0


class HostedWorker:
    """One attention worker on this host, for as long as this object lives.

    Raises:
        ConfigError, ResourceError: no such address, no free port, no place for the token.
    """

    def __init__(self, placed: Placed, token: str, node_address: str) -> None:
        self._resources = ExitStack()
        self._lock = threading.Lock()
        self._said: list[str] = []
        self._why = ""
        self._ended = threading.Event()
        self._last = ("", 0, 0)
        folder = self._resources.enter_context(run_folder(token=token))
        listen, advertised = bind_address(placed.bind, node_address)
        holder = self._resources.enter_context(_claim(listen, advertised, placed))
        self._address: Address = (advertised, holder.getsockname()[1])
        self._keeper = Keeper(
            placed.name,
            worker_command(
                (listen, self._address[1]),
                folder.token_file,
                placed.max_bytes,
                placed.threads,
                placed.device,
                DRAIN_S,
            ),
            self._say,
            is_ready=says_its_port,
        )
        self._thread = threading.Thread(target=self._keep, daemon=True)
        self._thread.start()

    def status(self) -> Status:
        """How it is now, and what was said since the last time."""
        with self._lock:
            said, self._said = self._said, []
        ending, code, early = self._last
        child = self._keeper.child
        return Status(self._address, child.pid if child else 0, self._keeper.ready, early, said, ending, code)

    def replace(self, why: str) -> None:
        """End the process; another one is started."""
        self._why = why

    def stop(self, patience_s: float) -> None:
        self._ended.set()
        self._thread.join()
        self._keeper.stop(patience_s)
        self._resources.close()

    def _keep(self) -> None:
        while not self._ended.wait(TICK_S):
            why, self._why = self._why, ""
            if why and self._keeper.ready:
                self._keeper.kill(why)
            if ending := self._keeper.look():
                self._last = (ending.reason, ending.code, ending.early)
                self._say(ending.announcement)

    def _say(self, line: str) -> None:
        with self._lock:
            self._said = [*self._said, line][-MAX_SAID:]


def bind_address(bind: str, node_address: str) -> tuple[str, str]:
    """Where to listen, and what others connect to.

    Args:
        bind: `node`, a network interface, or an address; with 0.0.0.0 the node's is told to others.

    Raises:
        ConfigError: this host has no such interface or address.
    """
    if bind == NODE:
        return node_address, node_address
    if bind in ("0.0.0.0", "::"):
        return bind, node_address
    interfaces = psutil.net_if_addrs()
    if bind in interfaces:
        found = [entry.address for entry in interfaces[bind] if entry.family == socket.AF_INET]
        if not found:
            raise ConfigError(f"bind: interface {bind} of {os.uname().nodename} has no IPv4 address")
        return found[0], found[0]
    if any(bind == entry.address for entries in interfaces.values() for entry in entries):
        return bind, bind
    raise ConfigError(
        f"bind: {os.uname().nodename} has neither an interface nor an address {bind!r}; it has: "
        f"{', '.join(sorted(interfaces))}"
    )


def _claim(listen: str, advertised: str, placed: Placed) -> socket.socket:
    if placed.previous and placed.previous[0] == advertised:
        with suppress(ResourceError):  # somebody was faster; another one will do
            return hold_port(listen, placed.previous[1])
    return hold_port_in(listen, *placed.ports) if placed.ports else hold_port(listen)
