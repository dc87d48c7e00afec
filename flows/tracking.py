"""Runs in MLflow: those of stages and the pipeline's parent run. (Its model registry is `flows.registry`.)

Rank 0 logs; every other process gets a run that does nothing. One experiment per stage family; the cells of a
matrix stage are nested in one run of that experiment. All calls go through `MlflowClient` with explicit run
ids, because the fluent API keeps one active run per thread and silently opens strays in worker threads.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import logging
import os
import socket
import sqlite3
import subprocess
import time
import urllib.parse
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flows import files, paths
from flows.errors import Interrupted, ResourceError, explain
from flows.params import Params, flatten

PARENT_VARIABLE = "TRUNKLINE_PARENT_RUN"
FLUSH_S = 5.0
PARAMS_PER_CALL = 100  # MLflow's limit of one batch
VALUE_LIMIT = 6000
SQLITE = "sqlite:///"


@dataclass
class Run:
    """Where a stage logs. This base class ignores everything: it serves other ranks and unit tests."""

    run_id: str = ""

    def log_metrics(self, metrics: Mapping[str, float], step: int = 0) -> None: ...

    def log_params(self, values: Mapping[str, Any]) -> None: ...

    def log_artifact(self, path: Path, folder: str | None = None) -> None: ...

    def set_tags(self, tags: Mapping[str, str]) -> None: ...

    def flush(self) -> None: ...


class MlflowRun(Run):
    """A run in the tracking store. Metrics are sent together every few seconds: a call costs about 13 ms."""

    def __init__(self, client: Any, run_id: str) -> None:
        super().__init__(run_id)
        self._client = client
        self._pending: list[Any] = []
        self._sent = time.monotonic()

    def log_metrics(self, metrics: Mapping[str, float], step: int = 0) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        self._pending += [
            Metric(key, float(value), now, int(step)) for key, value in metrics.items() if key != "step"
        ]
        if time.monotonic() - self._sent > FLUSH_S:
            self.flush()

    def log_params(self, values: Mapping[str, Any]) -> None:
        from mlflow.entities import Param

        flat = [Param(key, str(value)[:VALUE_LIMIT]) for key, value in flatten(values).items()]
        for start in range(0, len(flat), PARAMS_PER_CALL):
            self._client.log_batch(self.run_id, params=flat[start : start + PARAMS_PER_CALL])

    def log_artifact(self, path: Path, folder: str | None = None) -> None:
        if path.is_dir():
            self._client.log_artifacts(self.run_id, str(path), folder or path.name)
        else:
            self._client.log_artifact(self.run_id, str(path), folder)

    def set_tags(self, tags: Mapping[str, str]) -> None:
        from mlflow.entities import RunTag

        self._client.log_batch(self.run_id, tags=[RunTag(key, str(value)) for key, value in tags.items()])

    def flush(self) -> None:
        for start in range(0, len(self._pending), 1000):
            self._client.log_batch(self.run_id, metrics=self._pending[start : start + 1000])
        self._pending, self._sent = [], time.monotonic()


# ---- the store ---------------------------------------------------------------------------------------------


def tracking_uri(params: Params) -> str:
    """`MLFLOW_TRACKING_URI`, or the one in params, a relative SQLite path made absolute in the home clone."""
    uri = os.environ.get("MLFLOW_TRACKING_URI") or params.tracking.uri
    if uri.startswith(SQLITE) and not uri.startswith(SQLITE + "/"):
        uri = SQLITE + str(paths.home() / uri.removeprefix(SQLITE))
    return uri


def is_server(uri: str) -> bool:
    """An MLflow server, rather than a database that this process opens itself."""
    return uri.startswith(("http://", "https://"))


def artifact_root(params: Params) -> str:
    """Where files of new experiments lie when the store is a database: an absolute path or a bucket's URI."""
    place = params.tracking.artifacts
    return place if "://" in place else str(paths.home() / place)


def client(params: Params) -> Any:
    """`MlflowClient` of the tracking store, whose schema exists.

    Raises:
        ResourceError: the store cannot be reached.
    """
    uri = tracking_uri(params)
    os.environ["MLFLOW_TRACKING_URI"] = uri
    return _client(uri)


