"""A Lamina server follows its alias: the next model is started with processes of its own beside the present
one, tried out, and takes over between two requests.

    fetch, verify → heads divide, keys and values fit, tokenizer opens → workers and engine start, self-check
    → golden prompts token by token → switch → the model before ends its requests → its processes end

Until the switch nothing of the present model is touched, so what goes wrong before costs nobody anything. See
`flows.following` for how often is looked and when a version that failed is tried again.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager

from flows import golden_prompts, registry
from flows.errors import ResourceError
from flows.following import Follower, Target, following
from flows.lamina import Deployment
from flows.language_registry import Fetched, fetch_version
from flows.params import Params, Serve
from flows.serve import target_of
from flows.serving.lamina.api.metrics import Metrics
from flows.serving.lamina.api.served_model import ServedModel
from flows.serving.lamina.api.server import Server
from flows.serving.lamina.api.texts import Texts
from flows.serving.lamina.cluster.supervisor import Supervisor
from flows.serving.lamina.slices.bundle import Bundle, read_bundle
from flows.serving.rollout_state import RolloutState

READY_S = 300.0
"""For engine and workers of a new model to start, check themselves and answer the golden prompts."""
END_S = 20.0
"""For processes that are being started or ended when the server stops."""


Deploy = Callable[[Bundle], AbstractContextManager[Deployment]]
"""Start the processes of a bundle, and end them; an error if it cannot be served here."""


class Candidate:
    """A model with its processes, and how they are ended."""

    def __init__(self, model: ServedModel, supervisor: Supervisor, close: Callable[[], None]) -> None:
        self.model, self.supervisor, self.close = model, supervisor, close

    @property
    def digest(self) -> str:
        return self.model.digest


class FollowingServer:
    """A Lamina server as a `Follower` sees it. Its methods are called on one thread."""

    def __init__(self, server: Server, deploy: Deploy, first: Candidate) -> None:
        self._server, self._deploy, self._present = server, deploy, first
        self._retiring: threading.Thread | None = None

    @property
    def rollout(self) -> RolloutState:
        return self._server.service.rollout

    @rollout.setter
    def rollout(self, state: RolloutState) -> None:
        self._server.service.rollout = state

    @property
    def metrics(self) -> Metrics:
        return self._server.service.metrics

    def load(self, release: Fetched, settings: Serve) -> Candidate:
        """The processes of a version, started and tried out; they are ended again if anything is wrong.

        Raises:
            TrunklineError: it cannot be served here, or does not say what it has to.
        """
        self._wait_for_retiring()  # two models at once, not three
        bundle = read_bundle(release.folder)
        texts = Texts.of(bundle)
        prompts = golden_prompts.read_golden(release.folder)
        with ExitStack() as stack:
            deployment = stack.enter_context(self._deploy(bundle))
            model = self._server.service.connect(
                bundle.manifest,
                texts,
                deployment.folder.socket,
                name=release.name,
                version=release.version,
                digest=release.digest,
                hooks=deployment.hooks,
            )
            supervisor = deployment.supervisor
            self._server.try_out(model, prompts, READY_S, lambda: supervisor.failure)
            return Candidate(model, supervisor, stack.pop_all().close)

    def switch(self, model: Candidate) -> None:
        before = self._present
        before.supervisor.watch(lambda _: None)  # that it fails from now on ends the server no more
        try:
            self._server.switch(model.model)
        except ResourceError:
            model.close()
            raise
        self._present = model
        model.supervisor.watch(self._server.fail)
        self._retiring = threading.Thread(target=self._retire, args=(before,), name="retiring", daemon=True)
        self._retiring.start()

    def close(self) -> None:
        """When the server has stopped."""
        self._wait_for_retiring(END_S)
        self._present.close()

    def _retire(self, before: Candidate) -> None:
        try:
            cut = self._server.retire(before.model, lambda: before.supervisor.failure)
            if cut:
                logger.warning(
                    "%d requests of version %s took longer than lamina.http.drain_timeout_s and were ended",
                    cut, before.model.version,
                )  # fmt: skip
        except ResourceError:
            pass  # the server stops, and has told its requests
        finally:
            before.close()

    def _wait_for_retiring(self, within_s: float | None = None) -> None:
        if self._retiring is not None:
            self._retiring.join(within_s)


@contextmanager
def following_alias(
    params: Params, alias: str, server: Server, deploy: Deploy, first: Candidate
) -> Iterator[None]:
    """Keep a server on the alias of its model while the block runs; afterwards no process of a model that
    came later is left."""
    name = first.model.name

    def look() -> Target | None:
        present = registry.alias(params, name, alias)
        return target_of(present) if present else None

    def fetch(target: Target) -> Fetched:
        return fetch_version(params, registry.version_of(params, name, target.version))

    followed = FollowingServer(server, deploy, first)
    current = Target(first.model.version or "", first.digest)
    follower = Follower(followed, params.serve, look, fetch, current)
    try:
        with following(follower, params.serve.poll_s, END_S, lambda: server.is_up):
            yield
    finally:
        followed.close()


logger = logging.getLogger("trunkline.serving")
