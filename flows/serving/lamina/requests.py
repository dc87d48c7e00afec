"""What the HTTP process and the engine say to one another: one JSON object a line over a local socket.

The HTTP process knows texts, the engine knows tokens. Tokens carry their index, so that either side may
forget what it sent: after a new connection the HTTP process asks for each open request from the index it has
(`Follow`), and ignores what it has already. The engine writes a token to its journal before it sends it.

`decode` validates everything; bytes that are no message are a `DataError`, never code.
"""

from __future__ import annotations

from typing import Annotated, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from flows.errors import DataError

T = TypeVar("T")

MAX_LINE = 16 << 20
"""Bytes of one message; a prompt of a million tokens fits."""
MAX_ALTERNATIVES = 20

RequestId = Annotated[str, Field(min_length=1, max_length=128)]
Seconds = Annotated[float, Field(ge=0.0, allow_inf_nan=False)]
WorkerAddress = Annotated[
    tuple[Annotated[str, Field(min_length=1)], Annotated[int, Field(ge=1, le=65535)]], Field(strict=False)
]
Token = Annotated[int, Field(ge=0, lt=1 << 31)]


class Message(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Sampling(Message):
    """How the next token is chosen from the logits, in this order: temperature, top_k, top_p."""

    temperature: float = Field(default=1.0, ge=0.0, le=100.0, allow_inf_nan=False)  # 0: the largest logit
    top_k: int = Field(default=0, ge=0)  # 0: all
    top_p: float = Field(default=1.0, gt=0.0, le=1.0)
    seed: int = Field(default=0, ge=0, lt=1 << 64)  # with the token's index all that randomness depends on
    logprobs: int | None = Field(
        default=None, ge=0, le=MAX_ALTERNATIVES
    )  # alternatives beside the chosen one


# --- HTTP process → engine


class Submit(Message):
    """Generate. Answered by Accepted or Rejected, then TokenEvents, then one Finished."""

    type: Literal["submit"] = "submit"
    id: RequestId
    prompt: Annotated[tuple[Token, ...], Field(min_length=1, strict=False)]
    max_tokens: int = Field(ge=1)
    sampling: Sampling = Sampling()
    stop_token_ids: Annotated[tuple[Token, ...], Field(strict=False)] = ()  # beside those of the bundle
    ignore_eos: bool = False  # for measurements: only max_tokens ends it
    priority: int = Field(default=0, ge=-100, le=100)  # smaller goes first
    arrived: float  # Unix time
    queue_deadline: float | None = None  # Unix time by which its first row has to be computed
    deadline: float | None = None  # Unix time by which it has to be finished


class Cancel(Message):
    """End a request now; `stop` if the HTTP process found a stop string in its text."""

    type: Literal["cancel"] = "cancel"
    id: RequestId
    reason: Literal["cancelled", "stop"] = "cancelled"


class Follow(Message):
    """Send the tokens of a request from this index on, and those to come: asked after a new connection.

    Answered by Finished with code `unknown_request` if the engine does not know it.
    """

    type: Literal["follow"] = "follow"
    id: RequestId
    index: int = Field(ge=0)


class Drain(Message):
    """Admit nothing more; the engine ends when nothing runs."""

    type: Literal["drain"] = "drain"


class WorkersMoved(Message):
    """Where all attention workers are now, spares last, after one had to be placed on another host.

    What is not listed is gone for good.
    """

    type: Literal["workers_moved"] = "workers_moved"
    addresses: Annotated[tuple[WorkerAddress, ...], Field(strict=False, min_length=1)]


class AskMetrics(Message):
    """Answered by MetricsText."""

    type: Literal["ask_metrics"] = "ask_metrics"


# --- engine → HTTP process


class Accepted(Message):
    type: Literal["accepted"] = "accepted"
    id: RequestId


class Rejected(Message):
    """Not admitted; nothing was computed and nothing is kept."""

    type: Literal["rejected"] = "rejected"
    id: RequestId
    status: int = Field(ge=400, le=599)
    code: str  # queue_full, context_length_exceeded, no_capacity, draining, journal_full, duplicate_id
    message: str
    retry_after_s: Seconds | None = None


class TokenEvent(Message):
    type: Literal["token"] = "token"
    id: RequestId
    index: int = Field(ge=0)  # of the generated tokens
    token: Token
    logprob: float | None = None
    alternatives: Annotated[tuple[tuple[Token, float], ...], Field(strict=False)] = ()  # best first


class Finished(Message):
    """The last message of a request. Tokens before `completion_tokens` have all been sent."""

    type: Literal["finished"] = "finished"
    id: RequestId
    reason: Literal["stop", "length", "cancelled", "error"]
    code: str | None = (
        None  # with error: deadline_exceeded, recovery_failed, numeric_error, unknown_request …
    )
    message: str | None = None
    status: int = 500  # HTTP status of an error before the first byte of an answer
    prompt_tokens: int = 0
    completion_tokens: int = 0
    queue_s: Seconds = 0.0  # until its first row was computed
    prefill_s: Seconds = 0.0  # from then until its first token
    decode_s: Seconds = 0.0  # from then to the end
    recoveries: int = 0


class WorkerLost(Message):
    """An attention worker does not answer: whoever supervises it should end and replace it."""

    type: Literal["worker_lost"] = "worker_lost"
    host: str
    port: int
    pid: int = 0  # of the process that was spoken to; 0: it never said. A successor must not be ended for it
    reason: str


class Heartbeat(Message):
    """Sent every `cluster.heartbeat_ms`, also during an iteration and a recovery."""

    type: Literal["heartbeat"] = "heartbeat"
    state: Literal["loading", "ready", "recovering", "draining"]
    reasons: Annotated[tuple[str, ...], Field(strict=False)] = ()  # why it is not ready
    epoch: int = 0
    iterations: int = 0
    running: int = 0
    waiting: int = 0
    waiting_tokens: int = 0
    pages: int = 0
    pages_used: int = 0
    tokens_generated: int = 0
    preemptions: int = 0
    since_progress_s: Seconds = 0.0  # since a row was last computed while something runs; 0 if nothing does
    workers_up: Annotated[tuple[bool, ...], Field(strict=False)] = ()
    batch_invariant: bool = False


class MetricsText(Message):
    """The engine's own series in Prometheus' text format."""

    type: Literal["metrics_text"] = "metrics_text"
    text: str


ToEngine = Submit | Cancel | Follow | Drain | WorkersMoved | AskMetrics
FromEngine = Accepted | Rejected | TokenEvent | Finished | WorkerLost | Heartbeat | MetricsText

_to_engine: TypeAdapter[ToEngine] = TypeAdapter(Annotated[ToEngine, Field(discriminator="type")])
_from_engine: TypeAdapter[FromEngine] = TypeAdapter(Annotated[FromEngine, Field(discriminator="type")])


def encode(message: Message) -> bytes:
    """One line; JSON escapes the line breaks that texts may have."""
    return message.model_dump_json().encode() + b"\n"


def decode_to_engine(line: bytes) -> ToEngine:
    """
    Raises:
        DataError: not a message that an engine takes.
    """
    return _decode(_to_engine, line)


def decode_from_engine(line: bytes) -> FromEngine:
    """
    Raises:
        DataError: not a message that an engine sends.
    """
    return _decode(_from_engine, line)


def _decode(adapter: TypeAdapter[T], line: bytes) -> T:
    if len(line) > MAX_LINE:
        raise DataError(f"a message of {len(line)} bytes, at most {MAX_LINE} are taken")
    try:
        return adapter.validate_json(line)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise DataError(f"not a message: {where}: {first['msg']}") from None
