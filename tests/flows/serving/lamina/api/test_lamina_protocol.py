"""What a request may say: one clear sentence for everything else, naming the field."""

from __future__ import annotations

import json
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flows.serving.lamina.api.errors import ApiError
from flows.serving.lamina.api.protocol import (
    CHAT_NEUTRAL,
    COMPLETION_NEUTRAL,
    ChatRequest,
    CompletionRequest,
    parse_chat,
    parse_completion,
)

COMPLETION: dict[str, Any] = {"model": "m", "prompt": "x"}
CHAT: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "x"}]}


def completion(**fields: Any) -> CompletionRequest:
    return parse_completion(json.dumps({**COMPLETION, **fields}).encode(), 16)


def chat(**fields: Any) -> ChatRequest:
    return parse_chat(json.dumps({**CHAT, **fields}).encode(), 16)


def message(**fields: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": "x", **fields}]}


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"max_tokens": 0}, "max_tokens", "greater than or equal to 1"),
        ({"max_tokens": -5}, "max_tokens", "greater"),
        ({"max_tokens": 1e12}, "max_tokens", "integer"),
        ({"max_tokens": "5"}, "max_tokens", "integer"),
        ({"max_tokens": True}, "max_tokens", "integer"),
        ({"temperature": -0.1}, "temperature", "greater"),
        ({"temperature": 1e9}, "temperature", "less"),
        ({"temperature": "hot"}, "temperature", "number"),
        ({"top_p": 0}, "top_p", "greater than 0"),
        ({"top_p": 1.5}, "top_p", "less"),
        ({"top_k": -2}, "top_k", "greater"),
        ({"seed": 1 << 64}, "seed", "integer"),
        ({"seed": 1.5}, "seed", "integer"),
        ({"stop": ""}, "stop", "at least 1 character"),
        ({"stop": ["a", 5]}, "stop", "string"),
        ({"stop": ["a"] * 17}, "stop", "17 texts, at most 16"),
        ({"stop": ["a"] * 100_000}, "stop", "100000 texts"),
        ({"stop": "a" * 2000}, "stop", "at most 1024"),
        ({"logprobs": 21}, "logprobs", "less"),
        ({"logprobs": True}, "logprobs", "integer"),
        ({"stream": "yes"}, "stream", "boolean"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "only for stream"),
        ({"stream": True, "stream_options": {"chunks": 1}}, "stream_options", "stream_options.chunks"),
        ({"deadline_ms": 0}, "deadline_ms", "greater"),
        ({"priority": 1000}, "priority", "less"),
        ({"user": "u" * 600}, "user", "at most 512"),
        ({"prompt": 5}, "prompt", "a text or a list of token ids"),
        ({"prompt": {"text": "x"}}, "prompt", "a text or a list of token ids"),
        ({"prompt": None}, "prompt", "missing"),
        ({"prompt": ["a", "b"]}, "prompt", "one request for each"),
        ({"prompt": [[1], [2]]}, "prompt", "one request for each"),
        ({"prompt": [1, -1]}, "prompt", "greater"),
        ({"prompt": [1, "a"]}, "prompt", "integer"),
        ({"model": None}, "model", "missing"),
        ({"model": 5}, "model", "string"),
        ({"n": 2}, "n", "not supported"),
        ({"n": True}, "n", "not supported"),
        ({"echo": True}, "echo", "not supported"),
        ({"suffix": "end"}, "suffix", "not supported"),
        ({"best_of": 3}, "best_of", "not supported"),
        ({"messages": []}, "messages", "unknown field"),
        ({"temprature": 1}, "temprature", "unknown field 'temprature'"),
        ({"temprature": None}, "temprature", "unknown field"),
        ({"x" * 1000: 1}, "x" * 80, "unknown field"),
    ],
)
def test_a_completion_is_refused_by_name(fields: dict[str, Any], param: str, words: str) -> None:
    with pytest.raises(ApiError) as caught:
        completion(**fields)
    assert (caught.value.status, caught.value.param) == (400, param)
    assert words in caught.value.message
    assert len(caught.value.message) < 300
    assert "\n" not in caught.value.message


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"messages": []}, "messages", "at least 1"),
        ({"messages": "hi"}, "messages", "list"),
        (message(role="tool"), "messages", "messages.0.role"),
        (message(role=None), "messages", "messages.0.role: is missing"),
        (message(content=None), "messages", "messages.0.content: is missing"),
        (message(content=5), "messages", "messages.0.content"),
        (
            message(content=[{"type": "image_url", "image_url": {}}]),
            "messages",
            "'image_url' is not supported",
        ),
        (message(content=[{"type": "text"}]), "messages", "fields type and text"),
        (message(content=[5]), "messages", "not supported, only text"),
        (message(tool_calls=[{"id": "x"}]), "messages", "messages.0.tool_calls: is not supported"),
        ({"top_logprobs": 2}, "top_logprobs", "only for logprobs: true"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "less"),
        ({"logprobs": 2}, "logprobs", "boolean"),
        ({"max_tokens": 5, "max_completion_tokens": 6}, "max_tokens", "contradict"),
        ({"tools": [{}]}, "tools", "not supported"),
        ({"tool_choice": "required"}, "tool_choice", "not supported"),
        ({"response_format": {"type": "json_schema"}}, "response_format", "not supported"),
        ({"reasoning_effort": "high"}, "reasoning_effort", "not supported"),
        ({"modalities": ["text", "audio"]}, "modalities", "not supported"),
        ({"store": True}, "store", "not supported"),
        ({"prompt": "x"}, "prompt", "unknown field"),
    ],
)
def test_a_chat_is_refused_by_name(fields: dict[str, Any], param: str, words: str) -> None:
    with pytest.raises(ApiError) as caught:
        chat(**fields)
    assert (caught.value.status, caught.value.param) == (400, param)
    assert words in caught.value.message


