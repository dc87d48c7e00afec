"""Streams that break: the client goes away or does not read, the engine dies and comes back."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from fake_engine import FakeEngine
from served_texts import Running, http, new_client, running_server, settings, wait_until, with_settings

from flows.serving.lamina.api import engine_link
from flows.serving.lamina.requests import Accepted, Cancel, Follow, Submit, TokenEvent

TEXT = "A quick brown fox é 日本 jumps over a lazy dog."
ASKED = {"model": "tiny", "prompt": "x", "max_tokens": 400}


def post(server: Running, **extra: Any) -> httpx.Response:
    return http.post(f"{server.url}/v1/completions", json={**ASKED, **extra})


def events(lines: Iterator[str]) -> Iterator[dict[str, Any] | str]:
    """What a strict reader of server-sent events finds."""
    for line in lines:
        if line:
            assert line.startswith("data: "), line
            data = line.removeprefix("data: ")
            yield data if data == "[DONE]" else json.loads(data)


def text_of(found: list[Any]) -> str:
    return "".join(
        choice["text"] for event in found if isinstance(event, dict) for choice in event["choices"]
    )


class Stream:
    """A stream of which the test reads as far as it wants."""

    def __init__(self, server: Running, **extra: Any) -> None:
        self._client = new_client()
        request = self._client.build_request(
            "POST", f"{server.url}/v1/completions", json={**ASKED, "stream": True, **extra}
        )
        self.response = self._client.send(request, stream=True)
        self._events = events(self.response.iter_lines())
        self.found: list[Any] = []

    def read_until(self, text: str) -> None:
        while text_of(self.found) != text:
            self.found.append(next(self._events))

    def read_all(self) -> str:
        self.found += self._events
        self.close()
        assert self.found[-1] == "[DONE]"
        return text_of(self.found)

    def close(self) -> None:
        self.response.close()
        self._client.close()


def test_the_framing_of_a_stream(server: Running, engine: FakeEngine) -> None:
    engine.script.reply = server.ids("a\nb\r\n\n")
    answer = post(server, stream=True)
    assert answer.headers["content-type"].startswith("text/event-stream")
    blocks = answer.content.split(b"\n\n")
    assert blocks[-1] == b""  # the last one is ended too
    assert blocks[-2] == b"data: [DONE]"
    assert all(block.startswith(b"data: {") and b"\n" not in block for block in blocks[:-2])
    assert text_of([json.loads(block[6:]) for block in blocks[:-2]]) == "a\nb\r\n\n"


def test_a_client_that_goes_away_cancels_its_stream(server: Running, engine: FakeEngine) -> None:
    engine.script.reply, engine.script.free, engine.script.first = server.ids(TEXT), False, 3
    stream = Stream(server)
    stream.read_until(TEXT[:3])
    stream.close()
    (cancel,) = engine.wait_for(Cancel)
    assert cancel.id in engine.requests
    wait_until(lambda: server.service.in_flight == 0 and server.service.link.open_calls == 0)


def test_a_client_that_went_away_while_the_engine_was_dead_is_told_to_the_next_one(
    server: Running, engine: FakeEngine
) -> None:
    engine.script.reply, engine.script.free, engine.script.first = server.ids(TEXT), False, 3
    stream = Stream(server)
    stream.read_until(TEXT[:3])
    engine.kill()
    wait_until(lambda: not server.service.link.is_alive)
    stream.close()
    wait_until(lambda: server.service.in_flight == 0)
    engine.start()
    engine.wait_for(Cancel)
    wait_until(lambda: server.service.link.open_calls == 0)
    assert [request.sent for request in engine.requests.values()] == [3]


@pytest.mark.parametrize("first", [0, 2])
def test_a_client_that_goes_away_cancels_an_answer_that_is_not_streamed(
    server: Running, engine: FakeEngine, first: int
) -> None:
    engine.script.reply, engine.script.free, engine.script.first = server.ids(TEXT), False, first
    port = int(server.url.rsplit(":", 1)[1])
    body = json.dumps(ASKED).encode()
    with socket.create_connection(("127.0.0.1", port)) as client:
        head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n"
        client.sendall(head.encode() + b"Content-Type: application/json\r\n\r\n" + body)
        engine.wait_for(Submit)
    engine.wait_for(Cancel)
    wait_until(lambda: server.service.in_flight == 0)


def test_a_client_that_goes_away_while_the_engine_is_away_leaves_nothing(
    folder: Path, socket_path: Path
) -> None:
    with running_server(folder, socket_path) as server:
        port = int(server.url.rsplit(":", 1)[1])
        body = json.dumps(ASKED).encode()
        with socket.create_connection(("127.0.0.1", port)) as client:
            head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n"
            client.sendall(head.encode() + b"Content-Type: application/json\r\n\r\n" + body)
            wait_until(lambda: server.service.in_flight == 1)
        wait_until(lambda: server.service.in_flight == 0)


@pytest.mark.parametrize("by", ["id", "header"])
@pytest.mark.parametrize("away", [False, True])
def test_a_deleted_request_ends_as_cancelled(
    server: Running, engine: FakeEngine, by: str, away: bool
) -> None:
    engine.script.reply, engine.script.free, engine.script.first = server.ids(TEXT), False, 3
    stream = Stream(server)
    stream.read_until(TEXT[:3])
    name = stream.found[0]["id"] if by == "id" else stream.response.headers["x-request-id"]
    if away:
        engine.kill()
        wait_until(lambda: not server.service.link.is_alive)
    answer = http.delete(f"{server.url}/v1/requests/{name}")
    assert answer.status_code == 200
    assert stream.read_all() == TEXT[:3]
    assert stream.found[-2]["choices"][0]["finish_reason"] == "cancelled"
    assert http.delete(f"{server.url}/v1/requests/{name}").status_code == 404


@pytest.mark.parametrize("at", [1, 17, 30])
def test_an_engine_that_dies_and_comes_back_gives_the_text_once(
    server: Running, engine: FakeEngine, at: int
) -> None:
    engine.script.reply, engine.script.free, engine.script.first = server.ids(TEXT), False, at
    stream = Stream(server)
    engine.wait(lambda: any(request.sent == at for request in engine.requests.values()))
    engine.kill()
    wait_until(lambda: not server.service.link.is_alive)
    engine.script.free = True
    engine.start()
    assert stream.read_all() == TEXT
    (follow,) = engine.wait_for(Follow)
    assert follow.index == at


def test_a_connection_that_breaks_in_the_middle_gives_the_text_once(
    server: Running, engine: FakeEngine
) -> None:
    engine.script.reply, engine.script.die_after = server.ids(TEXT), 10
    answer = post(server)
    assert answer.json()["choices"][0]["text"] == TEXT
    assert engine.connections == 2
    assert len(engine.wait_for(Submit)) == 1


def test_tokens_that_come_twice_are_taken_once(server: Running, engine: FakeEngine) -> None:
    engine.script.reply, engine.script.free, engine.script.first = server.ids("abcdef"), False, 3
    stream = Stream(server)
    stream.read_until("abc")
    (name,) = engine.requests
    for index, token in enumerate(server.ids("abc")):
        engine.say(TokenEvent(id=name, index=index, token=token))
    engine.say(Accepted(id=name))
    engine.release(3)
    assert stream.read_all() == "abcdef"


def test_a_gap_in_the_tokens_is_asked_for(server: Running, engine: FakeEngine) -> None:
    engine.script.reply, engine.script.free, engine.script.first = server.ids("abcdef"), False, 2
    stream = Stream(server)
    stream.read_until("ab")
    (name,) = engine.requests
    engine.requests[name].sent = 4  # c and d were lost on their way
    engine.say(TokenEvent(id=name, index=4, token=server.ids("e")[0]))
    (follow,) = engine.wait_for(Follow)
    assert follow.index == 2
    stream.read_until("abcd")
    engine.release(2)
    assert stream.read_all() == "abcdef"


def test_a_request_that_was_lost_on_its_way_is_sent_again(server: Running, engine: FakeEngine) -> None:
    engine.script.reply, engine.script.lose_submits = server.ids(TEXT), 1
    assert post(server).json()["choices"][0]["text"] == TEXT
    first, second = engine.wait_for(Submit)
    assert first == second


def test_an_engine_without_a_journal_loses_what_has_begun(server: Running, engine: FakeEngine) -> None:
    engine.script.reply, engine.script.free, engine.script.first = server.ids(TEXT), False, 3
    stream = Stream(server)
    stream.read_until(TEXT[:3])
    engine.kill(forget=True)
    engine.start()
    assert stream.read_all() == TEXT[:3]
    last = stream.found[-2]
    assert last["error"]["code"] == "engine_lost"
    assert last["choices"][0]["finish_reason"] == "error"


def test_bytes_that_are_no_message_end_the_connection_only(server: Running, engine: FakeEngine) -> None:
    engine.script.reply, engine.script.free, engine.script.first = server.ids(TEXT), False, 3
    stream = Stream(server)
    stream.read_until(TEXT[:3])
    engine.say(b'{"type": "token", "id": 5}\n')
    engine.wait(lambda: engine.connections == 2)
    engine.wait_for(Follow)
    engine.release(100)
    assert stream.read_all() == TEXT


def test_without_an_engine_requests_wait_and_are_then_turned_away(
    folder: Path, socket_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_link, "ENGINE_WAIT_S", 0.05)
    with running_server(folder, socket_path) as server:
        answer = post(server)
        assert answer.status_code == 503
        assert answer.json()["error"]["code"] == "engine_unavailable"
        assert int(answer.headers["retry-after"]) >= 1


def test_a_loading_engine_is_waited_for(server: Running, engine: FakeEngine) -> None:
    engine.script.reply = server.ids("x")
    engine.kill()
    engine.script.heartbeat = {"state": "loading", "reasons": ("the model is being loaded",)}
    engine.start()
    wait_until(lambda: "the model is being loaded" in server.service.why_not_ready())
    with new_client() as client:
        assert client.get(f"{server.url}/readyz").json()["reasons"] == ["the model is being loaded"]
    answers: list[httpx.Response] = []
    thread = threading.Thread(target=lambda: answers.append(post(server)))
    thread.start()
    wait_until(lambda: server.service.in_flight == 1)
    http.get(f"{server.url}/livez")  # a round trip: the request has come to where it waits
    assert not engine.received
    engine.script.heartbeat = {}
    thread.join(20)
    assert answers[0].json()["choices"][0]["text"] == "x"


def test_a_deadline_holds_while_the_engine_is_away(
    server: Running, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_link, "OVERDUE_S", 0.0)
    engine.script.reply, engine.script.free, engine.script.first = server.ids(TEXT), False, 3
    stream = Stream(server, deadline_ms=300)
    stream.read_until(TEXT[:3])
    engine.kill()
    assert stream.read_all() == TEXT[:3]
    assert stream.found[-2]["error"]["code"] == "deadline_exceeded"
    wait_until(lambda: server.service.link.open_calls == 0)


def test_an_overdue_request_is_counted_once(
    server: Running, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_link, "OVERDUE_S", 0.0)
    engine.script.reply, engine.script.free = server.ids(TEXT), False
    assert post(server, deadline_ms=50).status_code == 504  # said here, as the engine does not
    engine.wait_for(Cancel)  # to which the engine says that it was cancelled
    wait_until(lambda: server.service.link.open_calls == 0)
    metrics = http.get(f"{server.url}/metrics").text
    assert 'trunkline_request_success_total{finished_reason="error"} 1.0' in metrics
    assert 'trunkline_request_success_total{finished_reason="cancelled"} 0.0' in metrics
    assert 'trunkline_deadline_expired_total{stage="queue"} 1.0' in metrics


def test_deadlines_come_from_body_header_and_settings(server: Running, engine: FakeEngine) -> None:
    engine.script.reply = server.ids("x")
    url = f"{server.url}/v1/completions"
    http.post(url, json={**ASKED, "deadline_ms": 5000, "queue_deadline_ms": 700})
    http.post(url, json={**ASKED, "deadline_ms": 5000}, headers={"X-Request-Timeout-Ms": "400"})
    http.post(url, json=ASKED)
    spans = [
        (round(each.deadline - each.arrived, 3), round(each.queue_deadline - each.arrived, 3))
        for each in engine.wait_for(Submit, 3)
    ]
    assert spans == [(5.0, 0.7), (0.4, 0.4), (600.0, 60.0)]
    assert http.post(url, json=ASKED, headers={"X-Request-Timeout-Ms": "soon"}).status_code == 400


def test_a_reader_that_does_not_read_is_given_up(
    folder: Path,
    engine: FakeEngine,
    socket_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    from flows.serving.lamina.api import streaming

    monkeypatch.setattr(streaming, "GRACE_S", 0.05)
    small = with_settings(settings(), {"http": {"slow_reader_kb": 8}})
    with running_server(folder, socket_path, small, send_buffer=4096) as server:
        engine.script.reply = server.ids("ab" * 200)
        engine.script.free, engine.script.first = False, 1
        port = int(server.url.rsplit(":", 1)[1])
        body = json.dumps({**ASKED, "stream": True, "logprobs": 20}).encode()
        with socket.socket() as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
            client.connect(("127.0.0.1", port))
            head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n"
            client.sendall(head.encode() + b"Content-Type: application/json\r\n\r\n" + body)
            engine.wait_for(Submit)
            engine.release(398)
            (cancel,) = engine.wait_for(Cancel)
            assert cancel.reason == "cancelled"
            wait_until(lambda: server.service.in_flight == 0)
            engine.script.free, engine.script.reply = True, server.ids("others go on")
            assert post(server).json()["choices"][0]["text"] == "others go on"
            metrics = http.get(f"{server.url}/metrics").text
            assert "trunkline_slow_readers_total 1.0" in metrics
            assert "ERROR" not in capfd.readouterr().err


def test_what_was_read_is_no_longer_unread() -> None:
    from flows.serving.lamina.api.streaming import Outbox

    sent: list[bytes] = []

    async def send(message: Any) -> None:
        sent.append(message["body"])

    async def stream() -> int:
        outbox = Outbox(100)
        sending = asyncio.create_task(outbox.send_all(send))
        for _ in range(50):
            outbox.put(b"x" * 60)
            await asyncio.sleep(0)
        outbox.close()
        await sending
        return outbox.unread

    assert asyncio.run(stream()) == 0
    assert b"".join(sent) == b"x" * 3000


def test_a_reader_that_pauses_gets_the_whole_stream(server: Running, engine: FakeEngine) -> None:
    engine.script.reply = server.ids("ab" * 200)
    stream = Stream(server)
    wait_until(lambda: server.service.link.open_calls == 0)
    assert stream.read_all() == "ab" * 200
