"""Around the answers: health, metrics, limits, keys, ids, and the end of the process."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import httpx
import pytest
from fake_engine import FakeEngine
from prometheus_client.parser import text_string_to_metric_families
from served_texts import Running, http, running_server, settings, wait_until, with_settings

from flows.errors import ConfigError, DataError, ResourceError
from flows.serving.lamina.api.gateway import read_api_key
from flows.serving.lamina.api.hooks import Hooks
from flows.serving.lamina.api.metrics import Metrics
from flows.serving.lamina.requests import Cancel, Drain, Heartbeat, Submit, WorkerLost, WorkersMoved

ASKED = {"model": "tiny", "prompt": "x", "max_tokens": 400}
TEXT = "A quick brown fox"


def post(server: Running, body: Any = ASKED, path: str = "/v1/completions", **extra: Any) -> httpx.Response:
    return http.post(f"{server.url}{path}", json=body, **extra)


def get(server: Running, path: str) -> httpx.Response:
    return http.get(f"{server.url}{path}")


def error_of(answer: httpx.Response, status: int) -> dict[str, Any]:
    assert answer.status_code == status, answer.text
    error: dict[str, Any] = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error


# ---- limits


def test_bodies_that_are_no_requests_get_one_clear_error(
    folder: Path, engine: FakeEngine, socket_path: Path
) -> None:
    small = with_settings(settings(), {"http": {"max_body_kb": 1}})
    with running_server(folder, socket_path, small) as server:
        url = f"{server.url}/v1/completions"
        json_type = {"Content-Type": "application/json"}
        assert "JSON" in error_of(http.post(url, content=b"{", headers=json_type), 400)["message"]
        assert "UTF-8" in error_of(http.post(url, content=b'"\xff"', headers=json_type), 400)["message"]
        assert "1024 bytes" in error_of(post(server, {**ASKED, "prompt": "x" * 2000}), 413)["message"]
        assert "application/json" in error_of(http.post(url, content=b"{}"), 415)["message"]
        zipped = {**json_type, "Content-Encoding": "gzip"}
        assert "gzip" in error_of(http.post(url, content=b"{}", headers=zipped), 415)["message"]
        error_of(http.get(url), 405)
        error_of(get(server, "/v1/embeddings"), 404)
        engine.script.reply = server.ids(TEXT)
        assert post(server).json()["choices"][0]["text"] == TEXT  # it goes on


def test_tokens_outside_of_the_vocabulary_are_refused(server: Running) -> None:
    assert "300" in error_of(post(server, {**ASKED, "prompt": [1, 300]}), 400)["message"]
    assert error_of(post(server, {**ASKED, "prompt": ""}), 400)["param"] == "prompt"
    assert error_of(post(server, {**ASKED, "prompt": []}), 400)["param"] == "prompt"


def test_more_streams_than_allowed_are_turned_away(
    folder: Path, engine: FakeEngine, socket_path: Path
) -> None:
    small = with_settings(settings(), {"http": {"max_streams": 1}})
    with running_server(folder, socket_path, small) as server:
        engine.script.reply, engine.script.free = server.ids(TEXT), False
        first: list[httpx.Response] = []
        thread = threading.Thread(target=lambda: first.append(post(server)))
        thread.start()
        engine.wait_for(Submit)
        answer = post(server)
        assert error_of(answer, 429)["code"] == "too_many_streams"
        assert int(answer.headers["retry-after"]) >= 1
        assert get(server, "/livez").status_code == 200
        engine.release(100)
        thread.join()
        assert first[0].json()["choices"][0]["text"] == TEXT


@pytest.mark.parametrize(
    ("sent", "echoed"),
    [("my-id/7", True), ("x" * 128, True), ("x" * 129, False), ("a b", False), ("", False)],
)
def test_fit_request_ids_are_echoed(server: Running, engine: FakeEngine, sent: str, echoed: bool) -> None:
    engine.script.reply = server.ids(TEXT)
    for answer in (
        post(server, headers={"X-Request-Id": sent}),
        post(server, {}, headers={"X-Request-Id": sent}),
    ):
        assert (answer.headers["x-request-id"] == sent) == echoed
        assert answer.headers["x-request-id"]
    assert all(sent != name for name in engine.requests)  # a client may send the same one twice


def test_the_key_guards_v1_only(folder: Path, engine: FakeEngine, socket_path: Path) -> None:
    with running_server(folder, socket_path, key="k") as server:
        for path in ("/livez", "/health", "/metrics", "/v2/health/live", "/version"):
            assert get(server, path).status_code in (200, 503)
        answer = get(server, "/v1/models")
        assert error_of(answer, 401)["code"] == "invalid_api_key"
        assert answer.headers["www-authenticate"] == "Bearer"
        for value in ("Bearer k", "bearer k"):
            assert http.get(f"{server.url}/v1/models", headers={"Authorization": value}).status_code == 200
        for value in ("k", "Basic k", "Bearer", "Bearer kk", "Bearer \xff"):
            answer = http.get(
                f"{server.url}/v1/models", headers=[(b"Authorization", value.encode("latin-1"))]
            )
            assert answer.status_code == 401


def test_a_key_file_has_to_hold_a_key(tmp_path: Path) -> None:
    path = tmp_path / "key"
    with pytest.raises(ConfigError, match="cannot be read"):
        read_api_key(str(path))
    for content in (b"", b"\n", b"two keys", b"\xff\xfe"):
        path.write_bytes(content)
        with pytest.raises(ConfigError, match="api_key_file"):
            read_api_key(str(path))
    path.write_text("sk-1\n")
    assert read_api_key(str(path)) is not None
    assert read_api_key("") is None


# ---- health


def test_health_says_what_is_wrong(folder: Path, engine: FakeEngine, socket_path: Path) -> None:
    replacing: list[int] = []
    hooks = Hooks(is_replacing=lambda: bool(replacing))
    with running_server(folder, socket_path, hooks=hooks) as server:

        def verdict(path: str, status: int) -> list[str]:
            wait_until(lambda: get(server, path).status_code == status)
            reasons: list[str] = get(server, path).json()["reasons"]
            return reasons

        assert verdict("/readyz", 200) == verdict("/health", 200) == []
        assert get(server, "/v2/health/ready").json()["ready"] is True
        assert get(server, "/v2/models/tiny/ready").json() == {"name": "tiny", "ready": True}

        engine.script.heartbeat = {"running": 2, "since_progress_s": 11.0}  # stall_s is 10
        assert "none has progressed for 11.0 s" in verdict("/health", 503)[0]
        assert verdict("/readyz", 200) == []
        engine.script.heartbeat = {"waiting": 9, "since_progress_s": 11.0}  # a full queue is no illness
        verdict("/health", 200)

        engine.script.heartbeat = {"workers_up": (True, False), "reasons": ("attention worker 1 is missing",)}
        assert verdict("/health", 503) == ["attention worker 1 is missing and not being replaced"]
        assert verdict("/readyz", 503) == ["attention worker 1 is missing"]
        replacing.append(1)
        verdict("/health", 200)
        replacing.clear()
        engine.script.heartbeat = {"workers_up": (True, False), "state": "recovering"}
        verdict("/health", 200)
        assert verdict("/readyz", 503) == ["the engine is recovering"]

        engine.kill()
        assert verdict("/health", 503) == verdict("/readyz", 503) == ["the engine is not there"]
        assert get(server, "/v2/models/tiny/ready").status_code == 503
        assert get(server, "/livez").status_code == get(server, "/v2/health/live").status_code == 200
        replacing.append(1)
        verdict("/health", 200)


def test_the_supervisor_hears_of_lost_workers_and_of_a_silent_engine(
    folder: Path, engine: FakeEngine, socket_path: Path
) -> None:
    lost: list[tuple[Any, ...]] = []
    silent: list[int] = []
    hooks = Hooks(on_worker_lost=lambda *where: lost.append(where), on_silent=lambda: silent.append(1))
    with running_server(folder, socket_path, hooks=hooks) as server:
        wait_until(lambda: server.service.link.is_alive)
        engine.say(WorkerLost(host="127.0.0.1", port=4001, pid=77, reason="no answer"))
        wait_until(lambda: lost == [("127.0.0.1", 4001, 77, "no answer")])
        engine.script.silent = True
        wait_until(lambda: silent == [1] and not server.service.link.is_alive)
        engine.script.silent = False
        wait_until(lambda: server.service.link.is_alive)
        assert silent == [1]
        engine.script.silent = True
        wait_until(lambda: silent == [1, 1])
        engine.kill()
        engine.start()  # it accepts, and stays silent
        wait_until(lambda: silent == [1, 1, 1])


def test_the_engine_hears_of_workers_that_moved_and_so_does_the_next_one(
    server: Running, engine: FakeEngine
) -> None:
    moved = WorkersMoved(addresses=(("127.0.0.1", 4001), ("10.0.0.2", 4002)))
    server.server.tell(moved)
    assert engine.wait_for(WorkersMoved) == [moved]
    engine.kill()
    engine.start()
    assert engine.wait_for(WorkersMoved, 2) == [moved, moved]


def test_a_process_that_is_gone_is_not_called_silent(
    folder: Path, engine: FakeEngine, socket_path: Path
) -> None:
    silent: list[int] = []
    with running_server(folder, socket_path, hooks=Hooks(on_silent=lambda: silent.append(1))) as server:
        wait_until(lambda: server.service.link.is_alive)
        engine.kill()
        wait_until(lambda: not server.service.link.is_alive)
        threading.Event().wait(0.4)  # 10 heartbeats of 20 ms, and more
        assert not silent


def test_models_and_versions_are_described(server: Running) -> None:
    assert get(server, "/v1/models").json()["data"][0]["max_model_len"] == 512
    assert error_of(get(server, "/v1/models/other"), 404)["code"] == "model_not_found"
    assert get(server, "/v2/models/tiny").json()["platform"] == "trunkline_lamina"
    assert error_of(get(server, "/v2/models/other"), 404)
    assert get(server, "/v2").json()["name"] == "trunkline-lamina"
    assert get(server, "/version").json()["source_sha256"] == "ab" * 32


# ---- metrics


def families(text: str) -> dict[str, dict[tuple[str, ...], float]]:
    found: dict[str, dict[tuple[str, ...], float]] = {}
    for family in text_string_to_metric_families(text):
        assert family.name not in found, f"{family.name} comes twice"
        found[family.name] = {
            (sample.name, *(f"{key}={value}" for key, value in sorted(sample.labels.items()))): sample.value
            for sample in family.samples
        }
    return found


def test_metrics_have_both_names_and_no_request_ids(server: Running, engine: FakeEngine) -> None:
    engine.script.reply = server.ids(TEXT)
    engine.script.heartbeat = {
        "running": 3,
        "waiting": 2,
        "pages": 8,
        "pages_used": 2,
        "epoch": 5,
        "preemptions": 4,
    }
    engine.script.metrics = (
        "# HELP trunkline_epoch again\n# TYPE trunkline_epoch gauge\ntrunkline_epoch 99\n"
        "# HELP trunkline_recoveries_total x\n# TYPE trunkline_recoveries_total counter\n"
        'trunkline_recoveries_total{policy="recompute"} 2\n'
        "# TYPE process_open_fds gauge\nprocess_open_fds 1\n"
    )
    name = post(server, headers={"X-Request-Id": "the-request"}).json()["id"]
    wait_until(lambda: server.service.link.heartbeat and server.service.link.heartbeat.epoch == 5)
    text = get(server, "/metrics").text
    assert name not in text
    assert "the-request" not in text
    found = families(text)
    count = len(engine.script.reply)
    model = "model_name=tiny"
    assert found["trunkline_generation_tokens"][("trunkline_generation_tokens_total",)] == count
    assert found["vllm:generation_tokens"][("vllm:generation_tokens_total", model)] == count
    success = found["vllm:request_success"]
    assert success[("vllm:request_success_total", "finished_reason=stop", model)] == 1
    assert ("vllm:request_success_total", "finished_reason=abort", model) in success
    for histogram, total in (
        ("time_to_first_token_seconds", 1), ("inter_token_latency_seconds", count - 1),
        ("e2e_request_latency_seconds", 1), ("request_queue_time_seconds", 1),
        ("request_prompt_tokens", 1), ("request_params_max_tokens", 1),
    ):  # fmt: skip
        assert found[f"vllm:{histogram}"][(f"vllm:{histogram}_count", model)] == total
        assert found[f"trunkline_{histogram}"][(f"trunkline_{histogram}_count",)] == total
    assert found["vllm:request_queue_time_seconds"][("vllm:request_queue_time_seconds_sum", model)] == 0.25
    assert found["vllm:request_inference_time_seconds"][
        ("vllm:request_inference_time_seconds_sum", model)
    ] == pytest.approx(1.25)
    assert found["vllm:num_requests_running"][("vllm:num_requests_running", model)] == 3
    assert found["vllm:kv_cache_usage_perc"][("vllm:kv_cache_usage_perc", model)] == 0.25
    assert found["vllm:num_preemptions"][("vllm:num_preemptions_total", model)] == 4
    assert ("vllm:cache_config_info", "block_size=16", model, "num_gpu_blocks=8") in found[
        "vllm:cache_config_info"
    ]
    assert found["trunkline_epoch"] == {("trunkline_epoch",): 5}  # ours, not the engine's
    assert found["trunkline_recoveries"][("trunkline_recoveries_total", "policy=recompute")] == 2


def test_metrics_count_what_went_wrong(server: Running, engine: FakeEngine) -> None:
    engine.script.reply, engine.script.reason, engine.script.code = [], "error", "deadline_exceeded"
    engine.script.metrics = "no { metrics"  # a damaged text is left out
    assert post(server).status_code == 500
    engine.script.reason, engine.script.free, engine.script.reply = None, False, server.ids(TEXT)
    port = int(server.url.rsplit(":", 1)[1])
    body = json.dumps(ASKED).encode()
    with socket.create_connection(("127.0.0.1", port)) as client:
        head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n"
        client.sendall(head.encode() + b"Content-Type: application/json\r\n\r\n" + body)
        engine.wait_for(Submit, 2)
    engine.wait_for(Cancel)
    wait_until(lambda: server.service.link.open_calls == 0)
    found = families(get(server, "/metrics").text)
    assert found["trunkline_cancelled"][("trunkline_cancelled_total",)] == 1
    assert (
        found["trunkline_request_success"][("trunkline_request_success_total", "finished_reason=error")] == 1
    )
    statuses = found["trunkline_http_requests"]
    assert statuses[("trunkline_http_requests_total", "route=/v1/completions", "status=499")] == 1


def test_an_engine_that_is_busy_does_not_hold_up_the_metrics(
    server: Running, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    from flows.serving.lamina.api import engine_link

    engine.script.metrics = "# TYPE trunkline_x gauge\ntrunkline_x 1\n"
    assert "trunkline_x 1" in get(server, "/metrics").text
    engine.script.metrics = None  # it does not answer
    monkeypatch.setattr(engine_link, "METRICS_WAIT_S", 0.01)
    assert "trunkline_x 1" in get(server, "/metrics").text


def test_preemptions_go_on_counting_when_the_engine_begins_anew() -> None:
    metrics = Metrics("tiny", vllm_alias=True)
    for number in (4, 4, 6, 1, 1):
        metrics.beat(Heartbeat(state="ready", preemptions=number))
    assert families(metrics.render().decode())["trunkline_preemptions"][("trunkline_preemptions_total",)] == 7


def test_the_names_of_vllm_can_be_left_out(folder: Path, engine: FakeEngine, socket_path: Path) -> None:
    plain = with_settings(settings(), {"metrics": {"vllm_alias": False}})
    with running_server(folder, socket_path, plain) as server:
        assert "vllm:" not in get(server, "/metrics").text


def test_texts_are_never_logged(
    server: Running, engine: FakeEngine, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level("DEBUG")
    engine.script.reply = server.ids("very secret answer")
    post(server, {**ASKED, "prompt": "very secret question"})
    post(server, {**ASKED, "prompt": "very secret question", "stop": 5})
    out, err = capfd.readouterr()
    assert "secret" not in caplog.text + out + err


# ---- the end


def test_a_drain_lets_answers_end_and_refuses_new_ones(
    folder: Path, engine: FakeEngine, socket_path: Path
) -> None:
    told: list[str] = []
    hooks = Hooks(
        on_started=lambda running: told.append("started"),
        on_draining=lambda: told.append("draining"),
        on_drained=lambda: told.append("drained"),
    )
    with running_server(folder, socket_path, hooks=hooks) as server:
        engine.script.reply, engine.script.free, engine.script.first = server.ids(TEXT), False, 1
        answers: list[httpx.Response] = []
        thread = threading.Thread(target=lambda: answers.append(post(server, {**ASKED, "stream": True})))
        thread.start()
        engine.wait_for(Submit)
        server.server.drain()
        wait_until(lambda: "draining" in told)
        answer = post(server)
        assert error_of(answer, 503)["code"] == "draining"
        assert answer.headers["connection"] == "close"
        assert get(server, "/readyz").json()["reasons"] == ["the server is stopping"]
        engine.release(100)
        thread.join(20)
        server.thread.join(20)
        assert answers[0].text.rstrip().endswith("[DONE]")
        engine.wait_for(Drain)
        assert told == ["started", "draining", "drained"]


def test_a_drain_that_takes_too_long_tells_those_that_wait(
    folder: Path, engine: FakeEngine, socket_path: Path
) -> None:
    hurried = with_settings(settings(), {"http": {"drain_timeout_s": 0.05}})
    with running_server(folder, socket_path, hurried) as server:
        engine.script.reply, engine.script.free, engine.script.first = server.ids(TEXT), False, 1
        answers: list[httpx.Response] = []
        threads = [
            threading.Thread(target=lambda body=body: answers.append(post(server, body)))  # type: ignore[misc]
            for body in (ASKED, {**ASKED, "stream": True})
        ]
        for thread in threads:
            thread.start()
        engine.wait_for(Submit, 2)
        server.server.drain()
        for thread in threads:
            thread.join(20)
        whole, stream = sorted(answers, key=lambda answer: -answer.status_code)
        assert error_of(whole, 503)["code"] == "server_stopping"
        assert '"code":"server_stopping"' in stream.text
        engine.wait_for(Cancel, 2)
        engine.wait_for(Drain)


def test_a_failure_ends_the_server_with_its_error(
    folder: Path, engine: FakeEngine, socket_path: Path
) -> None:
    with running_server(folder, socket_path) as server:
        server.server.fail(DataError("the bundle is damaged"))
        server.thread.join(20)
        assert not server.thread.is_alive()
        assert isinstance(server.server.error, DataError)


SCRIPT = """
import sys
from pathlib import Path
sys.path[:0] = sys.argv[3:]
from served_texts import manifest, settings
from flows.serving.lamina.api.hooks import Hooks
from flows.serving.lamina.api.server import serve
from flows.serving.lamina.slices.bundle import Bundle
from flows.serving.listening import listening_socket, server_url
with listening_socket("127.0.0.1", 0, "lamina.http") as listener:
    hooks = Hooks(
        on_started=lambda running: print(server_url(listener), flush=True),
        on_draining=lambda: print("draining", flush=True),
        on_drained=lambda: print("drained", flush=True),
    )
    bundle = Bundle(Path(sys.argv[1]), manifest())
    serve(bundle, settings(), Path(sys.argv[2]), listener=listener, hooks=hooks)