@functools.cache
def _client(uri: str) -> Any:
    os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")
    import mlflow

    # it logs every database error with a stack trace and raises it all the same: whoever catches it says it
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)
    try:
        _probe(uri)
        # processes that meet an empty database all fail in its migration: one creates, the others wait
        with _exclusive("tracking"):
            mlflow.set_tracking_uri(uri)
            connected = mlflow.MlflowClient(uri)
            connected.search_experiments(max_results=1)
    except Exception as error:
        if explained := explain(error):
            raise explained from None
        reason = str(error).partition("[SQL:")[0]
        raise ResourceError(
            f"the MLflow store {uri} cannot be used: {' '.join(reason.split())[:300]}; "
            "correct `tracking.uri` in params.yaml or MLFLOW_TRACKING_URI"
        ) from error
    return connected


def _probe(uri: str) -> None:
    """Fail at once where MLflow would try again for minutes: a file nobody can write, an absent server.

    Raises:
        OSError, sqlite3.Error: with the reason.
    """
    if uri.startswith(SQLITE):
        path = Path(uri.removeprefix(SQLITE).partition("?")[0])
        path.parent.mkdir(parents=True, exist_ok=True)
        with closing(sqlite3.connect(path, timeout=60)) as database:
            database.execute("BEGIN IMMEDIATE")
            database.rollback()
    elif is_server(uri):
        address = urllib.parse.urlsplit(uri)
        port = address.port or (443 if address.scheme == "https" else 80)
        socket.create_connection((address.hostname or "", port), timeout=10).close()


@contextmanager
def _exclusive(name: str) -> Iterator[None]:
    """Lock between all processes of this clone."""
    folder = paths.home() / ".trunkline"
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / f"{name}.lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _experiment_id(client: Any, name: str, artifacts: str) -> str:
    """Made by the first process that asks; one that was deleted on MLflow's pages comes back."""
    with _exclusive("tracking"):
        found = client.get_experiment_by_name(name)
        if found is None:
            location = None if is_server(client.tracking_uri) else f"{artifacts}/{name}"
            return str(client.create_experiment(name, artifact_location=location))
        if found.lifecycle_stage == "deleted":
            client.restore_experiment(found.experiment_id)
        return str(found.experiment_id)


# ---- runs --------------------------------------------------------------------------------------------------


@contextmanager
def stage_run(stage: str, cell: str | None, params: Params) -> Iterator[Run]:
    """The run of one stage execution: FINISHED at the end, KILLED if interrupted, FAILED on other errors."""
    if int(os.environ.get("RANK", "0")) != 0 or os.environ.get("TRUNKLINE_TRACKING") == "off":
        yield Run()
        return
    connection = client(params)
    experiment = _experiment_id(connection, f"{params.tracking.experiment}/{stage}", artifact_root(params))
    parent = os.environ.get(PARENT_VARIABLE, "")
    tags = {"trunkline.stage": f"{stage}@{cell}" if cell else stage, **provenance_tags()}
    if parent:
        tags["trunkline.pipeline_run"] = parent
    if cell:
        with _exclusive("tracking"):
            tags["mlflow.parentRunId"] = _group_run(connection, experiment, stage, parent or _origin(params))
    created = connection.create_run(experiment, run_name=cell or stage, tags=tags)
    run = MlflowRun(connection, created.info.run_id)
    try:
        run.log_params(params.model_dump())
        yield run
    except BaseException as error:
        run.flush()
        killed = isinstance(error, Interrupted | KeyboardInterrupt | SystemExit)
        connection.set_terminated(run.run_id, status="KILLED" if killed else "FAILED")
        raise
    run.flush()
    connection.set_terminated(run.run_id, status="FINISHED")


def _group_run(connection: Any, experiment: str, stage: str, group: str) -> str:
    """The run that holds the cells of one matrix stage in one pipeline run; made by the first cell."""
    found = connection.search_runs([experiment], f"tags.`trunkline.group` = '{group}'", max_results=1)
    if found:
        return str(found[0].info.run_id)
    made = connection.create_run(
        experiment, run_name=stage, tags={"trunkline.group": group, "trunkline.stage": stage}
    )
    connection.set_terminated(made.info.run_id, status="FINISHED")
    return str(made.info.run_id)


def _origin(params: Params) -> str:
    """What stands for the pipeline run when DVC is used alone: the same commit and params form one group."""
    return hashlib.sha256((git_commit() + params.model_dump_json()).encode()).hexdigest()[:16]


