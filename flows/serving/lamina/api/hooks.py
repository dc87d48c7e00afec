"""Where the HTTP process meets whoever supervises the other processes.

Every hook is called on the thread of the event loop and must not wait: note it, wake a thread, return.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from flows.errors import TrunklineError
from flows.serving.lamina.requests import WorkersMoved


class Running(Protocol):
    """The server while it runs. Its methods may be called from any thread, and more than once.

    `server.Server` has more of them, for whoever brings another model.
    """

    def drain(self) -> None:
        """As SIGTERM: admit nothing more, finish what was admitted, end. Called again: end at once."""

    def fail(self, error: TrunklineError) -> None:
        """End now; `serve` raises this. For an engine that cannot load its bundle."""

    def tell(self, message: WorkersMoved) -> None:
        """Pass this on to the engine, and to every connection after this one."""


def _nothing(*_: object) -> None:
    pass


@dataclass(frozen=True)
class Hooks:
    """What the supervisor is told, and asked."""

    on_worker_lost: Callable[[str, int, int, str], None] = _nothing
    """Host, port, process id (0: unknown), reason: the engine gets no answer from this attention worker."""
    on_silent: Callable[[], None] = _nothing
    """The engine takes connections and sends no heartbeat for `heartbeat_ms x silent_heartbeats`: end it.

    Called once, until it is heard again. A process that is gone is not reported: its exit tells.
    """
    on_started: Callable[[Running], None] = _nothing
    """Requests are taken from now on; the engine may still be loading."""
    on_draining: Callable[[], None] = _nothing
    """SIGTERM, or `Running.drain`: an engine that ends from now on need not be replaced once `on_drained`."""
    on_drained: Callable[[], None] = _nothing
    """All answers have left and the engine was sent `Drain`, or time was up; `serve` returns next."""
    is_replacing: Callable[[], bool] = lambda: False
    """Whether a process that is missing is being replaced now; /health then stays 200."""
