"""The vision server process: claim the port, verify and load the model, serve until told to stop.

The port is claimed first, so that an occupied one is reported at once and nothing is loaded in vain. Told to
stop, the server is not ready at once, answers what it has admitted within `serve.drain_s`, and returns.
"""

from __future__ import annotations

import socket
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from types import FrameType

import uvicorn

from flows.errors import ResourceError, explain_os_error
from flows.params import Serve
from flows.serving.listening import caught_signals, listening_socket, server_url
from flows.serving.vision.access_log import AccessLog
from flows.serving.vision.app import create_app
from flows.serving.vision.model import Release, load_model
from flows.serving.vision.observing import OnBatch, OnRequest
from flows.serving.vision.service import Limits, VisionService

IDLE_CONNECTIONS = 256  # beside those with a request; further ones get 503
KEEP_ALIVE_S = 10
CUT_OFF_S = 2  # for answers to leave after the drain
Companion = Callable[[VisionService], AbstractContextManager[object]]


def serve(
    folder: Path,
    settings: Serve,
    *,
    version: str,
    git_commit: str,
    max_pixels: int,
    name: str | None = None,
    digest: str | None = None,
    companion: Companion | None = None,
    on_batch: OnBatch | None = None,
    on_request: OnRequest | None = None,
) -> None:
    """Serve the model package in `folder` until SIGINT or SIGTERM; then answer what is in flight and return.

    Args:
        settings: section `serve` of params.yaml; port 0 takes a free one, which the first line printed names.
        version: of the registry, shown to clients.
        git_commit: of the run that trained the model, shown by /healthz.
        max_pixels: larger images are refused before they are decoded.
        name: of the registered model; default: the package's own.
        digest: content digest of variant fp32 in the registry; another one is refused.
        companion: entered around serving, with the service whose model it may switch.
        on_batch: sees every batch that was served, off the hot path.
        on_request: told of every answered inference request.

    Raises:
        ResourceError: the port is taken or not allowed, an execution provider is missing, or the access log
            cannot be written.
        ConfigError: the host is not an address of this machine.
        DataError: the package is damaged, not the one that was asked for, or fails its golden requests.
    """
    # what Pillow remarks on damaged uploads would fill the log; what it cannot read is answered with 4xx
    warnings.filterwarnings("ignore", module=r"PIL\.")
    with listening_socket(settings.host, settings.port, "serve") as listener:
        release = Release(folder, version, git_commit, name, digest)
        model = load_model(release, settings, max_pixels)
        app = create_app(
            model,
            Limits.of(settings, max_pixels),
            access_log=_access_log(settings),
            on_batch=on_batch,
            on_request=on_request,
        )
        service: VisionService = app.state.service
        server = _Server(
            uvicorn.Config(
                app,
                log_level="warning",
                access_log=False,
                proxy_headers=False,  # X-Forwarded-For is the client's word
                limit_concurrency=settings.max_requests + IDLE_CONNECTIONS,
                timeout_keep_alive=KEEP_ALIVE_S,
                timeout_graceful_shutdown=CUT_OFF_S,
                server_header=False,
            ),
            service,
            settings.drain_s,
        )
        print(
            f"serving {model.info.name} version {version} ({model.info.variant} on {model.session.provider}, "
            f"digest {model.digest[:12]}) at {server_url(listener)}",
            flush=True,
        )
        del model  # the service holds it, as long as it is the one in use
        with companion(service) if companion else nullcontext():
            server.run(sockets=[listener])


def _access_log(settings: Serve) -> AccessLog:
    try:
        return AccessLog(settings.access_log, settings.access_log_mb * 1024 * 1024, settings.access_log_files)
    except OSError as error:
        raise explain_os_error(error) or ResourceError(
            f"serve.access_log {settings.access_log!r} cannot be written: {error.strerror}"
        ) from None


class _Server(uvicorn.Server):
    """Told to stop, it first drains: new work is refused, admitted work is answered, health is told."""

    def __init__(self, config: uvicorn.Config, service: VisionService, drain_s: float) -> None:
        super().__init__(config)
        self._service = service
        self._drain_s = drain_s
        self._drain_until: float | None = None

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self._drain_until is not None:  # asked twice: now
            self.should_exit = self.force_exit = True
        else:
            self._service.stop_admitting()
            self._drain_until = time.monotonic() + self._drain_s

    async def on_tick(self, counter: int) -> bool:
        if self._drain_until is not None:
            late = time.monotonic() >= self._drain_until
            self.should_exit = self.should_exit or late or not self._service.in_flight
        return await super().on_tick(counter)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        if self._service.in_flight:
            self._service.batcher.close(0)  # those that wait are told, instead of being cut off
        await super().shutdown(sockets)

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Returns normally instead of dying from the signal."""
        with caught_signals(self.handle_exit):
            yield