print("returned", flush=True)
"""


@pytest.mark.parametrize("twice", [False, True])
def test_a_process_ends_by_sigterm(folder: Path, engine: FakeEngine, socket_path: Path, twice: bool) -> None:
    places = [str(Path(__file__).parent), str(Path(__file__).parents[5])]
    with subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(folder), str(socket_path), *places],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            assert process.stdout is not None
            url = process.stdout.readline().strip()
            engine.script.reply, engine.script.free, engine.script.first = [1] * 50, False, 1
            answers: list[httpx.Response] = []

            def ask() -> None:
                asked = {**ASKED, "stream": True}
                answers.append(http.post(f"{url}/v1/completions", json=asked))

            thread = threading.Thread(target=ask)
            thread.start()
            engine.wait_for(Submit)
            os.kill(process.pid, signal.SIGTERM)
            assert process.stdout.readline().strip() == "draining"
            if twice:
                os.kill(process.pid, signal.SIGTERM)
            else:
                engine.release(100)
            thread.join(20)
            out, err = process.communicate(timeout=20)
            assert out.split() == ["drained", "returned"]
            assert process.returncode == 0
            assert not err
            assert ("server_stopping" in answers[0].text) == twice
        finally:
            process.kill()


def test_a_port_that_is_taken_is_reported(folder: Path, socket_path: Path) -> None:
    from served_texts import manifest

    from flows.serving.lamina.api.server import serve
    from flows.serving.lamina.slices.bundle import Bundle

    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ResourceError, match=rf"port {port} .* in use.*lamina\.http\.port"):
            serve(Bundle(folder, manifest()), settings(port=port), socket_path)
