"""One model as the HTTP process knows it: its texts, its sizes, the way to its engine.

A request keeps to the model that it was encoded for, from its first token to its last, whatever the server
has switched to meanwhile.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from flows.serving.lamina.api.engine_link import EngineLink
from flows.serving.lamina.api.hooks import Hooks
from flows.serving.lamina.api.texts import Texts
from flows.serving.lamina.slices.bundle import Manifest


@dataclass(eq=False)
class ServedModel:
    """
    Args:
        name: by which clients ask for it.
        version: in the registry; None for a folder.
        digest: sha256 of the bundle's manifest, which lists every other file.
        hooks: of whoever supervises its processes.
    """

    manifest: Manifest
    texts: Texts
    link: EngineLink
    name: str
    version: str | None
    digest: str
    hooks: Hooks
    created: int = field(default_factory=lambda: int(time.time()))
    users: int = 0  # requests that began with this model and have not ended

    @contextmanager
    def used(self) -> Iterator[None]:
        self.users += 1
        try:
            yield
        finally:
            self.users -= 1

    def max_context(self, limit: int) -> int:
        """Tokens of a request at most.

        Args:
            limit: `lamina.model.max_context`; 0: the model's.
        """
        return min(limit, self.manifest.max_context) if limit else self.manifest.max_context

    def why_not_ready(self) -> list[str]:
        """Empty if its engine answers now."""
        heartbeat = self.link.heartbeat
        if not self.link.is_alive or heartbeat is None:
            return ["the engine is not there"]
        if heartbeat.state != "ready" or heartbeat.reasons:
            return list(heartbeat.reasons) or [f"the engine is {heartbeat.state}"]
        return []
