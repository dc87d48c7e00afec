"""The flow that watches a rollout, against real server processes that follow a real registry."""

from __future__ import annotations

import logging
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from releases import make_releases
from serving_workspace import ROOT, Exported, write_params

from flows import registry, rollout, serve, tracking
from flows.errors import ConfigError, DataError, GateFailed
from flows.params import Params
from flows.ports import free_port
from flows.serving.vision.model import Release

NAME = "digits"
SETTINGS: dict[str, Any] = {
    "serve.port": 0,
    "serve.threads": 1,
    "serve.poll_s": 0.1,
    "serve.retry_s": 1000.0,
    "rollout.wait_s": 60.0,
    "rollout.poll_s": 0.1,
}


@pytest.fixture(scope="module")
def releases(exported: Exported, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Release]:
    return make_releases(exported, tmp_path_factory.mktemp("releases"))


@pytest.fixture
def registered(home: Path, exported: Exported, releases: dict[str, Release]) -> Params:
    """Versions 1 and 2 are good, 3 is refused by servers for its golden requests; 1 is champion."""
    settings = write_params(home, SETTINGS)
    with tracking.pipeline_run(settings, "test", {}) as run:
        for key in ("1", "2", "golden mismatch"):
            release = releases[key]
            digest = {"onnx.digest": release.digest or ""}
            registry.register_folder(settings, run, NAME, release.folder, exported.images[:1], digest)
    registry.set_alias(settings, NAME, "champion", "1")
    return settings


@pytest.fixture
def watch(registered: Params, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """The flow's body, without Prefect's server; the tables it publishes are in `watch.tables`."""
    tables: list[Any] = []
    monkeypatch.setattr(rollout, "create_table_artifact", lambda rows, **_: tables.append(rows))
    monkeypatch.setattr(rollout, "get_run_logger", lambda: logging.getLogger("test"))
    monkeypatch.setattr(rollout, "check_servers", rollout.check_servers.fn)

    def run(*servers: str) -> Any:
        return rollout.rollout.fn(NAME, list(servers))

    run.tables = tables  # type: ignore[attr-defined]
    return run


def champion(params: Params) -> registry.Version:
    return serve.find(params, NAME, "champion", "")


@contextmanager
def server(home: Path, *arguments: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """`trunkline serve vision` and its address."""
    process = subprocess.Popen(
        [sys.executable, "-m", "flows.cli", "serve", "vision", "--model", NAME, *arguments],
        cwd=home,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        address = re.search(r"http://[\d.:]+", line)
        assert address, (line, process.stderr.read() if process.stderr and process.poll() else "")
        yield process, address.group()
    finally:
        process.kill()
        process.communicate()


def test_servers_follow_the_champion_and_the_flow_sees_it(
    home: Path, registered: Params, watch: Callable[..., Any], wait_until: Callable[..., None]
) -> None:
    with server(home) as (process, address):
        answer = watch(address)
        assert [check["version"] for check in answer["servers"]] == ["1"]

        registry.set_alias(registered, NAME, "champion", "2")
        (check,) = watch(address)["servers"]
        assert (check["passed"], check["version"]) == (True, "2")
        assert check["reason"] == "serves the champion, 4 golden requests answered"

        registry.set_alias(registered, NAME, "previous", "2")
        registry.set_alias(registered, NAME, "champion", "3")
        write_params(home, SETTINGS | {"rollout.rollback_on_failure": True})
        with pytest.raises(GateFailed, match=f"{address}: serves version 2 .*it refused the new one.*golden"):
            watch(address)
        champion = registry.alias(registered, NAME, "champion")
        assert champion is not None
        assert champion.version == "2"
        wait_until(lambda: httpx.get(f"{address}/healthz").json()["rollout"]["state"] == "current")
        assert [row["passed"] for rows in watch.tables for row in rows] == [True, True, False]  # type: ignore[attr-defined]

        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 0
    lines = [line for line in errors.splitlines() if line]
    assert len(lines) == 2, errors
    assert "serving version 2" in lines[0]
    assert "version 3 is not served, version 2 stays" in lines[1]


def test_a_fixed_version_does_not_follow_and_is_found_at_once(
    home: Path, registered: Params, watch: Callable[..., Any]
) -> None:
    registry.set_alias(registered, NAME, "champion", "2")
    with (
        server(home, "--version", "1") as (_, fixed),
        pytest.raises(GateFailed, match="started on a fixed version"),
    ):
        watch(fixed)
    champion = registry.alias(registered, NAME, "champion")
    assert champion is not None
    assert champion.version == "2", "no rollback unless it is asked for"


def test_a_server_that_is_away_is_named(home: Path, watch: Callable[..., Any]) -> None:
    write_params(home, SETTINGS | {"rollout.wait_s": 0.2})
    address = f"http://127.0.0.1:{free_port()}"
    with pytest.raises(GateFailed, match=f"{address}: cannot be reached"):
        watch(address)


def test_something_else_behind_the_address_is_named(registered: Params) -> None:
    def answer(request: httpx.Request) -> httpx.Response:
        return httpx.Response(200, text="<html>hello</html>")

    with httpx.Client(transport=httpx.MockTransport(answer), base_url="http://server") as client:
        expected = rollout.expectation(registered, champion(registered))
        assert rollout.look(client, expected)[1] == "/healthz answers 200 with something else"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"index": 99}, "class 99"),
        ({"confidence": 0.0}, "more than 0.005 apart"),
        ({"model": {"variant": "fp32", "version": "7"}}, "was answered by version 7"),
        ({"model": None}, "golden request 0: "),
    ],
)
def test_wrong_answers_are_found(registered: Params, change: dict[str, Any], reason: str) -> None:
    expected = rollout.expectation(registered, champion(registered))
    assert isinstance(expected, rollout.Expected)
    by_data = {golden.data: golden for golden in expected.golden}

    def answer(request: httpx.Request) -> httpx.Response:
        golden = by_data[request.content]
        right = {"index": golden.index, "confidence": golden.confidence}
        model = {"variant": "fp32", "version": "1"}
        return httpx.Response(200, json=right | {"model": model} | change)

    with httpx.Client(transport=httpx.MockTransport(answer), base_url="http://server") as client:
        assert reason in rollout.ask_golden(client, expected)


def test_without_servers_or_a_champion_there_is_one_clear_error(
    registered: Params, watch: Callable[..., Any]
) -> None:
    with pytest.raises(ConfigError, match=r"rollout\.servers"):
        watch()
    registry.delete_alias(registered, NAME, "champion")
    with pytest.raises(DataError, match="no alias 'champion'"):
        watch("http://127.0.0.1:1")
