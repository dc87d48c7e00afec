"""From one model to the next without losing a request: the next one is tried out beside the present one, the
present one ends what it has begun.

Two engines run meanwhile. That costs memory twice, and in exchange nobody waits: the present engine answers
until the next one has proved itself, and going back is not to go at all.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Callable, Sequence
from typing import Protocol

from flows.errors import GateFailed, ResourceError, TrunklineError
from flows.serving.lamina.api.engine_link import Call
from flows.serving.lamina.api.errors import ApiError
from flows.serving.lamina.api.served_model import ServedModel
from flows.serving.lamina.requests import Finished, Rejected, Sampling, Submit, TokenEvent

GOLDEN = "golden-"
"""Requests whose id begins so are the server's own and not counted as clients'."""
POLL_S = 0.05
Failure = Callable[[], TrunklineError | None]
"""Why the processes of a model have been given up; None while they have not."""


class Golden(Protocol):
    """A prompt and what the model has to say, in tokens."""

    @property
    def name(self) -> str: ...
    @property
    def prompt(self) -> tuple[int, ...]: ...
    @property
    def continuation(self) -> tuple[int, ...]: ...


async def try_out(
    model: ServedModel, prompts: Sequence[Golden], within_s: float, failure: Failure = lambda: None
) -> None:
    """Wait for the engine and have it continue the prompts; its link has to be running.

    Raises:
        ResourceError: not ready, or no answer, in time.
        GateFailed: it says something else than was recorded.
        TrunklineError: `failure` says that it will never be ready.
    """
    until = time.monotonic() + within_s
    while reasons := model.why_not_ready():
        if error := failure():
            raise error
        if time.monotonic() >= until:
            raise ResourceError(f"it was not ready within {within_s:g} s: {'; '.join(reasons)}")
        await asyncio.sleep(POLL_S)
    try:
        async with asyncio.timeout_at(asyncio.get_running_loop().time() + until - time.monotonic()):
            calls = [await model.link.submit(_submit(prompt), time.monotonic()) for prompt in prompts]
            for prompt, call in zip(prompts, calls, strict=True):
                if (tokens := await _tokens(call)) != prompt.continuation:
                    pairs = zip(tokens, prompt.continuation, strict=False)
                    place = next((n for n, (a, b) in enumerate(pairs) if a != b), len(tokens))
                    raise GateFailed(
                        f"golden prompt {prompt.name}: token {place} of the continuation is not the recorded "
                        "one"
                    )
    except TimeoutError:
        raise ResourceError(f"it did not continue the golden prompts within {within_s:g} s") from None
    except ApiError as error:
        raise ResourceError(f"golden prompts: {error.message}") from None


def _submit(prompt: Golden) -> Submit:
    return Submit(
        id=GOLDEN + secrets.token_hex(12),
        prompt=prompt.prompt,
        max_tokens=len(prompt.continuation),
        sampling=Sampling(temperature=0.0),
        arrived=time.time(),
    )


async def _tokens(call: Call) -> tuple[int, ...]:
    tokens: list[int] = []
    while True:
        match await call.next():
            case TokenEvent() as event:
                tokens.append(event.token)
            case Rejected() as event:
                raise ApiError(event.status, event.message)
            case Finished() as event:
                if event.reason == "error":
                    raise ApiError(event.status, event.message or event.code or "the engine does not say why")
                return tuple(tokens)


async def retire(model: ServedModel, within_s: float, failure: Failure = lambda: None) -> int:
    """Wait until nothing runs on a model that is no longer asked; what takes too long ends with an error.

    It is not begun again on the new model: part of the text may have been read, and the rest would be that of
    another model. Returns how many requests ended so.
    """
    until = time.monotonic() + within_s
    while model.users and time.monotonic() < until and not failure():
        await asyncio.sleep(POLL_S)
    cut = model.users
    model.link.finish_all(
        "model_replaced",
        "the model was replaced by another version and this request took longer; send it again",
    )
    model.hooks.on_draining()
    model.hooks.on_drained()
    model.link.drain()
    return cut
