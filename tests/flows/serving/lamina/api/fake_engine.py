"""An engine without a model: a real unix socket that speaks `requests.py`, and answers as a test scripts it.

Tokens come when the test lets them (`release`), so that no test waits for a clock. `kill` closes socket and
connection as a process that dies does; `start` brings it back, with its requests (a journal) or without.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flows.serving.lamina.requests import (
    MAX_LINE,
    Accepted,
    AskMetrics,
    Cancel,
    Drain,
    Finished,
    Follow,
    Heartbeat,
    Message,
    MetricsText,
    Rejected,
    Submit,
    ToEngine,
    TokenEvent,
    decode_to_engine,
    encode,
)

HEARTBEAT_S = 0.02
WAIT_S = 10.0


@dataclass(eq=False)
class Request:
    submit: Submit
    reply: list[int]
    sent: int = 0
    finished: Finished | None = None


@dataclass
class Script:
    """What the engine does; may be changed at any time."""

    reply: Sequence[int] | Callable[[Submit], Sequence[int]] = ()
    free: bool = True  # tokens come at once; else `first`, then as the test releases them
    first: int = 0
    reason: str | None = None  # how it ends; default: stop, or length when max_tokens are reached
    code: str | None = None
    status: int = 500
    reject: Rejected | None = None
    lose_submits: int = 0  # so many are read and forgotten with the connection
    die_after: int | None = None  # tokens of one request, then the connection closes
    heartbeat: dict[str, Any] = field(default_factory=dict)
    silent: bool = False
    journal: bool = True
    metrics: str | None = ""
    accept: bool = True


class FakeEngine:
    """Runs on a thread of its own. Its methods may be called from any thread."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.script = Script()
        self.received: list[ToEngine] = []
        self.requests: dict[str, Request] = {}
        self.connections = 0
        self._changed = threading.Condition()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self._server: asyncio.Server | None = None
        self._writer: asyncio.StreamWriter | None = None

    # ---- what a test does ----

    def start(self) -> None:
        self._call(self._listen())

    def kill(self, *, forget: bool = False) -> None:
        self._call(self._stop())
        if forget:
            self.requests.clear()

    def release(self, count: int = 1) -> None:
        """Let every open request go on by so many tokens."""
        self._call(self._advance(count))

    def say(self, message: Message | bytes) -> None:
        async def write() -> None:
            assert self._writer is not None
            self._writer.write(message if isinstance(message, bytes) else encode(message))

        self._call(write())

    def wait_for(self, kind: type[Message], count: int = 1) -> list[Any]:
        """Until so many messages of this kind were received."""

        def found() -> list[Any]:
            return [message for message in self.received if isinstance(message, kind)]

        self.wait(lambda: len(found()) >= count)
        return found()

    def wait(self, condition: Callable[[], bool]) -> None:
        with self._changed:
            assert self._changed.wait_for(condition, WAIT_S), f"not in {WAIT_S} s; received {self.received}"

    def close(self) -> None:
        self._call(self._stop())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(WAIT_S)
        self._loop.close()

    def _call(self, work: Any) -> None:
        asyncio.run_coroutine_threadsafe(work, self._loop).result(WAIT_S)

    # ---- the engine ----

    async def _listen(self) -> None:
        self.path.unlink(missing_ok=True)
        self._server = await asyncio.start_unix_server(self._converse, str(self.path), limit=MAX_LINE)

    async def _stop(self) -> None:
        if self._server is not None:
            self._server.close()
            self._server = None
        self.path.unlink(missing_ok=True)
        self._drop()

    def _drop(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    async def _converse(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._drop()
        self._writer = writer
        self.connections += 1
        beating = asyncio.ensure_future(self._beat(writer))
        with suppress(OSError):
            while line := await reader.readline():
                message = decode_to_engine(line)
                self._obey(message)
                with self._changed:
                    self.received.append(message)
                    self._changed.notify_all()
        beating.cancel()
        writer.close()

    async def _beat(self, writer: asyncio.StreamWriter) -> None:
        while True:
            if not self.script.silent:
                values = {"state": "ready", "pages": 10, "workers_up": (True, True), **self.script.heartbeat}
                writer.write(encode(Heartbeat(**values)))
            await asyncio.sleep(HEARTBEAT_S)

    def _send(self, message: Message) -> None:
        if self._writer is not None:
            self._writer.write(encode(message))

    def _obey(self, message: ToEngine) -> None:
        script = self.script
        match message:
            case Submit():
                self._submit(message)
            case Cancel():
                if (request := self.requests.get(message.id)) and request.finished is None:
                    self._finish(request, message.reason)
            case Follow():
                request = self.requests.get(message.id)
                if request is None:
                    self._send(Finished(id=message.id, reason="error", code="unknown_request", status=404))
                    return
                for index in range(message.index, request.sent):
                    self._send(self._token(request, index))
                if request.finished is not None:
                    self._send(request.finished)
                elif script.free:
                    self._run(request, len(request.reply))
            case AskMetrics():
                if script.metrics is not None:
                    self._send(MetricsText(text=script.metrics))
            case Drain():
                pass

    def _submit(self, submit: Submit) -> None:
        script = self.script
        if script.lose_submits:
            script.lose_submits -= 1
            self._drop()
            return
        if script.reject is not None:
            self._send(script.reject.model_copy(update={"id": submit.id}))
            return
        if not script.accept:
            return
        if submit.id in self.requests:
            self._send(Rejected(id=submit.id, status=409, code="duplicate_id", message="known already"))
            return
        reply = script.reply(submit) if callable(script.reply) else script.reply
        request = self.requests[submit.id] = Request(submit, list(reply)[: submit.max_tokens])
        self._send(Accepted(id=submit.id))
        self._run(request, len(request.reply) if script.free else script.first)

    async def _advance(self, count: int) -> None:
        for request in list(self.requests.values()):
            if request.finished is None:
                self._run(request, count)

    def _run(self, request: Request, count: int) -> None:
        for _ in range(min(count, len(request.reply) - request.sent)):
            if self.script.die_after is not None and request.sent == self.script.die_after:
                self.script.die_after = None
                self._drop()
                return
            self._send(self._token(request, request.sent))
            request.sent += 1
        if request.sent == len(request.reply) and request.finished is None:
            full = request.sent == request.submit.max_tokens
            self._finish(request, self.script.reason or ("length" if full else "stop"))

    def _finish(self, request: Request, reason: str) -> None:
        request.finished = Finished(
            id=request.submit.id,
            reason=reason,  # type: ignore[arg-type]
            code=self.script.code if reason == "error" else None,
            message="as scripted" if reason == "error" else None,
            status=self.script.status,
            prompt_tokens=len(request.submit.prompt),
            completion_tokens=request.sent,
            queue_s=0.25,
            prefill_s=0.5,
            decode_s=0.75,
        )
        self._send(request.finished)

    def _token(self, request: Request, index: int) -> TokenEvent:
        token = request.reply[index]
        wanted = request.submit.sampling.logprobs
        if wanted is None:
            return TokenEvent(id=request.submit.id, index=index, token=token)
        others = tuple((other, -2.0 - other) for other in range(wanted))
        return TokenEvent(
            id=request.submit.id, index=index, token=token, logprob=-0.5 - index, alternatives=others
        )


@contextmanager
def fake_engine(path: Path) -> Iterator[FakeEngine]:
    engine = FakeEngine(path)
    engine.start()
    try:
        yield engine
    finally:
        engine.close()
