"""Between HTTP and engine: who is admitted, what is asked of the engine, whether the service is well.

One `Service` per application. `Generation` is one admitted request: its tokens in, its pieces of text out.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from flows.params.language import Lamina
from flows.serving.lamina.api.answers import Answer, Piece
from flows.serving.lamina.api.chat_template import ChatError
from flows.serving.lamina.api.engine_link import Call, EngineLink, Event
from flows.serving.lamina.api.errors import ApiError
from flows.serving.lamina.api.formats import ChatFormat, CompletionFormat, Format, Head, Json, usage
from flows.serving.lamina.api.handover import GOLDEN
from flows.serving.lamina.api.hooks import Hooks
from flows.serving.lamina.api.metrics import Metrics
from flows.serving.lamina.api.protocol import ChatRequest, CompletionRequest
from flows.serving.lamina.api.served_model import ServedModel
from flows.serving.lamina.api.texts import Texts
from flows.serving.lamina.requests import Accepted, Finished, Heartbeat, Rejected, Submit, TokenEvent
from flows.serving.lamina.slices.bundle import Manifest
from flows.serving.rollout_state import RolloutState, utc_now

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
        digest: str = "",
        hooks: Hooks | None = None,
    ) -> None:
        self.settings = settings
        self.metrics = Metrics(name or manifest.name, settings.metrics.vllm_alias)
        self.rollout = RolloutState(None, "fixed", "", utc_now())
        self.draining = False
        self.in_flight = 0
        self._generations: dict[str, Generation] = {}
        self.current = self.connect(
            manifest,
            texts,
            socket_path,
            name=name or manifest.name,
            version=version,
            digest=digest,
            hooks=hooks or Hooks(),
        )
        self._publish()

    # ---- models ----

    def connect(
        self,
        manifest: Manifest,
        texts: Texts,
        socket_path: Path,
        *,
        name: str,
        version: str | None,
        digest: str,
        hooks: Hooks,
    ) -> ServedModel:
        """A model whose engine listens at `socket_path`, or will; its link has to be run by the server."""
        cluster = self.settings.cluster

        def observe(call: Call, event: Event) -> None:
            if not call.id.startswith(GOLDEN):
                self.metrics.observe(call, event)

        def beat(heartbeat: Heartbeat) -> None:
            if self.current.link is link:  # what another engine does is not what clients see
                self.metrics.beat(heartbeat)

        link = EngineLink(
            socket_path,
            heartbeat_s=cluster.heartbeat_ms / 1e3,
            silent_heartbeats=cluster.silent_heartbeats,
            hooks=hooks,
            on_event=observe,
            on_heartbeat=beat,
        )
        return ServedModel(manifest, texts, link, name, version, digest, hooks)

    def switch(self, model: ServedModel) -> ServedModel:
        """Serve `model` from the next request on; returns the one before. On the event loop only."""
        before, self.current = self.current, model
        self.metrics.new_engine()
        self.metrics.switches.labels("switched").inc()
        self._publish()
        return before

    def _publish(self) -> None:
        model = self.current
        self.metrics.serve_model(model.name, model.version or "", model.digest, time.time())

    @property
    def link(self) -> EngineLink:
        return self.current.link

    @property
    def name(self) -> str:
        return self.current.name

    @property
    def texts(self) -> Texts:
        return self.current.texts

    @property
    def max_context(self) -> int:
        return self.current.max_context(self.settings.model.max_context)

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
        model = self.current
        with ExitStack() as use:
            use.enter_context(model.used())
            generation = await self._start(model, asked, request_id, timeout_ms, arrived, started)
            generation.leave = use.pop_all().close
        return generation

    async def _start(
        self,
        model: ServedModel,
        asked: Asked,
        request_id: str,
        timeout_ms: int | None,
        arrived: float,
        started: float,
    ) -> Generation:
        if asked.model != model.name:
            raise ApiError(
                404,
                f"the model {asked.model[:80]!r} does not exist, this server has {model.name!r}",
                param="model",
                code="model_not_found",
            )
        prompt = await _encode(model, asked)
        total_ms = asked.deadline_ms or self.settings.admit.total_deadline_ms
        total_ms = min(total_ms, timeout_ms or total_ms)
        queue_ms = asked.queue_deadline_ms or self.settings.admit.queue_deadline_ms
        chat = isinstance(asked, ChatRequest)
        submit = Submit(
            id=("chatcmpl-" if chat else "cmpl-") + secrets.token_hex(12),
            prompt=tuple(prompt),
            max_tokens=self._answer_tokens(model, asked, len(prompt)),
            sampling=asked.sampling(),
            ignore_eos=asked.ignore_eos,
            priority=asked.priority,
            arrived=arrived,
            queue_deadline=arrived + min(queue_ms, total_ms) / 1e3,
            deadline=arrived + total_ms / 1e3,
        )
        head = Head(submit.id, int(arrived), model.name, "fp_" + model.manifest.source_sha256[:12])
        with_logprobs = asked.alternatives is not None
        shape: Format = ChatFormat(head, with_logprobs) if chat else CompletionFormat(head, with_logprobs)
        answer = Answer(
            model.texts,
            continues=() if chat else prompt,
            stops=asked.stop,
            alternatives=asked.alternatives,
        )
        try:
            call = await model.link.submit(submit, started)
        except ApiError as error:
            self.metrics.rejected.labels(error.code or "").inc()
            raise
        generation = Generation(self, model, call, answer, shape, request_id)
        self._generations[call.id] = generation
        return generation

    def _answer_tokens(self, model: ServedModel, asked: Asked, prompt_tokens: int) -> int:
        limit = model.max_context(self.settings.model.max_context)
        room = limit - prompt_tokens
        wanted = asked.answer_tokens
        if room < 1 or (wanted is not None and wanted > room):
            also = f" and {wanted} of the answer" if wanted is not None else ""
            raise ApiError(
                400,
                f"{prompt_tokens} tokens of the prompt{also} do not fit into the context of {limit} tokens",
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
            generation.model.link.delete(generation.call)
        return bool(found)

    def forget(self, generation: Generation) -> None:
        self._generations.pop(generation.call.id, None)

    # ---- health ----

    def why_not_ready(self) -> list[str]:
        """Empty if requests are answered now."""
        return (["the server is stopping"] if self.draining else []) + self.current.why_not_ready()

    def why_not_healthy(self) -> list[str]:
        """Empty while requests make progress, or something is being done about it (spec 17)."""
        heartbeat = self.link.heartbeat
        if not self.link.is_alive or heartbeat is None:
            return [] if self.current.hooks.is_replacing() else ["the engine is not there"]
        reasons: list[str] = []
        if heartbeat.state == "loading":
            reasons += heartbeat.reasons or ["the engine is loading"]
        if heartbeat.running and heartbeat.since_progress_s > self.settings.http.stall_s:
            reasons.append(
                f"{heartbeat.running} requests run and none has progressed for "
                f"{heartbeat.since_progress_s:.1f} s"
            )
        missing = [str(number) for number, up in enumerate(heartbeat.workers_up) if not up]
        if missing and heartbeat.state != "recovering" and not self.current.hooks.is_replacing():
            reasons.append(f"attention worker {', '.join(missing)} is missing and not being replaced")
        return reasons


class Generation:
    """One request and its answer. Leave it with `close`, always."""

    def __init__(
        self,
        service: Service,
        model: ServedModel,
        call: Call,
        answer: Answer,
        shape: Format,
        request_id: str,
    ) -> None:
        self.model = model
        self.call = call
        self.leave: Callable[[], None] = lambda: None  # tells the model that one less uses it
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
                    self.model.link.cancel(self.call, "stop")
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
            self.model.link.cancel(self.call)
        self._service.forget(self)
        self.leave()


def _failure(end: Finished) -> ApiError:
    status = end.status if 400 <= end.status <= 599 else 500
    return ApiError(
        status,
        end.message or f"the request failed: {end.code or 'the engine does not say why'}",
        code=end.code,
        retry_after_s=1 if status == 503 else None,
    )


async def _encode(model: ServedModel, asked: Asked) -> list[int]:
    if isinstance(asked, ChatRequest):
        messages = asked.template_messages()
        size = sum(len(message["content"]) for message in messages)
        try:
            prompt = await _in_thread_if(size > INLINE_CHARACTERS, lambda: model.texts.encode_chat(messages))
        except ChatError as error:
            raise ApiError(
                400,
                f"messages: the chat template of the model does not take them: {error}",
                param="messages",
            ) from None
    elif isinstance(text := asked.prompt, str):
        prompt = await _in_thread_if(len(text) > INLINE_CHARACTERS, lambda: model.texts.encode_prompt(text))
    else:
        prompt = text
    param = "messages" if isinstance(asked, ChatRequest) else "prompt"
    if not prompt:
        raise ApiError(400, f"{param}: is empty, there is nothing to go on from", param=param)
    if (largest := max(prompt)) >= model.manifest.vocab_size:
        raise ApiError(
            400, f"{param}: token {largest} of a vocabulary of {model.manifest.vocab_size}", param=param
        )
    return prompt


async def _in_thread_if(large: bool, encode: Callable[[], list[int]]) -> list[int]:
    return await asyncio.to_thread(encode) if large else encode()
