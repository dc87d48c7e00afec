"""Requests of /v1/completions and /v1/chat/completions: what is taken, within which limits, what is refused.

A field is one of four things: supported; neutral (known to OpenAI, and at the value it has there when nobody
sets it, so ignoring it is right); known and not supported; unknown. The last two are refused by name. Nothing
is ignored silently but `user`, which says nothing about the answer.
"""

from __future__ import annotations

import secrets
from abc import abstractmethod
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal, TypeVar

import orjson
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from flows.serving.lamina.api.errors import ApiError
from flows.serving.lamina.requests import MAX_ALTERNATIVES, Sampling

COMPLETION_TOKENS = 16  # max_tokens of /v1/completions if the request names none, as OpenAI documents
MAX_STOP_CHARACTERS = 1024
MAX_DEADLINE_MS = 24 * 3600 * 1000
MAX_MESSAGES = 4096
R = TypeVar("R", bound="_Request")

_SHARED_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "repetition_penalty": (1,),
    "min_p": (0,),
    "min_tokens": (0,),
    "logit_bias": ({},),
}
COMPLETION_NEUTRAL = {**_SHARED_NEUTRAL, "best_of": (1,), "echo": (False,), "suffix": ("",)}
CHAT_NEUTRAL = {
    **_SHARED_NEUTRAL,
    "audio": (),
    "function_call": ("none",),
    "functions": ([],),
    "metadata": ({},),
    "modalities": (["text"],),
    "parallel_tool_calls": (True, False),
    "prediction": (),
    "reasoning_effort": (),
    "response_format": ({"type": "text"},),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "verbosity": (),
    "web_search_options": (),
}
"""Fields that are not supported, and the values that ask for nothing. null is one of all."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, hide_input_in_errors=True)


class StreamOptions(_Strict):
    include_usage: bool = False


def _one_or_several(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _smallest_top_k(value: Any) -> Any:
    return 0 if value == -1 else value  # both mean all


StopText = Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARACTERS)]
Milliseconds = Annotated[int, Field(ge=1, le=MAX_DEADLINE_MS)]


class _Request(_Strict):
    """What both routes take."""

    model: str
    max_tokens: int | None = Field(default=None, ge=1)
    temperature: float = Field(default=1.0, ge=0.0, le=100.0, allow_inf_nan=False)
    top_p: float = Field(default=1.0, gt=0.0, le=1.0)
    top_k: Annotated[int, BeforeValidator(_smallest_top_k)] = Field(default=0, ge=0, lt=1 << 31)
    seed: int | None = Field(default=None, ge=-(1 << 63), lt=1 << 64)
    stop: Annotated[list[StopText], BeforeValidator(_one_or_several)] = []
    stream: bool = False
    stream_options: StreamOptions | None = None
    user: str | None = Field(default=None, max_length=512)
    deadline_ms: Milliseconds | None = None
    queue_deadline_ms: Milliseconds | None = None
    priority: int = Field(default=0, ge=-100, le=100)
    ignore_eos: bool = False

    @model_validator(mode="after")
    def _options_fit(self) -> _Request:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options is only for stream: true")
        return self

    @property
    @abstractmethod
    def answer_tokens(self) -> int | None:
        """None: as many as the context has room for."""

    @property
    @abstractmethod
    def alternatives(self) -> int | None:
        """Beside each chosen token; None: no probabilities at all."""

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    def sampling(self) -> Sampling:
        return Sampling(
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            seed=secrets.randbits(63) if self.seed is None else self.seed % (1 << 64),
            logprobs=self.alternatives,
        )


def _single_prompt(value: Any) -> Any:
    """A list of one prompt is that prompt."""
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], str | list):
        value = value[0]
    if isinstance(value, list) and value and isinstance(value[0], str | list):
        raise ValueError("several prompts; send one request for each")
    if not isinstance(value, str | list):
        raise ValueError("has to be a text or a list of token ids")
    return value


class CompletionRequest(_Request):
    """POST /v1/completions."""

    prompt: Annotated[str | list[Annotated[int, Field(ge=0, lt=1 << 31)]], BeforeValidator(_single_prompt)]
    logprobs: int | None = Field(default=None, ge=0, le=MAX_ALTERNATIVES)

    @property
    def answer_tokens(self) -> int | None:
        return COMPLETION_TOKENS if self.max_tokens is None else self.max_tokens

    @property
    def alternatives(self) -> int | None:
        return self.logprobs


def _joined_parts(value: Any) -> Any:
    """A content of text parts is their text."""
    if not isinstance(value, list):
        return value
    texts = []
    for part in value:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind != "text":
            raise ValueError(f"a part of type {str(kind)[:40]!r} is not supported, only text")
        if set(part) != {"type", "text"} or not isinstance(part["text"], str):
            raise ValueError("a text part has the fields type and text")
        texts.append(part["text"])
    return "".join(texts)


class ChatMessage(_Strict):
    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[str, BeforeValidator(_joined_parts)]
    name: str | None = Field(default=None, max_length=128)

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, value: Any) -> Any:
        """An answer of this server, sent back by a client, has its unused fields at null."""
        if not isinstance(value, dict):
            return value
        return {key: entry for key, entry in value.items() if entry is not None}


class ChatRequest(_Request):
    """POST /v1/chat/completions."""

    messages: list[ChatMessage] = Field(min_length=1, max_length=MAX_MESSAGES)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    logprobs: bool = False
    top_logprobs: int | None = Field(default=None, ge=0, le=MAX_ALTERNATIVES)

    @model_validator(mode="after")
    def _consistent(self) -> ChatRequest:
        if None not in (self.max_tokens, self.max_completion_tokens) and (
            self.max_tokens != self.max_completion_tokens
        ):
            raise ValueError("max_tokens and max_completion_tokens contradict one another")
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs is only for logprobs: true")
        return self

    @property
    def answer_tokens(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    @property
    def alternatives(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    def template_messages(self) -> list[dict[str, str]]:
        return [message.model_dump(exclude_none=True) for message in self.messages]


def parse_completion(body: bytes, max_stop_strings: int) -> CompletionRequest:
    """
    Raises:
        ApiError: 400 with the first thing that is wrong.
    """
    return _parse(CompletionRequest, body, COMPLETION_NEUTRAL, max_stop_strings)


def parse_chat(body: bytes, max_stop_strings: int) -> ChatRequest:
    """
    Raises:
        ApiError: 400 with the first thing that is wrong.
    """
    return _parse(ChatRequest, body, CHAT_NEUTRAL, max_stop_strings)


def _parse(kind: type[R], body: bytes, neutral: Mapping[str, tuple[Any, ...]], max_stops: int) -> R:
    try:
        value = orjson.loads(body)
    except (orjson.JSONDecodeError, RecursionError) as error:
        raise ApiError(400, f"the body is not JSON: {error}", code="invalid_json") from None
    if not isinstance(value, dict):
        raise ApiError(400, "the body has to be a JSON object", code="invalid_json")
    asked = {}
    for name, entry in value.items():
        if name in kind.model_fields:
            if entry is not None:  # null is how clients say that they do not set it
                asked[name] = entry
        elif name not in neutral:
            raise ApiError(400, f"unknown field {name[:80]!r}", param=name[:80], code="unknown_field")
        elif entry is not None and not _is_any_of(entry, neutral[name]):
            raise ApiError(
                400, f"{name} is not supported; leave it out", param=name, code="unsupported_parameter"
            )
    stops = asked.get("stop")
    if isinstance(stops, list) and len(stops) > max_stops:
        raise ApiError(400, f"stop has {len(stops)} texts, at most {max_stops} are taken", param="stop")
    try:
        return kind.model_validate(asked)
    except ValidationError as error:
        raise _refusal(error, kind) from None


def _is_any_of(value: Any, neutral: tuple[Any, ...]) -> bool:
    """Equal, and not by true being 1."""
    return any(isinstance(value, bool) == isinstance(entry, bool) and value == entry for entry in neutral)


_MESSAGES: dict[str, Callable[[dict[str, Any]], str]] = {
    "missing": lambda _: "is missing",
    "extra_forbidden": lambda _: "is not supported",
    "value_error": lambda context: str(context["error"]),
}


def _refusal(error: ValidationError, kind: type[BaseModel]) -> ApiError:
    found = error.errors(include_url=False, include_input=False)
    first = max(found, key=lambda each: len(each["loc"])) if found[0]["loc"][:1] == ("prompt",) else found[0]
    where = [part for part in first["loc"] if isinstance(part, int) or part.isidentifier()]
    if len(where) > 1 and where[0] == "prompt" and where[1] == "str":
        del where[1]  # the branch of a union
    name = ".".join(str(part) for part in where)
    describe = _MESSAGES.get(first["type"])
    text = describe(first.get("ctx", {})) if describe else first["msg"][:1].lower() + first["msg"][1:]
    param = str(where[0]) if where else text.split()[0]  # a contradiction begins with the field's name
    return ApiError(400, f"{name}: {text}" if name else text, param=param)
