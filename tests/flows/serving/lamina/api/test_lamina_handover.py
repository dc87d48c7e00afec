"""From one model to the next: two scripted engines behind one real server."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from fake_engine import FakeEngine, fake_engine
from served_texts import END, Running, manifest, running_server, settings, wait_until

from flows.errors import DataError, GateFailed, ResourceError
from flows.serving.lamina.api.hooks import Hooks
from flows.serving.lamina.api.served_model import ServedModel
from flows.serving.lamina.api.texts import Texts
from flows.serving.lamina.requests import Drain, Submit


@dataclass(frozen=True)
class Prompt:
    name: str
    prompt: tuple[int, ...]
    continuation: tuple[int, ...]


GOLDEN = [Prompt("one", (1, 2), (5, 6, END)), Prompt("two", (3,), (5, 6, END))]


@dataclass
class Stage:
    """A server on version 1, and the engine and the model of version 2."""

    server: Running
    old: FakeEngine
    new: FakeEngine
    model: ServedModel
    told: list[str]

    def say(self, engine: FakeEngine, text: str, **script: Any) -> None:
        engine.script.reply = [*self.server.ids(text), END]
        for name, value in script.items():
            setattr(engine.script, name, value)

    def try_out(self, **arguments: Any) -> None:
        self.new.script.reply = (5, 6, END)
        values = {"prompts": GOLDEN, "within_s": 20.0, "failure": lambda: None, **arguments}
        self.server.server.try_out(self.model, **values)

    def post(self, stream: bool = False) -> Any:
        body = {"model": "tiny", "prompt": "x", "max_tokens": 60, "stream": stream}
        return httpx.post(f"{self.server.url}/v1/completions", json=body, timeout=20)


@contextmanager
def staged(folder: Path, path: Path, **http: Any) -> Iterator[Stage]:
    told: list[str] = []
    hooks = Hooks(on_draining=lambda: told.append("draining"), on_drained=lambda: told.append("drained"))
    other = path.with_name("other.sock")
    with (
        fake_engine(path) as old,
        fake_engine(other) as new,
        running_server(folder, path, settings(**http), hooks=hooks) as server,
    ):
        wait_until(lambda: not server.service.why_not_ready())
        model = server.service.connect(
            manifest(), Texts(folder, [END]), other, name="tiny", version="2", digest="d2", hooks=Hooks()
        )
        yield Stage(server, old, new, model, told)


@pytest.fixture
def stage(folder: Path, socket_path: Path) -> Iterator[Stage]:
    with staged(folder, socket_path) as found:
        yield found


def in_thread(work: Any) -> tuple[threading.Thread, list[Any]]:
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(work()))
    thread.start()
    return thread, found


def test_a_stream_keeps_its_model_and_what_comes_after_the_switch_gets_the_new_one(stage: Stage) -> None:
    stage.say(stage.old, "the old text", free=False, first=3)
    streaming, answers = in_thread(lambda: stage.post(stream=True))
    (submitted,) = stage.old.wait_for(Submit)

    stage.try_out()
    stage.say(stage.new, "the new text")
    before = stage.server.server.switch(stage.model)
    retiring, cut = in_thread(lambda: stage.server.server.retire(before, lambda: None))
    assert stage.post().json()["choices"][0]["text"] == "the new text"
    assert len(stage.old.wait_for(Submit)) == 1
    assert retiring.is_alive(), "the old engine is not given up while it answers"
    stage.old.release(60)
    streaming.join(20)
    retiring.join(20)

    (answer,) = answers
    parts = [line for line in answer.text.splitlines() if '"text":"' in line]
    text = "".join(part.split('"text":"')[1].split('"')[0] for part in parts)
    assert (text, answer.text.endswith("data: [DONE]\n\n")) == ("the old text", True)
    assert f'"id":"{submitted.id}"' in parts[-1]
    assert cut == [0]
    assert stage.old.wait_for(Drain)
    assert stage.told == ["draining", "drained"]
    health = httpx.get(f"{stage.server.url}/healthz").json()
    assert (health["version"], health["digests"], health["status"]) == ("2", {"bundle": "d2"}, "ok")
    metrics = httpx.get(f"{stage.server.url}/metrics").text
    assert 'trunkline_request_success_total{finished_reason="stop"} 2.0' in metrics, (
        "golden ones do not count"
    )


def test_what_outlasts_the_drain_ends_with_an_error_and_never_with_another_models_text(
    folder: Path, socket_path: Path
) -> None:
    with staged(folder, socket_path, drain_timeout_s=0.2) as stage:
        stage.say(stage.old, "the old text", free=False, first=3)
        streaming, answers = in_thread(lambda: stage.post(stream=True))
        stage.old.wait_for(Submit)
        stage.try_out()
        before = stage.server.server.switch(stage.model)
        assert stage.server.server.retire(before, lambda: None) == 1
        streaming.join(20)
        assert "model_replaced" in answers[0].text
        assert not [message for message in stage.new.wait_for(Submit) if not message.id.startswith("golden-")]


@pytest.mark.parametrize(
    ("script", "arguments", "kind", "words"),
    [
        ({"reply": (5, 7, END)}, {}, GateFailed, "golden prompt one: token 1 "),
        ({"reply": (5,), "reason": "stop"}, {}, GateFailed, "golden prompt one: token 1 "),
        ({"reason": "error", "code": "numeric_error"}, {}, ResourceError, "golden prompts: as scripted"),
        ({"heartbeat": {"state": "loading"}}, {"within_s": 0.1}, ResourceError, "not ready within 0.1 s"),
        ({"accept": False}, {"within_s": 0.3}, ResourceError, "did not continue the golden prompts"),
        ({"silent": True}, {"failure": lambda: DataError("damaged")}, DataError, "damaged"),
    ],
)
def test_a_model_that_is_not_sound_changes_nothing(
    stage: Stage, script: dict[str, Any], arguments: dict[str, Any], kind: type[Exception], words: str
) -> None:
    stage.say(stage.old, "the old text")
    values = {"prompts": GOLDEN, "within_s": 20.0, "failure": lambda: None, **arguments}
    stage.new.script.reply = (5, 6, END)
    for name, value in script.items():
        setattr(stage.new.script, name, value)
    with pytest.raises(kind, match=words):
        stage.server.server.try_out(stage.model, **values)
    assert stage.post().json()["choices"][0]["text"] == "the old text"
    assert httpx.get(f"{stage.server.url}/healthz").json()["version"] == ""


def test_a_server_that_stops_gives_up_what_it_tries_out(stage: Stage) -> None:
    stage.new.script.heartbeat = {"state": "loading"}

    def try_out() -> str:
        try:
            stage.try_out()
        except ResourceError as error:
            return str(error)
        return ""

    trying, said = in_thread(try_out)
    wait_until(lambda: stage.new.connections == 1)
    stage.server.server.drain()
    trying.join(20)
    assert said == ["the server stops"]