@pytest.mark.parametrize(
    "body",
    [
        b"", b"{", b"[]", b"null", b'"text"', b'{"model": "m", "prompt": "x", "temperature": NaN}',
        b'{"model": "m", "prompt": "x", "temperature": Infinity}', b'{"prompt": "\xff\xfe"}',
        b'{"prompt": "\\ud800"}', b"[" * 100_000, b'{"a":' * 100_000, b"\x00" * 50,
        '{"model": "m"}'.encode("utf-16"),
    ],
)  # fmt: skip
def test_what_is_not_json_is_refused(body: bytes) -> None:
    for parse in (parse_completion, parse_chat):
        with pytest.raises(ApiError) as caught:
            parse(body, 16)
        assert caught.value.status == 400
        assert caught.value.code == "invalid_json"


@settings(max_examples=50, deadline=None)
@given(
    st.dictionaries(
        st.sampled_from(
            [*CompletionRequest.model_fields, *ChatRequest.model_fields, *CHAT_NEUTRAL, "role", "content"]
        ),
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
            lambda inner: (
                st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
            ),
            max_leaves=6,
        ),
    )
)
def test_no_request_is_anything_but_taken_or_refused(fields: dict[str, Any]) -> None:
    for parse, base in ((parse_completion, COMPLETION), (parse_chat, CHAT)):
        with suppress(ApiError):
            parse(json.dumps({**base, **fields}).encode(), 16).sampling()


def test_neutral_values_are_accepted() -> None:
    for name, values in COMPLETION_NEUTRAL.items():
        for value in (*values, None):
            completion(**{name: value})
    for name, values in CHAT_NEUTRAL.items():
        for value in (*values, None):
            chat(**{name: value})
    assert completion(presence_penalty=0.0, stop=None, max_tokens=None).answer_tokens == 16


def test_what_was_asked_is_what_the_engine_is_told() -> None:
    asked = completion(temperature=0.5, top_p=0.9, top_k=-1, seed=-1, logprobs=3, stop="x")
    sampling = asked.sampling()
    assert (sampling.temperature, sampling.top_p, sampling.top_k) == (0.5, 0.9, 0)
    assert (sampling.seed, sampling.logprobs, asked.stop) == ((1 << 64) - 1, 3, ["x"])
    assert completion(prompt=["text"]).prompt == "text"
    assert completion(prompt=[[1, 2]]).prompt == [1, 2]
    assert completion(seed=0).sampling().seed == 0
    assert chat(logprobs=True).sampling().logprobs == 0
    assert chat(max_completion_tokens=7).answer_tokens == 7
    assert chat().answer_tokens is None
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    answer = {"role": "assistant", "content": "y", "refusal": None, "tool_calls": None}
    asked_chat = chat(messages=[{"role": "user", "content": parts, "name": "N"}, answer])
    assert asked_chat.template_messages() == [
        {"role": "user", "content": "ab", "name": "N"},
        {"role": "assistant", "content": "y"},
    ]
