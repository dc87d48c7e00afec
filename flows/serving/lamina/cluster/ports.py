"""Ports that stay a process's own while the process itself is started again."""

from __future__ import annotations

import socket

from flows.errors import ResourceError


def hold_port(host: str, port: int = 0) -> socket.socket:
    """Claim a port without listening on it, until the socket is closed.

    Nobody else gets the port, neither to listen on nor to connect from; a process of this user that asks for
    a shared port (SO_REUSEPORT) may listen on it. While none does, connections are refused at once, instead
    of waiting for somebody who is not there.

    Raises:
        ResourceError: the port is taken, or `host` is not an address of this machine.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    holder = socket.socket(family, socket.SOCK_STREAM)
    try:
        holder.bind((host, port))
        # only now: two that share from the beginning would both get the port
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    except OSError as error:
        holder.close()
        raise ResourceError(
            f"cannot claim {host}:{port} for an attention worker ({error.strerror or error})"
        ) from None
    return holder


def hold_port_in(host: str, first: int, last: int) -> socket.socket:
    """The first free port of a range.

    Raises:
        ResourceError: none is free.
    """
    for port in range(first, last + 1):
        try:
            return hold_port(host, port)
        except ResourceError as error:
            problem = error
    raise ResourceError(f"no port from {first} to {last} is free on {host}: {problem}")
