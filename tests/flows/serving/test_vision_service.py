"""Load, deadlines, clients that go away, the drain, and what is counted and logged about it all."""

from __future__ import annotations

import json
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import anyio
import httpx
import numpy as np
import pytest
import uvicorn
from fastapi import FastAPI
from fastapi.testclient import TestClient
from served_digits import LIMITS, loaded
from serving_workspace import Exported

from flows.serving import listening
from flows.serving.session import Session
from flows.serving.vision import server
from flows.serving.vision.access_log import AccessLog
from flows.serving.vision.app import create_app
from flows.serving.vision.observing import CAPACITY, BatchInfo, Observer
from flows.serving.vision.service import VisionService

CLASSIFY = "/v1/classify"
WaitUntil = Callable[[Callable[[], bool]], None]


class Gate:
    """Holds the network while it is closed."""

    def __init__(self, session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
        self.entered, self._open = threading.Event(), threading.Event()
        run = session.run_all

        def held(images: np.ndarray) -> dict[str, np.ndarray]:
            self.entered.set()
            assert self._open.wait(60)
            return run(images)

        monkeypatch.setattr(session, "run_all", held)

    def open(self) -> None:
        self._open.set()


@pytest.fixture
def gate(session: Session, monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    gate = Gate(session, monkeypatch)
    yield gate
    gate.open()


@contextmanager
def client_of(
    exported: Exported, session: Session, **limits: Any
) -> Iterator[tuple[TestClient, VisionService]]:
    app = create_app(loaded(exported, session), replace(LIMITS, **limits))
    with TestClient(app) as client:
        yield client, app.state.service


def metric(client: TestClient, line: str) -> float:
    """Value of the series `line`, as in the text format."""
    (value,) = [
        text.rpartition(" ")[2]
        for text in client.get("/metrics").text.splitlines()
        if text.rpartition(" ")[0] == line
    ]
    return float(value)


# ---- the queue ----


def test_a_full_queue_is_429_with_retry_after_and_loses_nobody(
    exported: Exported, session: Session, gate: Gate, wait_until: WaitUntil
) -> None:
    with client_of(exported, session, queue_images=2) as (client, service), ThreadPoolExecutor(3) as pool:
        ask = lambda: client.post(CLASSIFY, content=exported.encoded[0])  # noqa: E731
        running = pool.submit(ask)
        assert gate.entered.wait(60)
        waiting = [pool.submit(ask) for _ in range(2)]
        wait_until(lambda: service.batcher.queued_images == 2)
        assert metric(client, "trunkline_queue_images") == 2
        refused = ask()
        assert refused.status_code == 429
        assert "no room for 1 images, 2 are waiting" in refused.json()["error"]
        assert 1 <= int(refused.headers["Retry-After"]) <= 60
        gate.open()
        assert [future.result().status_code for future in (running, *waiting)] == [200] * 3
        assert metric(client, 'trunkline_rejected_total{reason="queue_full"}') == 1
        assert metric(client, "trunkline_batch_images_count") == 2  # one alone, then two together
        assert metric(client, "trunkline_batch_images_sum") == 3
        assert (service.in_flight, service.batcher.approaching) == (0, 0)


# ---- deadlines ----


def test_work_past_its_deadline_is_504_and_never_computed(
    exported: Exported, session: Session, gate: Gate, wait_until: WaitUntil
) -> None:
    with client_of(exported, session) as (client, service), ThreadPoolExecutor(2) as pool:
        running = pool.submit(client.post, CLASSIFY, content=exported.encoded[0])
        assert gate.entered.wait(60)
        late = client.post(CLASSIFY, content=exported.encoded[0], headers={"X-Request-Timeout-Ms": "50"})
        assert (late.status_code, late.json()) == (504, {"error": "the deadline of 50 ms passed"})
        assert service.batcher.queued_images == 0
        gate.open()
        assert running.result().status_code == 200
        assert metric(client, "trunkline_batch_images_sum") == 1
        assert metric(client, "trunkline_expired_total") == 1


def test_deadlines_have_a_default_and_a_maximum(exported: Exported, session: Session, gate: Gate) -> None:
    with client_of(exported, session, timeout_s=0.05, max_timeout_s=0.1) as (client, _):
        assert "of 50 ms" in client.post(CLASSIFY, content=exported.encoded[0]).json()["error"]
        long = client.post(CLASSIFY, content=exported.encoded[0], headers={"X-Request-Timeout-Ms": "999999"})
        assert "of 100 ms" in long.json()["error"]


@pytest.mark.parametrize("value", ["0", "-1", "nan", "inf", "soon", ""])
def test_a_wrong_deadline_is_refused(exported: Exported, session: Session, value: str) -> None:
    with client_of(exported, session) as (client, _):
        answer = client.post(CLASSIFY, content=exported.encoded[0], headers={"X-Request-Timeout-Ms": value})
        assert answer.status_code == 400
        assert "X-Request-Timeout-Ms" in answer.json()["error"]


# ---- clients that go away ----


def test_queued_work_of_a_vanished_client_is_dropped(
    exported: Exported, session: Session, gate: Gate, tmp_path: Path
) -> None:
    log = AccessLog(str(tmp_path / "access.log"), 10**6, 1)
    app = create_app(loaded(exported, session), LIMITS, access_log=log)
    service: VisionService = app.state.service

    async def scenario() -> None:
        async with anyio.create_task_group() as group:
            first = anyio.Event()
            group.start_soon(ask, app, exported.encoded[0], first)  # stays, and holds the network
            await anyio.to_thread.run_sync(gate.entered.wait, 60)
            gone = anyio.Event()
            group.start_soon(ask, app, exported.encoded[1], gone)
            with anyio.fail_after(60):
                while service.batcher.queued_images != 1:
                    await anyio.sleep(0.01)
                gone.set()
                while service.batcher.queued_images != 0:
                    await anyio.sleep(0.01)
            gate.open()

    anyio.run(scenario)
    assert service.metrics.registry.get_sample_value("trunkline_cancelled_total") == 1
    assert service.metrics.registry.get_sample_value("trunkline_batch_images_sum") == 1
    assert service.in_flight == 0
    service.close()
    lines = [json.loads(line) for line in (tmp_path / "access.log").read_text().splitlines()]
    assert sorted(line["status"] for line in lines) == [200, 499]


async def ask(app: FastAPI, body: bytes, gone: anyio.Event) -> None:
    """One request as a server hands it over; the client leaves when `gone` is set."""
    messages = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive() -> dict[str, Any]:
        if messages:
            return messages.pop()
        await gone.wait()
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        pass

    scope = {
        "type": "http",
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": CLASSIFY,
        "query_string": b"",
        "root_path": "",
        "headers": [],
        "client": ("203.0.113.9", 1),
        "server": ("127.0.0.1", 80),
        "app": app,
    }
    await app(scope, receive, send)


# ---- the drain ----


def test_a_drain_answers_what_was_admitted_and_refuses_the_rest(
    exported: Exported, session: Session, gate: Gate, wait_until: WaitUntil
) -> None:
    app = create_app(loaded(exported, session), LIMITS)
    with (
        running_server(app, drain_s=60.0) as (process, thread, address),
        httpx.Client(base_url=address) as client,
    ):
        answers: list[httpx.Response] = []
        post = lambda: answers.append(httpx.post(address + CLASSIFY, content=exported.encoded[0], timeout=60))  # noqa: E731
        asking = [threading.Thread(target=post) for _ in range(2)]
        asking[0].start()
        assert gate.entered.wait(60)
        asking[1].start()  # waits in the queue
        wait_until(lambda: app.state.service.batcher.queued_images == 1)
        process.handle_exit(signal.SIGTERM, None)
        ready = client.get("/v2/health/ready")
        assert (ready.status_code, ready.headers["Connection"]) == (503, "close")
        assert client.get("/v2/health/live").status_code == 200
        refused = client.post(CLASSIFY, content=exported.encoded[0])
        assert (refused.status_code, refused.headers["Connection"]) == (503, "close")
        assert thread.is_alive()
        gate.open()
        for each in asking:
            each.join()
        thread.join(60)
        assert not thread.is_alive()
    assert [answer.status_code for answer in answers] == [200, 200]


def test_a_drain_has_an_end(exported: Exported, session: Session, gate: Gate, wait_until: WaitUntil) -> None:
    """The network hangs: what waits is told so, and the server ends."""
    app = create_app(loaded(exported, session), LIMITS)
    with running_server(app, drain_s=0.1) as (process, thread, address), ThreadPoolExecutor(2) as pool:
        ask = lambda: httpx.post(address + CLASSIFY, content=exported.encoded[0], timeout=60)  # noqa: E731
        hanging = pool.submit(ask)
        assert gate.entered.wait(60)
        waiting = pool.submit(ask)
        wait_until(lambda: app.state.service.batcher.queued_images == 1)
        process.handle_exit(signal.SIGTERM, None)
        assert waiting.result().status_code == 503
        thread.join(60)
        assert not thread.is_alive()
        gate.open()
        hanging.exception(60)


@contextmanager
def running_server(app: FastAPI, drain_s: float) -> Iterator[tuple[server._Server, threading.Thread, str]]:
    with listening.listening_socket("127.0.0.1", 0, "serve") as listener:
        config = uvicorn.Config(app, log_level="critical", access_log=False, timeout_graceful_shutdown=1)
        process = server._Server(config, app.state.service, drain_s)
        thread = threading.Thread(target=process.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            yield process, thread, listening.server_url(listener)
        finally:
            process.should_exit = True
            thread.join(60)


# ---- what is said about requests ----


def test_request_ids_are_taken_over_or_made(exported: Exported, session: Session) -> None:
    with client_of(exported, session) as (client, _):
        assert client.get("/v2", headers={"X-Request-Id": "abc-1"}).headers["X-Request-Id"] == "abc-1"
        for unfit in ("two words", "x" * 200, ""):
            made = client.get("/v2", headers={"X-Request-Id": unfit}).headers["X-Request-Id"]
            assert len(made) == 32
        refused = client.post(CLASSIFY, content=b"", headers={"X-Request-Id": "abc-2"})
        assert (refused.status_code, refused.headers["X-Request-Id"]) == (422, "abc-2")
        assert refused.headers["X-Model-Version"] == "3"


def test_the_access_log_has_one_line_per_request_and_no_payload(
    exported: Exported, session: Session, tmp_path: Path
) -> None:
    path = tmp_path / "logs" / "access.log"
    log = AccessLog(str(path), 10**6, 1)
    with TestClient(create_app(loaded(exported, session), LIMITS, access_log=log)) as client:
        answer = client.post(CLASSIFY, content=exported.encoded[0], headers={"X-Request-Id": "id-7"})
        client.post("/v2/models/digits/infer", content=b'{"secret": "payload"}')
        client.get("/nowhere/secret?token=payload")
    first, second, third = [json.loads(line) for line in path.read_text().splitlines()]
    assert first["request_id"] == "id-7"
    assert (first["method"], first["route"], first["status"]) == ("POST", CLASSIFY, 200)
    assert (first["bytes"], first["batch_size"]) == (len(answer.content), 1)
    assert (first["model_version"], first["digest"]) == ("3", loaded(exported, session).digest[:12])
    assert first["total_ms"] >= first["queue_ms"] + first["compute_ms"] > 0
    assert (second["status"], second["route"]) == (400, "/v2/models/{name}/infer")
    assert (third["status"], third["route"]) == (404, "other")
    assert "payload" not in path.read_text()


def test_the_access_log_rotates_and_a_broken_one_stops_nothing(
    exported: Exported, session: Session, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "access.log"
    log = AccessLog(str(path), 2000, 2)
    with TestClient(create_app(loaded(exported, session), LIMITS, access_log=log)) as client:
        for _ in range(40):
            client.get("/v2")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == [
        "access.log",
        "access.log.1",
        "access.log.2",
    ]
    assert all(entry.stat().st_size <= 2000 for entry in tmp_path.iterdir())

    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("no /dev/full here")
    log = AccessLog(str(full), 0, 0)
    with TestClient(create_app(loaded(exported, session), LIMITS, access_log=log)) as client:
        assert [client.get("/v2").status_code for _ in range(3)] == [200] * 3
    assert log.dropped == 3
    assert caplog.text.count("the access log cannot be written") == 1


def test_metrics_have_routes_not_paths_and_the_model(exported: Exported, session: Session) -> None:
    with client_of(exported, session) as (client, _):
        client.post(CLASSIFY, content=exported.encoded[0])
        client.post(CLASSIFY, content=b"nonsense")
        for index in range(3):
            client.get(f"/invented/{index}")
        assert metric(client, 'trunkline_requests_total{route="/v1/classify",status="200"}') == 1
        assert metric(client, 'trunkline_requests_total{route="/v1/classify",status="415"}') == 1
        assert metric(client, 'trunkline_requests_total{route="other",status="404"}') == 3
        assert metric(client, "trunkline_queue_seconds_count") == 1
        text = client.get("/metrics").text
        assert "process_resident_memory_bytes" in text
        (info,) = [line for line in text.splitlines() if line.startswith("trunkline_model_info{")]
        for part in ('name="digits"', 'version="3"', 'variant="fp32"', 'provider="CPUExecutionProvider"'):
            assert part in info
    with client_of(exported, session) as (client, _):  # nothing is shared between applications
        assert CLASSIFY not in client.get("/metrics").text


# ---- the listener ----


def test_on_batch_sees_what_was_served(exported: Exported, session: Session) -> None:
    seen: list[tuple[np.ndarray, dict[str, np.ndarray], BatchInfo]] = []

    def listen(images: np.ndarray, outputs: dict[str, np.ndarray], info: BatchInfo) -> None:
        seen.append((images, outputs, info))
        raise RuntimeError("never reaches a request")

    with TestClient(create_app(loaded(exported, session), LIMITS, on_batch=listen)) as client:
        body = {"name": "images", "shape": [2, 3, 16, 16], "datatype": "FP32"}
        data = exported.images[:2].ravel().tolist()
        answer = client.post("/v2/models/digits/infer", json={"inputs": [body | {"data": data}]})
    ((images, outputs, info),) = seen
    np.testing.assert_array_equal(images, exported.images[:2])
    served = np.asarray(answer.json()["outputs"][0]["data"], dtype=np.float32)
    np.testing.assert_array_equal(outputs["logits"].ravel(), served)
    assert outputs["features"].shape[0] == 2
    assert (info.name, info.version, info.variant) == ("digits", "3", "fp32")


def test_a_listener_that_is_behind_loses_batches_and_delays_nothing() -> None:
    opened, entered = threading.Event(), threading.Event()
    seen = []

    def listen(images: np.ndarray, outputs: dict[str, np.ndarray], info: BatchInfo) -> None:
        entered.set()
        assert opened.wait(60)
        seen.append(info.time)

    observer = Observer(listen)
    for number in range(CAPACITY + 4):
        observer.offer(np.zeros(1, np.float32), {}, BatchInfo("m", "1", "d", "fp32", number))
        if number == 0:
            assert entered.wait(60)
    assert observer.dropped == 3
    opened.set()
    observer.close(60)
    assert seen == list(range(CAPACITY + 1))
