"""The flow as Prefect runs it and the commands around it: states, tables, the page's question, exit codes."""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from promotion_workspace import NAME, add_version, aliases_of
from test_cli import Answer

from flows import cli, gates, pipeline, promotion, promotion_log, registry, tracking
from flows.errors import DataError
from flows.gates import Candidate, Gate
from flows.params import Params, load
from flows.registry import Version


@pytest.fixture(scope="module")
def prefect_server() -> Iterator[None]:
    from prefect.testing.utilities import prefect_test_harness

    with prefect_test_harness(server_startup_timeout=120):
        yield


@pytest.fixture
def quality(home: Path, prefect_server: None, monkeypatch: pytest.MonkeyPatch) -> dict[str, bool]:
    """Gates that pass at once; what `quality` says is set by the test."""
    verdicts = {"passed": True}

    def check(name: str, candidate: Candidate, champion: Version | None) -> Gate:
        passed = verdicts["passed"] or name != "quality"
        return Gate(name, passed, "fine" if passed else "too many mistakes", {"figure": 0.5})

    monkeypatch.setattr(gates, "check_gate", check)
    monkeypatch.setattr(promotion, "POLL_S", 1)
    return verdicts


@pytest.fixture
def trunkline(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Answer]:
    """Run the command in this process."""

    def run(*arguments: str) -> Answer:
        monkeypatch.setattr(sys, "argv", ["trunkline", *arguments])
        code = 0
        try:
            cli.main()
        except SystemExit as error:
            code = int(error.code or 0)
        captured = capsys.readouterr()
        return Answer(code, captured.out, captured.err)

    return run


def newest_run() -> Any:
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.sorting import FlowRunSort

    with get_client(sync_client=True) as client:
        return client.read_flow_runs(sort=FlowRunSort.START_TIME_DESC, limit=1)[0]


def table() -> list[dict[str, Any]]:
    """The newest table `gates`."""
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterKey
    from prefect.client.schemas.sorting import ArtifactSort

    with get_client(sync_client=True) as client:
        found = client.request(
            "POST",
            "/artifacts/filter",
            json={
                "artifacts": ArtifactFilter(key=ArtifactFilterKey(any_=["gates"])).model_dump(mode="json"),
                "sort": ArtifactSort.CREATED_DESC.value,
                "limit": 1,
            },
        ).json()
    return list(json.loads(found[0]["data"]))


def test_the_flow_promotes_and_says_so(quality: dict[str, bool], home_params: Params) -> None:
    add_version(home_params)
    made = promotion.promotion(model=NAME)
    assert made["promoted"]
    assert made["aliases"] == ["champion"]
    assert json.loads(json.dumps(made)) == made, "other flows and deployments get plain values"
    state = newest_run().state
    assert state.is_completed()
    assert state.message == f"promoted: version 1 of {NAME} is champion"
    assert [row["gate"] for row in table()] == list(gates.GATES)
    assert {row["verdict"] for row in table()} == {"passed"}

    assert promotion.promotion()["reason"] == f"{NAME} has no challenger; nothing to promote"
    again = promotion.promotion(model=NAME, version="1")
    assert (again["promoted"], again["refused"], again["gates"]) == (False, False, [])


def test_a_refusal_is_a_normal_end_with_reasons(quality: dict[str, bool], home_params: Params) -> None:
    add_version(home_params)
    promotion.promotion()
    quality["passed"] = False
    add_version(home_params)
    before = aliases_of(home_params)
    made = promotion.promotion()
    assert made["refused"]
    assert aliases_of(home_params) == before == {"champion": "1", "challenger": "2"}
    state = newest_run().state
    assert state.is_completed()
    assert state.message == f"refused: version 2 of {NAME}: quality: too many mistakes"
    rows = {row["gate"]: row for row in table()}
    assert rows["quality"] == {
        "gate": "quality",
        "verdict": "failed",
        "reason": "too many mistakes",
        "figures": '{"figure": 0.5}',
    }
    assert rows["budget"]["verdict"] == "passed"


def test_two_machines_share_a_limit_of_the_server(quality: dict[str, bool], home_params: Params) -> None:
    from prefect.client.orchestration import get_client

    from flows import aliases

    add_version(home_params)
    promotion.promotion()
    with get_client(sync_client=True) as client:
        found = client.read_global_concurrency_limit_by_name(aliases.LIMIT)
        assert (found.limit, found.active_slots) == (1, 0)
        with aliases.exclusive():
            assert client.read_global_concurrency_limit_by_name(aliases.LIMIT).active_slots == 1


# ---- approval ----------------------------------------------------------------------------------------------


def asking(home: Path, **changes: Any) -> Params:
    text = (home / "params.yaml").read_text().replace("require_approval: false", "require_approval: true")
    for key, (old, new) in changes.items():
        assert f"{key}: {old}" in text
        text = text.replace(f"{key}: {old}", f"{key}: {new}")
    (home / "params.yaml").write_text(text)
    return load(home / "params.yaml")


