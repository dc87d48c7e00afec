"""The attention workers of a service, wherever they run; here: on this machine."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Protocol

from flows.errors import ConfigError, ResourceError
from flows.serving.lamina.cluster.child import Child, Say, end_children
from flows.serving.lamina.cluster.keeper import START_PATIENCE_S, Keeper
from flows.serving.lamina.cluster.ports import hold_port

Address = tuple[str, int]
MODULE = "flows.serving.lamina.attention.worker"
TICK_S = 0.05


class Fleet(Protocol):
    """All attention workers. After `start` every method is called on one thread."""

    def start(self) -> None:
        """Returns when every worker listens.

        Raises:
            ConfigError, ResourceError: a worker cannot be started; none is left.
        """

    @property
    def addresses(self) -> list[Address]:
        """Where they are now; a worker keeps its place in the list, wherever it moves."""

    @property
    def labels(self) -> list[str]:
        """For people: where each is, and its process."""

    def look(self) -> None:
        """Start again what has ended."""

    def replace(self, address: Address, why: str) -> None:
        """End the worker at an address, if there is one that can be used, and start another."""

    def pid_at(self, address: Address) -> int:
        """Process id of the worker that listens there, as far as is known; 0: none does."""

    def stop(self, patience_s: float) -> None:
        """End all."""


def worker_command(
    address: Address, token_file: Path, max_bytes: int, threads: int, device: str, drain_s: float
) -> list[str]:
    host, port = address
    return [
        sys.executable, "-m", MODULE, "--host", host, "--port", str(port), "--share-port",
        "--token-file", str(token_file), "--max-bytes", str(max_bytes), "--threads", str(threads),
        "--device", device, "--drain-timeout-s", str(drain_s),
    ]  # fmt: skip


def says_its_port(child: Child) -> bool:
    """Whether the worker has said that it listens."""
    if not child.first_line:
        return False
    try:
        return "port" in json.loads(child.first_line)
    except ValueError:
        return False


class NoFleet:
    """Attention in the engine's own process."""

    @property
    def addresses(self) -> list[Address]:
        return []

    @property
    def labels(self) -> list[str]:
        return []

    def start(self) -> None:
        pass

    def look(self) -> None:
        pass

    def replace(self, address: Address, why: str) -> None:
        pass

    def pid_at(self, address: Address) -> int:
        return 0

    def stop(self, patience_s: float) -> None:
        pass


class LocalFleet:
    """Workers on this machine, on ports that stay theirs from the start of the service to its end."""

    def __init__(
        self,
        count: int,
        token_file: Path,
        say: Say,
        *,
        max_bytes: int,
        threads: int = 1,
        device: str = "cpu",
        host: str = "127.0.0.1",
        drain_s: float = 1.0,
    ) -> None:
        self._say = say
        self._holders = [hold_port(host) for _ in range(count)]
        self.addresses: list[Address] = [holder.getsockname()[:2] for holder in self._holders]
        self._keepers = [
            Keeper(
                f"attention worker {host}:{port}",
                worker_command((host, port), token_file, max_bytes, threads, device, drain_s),
                say,
                is_ready=says_its_port,
            )
            for host, port in self.addresses
        ]

    def start(self) -> None:
        deadline = time.monotonic() + START_PATIENCE_S
        try:
            while not all(keeper.ready for keeper in self._keepers):
                for keeper in self._keepers:
                    ending = keeper.look()
                    if ending is not None:
                        kind = ConfigError if ending.code == ConfigError.exit_code else ResourceError
                        raise kind(ending.reason)
                if time.monotonic() > deadline:
                    raise ResourceError(f"attention workers did not start within {START_PATIENCE_S:g} s")
                time.sleep(TICK_S)
        except BaseException:
            self.stop(0.5)
            raise

    def look(self) -> None:
        for keeper in self._keepers:
            ending = keeper.look()
            if ending is not None:
                self._say(ending.announcement)

    def replace(self, address: Address, why: str) -> None:
        for known, keeper in zip(self.addresses, self._keepers, strict=True):
            if known == address and keeper.ready:
                keeper.kill(why)

    def pid_at(self, address: Address) -> int:
        for known, keeper in zip(self.addresses, self._keepers, strict=True):
            child = keeper.child
            if known == address and keeper.ready and child is not None:
                return child.pid
        return 0

    @property
    def labels(self) -> list[str]:
        return [
            f"{host}:{port} (pid {keeper.child.pid if keeper.child else 'none'})"
            for (host, port), keeper in zip(self.addresses, self._keepers, strict=True)
        ]

    def stop(self, patience_s: float) -> None:
        end_children([keeper.child for keeper in self._keepers if keeper.child], patience_s)
        for holder in self._holders:
            holder.close()
