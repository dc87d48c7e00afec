"""A server follows its alias: no request is lost, a bad version changes nothing, the reason is shown."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from fastapi.testclient import TestClient
from releases import MAX_PIXELS, make_releases, settings_of
from serving_workspace import Exported

from flows.following import Follower, Target, following
from flows.serving.vision.app import create_app
from flows.serving.vision.model import Release, load_model, top_class
from flows.serving.vision.service import Limits, VisionService
from flows.serving.vision.uploads import prepare_image


@pytest.fixture(scope="module")
def releases(exported: Exported, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Release]:
    return make_releases(exported, tmp_path_factory.mktemp("releases"))


class Held:
    """Keeps a batch in the network until the gate opens."""

    def __init__(self, run: Any, entered: threading.Event, gate: threading.Event) -> None:
        self.run, self.entered, self.gate = run, entered, gate

    def __call__(self, images: np.ndarray) -> Any:
        self.entered.set()
        assert self.gate.wait(60)
        return self.run(images)


class Registry:
    """Where the alias points; what can go wrong on the way."""

    def __init__(self, releases: dict[str, Release]) -> None:
        self.releases = releases
        self.version: str | None = "1"
        self.error: Exception | None = None
        self.fetched: list[str] = []

    def look(self) -> Target | None:
        if self.error:
            raise self.error
        return self.target(self.version) if self.version else None

    def target(self, version: str) -> Target:
        return Target(version, self.releases[version].digest or "")

    def fetch(self, target: Target) -> Release:
        self.fetched.append(target.version)
        return self.releases[target.version]


@pytest.fixture
def alias(releases: dict[str, Release]) -> Registry:
    return Registry(releases)


@pytest.fixture
def client(exported: Exported, alias: Registry) -> Iterator[TestClient]:
    settings = settings_of(exported)
    # the application alone holds the model: one test sees to it that it lets go
    app = create_app(load_model(alias.releases["1"], settings, MAX_PIXELS), Limits.of(settings, MAX_PIXELS))
    with TestClient(app) as client:
        yield client


def service_of(client: TestClient) -> VisionService:
    service = client.app.state.service  # type: ignore[attr-defined]
    assert isinstance(service, VisionService)
    return service


def follower_of(client: TestClient, alias: Registry, exported: Exported, **changes: Any) -> Follower:
    settings = settings_of(exported, **changes)
    return Follower(service_of(client), settings, alias.look, alias.fetch, alias.target("1"))


def test_traffic_sees_every_version_and_no_failure(
    client: TestClient, alias: Registry, exported: Exported, wait_until: Callable[[Callable[[], bool]], None]
) -> None:
    """1 → 2 → 1 → a broken one, under steady load; each answer is that of the version it names."""
    expected = {}
    for version in ("1", "2"):
        model = load_model(alias.releases[version], settings_of(exported), MAX_PIXELS)
        image = prepare_image(exported.encoded[0], model.manifest.preprocessing, MAX_PIXELS)
        expected[version] = (model.digest, top_class(model.run(image[None])["logits"][0])[0])
    assert expected["1"][1] != expected["2"][1]

    answers: list[tuple[int, str, str, int]] = []
    stop = threading.Event()

    def ask() -> None:
        while not stop.is_set():
            answer = client.post("/v1/classify", content=exported.encoded[0])
            body = answer.json()
            answers.append(
                (
                    answer.status_code,
                    answer.headers["X-Model-Version"],
                    body["model"]["digest"],
                    body["index"],
                )
            )

    def seen(version: str) -> Callable[[], bool]:
        return lambda: bool(answers) and answers[-1][1] == version

    threads = [threading.Thread(target=ask) for _ in range(3)]
    with following(follower_of(client, alias, exported), 0.01):
        for thread in threads:
            thread.start()
        try:
            wait_until(seen("1"))
            for version in ("2", "1"):
                alias.version = version
                wait_until(seen(version))
            alias.version = "damaged"
            wait_until(lambda: service_of(client).rollout.state == "failed")
            count = len(answers)
            wait_until(lambda: len(answers) > count + 10)
        finally:
            stop.set()
            for thread in threads:
                thread.join()
    assert {status for status, *_ in answers} == {200}
    assert {version for _, version, _, _ in answers} == {"1", "2"}
    for _, version, digest, index in answers:
        assert (digest, index) == expected[version]
    assert answers[-1][1] == "1"
    assert service_of(client).in_flight == 0


@pytest.mark.parametrize(
    ("version", "reason"),
    [
        ("damaged", "was changed after its export"),
        ("other digest", "as recorded"),
        ("golden mismatch", "4 of 4 golden requests are answered otherwise"),
    ],
)
def test_a_bad_version_changes_nothing_and_says_why(
    client: TestClient,
    alias: Registry,
    exported: Exported,
    caplog: pytest.LogCaptureFixture,
    version: str,
    reason: str,
) -> None:
    follower = follower_of(client, alias, exported, retry_s=1e6)
    before = client.get("/healthz").json()
    assert (before["rollout"]["candidate"], before["rollout"]["state"]) == (None, "current")
    alias.version = version
    for _ in range(3):
        follower.step()
    health = client.get("/healthz").json()
    assert (health["version"], health["digest"]) == (before["version"], before["digest"])
    assert (health["rollout"]["candidate"], health["rollout"]["state"]) == (version, "failed")
    assert reason in health["rollout"]["reason"]
    assert alias.fetched == [version], "not tried again at once"
    assert len(caplog.messages) == 1
    assert reason in caplog.messages[0]
    assert 'trunkline_switches_total{result="failed"} 1.0' in client.get("/metrics").text
    alias.version = "2"  # the repaired one
    follower.step()
    assert client.get("/healthz").json()["version"] == "2"
    assert client.get("/healthz").json()["rollout"]["state"] == "current"


def test_a_failed_version_is_tried_again_later_and_later(
    client: TestClient, alias: Registry, exported: Exported, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [1000.0]
    monkeypatch.setattr("flows.following.time.monotonic", lambda: now[0])
    follower = follower_of(client, alias, exported, retry_s=10.0)
    alias.version = "damaged"
    tried_at = []
    for second in range(160):
        now[0] = 1000.0 + second
        before = len(alias.fetched)
        follower.step()
        if len(alias.fetched) > before:
            tried_at.append(second)
    assert tried_at == [0, 10, 30, 70, 150]


def test_memory_that_runs_out_keeps_the_old_version(
    client: TestClient, alias: Registry, exported: Exported, monkeypatch: pytest.MonkeyPatch
) -> None:
    def exhausted(*arguments: object) -> None:
        raise MemoryError

    monkeypatch.setattr("flows.serving.vision.model.open_session", exhausted)
    alias.version = "2"
    follower_of(client, alias, exported).step()
    assert service_of(client).rollout.reason == "MemoryError: MemoryError"
    assert client.post("/v1/classify", content=exported.encoded[0]).headers["X-Model-Version"] == "1"


def test_an_unreachable_registry_is_counted_and_got_over(
    client: TestClient, alias: Registry, exported: Exported, caplog: pytest.LogCaptureFixture
) -> None:
    follower = follower_of(client, alias, exported)
    alias.error = ConnectionError("connection refused")
    for _ in range(3):
        follower.step()
    rollout = client.get("/healthz").json()["rollout"]
    assert (rollout["state"], len(caplog.messages)) == ("unreachable", 1)
    assert "connection refused" in rollout["reason"]
    assert "trunkline_registry_errors_total 3.0" in client.get("/metrics").text
    alias.error, alias.version = None, None
    follower.step()
    assert service_of(client).rollout.state == "missing"
    alias.version = "1"
    follower.step()
    assert service_of(client).rollout.state == "current"


def test_the_old_session_is_released_and_requests_in_flight_finish_on_it(
    client: TestClient, alias: Registry, exported: Exported, monkeypatch: pytest.MonkeyPatch
) -> None:
    service = service_of(client)
    old, gate, entered = service.model, threading.Event(), threading.Event()
    monkeypatch.setattr(old.session, "run_all", Held(old.session.run_all, entered, gate))
    answers: list[Any] = []
    thread = threading.Thread(
        target=lambda: answers.append(client.post("/v1/classify", content=exported.encoded[0]))
    )
    thread.start()
    assert entered.wait(60)
    alias.version = "2"
    follower_of(client, alias, exported).step()
    assert client.get("/healthz").json()["version"] == "2"
    gate.set()
    thread.join()
    assert answers[0].json()["model"]["version"] == "1"
    assert answers[0].headers["X-Model-Version"] == "1"
    monkeypatch.undo()
    session = weakref.ref(old.session)
    del old
    client.post("/v1/classify", content=exported.encoded[0])
    gc.collect()
    assert session() is None


def test_metrics_name_the_version_in_use(client: TestClient, alias: Registry, exported: Exported) -> None:
    alias.version = "2"
    follower_of(client, alias, exported).step()
    text = client.get("/metrics").text
    (info,) = [line for line in text.splitlines() if line.startswith("trunkline_model_info{")]
    assert 'version="2"' in info
    assert 'trunkline_switches_total{result="switched"} 1.0' in text