@contextmanager
def pipeline_run(params: Params, name: str, tags: Mapping[str, str]) -> Iterator[MlflowRun]:
    """The parent run of one pipeline execution."""
    connection = client(params)
    experiment = _experiment_id(connection, f"{params.tracking.experiment}/pipeline", artifact_root(params))
    created = connection.create_run(experiment, run_name=name, tags={**provenance_tags(), **tags})
    run = MlflowRun(connection, created.info.run_id)
    try:
        run.log_params(params.model_dump())
        yield run
    except BaseException as error:
        run.flush()
        killed = isinstance(error, Interrupted | KeyboardInterrupt | SystemExit)
        connection.set_terminated(run.run_id, status="KILLED" if killed else "FAILED")
        raise
    run.flush()
    connection.set_terminated(run.run_id, status="FINISHED")


@contextmanager
def continued_run(
    params: Params, kind: str, name: str, tags: Mapping[str, str], run_id: str = ""
) -> Iterator[MlflowRun]:
    """A run of experiment `kind` that a later attempt goes on with: `run_id` if the store has it, else a new
    one."""
    connection = client(params)
    experiment = _experiment_id(connection, f"{params.tracking.experiment}/{kind}", artifact_root(params))
    known = run_id and connection.search_runs([experiment], f"attributes.run_id = '{run_id}'", max_results=1)
    if not known:
        run_id = connection.create_run(experiment, run_name=name).info.run_id
    run = MlflowRun(connection, run_id)
    connection.update_run(run_id, status="RUNNING")
    try:
        run.set_tags({**provenance_tags(), **tags})
        yield run
    except BaseException as error:
        run.flush()
        killed = isinstance(error, Interrupted | KeyboardInterrupt | SystemExit)
        connection.set_terminated(run_id, status="KILLED" if killed else "FAILED")
        raise
    run.flush()
    connection.set_terminated(run_id, status="FINISHED")


def find_run(params: Params, kind: str, tags: Mapping[str, str]) -> str:
    """The newest run of experiment `kind` with these tags; empty if there is none."""
    connection = client(params)
    experiment = _experiment_id(connection, f"{params.tracking.experiment}/{kind}", artifact_root(params))
    wanted = " and ".join(f"tags.`{key}` = '{value}'" for key, value in tags.items())
    found = connection.search_runs([experiment], wanted, max_results=1)
    return str(found[0].info.run_id) if found else ""


def close_abandoned_runs(params: Params, parent: str) -> int:
    """Mark the runs a killed stage left RUNNING under pipeline run `parent` as KILLED; returns how many."""
    connection = client(params)
    experiments = [
        experiment.experiment_id
        for experiment in connection.search_experiments()
        if experiment.name.startswith(f"{params.tracking.experiment}/")
    ]
    left = connection.search_runs(
        experiments, f"tags.`trunkline.pipeline_run` = '{parent}' and attributes.status = 'RUNNING'"
    )
    for run in left:
        connection.set_terminated(run.info.run_id, status="KILLED")
    return len(left)


# ---- provenance --------------------------------------------------------------------------------------------


def provenance_tags() -> dict[str, str]:
    """Git commit, dirty flag, hash of dvc.lock, digest of the data manifest, DVC experiment name."""
    tags = {"git.commit": git_commit(), "git.dirty": str(git_is_dirty()).lower()}
    if (lock := Path("dvc.lock")).is_file():
        tags["dvc.lock_sha256"] = files.sha256_file(lock)
    if (manifest := paths.DATA / "manifest.json").is_file():
        tags["data.digest"] = files.read_json(manifest)["digest"]
    if name := os.environ.get("DVC_EXP_NAME"):
        tags["dvc.experiment"] = name
    return tags


def _git(*arguments: str) -> str | None:
    try:
        answer = subprocess.run(["git", "-C", str(paths.home()), *arguments], capture_output=True, text=True)
    except FileNotFoundError:
        return None
    return answer.stdout.strip() if answer.returncode == 0 else None


@functools.cache
def git_commit() -> str:
    """Commit of the clone, or "unknown" outside a git checkout."""
    return _git("rev-parse", "HEAD") or "unknown"


@functools.cache
def git_is_dirty() -> bool:
    """True when tracked files differ from the commit, except what the pipeline writes (dvc.lock, metrics)."""
    return bool(_git("status", "--porcelain", "-uno", "--", ".", ":!dvc.lock", ":!artifacts"))
