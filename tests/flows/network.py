"""Hosts as network namespaces, joined by virtual cables to one switch. Needs root and iproute2."""

from __future__ import annotations

import os
import secrets
import subprocess
from dataclasses import dataclass
from types import TracebackType
from typing import Self


@dataclass(frozen=True)
class Host:
    name: str
    address: str
    cable: str  # the end that is plugged into the switch, which is where it can be pulled out

    @property
    def command(self) -> list[str]:
        """In front of a command: run it on this host. It becomes the command, so that its pid stays."""
        return ["ip", "netns", "exec", self.name]


class Network:
    """`count` hosts 10.77.0.1, 10.77.0.2, … while it is open; nothing is left when it is closed."""

    def __init__(self, count: int) -> None:
        self._tag = secrets.token_hex(3)
        self._switch = f"tl{self._tag}"
        self.hosts = [
            Host(f"trunkline-{self._tag}-{i}", f"10.77.0.{i + 1}", f"tl{self._tag}c{i}") for i in range(count)
        ]

    def __enter__(self) -> Self:
        try:
            # the switch has a namespace of its own: the address range does not meet the machine's
            _ip(f"netns add {self._switch}")
            _ip(f"-n {self._switch} link add switch type bridge")
            _ip(f"-n {self._switch} link set switch up")
            for host in self.hosts:
                _ip(f"netns add {host.name}")
                _ip(f"-n {self._switch} link add {host.cable} type veth peer name net0 netns {host.name}")
                _ip(f"-n {self._switch} link set {host.cable} master switch")
                _ip(f"-n {self._switch} link set {host.cable} up")
                _ip(f"-n {host.name} address add {host.address}/24 dev net0")
                _ip(f"-n {host.name} link set net0 up")
                _ip(f"-n {host.name} link set lo up")
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        for name in (self._switch, *(host.name for host in self.hosts)):
            subprocess.run(["ip", "netns", "delete", name], capture_output=True)

    def unplug(self, host: Host) -> None:
        _ip(f"-n {self._switch} link set {host.cable} down")

    def plug_in(self, host: Host) -> None:
        _ip(f"-n {self._switch} link set {host.cable} up")


def why_not() -> str:
    """Why hosts cannot be made here; empty if they can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    try:
        with Network(1):
            return ""
    except FileNotFoundError:
        return "iproute2 is not installed"
    except OSError as error:
        return str(error)


def _ip(arguments: str) -> None:
    answer = subprocess.run(["ip", *arguments.split()], capture_output=True, text=True)
    if answer.returncode:
        raise OSError(f"ip {arguments}: {answer.stderr.strip()}")
