"""The same code on PostgreSQL and an S3-compatible store, chosen by configuration alone."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import test_tracking
import test_up_and_down
import tiny_clone
import yaml
from real_backends import PASSWORD, QUOTED, ObjectStore, Postgres, running_object_store, running_postgres
from test_up_and_down import OFTEN, ask, deployment, trunkline, wait_for, write_file
from tiny_clone import change_params

from flows import registry, services, stores, tracking
from flows.errors import ResourceError
from flows.params import Params
from flows.stores import StoreAway
from flows.tracking import stage_run

ROOT = Path(__file__).resolve().parents[2]
clone = test_up_and_down.clone


@pytest.fixture(scope="module")
def postgres() -> Iterator[Postgres]:
    with running_postgres() as server:
        yield server


@pytest.fixture(scope="module")
def object_store() -> Iterator[ObjectStore]:
    with running_object_store() as server:
        yield server


@pytest.fixture
def bucket(object_store: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> ObjectStore:
    for name, value in object_store.environment.items():
        monkeypatch.setenv(name, value)
    return object_store


# ---- PostgreSQL ----


def test_processes_of_two_clones_meet_an_empty_database(
    postgres: Postgres, home: Path, home_params: Params, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two clones share no file lock, as two machines do not."""
    uri = postgres.create("empty")
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "MLFLOW_TRACKING_URI": uri,
    }
    folders = [tmp_path / "first", tmp_path / "second"]
    for folder in folders:
        folder.mkdir()
        shutil.copy(home / "params.yaml", folder)
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", test_tracking.WRITERS],
            cwd=folder,
            env={**environment, "TRUNKLINE_HOME": str(folder)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for folder in folders
    ]
    for process in processes:
        _, said = process.communicate()
        assert process.returncode == 0, said
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    found = test_tracking.runs(home_params, "ingest")
    assert [run.info.status for run in found] == ["FINISHED"] * 8
    assert [run.data.metrics for run in found] == [{"loss": 1.0}] * 8


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda uri: uri.replace(QUOTED, "wr0ng"), "password authentication failed"),
        (lambda uri: uri.replace("/empty2", "/nowhere"), "does not exist"),
        (lambda uri: uri.replace("+psycopg", "+nodriver"), "Can't load plugin"),
        (lambda uri: uri.replace("127.0.0.1", "nowhere.invalid"), "failed to resolve host"),
    ],
    ids=["password", "database", "driver", "host"],
)
def test_a_wrong_uri_is_one_line_without_the_password(
    change: Any, reason: str, postgres: Postgres, home_params: Params, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = change(postgres.uri("empty2"))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    with pytest.raises(ResourceError) as caught:
        tracking.client(home_params)
    message = str(caught.value)
    assert reason in message
    assert "\n" not in message
    assert not any(secret in message for secret in (PASSWORD, QUOTED, "wr0ng"))
    assert stores.shown(uri) in message


def test_a_server_that_restarts_gets_all(
    postgres: Postgres, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", postgres.create("restarts"))
    settings = change_params(home, {"tracking.patience_s": 120.0})
    with stage_run("pretrain", None, settings) as run:
        run.log_metrics({"loss": 1.0}, 1)
        run.flush()
        postgres.stop()
        with pytest.raises(StoreAway):
            stores.probe(postgres.uri("restarts"))
        run.log_metrics({"loss": 0.5}, 2)
        postgres.start()
    history = tracking.client(settings).get_metric_history(run.run_id, "loss")
    assert [(point.step, point.value) for point in history] == [(1, 1.0), (2, 0.5)]
    assert [found.info.status for found in test_tracking.runs(settings, "pretrain")] == ["FINISHED"]


def test_both_servers_and_a_scheduled_run_on_postgresql(
    postgres: Postgres, clone: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing but the two addresses differs from the embedded databases."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", postgres.create("mlflow"))
    prefect = postgres.create("prefect").replace("+psycopg", "+asyncpg")
    monkeypatch.setenv("PREFECT_API_DATABASE_CONNECTION_URL", prefect)
    settings = change_params(clone, {})
    write_file(clone, deployment("nightly", schedules=[OFTEN]))
    try:
        trunkline("up")
        wait_for(
            lambda: [run for run in ask(settings, "flow_runs", {}) if run["state_type"] == "COMPLETED"],
            "a completed scheduled run",
        )
    finally:
        trunkline("down")
    assert postgres.execute("SELECT count(*) FROM flow_run WHERE state_type = 'COMPLETED'", "prefect")[0][0]
    states = postgres.execute("SELECT DISTINCT status FROM runs WHERE name = '" + clone.name + "'", "mlflow")
    assert ("FINISHED",) in states
    assert not (clone / ".prefect" / "prefect.db").exists()
    for path in services.folder().iterdir():
        assert QUOTED not in path.read_text(errors="replace"), f"{path} holds the password"
        assert PASSWORD not in path.read_text(errors="replace"), f"{path} holds the password"


# ---- PostgreSQL and S3 ----


def test_the_registry_on_postgresql_and_s3_gives_back_every_byte(
    postgres: Postgres, bucket: ObjectStore, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", postgres.create("registry"))
    settings = change_params(home, {"tracking.artifacts": f"s3://{bucket.bucket}/mlflow"})
    example = test_tracking.write_package(home / "export", external=True)
    version = test_tracking.register(settings, home / "export", example)
    registry.set_alias(settings, version.name, "champion", version.version)
    found = registry.alias(settings, version.name, "champion")
    assert found
    assert (found.version, found.tags) == ("1", {"onnx.digest": "abc"})

    fetched = home / "fetched"
    fetched.mkdir()
    registry.download_version(settings, found, fetched)
    original = test_tracking.hashes(home / "export")
    assert {name: test_tracking.hashes(fetched).get(name) for name in original} == original
    assert len(bucket.keys("mlflow/trunkline/pipeline")) > len(original)
    assert not (home / "mlartifacts").exists(), "nothing lies on this disk"


def test_a_run_logs_files_to_s3(bucket: ObjectStore, home: Path) -> None:
    settings = change_params(home, {"tracking.artifacts": f"s3://{bucket.bucket}/curves"})
    picture = os.urandom(1000)
    (home / "picture.png").write_bytes(picture)
    with stage_run("pretrain", None, settings) as run:
        run.log_artifact(home / "picture.png", "pictures")
    copy = tracking.client(settings).download_artifacts(run.run_id, "pictures/picture.png", str(home / "tmp"))
    assert Path(copy).read_bytes() == picture


# ---- DVC and S3 ----


def dvc(folder: Path, *arguments: str) -> None:
    answer = subprocess.run(
        [sys.executable, "-m", "dvc", *arguments], cwd=folder, capture_output=True, text=True
    )
    assert answer.returncode == 0, answer.stdout + answer.stderr


def test_a_fresh_clone_pulls_what_another_one_pushed(bucket: ObjectStore, in_folder: Path) -> None:
    first, second = tiny_clone.build(in_folder / "first"), tiny_clone.build(in_folder / "second")
    dvc(first, "repro")
    for folder in (first, second):
        dvc(folder, "remote", "add", "--default", "store", f"s3://{bucket.bucket}/dvc")
        dvc(folder, "remote", "modify", "store", "endpointurl", bucket.url)
    dvc(first, "push", "--run-cache")
    shutil.copy(first / "dvc.lock", second / "dvc.lock")
    dvc(second, "pull", "--run-cache")
    made = sorted(yaml.safe_load((first / "dvc.lock").read_text())["stages"])
    assert made == ["finetune@scratch", "ingest", "parity", "pretrain"]
    for path in (path for path in (first / "artifacts").rglob("*") if path.is_file()):
        if "metrics" not in path.parts:  # those are in git
            assert (second / path.relative_to(first)).read_bytes() == path.read_bytes()
    shutil.copytree(first / "artifacts/metrics", second / "artifacts/metrics")
    dvc(second, "repro")
    assert tiny_clone.executed(second) == [], "nothing is computed twice"
