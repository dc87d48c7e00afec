"""Between HTTP and engine: who is admitted, what is asked of the engine, whether the service is well.

One `Service` per application. `Generation` is one admitted request: its tokens in, its pieces of text out.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from flows.params.language import Lamina
from flows.serving.lamina.api.answers import Answer, Piece
from flows.serving.lamina.api.chat_template import ChatError
from flows.serving.lamina.api.engine_link import Call, EngineLink
from flows.serving.lamina.api.errors import ApiError
from flows.serving.lamina.api.formats import ChatFormat, CompletionFormat, Format, Head, Json, usage
from flows.serving.lamina.api.hooks import Hooks
from flows.serving.lamina.api.metrics import Metrics
from flows.serving.lamina.api.protocol import ChatRequest, CompletionRequest
from flows.serving.lamina.api.texts import Texts
from flows.serving.lamina.requests import Accepted, Finished, Rejected, Submit, TokenEvent
from flows.serving.lamina.slices.bundle import Manifest

INLINE_CHARACTERS = 4096  # longer prompts are tokenised in a thread, so that the others' streams go on
Asked = CompletionRequest | ChatRequest


class Service:
    """What the routes share."""

    def __init__(
        self,
        manifest: Manifest,
        texts: Texts,
        settings: Lamina,
        socket_path: Path,
        *,
        name: str | None = None,
        version: str | None = None,
        hooks: Hooks | None = None,
    ) -> None:
        self.manifest = manifest
        self.texts = texts
        self.settings = settings
        self.name = name or manifest.name
        self.version = version
        self.hooks = hooks or Hooks()
        self.created = int(time.time())
        self.metrics = Metrics(self.name, settings.metrics.vllm_alias)
        self.link = EngineLink(
            socket_path,
            heartbeat_s=settings.cluster.heartbeat_ms / 1e3,
            silent_heartbeats=settings.cluster.silent_heartbeats,
            hooks=self.hooks,
            on_event=self.metrics.observe,
            on_heartbeat=self.metrics.beat,
        )
        self.draining = False
        self.in_flight = 0
        self._generations: dict[str, Generation] = {}

    @property
    def max_context(self) -> int:
        limit = self.settings.model.max_context
        return min(limit, self.manifest.max_context) if limit else self.manifest.max_context

    # ---- admission ----

    @contextmanager
    def admitted(self) -> Iterator[None]:
        """
        Raises:
            ApiError: 503 while the server stops, 429 with too many requests held open.
        """
        if self.draining:
            self.metrics.rejected.labels("draining").inc()
            raise ApiError(503, "the server is stopping", code="draining", retry_after_s=5)
        if self.in_flight >= self.settings.http.max_streams:
            self.metrics.rejected.labels("too_many_streams").inc()
            raise ApiError(
                429,
                f"{self.in_flight} requests are open already (http.max_streams); try again",
                code="too_many_streams",
                retry_after_s=1,
            )
        self.in_flight += 1
        try:
            yield
        finally:
            self.in_flight -= 1

    async def start(self, asked: Asked, request_id: str, timeout_ms: int | None) -> Generation:
        """Hand a request to the engine.

        Args:
            request_id: by which the client may delete it, beside the id of the answer.
            timeout_ms: of the header, beside what the body says.

        Raises:
            ApiError: another model, a prompt that does not fit, no engine.
        """
        arrived, started = time.time(), time.monotonic()
        if asked.model != self.name:
            raise ApiError(
                404,
                f"the model {asked.model[:80]!r} does not exist, this server has {self.name!r}",
                param="model",
                code="model_not_found",
            )
        prompt = await self._encode(asked)
        total_ms = asked.deadline_ms or self.settings.admit.total_deadline_ms
        total_ms = min(total_ms, timeout_ms or total_ms)
        queue_ms = asked.queue_deadline_ms or self.settings.admit.queue_deadline_ms
        chat = isinstance(asked, ChatRequest)
        submit = Submit(
            id=("chatcmpl-" if chat else "cmpl-") + secrets.token_hex(12),
            prompt=tuple(prompt),
            max_tokens=self._answer_tokens(asked, len(prompt)),
            sampling=asked.sampling(),
            ignore_eos=asked.ignore_eos,
            priority=asked.priority,
            arrived=arrived,
            queue_deadline=arrived + min(queue_ms, total_ms) / 1e3,
            deadline=arrived + total_ms / 1e3,
        )
        head = Head(submit.id, int(arrived), self.name, "fp_" + self.manifest.source_sha256[:12])
        with_logprobs = asked.alternatives is not None
        shape: Format = ChatFormat(head, with_logprobs) if chat else CompletionFormat(head, with_logprobs)
        answer = Answer(
            self.texts,
            continues=() if chat else prompt,
            stops=asked.stop,
            alternatives=asked.alternatives,
        )
        try:
            call = await self.link.submit(submit, started)
        except ApiError as error:
            self.metrics.rejected.labels(error.code or "").inc()
            raise
        generation = Generation(self, call, answer, shape, request_id)
        self._generations[call.id] = generation
        return generation

    async def _encode(self, asked: Asked) -> list[int]:
        if isinstance(asked, ChatRequest):
            messages = asked.template_messages()
            size = sum(len(message["content"]) for message in messages)
            try:
                prompt = await _in_thread_if(
                    size > INLINE_CHARACTERS, lambda: self.texts.encode_chat(messages)
                )
            except ChatError as error:
                raise ApiError(
                    400,
                    f"messages: the chat template of the model does not take them: {error}",
                    param="messages",
                ) from None
        elif isinstance(text := asked.prompt, str):
            prompt = await _in_thread_if(
                len(text) > INLINE_CHARACTERS, lambda: self.texts.encode_prompt(text)
            )
        else:
            prompt = text
        param = "messages" if isinstance(asked, ChatRequest) else "prompt"
        if not prompt:
            raise ApiError(400, f"{param}: is empty, there is nothing to go on from", param=param)
        if (largest := max(prompt)) >= self.manifest.vocab_size:
            raise ApiError(
                400, f"{param}: token {largest} of a vocabulary of {self.manifest.vocab_size}", param=param
            )
        return prompt

    def _answer_tokens(self, asked: Asked, prompt_tokens: int) -> int:
        room = self.max_context - prompt_tokens
        wanted = asked.answer_tokens
        if room < 1 or (wanted is not None and wanted > room):
            also = f" and {wanted} of the answer" if wanted is not None else ""
            raise ApiError(
                400,
                f"{prompt_tokens} tokens of the prompt{also} do not fit into the context of "
                f"{self.max_context} tokens",
                param="messages" if isinstance(asked, ChatRequest) else "prompt",
                code="context_length_exceeded",
            )
        return room if wanted is None else wanted

    def delete(self, request_id: str) -> bool:
        """End the requests of this id, that of an answer or the client's own. Whether there was one."""
        found = [
            each
            for each in self._generations.values()
            if request_id in (each.call.id, each.request_id) and not each.call.settled
        ]
        for generation in found:
            self.link.delete(generation.call)
        return bool(found)

    def forget(self, generation: Generation) -> None:
        self._generations.pop(generation.call.id, None)

    # ---- health ----

    def why_not_ready(self) -> list[str]:
        """Empty if requests are answered now."""
        reasons = ["the server is stopping"] if self.draining else []
        heartbeat = self.link.heartbeat
        if not self.link.is_alive or heartbeat is None:
            return [*reasons, "the engine is not there"]
        if heartbeat.state != "ready" or heartbeat.reasons:
            reasons += heartbeat.reasons or [f"the engine is {heartbeat.state}"]
        return reasons

    def why_not_healthy(self) -> list[str]:
        """Empty while requests make progress, or something is being done about it (spec 17)."""
        heartbeat = self.link.heartbeat
        if not self.link.is_alive or heartbeat is None:
            return [] if self.hooks.is_replacing() else ["the engine is not there"]
        reasons: list[str] = []
        if heartbeat.state == "loading":
            reasons += heartbeat.reasons or ["the engine is loading"]
        if heartbeat.running and heartbeat.since_progress_s > self.settings.http.stall_s:
            reasons.append(
                f"{heartbeat.running} requests run and none has progressed for "
                f"{heartbeat.since_progress_s:.1f} s"
            )
        missing = [str(number) for number, up in enumerate(heartbeat.workers_up) if not up]
        if missing and heartbeat.state != "recovering" and not self.hooks.is_replacing():
            reasons.append(f"attention worker {', '.join(missing)} is missing and not being replaced")
        return reasons


