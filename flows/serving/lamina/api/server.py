"""The HTTP process of Lamina: claim the port, read the tokenizer, answer until told to stop.

    with listening_socket(settings.http.host, settings.http.port, "lamina.http") as listener:
        bundle = read_bundle(folder)
        ... start engine and attention workers ...
        serve(bundle, settings, socket_path, listener=listener, hooks=Hooks(on_worker_lost=...))

`listening_socket` is that of `flows.serving.listening`. SIGTERM and SIGINT are caught inside of `serve` only:
once, answers end within `http.drain_timeout_s`; twice, at once. `serve` then returns, and the caller ends its
processes. It must run in the main thread.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import time
from collections.abc import Callable, Coroutine, Iterator, Sequence
from concurrent.futures import CancelledError
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

import uvicorn

from flows.errors import ResourceError, TrunklineError
from flows.params.language import Lamina
from flows.serving.lamina.api import handover
from flows.serving.lamina.api.app import create_app
from flows.serving.lamina.api.gateway import ApiKey, read_api_key
from flows.serving.lamina.api.handover import Failure, Golden
from flows.serving.lamina.api.hooks import Hooks
from flows.serving.lamina.api.served_model import ServedModel
from flows.serving.lamina.api.service import Service
from flows.serving.lamina.api.texts import Texts
from flows.serving.lamina.requests import WorkersMoved
from flows.serving.lamina.slices.bundle import Bundle
from flows.serving.listening import caught_signals, listening_socket

IDLE_CONNECTIONS = 256  # beside those with a request; further ones get 503
KEEP_ALIVE_S = 10
CUT_OFF_S = 2  # for answers to leave after the drain
UNACKNOWLEDGED_MS = 30_000  # a connection whose other end takes nothing for so long is cut by the system
T = TypeVar("T")


def serve(
    bundle: Bundle,
    settings: Lamina,
    socket_path: Path,
    *,
    listener: socket.socket | None = None,
    name: str | None = None,
    version: str | None = None,
    digest: str = "",
    hooks: Hooks | None = None,
    companion: Callable[[Server], AbstractContextManager[None]] | None = None,
) -> None:
    """Serve until SIGINT or SIGTERM; then answer what is in flight, send the engine `Drain` and return.

    Args:
        bundle: of which the tokenizer and the sizes are used here.
        settings: section `lamina` of params.yaml.
        socket_path: of the engine; it need not exist yet.
        listener: a port that is claimed already; default: `http.host` and `http.port`.
        name: of the model for clients; default: the bundle's.
        version: of the model in the registry, shown by /healthz, /version, /v1/models and /v2.
        digest: sha256 of the bundle's manifest, shown there too.
        hooks: see `hooks.Hooks`.
        companion: a context around the life of the server; it may bring other models.

    Raises:
        ResourceError: the port is taken or not allowed.
        ConfigError: the host is not an address of this machine, or `http.api_key_file` is of no use.
        DataError: the bundle has no usable tokenizer.
        TrunklineError: what `Running.fail` was given.
    """
    http = settings.http
    with ExitStack() as stack:
        if listener is None:
            listener = stack.enter_context(listening_socket(http.host, http.port, "lamina.http"))
        _limit_buffers(listener, http.slow_reader_kb * 1024)
        key = read_api_key(http.api_key_file)
        service = Service(
            bundle.manifest,
            Texts.of(bundle),
            settings,
            socket_path,
            name=name,
            version=version,
            digest=digest,
            hooks=hooks,
        )
        server = Server(service, uvicorn_config(service, key))
        if companion is not None:
            stack.enter_context(companion(server))
        server.run(sockets=[listener])
        if server.error is not None:
            raise server.error


def uvicorn_config(service: Service, key: ApiKey | None) -> uvicorn.Config:
    return uvicorn.Config(
        create_app(service, key),
        log_level="warning",
        access_log=False,
        proxy_headers=False,  # X-Forwarded-For is the client's word
        limit_concurrency=service.settings.http.max_streams + IDLE_CONNECTIONS,
        timeout_keep_alive=KEEP_ALIVE_S,
        timeout_graceful_shutdown=CUT_OFF_S,
        server_header=False,
        lifespan="off",  # the server itself keeps the link to the engine
    )


def _limit_buffers(listener: socket.socket, unread: int) -> None:
    """What the system keeps for a client that does not read; accepted connections take this over."""
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, unread)
    if hasattr(socket, "TCP_USER_TIMEOUT"):
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, UNACKNOWLEDGED_MS)


class _WithoutGivenUpStreams(logging.Filter):
    """uvicorn's remark on a stream that was given up; the gateway has said so with the request's id."""

    def filter(self, record: logging.LogRecord) -> bool:
        return record.getMessage() != "ASGI callable returned without completing response."


_QUIET = _WithoutGivenUpStreams()


class Server(uvicorn.Server):
    """Told to stop, it first drains: new work is refused, admitted work is answered, the engine is told."""

    def __init__(self, service: Service, config: uvicorn.Config) -> None:
        super().__init__(config)
        logging.getLogger("uvicorn.error").addFilter(_QUIET)
        self.error: BaseException | None = None
        self.service = service
        self._asked = 0  # to stop
        self._loop: asyncio.AbstractEventLoop | None = None
        self._drain_until: float | None = None
        self._links: dict[ServedModel, asyncio.Task[None]] = {}
        self._work: set[asyncio.Task[Any]] = set()  # that other threads wait for

    def drain(self) -> None:
        self._asked += 1
        self.service.draining = True
        if self._asked > 1:
            self.should_exit = self.force_exit = True

    def fail(self, error: TrunklineError) -> None:
        self.error = self.error or error
        self.service.draining = self.should_exit = self.force_exit = True

    def tell(self, message: WorkersMoved) -> None:
        with suppress(RuntimeError):  # the loop has ended, and the engine with it
            if self._loop is not None:
                self._loop.call_soon_threadsafe(self.service.link.move_workers, message)

    # --- another model; for another thread, which waits meanwhile

    def try_out(
        self, model: ServedModel, prompts: Sequence[Golden], within_s: float, failure: Failure
    ) -> None:
        """Keep a link to the engine of `model` from now on, and see whether it says what it has to.

        Raises:
            TrunklineError: it does not; the link is given up.
        """

        async def work() -> None:
            self._keep_link(model)
            try:
                await handover.try_out(model, prompts, within_s, failure)
            except BaseException:
                await self._give_up_link(model)
                raise

        self._wait_for(work())

    def switch(self, model: ServedModel) -> ServedModel:
        """Serve a model that was tried out from the next request on; returns the one before."""

        async def work() -> ServedModel:
            return self.service.switch(model)

        return self._wait_for(work())

    def retire(self, model: ServedModel, failure: Failure) -> int:
        """Let a model end its requests within `http.drain_timeout_s`; returns how many were cut short."""

        async def work() -> int:
            cut = await handover.retire(model, self.service.settings.http.drain_timeout_s, failure)
            await self._give_up_link(model)
            return cut

        return self._wait_for(work())

    @property
    def is_up(self) -> bool:
        """Whether there is anything to be switched: started, and not told to stop."""
        return self._loop is not None and not self.service.draining

    def _wait_for(self, work: Coroutine[Any, Any, T]) -> T:
        """
        Raises:
            ResourceError: the server stops.
        """

        async def noted() -> T:
            task = asyncio.current_task()
            assert task is not None
            self._work.add(task)
            try:
                return await work
            finally:
                self._work.discard(task)

        if self._loop is None or not self.is_up:
            work.close()
            raise ResourceError("the server stops, or has not started")
        try:
            return asyncio.run_coroutine_threadsafe(noted(), self._loop).result()
        except (CancelledError, RuntimeError):
            raise ResourceError("the server stops") from None

    def _keep_link(self, model: ServedModel) -> None:
        self._links[model] = asyncio.create_task(model.link.run())

    async def _give_up_link(self, model: ServedModel) -> None:
        if (task := self._links.pop(model, None)) is not None:
            task.cancel()
            await asyncio.wait({task})

    # --- uvicorn's

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self.drain()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        self._keep_link(self.service.current)
        await super().startup(sockets)
        self._loop = asyncio.get_running_loop()
        self.service.current.hooks.on_started(self)

    async def on_tick(self, counter: int) -> bool:
        if self._asked and self._drain_until is None:
            self._drain_until = time.monotonic() + self.service.settings.http.drain_timeout_s
            for model in self._links:
                model.hooks.on_draining()
        if self._drain_until is not None:
            late = time.monotonic() >= self._drain_until
            self.should_exit = self.should_exit or late or not self.service.in_flight
        link = self._links.get(self.service.current)
        if link is not None and link.done():  # a bug: it ends when it is told to
            self.error = self.error or link.exception()
            self.should_exit = self.force_exit = True
        return await super().on_tick(counter)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        for work in list(self._work):  # nothing is switched any more
            work.cancel()
        if self._work:
            await asyncio.wait(self._work)
        models = list(self._links)
        for model in models:
            model.link.finish_all(
                "server_stopping", "the server stops and this request took longer than it waits"
            )
            model.link.drain()
        await super().shutdown(sockets)
        for model in models:
            await self._give_up_link(model)
            model.hooks.on_drained()

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Returns normally instead of dying from the signal."""
        with caught_signals(self.handle_exit):
            yield
