"""Ports of servers that this machine starts."""

from __future__ import annotations

import socket

from flows.errors import ResourceError


def require_free(host: str, port: int) -> None:
    """
    Raises:
        ResourceError: something listens on `port` already, or `host` is not an address of this machine.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ResourceError(
                f"cannot listen on {host}:{port} ({error.strerror}); "
                "choose another port or stop the program that holds it"
            ) from None


def free_port(host: str = "127.0.0.1") -> int:
    """A port that is free now."""
    with socket.socket() as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])
