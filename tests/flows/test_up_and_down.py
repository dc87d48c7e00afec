"""The real servers and worker on loopback: a scheduled run is picked up, and `down` leaves nothing."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny_clone
import yaml
from tiny_clone import change_params

from flows import deployments, params, ports, services, supervisor
from flows.errors import ConfigError
from flows.params import Params

ROOT = Path(__file__).resolve().parents[2]
PATIENCE_S = 240.0

# the flow is the real one; only the report, which wants real stages, is a stub
FLOW = """
from flows import files, paths, pipeline as module
def report(root, extra):
    files.write_json(root / paths.REPORT, extra)
    return root / paths.REPORT
module.build_report = report
pipeline = module.pipeline
"""


def deployment(called: str, **changes: Any) -> dict[str, Any]:
    return {
        "name": called,
        "entrypoint": "scheduled.py:pipeline",
        "tags": ["trunkline"],
        "work_pool": {"name": "local"},
        "concurrency_limit": {"limit": 1, "collision_strategy": "CANCEL_NEW"},
        **changes,
    }


OFTEN = {"interval": 10, "slug": "often"}
NIGHTLY = {"cron": "0 2 * * *", "timezone": "UTC", "slug": "nightly"}
ALARM = {
    "name": "after an alarm",
    "type": "event",
    "match": {"prefect.resource.id": "trunkline.*"},
    "expect": ["trunkline.monitor.alarm"],
    "posture": "Reactive",
    "threshold": 1,
    "parameters": {"settings": ["seed={{ event.payload.seed }}"]},
}


def write_file(root: Path, *entries: dict[str, Any]) -> None:
    pull = [{"prefect.deployments.steps.set_working_directory": {"directory": "{{ $PWD }}"}}]
    (root / "prefect.yaml").write_text(yaml.safe_dump({"pull": pull, "deployments": list(entries)}))


@pytest.fixture
def clone(home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A clone without labels (its pipeline ends with pretraining) whose services use free ports."""
    tiny_clone.build(home, classes="[]")
    (home / "scheduled.py").write_text(FLOW)
    (home / "tmp").mkdir()
    for name in ("PREFECT_API_URL", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PREFECT_HOME", str(home / ".prefect"))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("TMPDIR", str(home / "tmp"))
    change_params(
        home, {"services.prefect_port": ports.free_port(), "services.mlflow_port": ports.free_port()}
    )
    yield home
    supervisor.end_processes(supervisor.marked_processes(services.folder()), 0.0)


def trunkline(*arguments: str, code: int = 0) -> str:
    answer = subprocess.run([sys.executable, "-m", "flows.cli", *arguments], capture_output=True, text=True)
    assert answer.returncode == code, answer
    return answer.stdout if code == 0 else answer.stderr


def ask(settings: Params, path: str, body: dict[str, Any]) -> Any:
    """A filter of the Prefect server."""
    import httpx

    url = services.page_url(settings.services.host, settings.services.prefect_port)
    answer = httpx.post(f"{url}/api/{path}/filter", json=body, timeout=60)
    answer.raise_for_status()
    return answer.json()


def wait_for(condition: Callable[[], Any], what: str) -> Any:
    deadline = time.monotonic() + PATIENCE_S
    while not (value := condition()):
        assert time.monotonic() < deadline, f"{what} did not come"
        time.sleep(0.2)
    return value


def test_a_scheduled_run_succeeds_and_down_leaves_nothing(clone: Path) -> None:
    settings = params.load()
    write_file(
        clone,
        deployment("nightly", schedules=[OFTEN, NIGHTLY], triggers=[ALARM]),
        deployment("old", schedules=[NIGHTLY]),
    )

    said = trunkline("up", "--wait")
    assert "worker ready" in said
    assert f"http://127.0.0.1:{settings.services.prefect_port}" in said
    assert trunkline("up").startswith("already up")
    shown = {line.split()[0]: line.split()[1] for line in trunkline("services").splitlines()}
    assert shown == {"prefect": "ready", "mlflow": "ready", "deployments": "done", "worker": "ready"}

    def runs(*states: str) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = ask(settings, "flow_runs", {})
        return [run for run in found if run["state_type"] in states]

    assert len(wait_for(lambda: runs("SCHEDULED"), "scheduled runs")) >= 3
    done = wait_for(lambda: runs("COMPLETED"), "a completed scheduled run")[0]
    assert done["auto_scheduled"]
    assert tiny_clone.executed(clone) == ["ingest", "pretrain"]

    # what left the file leaves the server; a broken file changes nothing
    (clone / "prefect.yaml").write_text("deployments: [{name: nightly}]")
    assert "entrypoint" in trunkline("deploy", code=ConfigError.exit_code)
    assert sorted(entry["name"] for entry in ask(settings, "deployments", {})) == ["nightly", "old"]
    write_file(clone, deployment("nightly", schedules=[NIGHTLY], triggers=[ALARM]))
    assert "schedule often of nightly removed\ndeployment old removed" in trunkline("deploy")
    [left] = ask(settings, "deployments", {})
    assert (left["name"], [schedule["slug"] for schedule in left["schedules"]]) == ("nightly", ["nightly"])
    assert all(run["expected_start_time"][11:16] == "02:00" for run in runs("SCHEDULED"))
    assert len(ask(settings, "automations", {})) == 1, "deployed twice, there once"

    wait_for(
        lambda: not runs("RUNNING", "PENDING"), "the end of the last run; the next one would be cancelled"
    )

    # an event starts a run; overrides go into a workspace of their own; both servers hold its record
    subprocess.run([sys.executable, "-c", EMIT], check=True, env={**os.environ, **used(settings)})
    started = wait_for(
        lambda: [run for run in runs("COMPLETED") if run["parameters"]], "the run after the alarm"
    )
    assert started[0]["parameters"] == {"settings": ["seed=7"]}

    # a server that dies comes back
    pid = next(service.pid for service in services.running() if service.name == "mlflow")
    assert pid  # 0 would be the process group of this test
    os.kill(pid, signal.SIGKILL)
    wait_for(lambda: [s for s in services.running() if s.name == "mlflow" and s.restarts], "the restart")
    services.wait_until_ready(settings)

    # a run that is under way is stopped with time to save, and is not left RUNNING on the server
    (clone / "pretrain.sh").write_text(
        "trap 'touch saved; exit 75' TERM; touch begun; while :; do sleep 0.1 || true; done\n"
    )
    (clone / "constraints.txt").write_text('{"name": "digits", "digest": "other", "classes": []}\n')
    subprocess.run(
        [sys.executable, "-m", "prefect", "deployment", "run", "pipeline/nightly"],
        check=True,
        capture_output=True,
        env={**os.environ, **used(settings)},
    )
    wait_for((clone / "begun").exists, "the stage")
    assert trunkline("down") == "down\n"
    assert (clone / "saved").exists()
    assert supervisor.marked_processes(services.folder()) == []
    for port in (settings.services.prefect_port, settings.services.mlflow_port):
        ports.require_free("127.0.0.1", port)
    assert list((clone / "tmp").iterdir()) == []
    assert trunkline("down") == "nothing was up\n"
    assert states_on_disk(clone).count("RUNNING") == 0
    assert states_on_disk(clone).count("CRASHED") == 1


EMIT = """
from prefect.events import emit_event
resource = {"prefect.resource.id": "trunkline.monitor"}
emit_event("trunkline.monitor.alarm", resource=resource, payload={"seed": 7})
"""


def used(settings: Params) -> dict[str, str]:
    """What `trunkline` commands get from `use_running`, for a program that is none."""
    url = services.page_url(settings.services.host, settings.services.prefect_port)
    return {"PREFECT_API_URL": f"{url}/api"}


def states_on_disk(clone: Path) -> list[str]:
    """Of the flow runs, once no server is left to ask."""
    import sqlite3
    from contextlib import closing

    with closing(sqlite3.connect(clone / ".prefect" / "prefect.db")) as database:
        return [row[0] for row in database.execute("SELECT state_type FROM flow_run")]


# ---- the file ----


def test_commands_use_the_running_servers_unless_told_otherwise(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = [
        services.Running("prefect", "ready", 1, "http://127.0.0.1:1", home, 0, None, ""),
        services.Running("mlflow", "pausing", 1, "http://127.0.0.1:2", home, 0, None, ""),
    ]
    monkeypatch.setattr(services, "running", lambda: found)
    monkeypatch.setenv("PREFECT_API_URL", "")
    services.use_running()
    assert os.environ["PREFECT_API_URL"] == "http://127.0.0.1:1/api"
    assert os.environ["MLFLOW_TRACKING_URI"] == "", "a server that is not ready is not used"
    monkeypatch.setenv("PREFECT_API_URL", "http://mine/api")
    services.use_running()
    assert os.environ["PREFECT_API_URL"] == "http://mine/api"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"name": ""}, "needs a name of its own"),
        ({"entrypoint": "nowhere.py:pipeline"}, "nowhere.py:pipeline does not exist"),
        ({"entrypoint": None}, "nothing does not exist"),
        ({"tags": []}, "`tags` must hold trunkline"),
        ({"work_pool": None}, "`work_pool` needs a name"),
        ({"schedules": [{"cron": "0 2 * * *"}]}, "each schedule needs a slug"),
        ({"schedules": [NIGHTLY, NIGHTLY]}, "each schedule needs a slug of its own"),
    ],
)
def test_a_mistake_in_the_file_is_one_line(change: dict[str, Any], reason: str, in_folder: Path) -> None:
    (in_folder / "scheduled.py").write_text(FLOW)
    write_file(in_folder, deployment("nightly", **change))
    with pytest.raises(ConfigError, match=reason) as caught:
        deployments.read_file(in_folder)
    assert "\n" not in str(caught.value)


def entries() -> list[dict[str, Any]]:
    return list(params.read(ROOT / "prefect.yaml")["deployments"])


@pytest.mark.parametrize("entry", entries(), ids=lambda entry: str(entry["name"]))
def test_the_entrypoint_of_each_deployment_exists_and_takes_its_parameters(entry: dict[str, Any]) -> None:
    import importlib

    from prefect import Flow

    path, _, name = entry["entrypoint"].partition(":")
    assert (ROOT / path).is_file()
    flow = getattr(importlib.import_module(path.removesuffix(".py").replace("/", ".")), name)
    assert isinstance(flow, Flow)
    triggered = {key for trigger in entry.get("triggers", []) for key in trigger.get("parameters", {})}
    assert set(entry.get("parameters", {})) | triggered <= set(flow.parameters.properties)


def test_the_shipped_file_is_what_up_serves() -> None:
    checked = params.load(ROOT / "params.yaml")
    assert [entry["name"] for entry in entries()] == ["nightly", "promote", "monitor"]
    assert {entry["work_pool"]["name"] for entry in entries()} == {checked.services.work_pool}