def answer_when_asked(answer: dict[str, Any]) -> threading.Thread:
    """What a person does on Prefect's page."""

    def wait_and_resume() -> None:
        from prefect.client.orchestration import get_client

        with get_client(sync_client=True) as client:
            for _ in range(600):
                run = newest_run()
                if run.state.is_paused():
                    client.resume_flow_run(run.id, run_input=answer)
                    return
                time.sleep(0.2)

    thread = threading.Thread(target=wait_and_resume, daemon=True)
    thread.start()
    return thread


@pytest.mark.parametrize("approve", [True, False])
def test_a_person_decides(approve: bool, quality: dict[str, bool], home: Path) -> None:
    settings = asking(home)
    add_version(settings)
    person = answer_when_asked({"approve": approve, "comment": "not on a Friday"})
    made = promotion.promotion()
    person.join(60)
    assert made["promoted"] == approve
    assert aliases_of(settings) == {"champion" if approve else "challenger": "1"}
    if not approve:
        assert made["reason"] == "a person said no: not on a Friday"
        assert promotion_log.read(settings, NAME)[-1].reason == made["reason"]


def test_nobody_answers(quality: dict[str, bool], home: Path) -> None:
    settings = asking(home, approval_timeout_s=(86400, 2))
    add_version(settings)
    made = promotion.promotion()
    assert made["refused"]
    assert made["reason"] == "nobody approved it within 2 s"
    assert newest_run().state.is_completed()


# ---- the pipeline's part -----------------------------------------------------------------------------------


def test_an_announced_challenger_is_an_event(home_params: Params, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[dict[str, Any]] = []
    monkeypatch.setattr(pipeline, "emit_event", lambda **event: sent.append(event))
    told = pipeline._announce(add_version(home_params))
    assert sent == [
        {
            "event": "trunkline.challenger.registered",
            "resource": {"prefect.resource.id": f"trunkline.model.{NAME}"},
            "payload": {"model": NAME, "version": "1"},
        }
    ]
    assert (told["aliases"], told["promoted"], told["gates"]) == (["challenger"], False, [])
    pipeline._announce(add_version(home_params, alias="champion"))
    assert len(sent) == 1, "a champion is no news"


# ---- the commands ------------------------------------------------------------------------------------------


def test_promote_status_and_rollback(
    quality: dict[str, bool], home_params: Params, trunkline: Callable[..., Answer]
) -> None:
    add_version(home_params, **{"data.name": "digits", "data.digest": "d" * 64})
    done = trunkline("promote")
    assert done.code == 0, done
    assert f"version 1 of {NAME} is champion: all gates passed" in done.out
    add_version(home_params)
    quality["passed"] = False
    refused = trunkline("promote", "--model", NAME)
    assert refused.code == 10
    assert "✗  quality" in refused.out
    assert refused.err.splitlines()[-1].startswith("error: version 2 of ")
    assert "champion stays version 1: quality: too many mistakes" in refused.err

    page = trunkline("status")
    assert page.code == 0
    for words in (
        "champion     1",
        "challenger   2",
        "previous     –",
        "was refused",
        "too many mistakes",
        "promote none → 1",
    ):
        assert words in page.out, page.out
    told = json.loads(trunkline("status", "--json").out)
    assert told["champion"]["version"] == "1"
    assert told["champion"]["gates"]["quality"] == "passed: fine"
    assert told["challenger"]["gates"]["quality"] == "failed: too many mistakes"
    assert told["previous"] is None
    assert [line["action"] for line in told["log"]] == ["promote", "refused"]
    assert told["since"] == told["log"][0]["time"]

    back = trunkline("rollback")
    assert back.code == 11
    assert back.err == f"error: {NAME} has no previous version to roll back to; champion stays version 1\n"


def test_an_alias_moved_by_hand_is_told(home_params: Params, trunkline: Callable[..., Answer]) -> None:
    add_version(home_params, alias="champion")
    told = json.loads(trunkline("status", "--json").out)
    assert told["since"] is None
    assert "outside Trunkline" in told["notes"][0]
    assert "outside Trunkline" in " ".join(trunkline("status").out.split())


@pytest.mark.parametrize("command", ["status", "rollback"])
def test_a_model_nobody_registered(
    command: str, home_params: Params, trunkline: Callable[..., Answer]
) -> None:
    missing = trunkline(command, "--model", "nosuch")
    assert missing.code == 11
    assert missing.err.count("\n") == 1
    assert "nosuch" in missing.err


def test_the_flow_names_what_is_missing(quality: dict[str, bool], home_params: Params) -> None:
    with pytest.raises(DataError, match="no model 'nosuch'"):
        promotion.promotion(model="nosuch")
    assert registry.model_names(home_params) == []
    assert tracking.client(home_params)
