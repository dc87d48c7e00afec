"""The vision server process: claim the port, verify and load the model, serve until told to stop.

The port is claimed first, so that an occupied one is reported at once and nothing is loaded in vain.
"""

from __future__ import annotations

import errno
import os
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import uvicorn

from flows.errors import ConfigError, DataError, ResourceError
from flows.params import Serve
from flows.serving.package import ModelPackage
from flows.serving.session import open_session
from flows.serving.vision.app import Limits, ServedModel, VisionService, create_app

BACKLOG = 128
MAX_CONNECTIONS = 256  # further ones get 503
KEEP_ALIVE_S = 10
DRAIN_S = 10  # requests in flight may take this long after SIGTERM


def serve(
    folder: Path,
    settings: Serve,
    *,
    version: str,
    git_commit: str,
    max_pixels: int,
    name: str | None = None,
    digest: str | None = None,
) -> None:
    """Serve the model package in `folder` until SIGINT or SIGTERM; then answer what is in flight and return.

    Args:
        settings: section `serve` of params.yaml; port 0 takes a free one, which the first line printed names.
        version: of the registry, shown to clients.
        git_commit: of the run that trained the model, shown by /healthz.
        max_pixels: larger images are refused before they are decoded.
        name: of the registered model; default: the package's own.
        digest: content digest of variant fp32 in the registry; another one is refused.

    Raises:
        ResourceError: the port is taken or not allowed, or an execution provider is missing.
        ConfigError: the host is not an address of this machine.
        DataError: the package is damaged or not the one that was asked for.
    """
    with listening_socket(settings.host, settings.port) as listener:
        package = ModelPackage.open(folder, digest=digest)
        session = open_session(package.path(settings.variant), settings.providers, settings.threads)
        manifest = package.manifest
        if session.image_shape != manifest.inputs[0].shape[1:]:
            raise DataError(f"{session.path} takes images {session.image_shape}, its manifest says otherwise")
        session.warm_up(sorted({1, min(settings.max_batch, manifest.max_batch)}))
        info = ServedModel(name or manifest.name, version, settings.variant, git_commit)
        limits = Limits(settings.max_upload_mb * 1024 * 1024, settings.max_batch, max_pixels)
        app = create_app(package, session, limits, info)
        server = _Server(
            uvicorn.Config(
                app,
                log_level="warning",
                access_log=False,
                limit_concurrency=MAX_CONNECTIONS,
                timeout_keep_alive=KEEP_ALIVE_S,
                timeout_graceful_shutdown=DRAIN_S,
                server_header=False,
            ),
            app.state.service,
        )
        print(
            f"serving {info.name} version {version} ({settings.variant} on {session.provider}, digest "
            f"{app.state.service.digest[:12]}) at {_url(listener)}",
            flush=True,
        )
        server.run(sockets=[listener])


@contextmanager
def listening_socket(host: str, port: int) -> Iterator[socket.socket]:
    """A socket that already listens: clients that come during loading wait instead of being refused.

    Raises:
        ResourceError, ConfigError: see `serve`.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except (socket.gaierror, UnicodeError):
        raise ConfigError(f"serve.host {host!r} is not a known host name or address") from None
    with socket.socket(family, socket.SOCK_STREAM) as listener:
        if os.name == "posix":  # elsewhere this option would let two servers share the port
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(address)
            listener.listen(BACKLOG)
        except OSError as error:
            raise _explain_bind(error, host, port) from None
        yield listener


def _explain_bind(error: OSError, host: str, port: int) -> ResourceError | ConfigError:
    if error.errno == errno.EADDRINUSE:
        return ResourceError(
            f"port {port} on {host} is already in use; choose another one with serve.port or stop the "
            "program that holds it"
        )
    if error.errno == errno.EACCES:
        return ResourceError(
            f"port {port} on {host} is reserved for administrators; choose one above 1023 with serve.port"
        )
    if error.errno == errno.EADDRNOTAVAIL:
        return ConfigError(
            f"serve.host {host!r} is not an address of this machine; 127.0.0.1 is its loopback"
        )
    return ResourceError(f"cannot listen on {host} port {port}: {error.strerror}")


def _url(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://{'[' + host + ']' if ':' in host else host}:{port}"


class _Server(uvicorn.Server):
    """Reports not ready once it is told to stop, and returns normally instead of dying from the signal."""

    def __init__(self, config: uvicorn.Config, service: VisionService) -> None:
        super().__init__(config)
        self._service = service

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self._service.ready = False
        super().handle_exit(sig, frame)

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():
            yield  # signals can only be caught in the main thread
            return
        previous = {
            number: signal.signal(number, self.handle_exit) for number in (signal.SIGINT, signal.SIGTERM)
        }
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