class Generation:
    """One request and its answer. Leave it with `close`, always."""

    def __init__(self, service: Service, call: Call, answer: Answer, shape: Format, request_id: str) -> None:
        self.call = call
        self.format = shape
        self.request_id = request_id
        self.finish_reason: str | None = None
        self.error: ApiError | None = None
        self._service = service
        self._answer = answer
        self._first: TokenEvent | Finished | None = None

    async def wait_for_first(self) -> None:
        """Until there is a token, or an end without one.

        Raises:
            ApiError: not admitted, or failed before the first token: the answer has a status of its own.
        """
        while self._first is None:
            event = await self.call.next()
            if isinstance(event, Rejected):
                raise ApiError(
                    event.status, event.message, code=event.code, retry_after_s=event.retry_after_s
                )
            if isinstance(event, Finished) and event.reason == "error":
                raise _failure(event)
            if not isinstance(event, Accepted):
                self._first = event

    async def pieces(self) -> AsyncIterator[Piece]:
        """Text as it comes; afterwards `finish_reason` is set, and `error` with it if it is that."""
        event: Accepted | Rejected | TokenEvent | Finished | None = self._first
        while self.finish_reason is None:
            if isinstance(event, TokenEvent):
                if piece := self._answer.add(event):
                    yield piece
                if self._answer.is_stopped:
                    self._service.link.cancel(self.call, "stop")
                    self.finish_reason = "stop"
            elif isinstance(event, Finished):
                if piece := self._answer.finish():
                    yield piece
                self.finish_reason = "stop" if self._answer.is_stopped else event.reason
                self.error = _failure(event) if self.finish_reason == "error" else None
            if self.finish_reason is None:
                event = await self.call.next()

    async def collect(self) -> Piece:
        whole = Piece()
        async for piece in self.pieces():
            whole.add(piece)
        return whole

    def usage(self) -> Json:
        return usage(len(self.call.submit.prompt), self._answer.count)

    def close(self) -> None:
        """Nobody reads on. What still runs is cancelled."""
        if not self.call.settled:
            self._service.link.cancel(self.call)
        self._service.forget(self)


def _failure(end: Finished) -> ApiError:
    status = end.status if 400 <= end.status <= 599 else 500
    return ApiError(
        status,
        end.message or f"the request failed: {end.code or 'the engine does not say why'}",
        code=end.code,
        retry_after_s=1 if status == 503 else None,
    )


async def _in_thread_if(large: bool, encode: Callable[[], list[int]]) -> list[int]:
    return await asyncio.to_thread(encode) if large else encode()
