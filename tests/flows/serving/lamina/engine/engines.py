"""An engine in the test's own process, turned by hand; its workers are threads behind real sockets."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from attention_servers import TOKEN, serving

from benchmarks.lamina_engine import section
from flows.params import Lamina
from flows.serving.lamina.attention.transport import dial
from flows.serving.lamina.engine.calibration import Calibration
from flows.serving.lamina.engine.engine import Engine
from flows.serving.lamina.engine.journal import Journal
from flows.serving.lamina.engine.process import model_shape
from flows.serving.lamina.engine.workers import Workers
from flows.serving.lamina.requests import Finished, Rejected, Sampling, Submit, TokenEvent
from flows.serving.lamina.slices.bundle import Bundle
from flows.serving.lamina.slices.runner import greedy, open_slices

MEGABYTES = 4
PROMPTS = (
    [1, 70, 71, 72, 73],
    [1],
    [1, 40, 41, 42, 43, 44, 45, 46, 47, 48, 49, 50, 51, 52, 53, 54, 55, 56, 57],
)


class Driven:
    """An engine and what it said."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.said: list[Any] = []

    def submit(self, name: str, prompt: Sequence[int], max_tokens: int = 20, **fields: Any) -> None:
        fields = {"sampling": Sampling(temperature=0), "arrived": time.time(), **fields}
        self.engine.inbox.put(Submit(id=name, prompt=tuple(prompt), max_tokens=max_tokens, **fields))

    def turn_until_done(self, turns: int = 2000) -> None:
        for _ in range(turns):
            self.engine.turn()
            if not (self.engine.scheduler.running or self.engine.scheduler.waiting):
                self.engine.turn()  # the workers forget what has ended
                return
        raise AssertionError("the engine does not come to an end")

    def tokens(self, name: str) -> list[int]:
        """In the order in which they were said; indices without a gap."""
        events = [said for said in self.said if isinstance(said, TokenEvent) and said.id == name]
        assert [event.index for event in events] == list(range(len(events)))
        return [event.token for event in events]

    def finished(self, name: str) -> Finished:
        (found,) = [said for said in self.said if isinstance(said, Finished) and said.id == name]
        return found

    def rejected(self, name: str) -> Rejected:
        (found,) = [said for said in self.said if isinstance(said, Rejected) and said.id == name]
        return found

    def assert_nothing_leaked(self) -> None:
        """All pages are free, on the engine's side and on every worker that is there."""
        engine = self.engine
        engine.memory.check({})
        assert engine.memory.used == 0
        for worker, up in enumerate(engine.workers.up):
            if up:
                stats = engine.workers.link.stats(worker)
                assert (stats["pages_used"], stats["slots"], stats["plans"]) == (0, 0, 0), stats


def make_engine(
    bundle: Bundle,
    addresses: Sequence[tuple[str, int]],
    *,
    journal: Journal | None = None,
    connect: Any = dial,
    split: bool = True,
    **changes: Any,
) -> Driven:
    """`changes` by group__key of section lamina."""
    plain = {name.replace("__", "."): value for name, value in changes.items()}
    settings = Lamina.model_validate(
        section({"cluster.attention_workers": len(addresses), "kv.mb_per_worker": MEGABYTES,
                 "cluster.layer_timeout_ms": 20_000, **plain})
    )  # fmt: skip
    workers = Workers(
        model_shape(bundle), settings, list(addresses), TOKEN, first_epoch=1,
        on_lost=lambda address, pid, reason: driven.said.append(reason), on_epoch=lambda epoch: None,
        connect=connect,
    )  # fmt: skip
    driven: Driven
    slices = open_slices(bundle, split=split, threads=1)
    engine = Engine(
        slices, settings, workers, journal or Journal(None), Calibration("", split, None, True),
        lambda message: driven.said.append(message),
    )  # fmt: skip
    driven = Driven(engine)
    workers.start(lambda: None)
    engine._remember()
    engine.state = "ready"
    return driven


@contextmanager
def an_engine(bundle: Bundle, workers: int = 1, **changes: Any) -> Iterator[Driven]:
    with serving(workers) as (_, addresses):
        driven = make_engine(bundle, addresses, **changes)
        try:
            yield driven
        finally:
            driven.engine.workers.close()


def reference(bundle: Bundle, prompts: Sequence[Sequence[int]], max_tokens: int) -> list[list[int]]:
    """Each prompt alone through the slices, with the plain attention of `slices.runner`."""
    slices = open_slices(bundle, threads=1)
    return [list(greedy(slices, [prompt], max_tokens)[0].tokens) for prompt in prompts]
