"""The port of a server, claimed before anything is loaded, so that an occupied one is reported at once, and
the signals that end it."""

from __future__ import annotations

import errno
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from flows.errors import ConfigError, ResourceError

BACKLOG = 128


@contextmanager
def listening_socket(host: str, port: int, section: str) -> Iterator[socket.socket]:
    """A socket that already listens: clients that come during loading wait instead of being refused.

    Args:
        section: of params.yaml whose `host` and `port` these are, for messages.

    Raises:
        ResourceError: the port is taken or not allowed.
        ConfigError: the host is not an address of this machine.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except (socket.gaierror, UnicodeError):
        raise ConfigError(f"{section}.host {host!r} is not a known host name or address") from None
    with socket.socket(family, socket.SOCK_STREAM) as listener:
        if os.name == "posix":  # elsewhere this option would let two servers share the port
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(address)
            listener.listen(BACKLOG)
        except OSError as error:
            raise _explain_bind(error, host, port, section) from None
        yield listener


@contextmanager
def caught_signals(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """SIGINT and SIGTERM go to `handler`; in another thread than the main one nothing can be caught."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, before in previous.items():
            signal.signal(number, before)


def _explain_bind(error: OSError, host: str, port: int, section: str) -> ResourceError | ConfigError:
    if error.errno == errno.EADDRINUSE:
        return ResourceError(
            f"port {port} on {host} is already in use; choose another one with {section}.port or stop "
            "the program that holds it"
        )
    if error.errno == errno.EACCES:
        return ResourceError(
            f"port {port} on {host} is reserved for administrators; choose one above 1023 with {section}.port"
        )
    if error.errno == errno.EADDRNOTAVAIL:
        return ConfigError(
            f"{section}.host {host!r} is not an address of this machine; 127.0.0.1 is its loopback"
        )
    return ResourceError(f"cannot listen on {host} port {port}: {error.strerror}")


def server_url(listener: socket.socket) -> str:
    """Where clients find what listens."""
    host, port = listener.getsockname()[:2]
    return f"http://{'[' + host + ']' if ':' in host else host}:{port}"
