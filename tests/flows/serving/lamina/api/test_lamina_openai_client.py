"""The official client of OpenAI against the server."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import openai
import pytest
from fake_engine import FakeEngine
from served_texts import END, Running, running_server, write_byte_fallback

from flows.serving.lamina.requests import Cancel, Rejected, Submit

TEXT = "hello world, é and 日本 😀!"


@pytest.fixture
def client(server: Running) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0) as client:
        yield client


def test_a_chat_is_answered(client: openai.OpenAI, server: Running, engine: FakeEngine) -> None:
    engine.script.reply = [*server.ids(TEXT), END]
    answer = client.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": "hi"}], seed=7, temperature=0, max_tokens=100
    )
    assert answer.choices[0].message.content == TEXT
    assert answer.choices[0].finish_reason == "stop"
    assert answer.id.startswith("chatcmpl-")
    (submit,) = engine.wait_for(Submit)
    assert submit.prompt == tuple(server.ids("user: hi\nassistant: "))
    assert (submit.sampling.seed, submit.sampling.temperature, submit.max_tokens) == (7, 0.0, 100)
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == len(submit.prompt)
    assert answer.usage.completion_tokens == len(engine.script.reply)


def test_a_streamed_chat_is_the_same_text(client: openai.OpenAI, server: Running, engine: FakeEngine) -> None:
    engine.script.reply = [*server.ids(TEXT), END]
    chunks = list(
        client.chat.completions.create(
            model="tiny",
            messages=[{"role": "user", "content": [{"type": "text", "text": "hi"}]}],
            max_completion_tokens=100,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    parts = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
    assert "".join(parts) == TEXT
    assert all("�" not in part for part in parts)
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == "stop"
    assert chunks[-1].usage is not None
    assert not chunks[-1].choices
    assert chunks[-1].usage.completion_tokens == len(engine.script.reply)
    assert len({chunk.id for chunk in chunks}) == 1


@pytest.mark.parametrize("stream", [False, True])
def test_a_completion_ends_with_its_tokens(
    client: openai.OpenAI, server: Running, engine: FakeEngine, stream: bool
) -> None:
    engine.script.reply = server.ids("abcdefghijklmnopqrstuvwxyz")
    asked = {"model": "tiny", "prompt": "x", "max_tokens": 5}
    if stream:
        chunks = list(client.completions.create(**asked, stream=True))  # type: ignore[call-overload]
        text, reason = "".join(each.choices[0].text for each in chunks), chunks[-1].choices[0].finish_reason
    else:
        answer = client.completions.create(**asked)  # type: ignore[call-overload]
        text, reason = answer.choices[0].text, answer.choices[0].finish_reason
    assert (text, reason) == ("abcde", "length")


def test_completions_have_sixteen_tokens_and_chats_the_context(
    client: openai.OpenAI, server: Running, engine: FakeEngine
) -> None:
    engine.script.reply = server.ids("x")
    client.completions.create(model="tiny", prompt=[1, 2, 3])
    client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "hi"}])
    completion, chat = engine.wait_for(Submit, 2)
    assert completion.prompt == (1, 2, 3)
    assert completion.max_tokens == 16
    assert chat.max_tokens == server.service.max_context - len(chat.prompt)
    assert completion.sampling.seed != chat.sampling.seed  # nobody named one


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_string_across_tokens_ends_the_text(
    client: openai.OpenAI, server: Running, engine: FakeEngine, stream: bool
) -> None:
    engine.script.reply = server.ids("one two three four")
    asked = {"model": "tiny", "prompt": "x", "max_tokens": 100, "stop": ["zzz", "o th", "four"]}
    if stream:
        chunks = list(client.completions.create(**asked, stream=True))  # type: ignore[call-overload]
        text, reason = "".join(each.choices[0].text for each in chunks), chunks[-1].choices[0].finish_reason
    else:
        answer = client.completions.create(**asked)  # type: ignore[call-overload]
        text, reason = answer.choices[0].text, answer.choices[0].finish_reason
    assert (text, reason) == ("one tw", "stop")


def test_a_found_stop_string_ends_the_request_in_the_engine(
    client: openai.OpenAI, server: Running, engine: FakeEngine
) -> None:
    engine.script.reply = server.ids("ab" * 50)
    engine.script.free, engine.script.first = False, 4
    stream = client.completions.create(model="tiny", prompt="x", max_tokens=100, stop="ba", stream=True)
    assert "".join(chunk.choices[0].text for chunk in stream) == "a"
    (cancel,) = engine.wait_for(Cancel)
    assert cancel.reason == "stop"


@pytest.mark.parametrize("stream", [False, True])
def test_probabilities_of_a_completion(
    client: openai.OpenAI, server: Running, engine: FakeEngine, stream: bool
) -> None:
    engine.script.reply = [*server.ids("hello é日"), END]
    asked = {"model": "tiny", "prompt": "x", "max_tokens": 100, "logprobs": 2}
    if stream:
        found = [
            chunk.choices[0].logprobs
            for chunk in client.completions.create(**asked, stream=True)  # type: ignore[call-overload]
        ]
    else:
        found = [client.completions.create(**asked).choices[0].logprobs]  # type: ignore[call-overload]
    tokens = [token for each in found for token in each.tokens]
    assert tokens == ["hello", " ", "é", "bytes:\\xe6", "bytes:\\x97", "bytes:\\xa5"]
    assert [offset for each in found for offset in each.text_offset] == [0, 5, 6, 7, 7, 7]
    assert [value for each in found for value in each.token_logprobs] == [-0.5, -1.5, -2.5, -3.5, -4.5, -5.5]
    top = [entry for each in found for entry in each.top_logprobs]
    assert "hello" in top[0]
    assert len(top[0]) == 2  # the two best, and the chosen one is the best


@pytest.mark.parametrize("stream", [False, True])
def test_probabilities_of_a_chat(
    client: openai.OpenAI, server: Running, engine: FakeEngine, stream: bool
) -> None:
    engine.script.reply = [*server.ids("hello é!"), END]
    asked = {
        "model": "tiny", "messages": [{"role": "user", "content": "hi"}], "logprobs": True, "top_logprobs": 3,
        "stop": "!",
    }  # fmt: skip
    if stream:
        found = [
            entry
            for chunk in client.chat.completions.create(**asked, stream=True)  # type: ignore[call-overload]
            for entry in (chunk.choices[0].logprobs.content if chunk.choices[0].logprobs else [])
        ]
    else:
        answer = client.chat.completions.create(**asked)  # type: ignore[call-overload]
        found = answer.choices[0].logprobs.content
    assert [entry.token for entry in found] == ["hello", " ", "é"]  # not the stop string
    assert found[2].bytes == list("é".encode())
    assert [len(entry.top_logprobs) for entry in found] == [3, 3, 3]
    assert found[0].top_logprobs[0].token == "hello"
    assert found[2].top_logprobs[0].logprob == -2.0  # the chosen one, at -2.5, comes after


@pytest.mark.parametrize(
    ("extra", "param"),
    [
        ({"n": 2}, "n"),
        ({"presence_penalty": 0.5}, "presence_penalty"),
        ({"logit_bias": {"5": 1}}, "logit_bias"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
        ({"extra_body": {"beams": 4}}, "beams"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(
    client: openai.OpenAI, engine: FakeEngine, extra: dict[str, object], param: str
) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(  # type: ignore[call-overload]
            model="tiny", messages=[{"role": "user", "content": "hi"}], **extra
        )
    assert caught.value.param == param
    assert param in caught.value.message
    assert not engine.requests


def test_defaults_of_openai_are_accepted(client: openai.OpenAI, server: Running, engine: FakeEngine) -> None:
    engine.script.reply = server.ids("x")
    client.chat.completions.create(
        model="tiny",
        messages=[{"role": "user", "content": "hi"}],
        n=1,
        presence_penalty=0,
        frequency_penalty=0.0,
        logit_bias={},
        response_format={"type": "text"},
        store=False,
        stop=None,
        user="somebody",
        extra_body={"top_k": -1, "repetition_penalty": 1.0, "priority": 3, "ignore_eos": True},
    )
    (submit,) = engine.wait_for(Submit)
    assert submit.sampling.top_k == 0
    assert (submit.priority, submit.ignore_eos) == (3, True)


def test_an_unknown_model_is_not_found(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        client.completions.create(model="gpt-9", prompt="x")
    assert caught.value.code == "model_not_found"
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").id == "tiny"


def test_a_text_that_does_not_fit_is_refused(client: openai.OpenAI, server: Running) -> None:
    context = server.service.max_context
    for prompt, max_tokens in (([5] * context, 1), ([5], context), ([5] * (context + 1), None)):
        with pytest.raises(openai.BadRequestError) as caught:
            client.completions.create(model="tiny", prompt=prompt, max_tokens=max_tokens)
        assert caught.value.code == "context_length_exceeded"


def test_a_full_queue_is_told_with_when_to_come_back(client: openai.OpenAI, engine: FakeEngine) -> None:
    engine.script.reject = Rejected(
        id="x", status=429, code="queue_full", message="the queue is full", retry_after_s=2.2
    )
    with pytest.raises(openai.RateLimitError) as caught:
        client.completions.create(model="tiny", prompt="x", stream=True)
    assert caught.value.response.headers["retry-after"] == "3"
    assert caught.value.code == "queue_full"


def test_an_error_before_the_first_token_has_its_status(client: openai.OpenAI, engine: FakeEngine) -> None:
    engine.script.reply = []
    engine.script.reason, engine.script.code, engine.script.status = "error", "deadline_exceeded", 504
    with pytest.raises(openai.APIStatusError) as caught:
        client.completions.create(model="tiny", prompt="x", stream=True)
    assert caught.value.status_code == 504
    assert caught.value.code == "deadline_exceeded"


def test_an_error_in_a_stream_is_its_last_event(
    client: openai.OpenAI, server: Running, engine: FakeEngine
) -> None:
    engine.script.reply = server.ids("abc")
    engine.script.reason, engine.script.code = "error", "numeric_error"
    stream = client.completions.create(model="tiny", prompt="x", stream=True)
    parts = [next(stream).choices[0].text for _ in "abc"]
    with pytest.raises(openai.APIError) as caught:
        next(stream)
    assert "".join(parts) == "abc"
    assert caught.value.code == "numeric_error"


def test_a_template_may_refuse_messages(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="no system messages"):
        client.chat.completions.create(model="tiny", messages=[{"role": "system", "content": "x"}])


def test_a_completion_goes_on_from_its_prompt_and_a_chat_begins_anew(
    tmp_path: Path, engine: FakeEngine, socket_path: Path
) -> None:
    with (
        running_server(write_byte_fallback(tmp_path / "fallback"), socket_path) as server,
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0) as client,
    ):
        engine.script.reply = server.ids("the the")[1:]  # without the begin token
        assert client.completions.create(model="tiny", prompt="the").choices[0].text == " the the"
        answer = client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "the"}])
        assert answer.choices[0].message.content == "the the"


def test_a_client_with_a_key(folder: Path, engine: FakeEngine, socket_path: Path) -> None:
    with running_server(folder, socket_path, key="secret-key") as server:
        engine.script.reply = server.ids("x")
        for key, works in (("secret-key", True), ("secret-kez", False), ("secret-key-longer", False)):
            with openai.OpenAI(base_url=f"{server.url}/v1", api_key=key, max_retries=0) as client:
                if works:
                    assert client.completions.create(model="tiny", prompt="x").choices[0].text == "x"
                else:
                    with pytest.raises(openai.AuthenticationError):
                        client.completions.create(model="tiny", prompt="x")
