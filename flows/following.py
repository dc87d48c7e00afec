"""Keep a server on the version that an alias of the registry points at.

A thread looks at the alias every `serve.poll_s`. A new version is fetched beside the one in use, and `load`
of the service verifies, opens and tries it; only then the server switches, between two batches or requests.
Whatever fails leaves the server as it is, is counted, logged in one line and shown by /healthz; the same
version is tried again only after `serve.retry_s`, then after twice that, and so on.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from prometheus_client import Counter

from flows.errors import TrunklineError
from flows.params import Serve
from flows.serving.rollout_state import RolloutState, utc_now

Files = TypeVar("Files")
"""A version whose files are here."""
Model = TypeVar("Model", bound="Loaded")
"""A version that could answer."""
FilesIn = TypeVar("FilesIn", contravariant=True)

MAX_BACKOFF = 64  # times serve.retry_s
STOP_S = 2.0


@dataclass(frozen=True)
class Target:
    """Where the alias points."""

    version: str
    digest: str  # as recorded in the registry: a version that was registered anew is another target


Look = Callable[[], Target | None]
"""Asks the registry; None when the alias does not exist."""


class Loaded(Protocol):
    @property
    def digest(self) -> str: ...


class Counts(Protocol):
    @property
    def switches(self) -> Counter: ...
    @property
    def registry_errors(self) -> Counter: ...


class Followed(Protocol[FilesIn, Model]):
    """A server that can change what it serves."""

    rollout: RolloutState

    @property
    def metrics(self) -> Counts: ...

    def load(self, release: FilesIn, settings: Serve) -> Model:
        """Ready to take over, or an error and nothing changed."""

    def switch(self, model: Model) -> None:
        """Serve it from the next request on, and count that."""


class Follower(Generic[Files, Model]):
    """The loop, one step at a time: `step` never raises."""

    def __init__(
        self,
        service: Followed[Files, Model],
        settings: Serve,
        look: Look,
        fetch: Callable[[Target], Files],
        current: Target,
    ) -> None:
        """
        Args:
            fetch: brings the files of a version here.
            current: what `service` has loaded already.
        """
        self._service = service
        self._settings = settings
        self._look = look
        self._fetch = fetch
        self._current = current
        self._failed: Target | None = None
        self._failures = 0
        self._retry_at = 0.0  # time.monotonic()
        self._show(None, "current", "")

    def step(self) -> None:
        """Look once, and bring the server to where the alias points if it is elsewhere."""
        try:
            target = self._look()
        except Exception as error:
            self._service.metrics.registry_errors.inc()
            self._report(None, "unreachable", f"the registry cannot be read: {_reason(error)}")
            return
        if target is None:
            self._report(None, "missing", "the alias does not exist")
        elif target == self._current:
            self._failed, self._failures = None, 0
            self._show(None, "current", "")
        elif target != self._failed or time.monotonic() >= self._retry_at:
            self._bring(target)

    def _bring(self, target: Target) -> None:
        self._show(target, "loading", "")
        started = time.monotonic()
        try:
            model = self._service.load(self._fetch(target), self._settings)
            digest = model.digest
            self._service.switch(model)
        except Exception as error:
            self._failures = self._failures + 1 if target == self._failed else 1
            self._failed = target
            pause_s = self._settings.retry_s * min(2 ** (self._failures - 1), MAX_BACKOFF)
            self._retry_at = time.monotonic() + pause_s
            self._service.metrics.switches.labels("failed").inc()
            self._report(target, "failed", _reason(error))
            return
        before, self._current = self._current, target
        self._failed, self._failures = None, 0
        self._show(None, "current", "")
        logger.warning(
            "serving version %s (digest %s) instead of %s, %.1f s after it was seen",
            target.version, digest[:12], before.version, time.monotonic() - started,
        )  # fmt: skip

    def _report(self, target: Target | None, state: str, reason: str) -> None:
        """Show a problem; log it when it is a new one."""
        shown = self._service.rollout
        if (shown.state, shown.reason) != (state, reason):
            what = f"version {target.version} is not served" if target else "the alias cannot be followed"
            logger.warning("%s, version %s stays: %s", what, self._current.version, reason)
        self._show(target, state, reason)

    def _show(self, target: Target | None, state: str, reason: str) -> None:
        shown = self._service.rollout
        candidate = target.version if target else None
        if (shown.candidate, shown.state, shown.reason) != (candidate, state, reason):
            self._service.rollout = RolloutState(candidate, state, reason, utc_now())


@contextmanager
def following(
    follower: Follower[Files, Model],
    poll_s: float,
    patience_s: float = STOP_S,
    may_step: Callable[[], bool] = lambda: True,
) -> Iterator[None]:
    """A thread that steps every `poll_s` while the block runs.

    Args:
        patience_s: how long its last step is waited for.
        may_step: whether the server is there to be switched.
    """
    stop = threading.Event()

    def run() -> None:
        while not stop.wait(poll_s):
            if may_step():
                follower.step()

    # a daemon: a registry that hangs must not keep the process
    thread = threading.Thread(target=run, name="follower", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join(patience_s)


def _reason(error: Exception) -> str:
    """One line for people."""
    text = " ".join(str(error).split())[:300] or type(error).__name__
    return text if isinstance(error, TrunklineError) else f"{type(error).__name__}: {text}"


logger = logging.getLogger("trunkline.serving")
