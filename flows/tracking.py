"""Runs in MLflow: those of stages and the pipeline's parent run. (Its model registry is `flows.registry`.)

Rank 0 logs; every other process gets a run that does nothing. One experiment per stage family; the cells of a
matrix stage are nested in one run of that experiment. All calls go through `MlflowClient` with explicit run
ids, because the fluent API keeps one active run per thread and silently opens strays in worker threads.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import logging
import os
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flows import files, paths, spool, stores
from flows.errors import Interrupted, ResourceError, explain
from flows.params import Params, flatten
from flows.stores import SQLITE, StoreAway

PARENT_VARIABLE = "TRUNKLINE_PARENT_RUN"
SPOOL = ".trunkline/spool"
SPOOL_TAG = "trunkline.spool"
PENDING = "pending-"
"""Begins the id of a run that the store could not make yet."""
PARAMS_PER_CALL = 100  # MLflow's limits of one batch
METRICS_PER_CALL = 1000
VALUE_LIMIT = 6000
REFUSALS = frozenset(
    {
        "INVALID_PARAMETER_VALUE",
        "RESOURCE_DOES_NOT_EXIST",
        "RESOURCE_ALREADY_EXISTS",
        "INVALID_STATE",
        "BAD_REQUEST",
    }
)


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
    """A run in the tracking store. What is logged goes to disk and is sent in the background (flows.spool):
    neither a slow nor an absent store holds up the work.

    `run_id` begins with `PENDING` until the store has been reached to make the run; the rest is its tag
    `SPOOL_TAG` for ever.
    """

    def __init__(
        self, params: Params, run_id: str = "", create: Mapping[str, Any] | None = None, at_once: bool = False
    ) -> None:
        """
        Args:
            run_id: of a run that exists; else `create` describes the one to make.
            at_once: an absent store is an error.

        Raises:
            StoreAway, ResourceError: the store cannot be used.
        """
        super().__init__()
        meta = {"store": store_identity(params), "run_id": run_id, "create": create, "attempted": False}
        self._params = params
        self._spool = spool.Spool.create(paths.home() / SPOOL, meta)
        try:
            _find_run_of(params, self._spool)
        except BaseException as error:
            if at_once or not isinstance(error, StoreAway):
                self._spool.remove()
                raise
            spool.say(f"{error}; the run begins without it, what is logged is kept and sent later")
        self.run_id = self._spool.meta["run_id"] or PENDING + self._spool.name
        self._sender = spool.Sender(
            self._spool,
            self._deliver,
            lambda: _deliver_quietly(params),
            is_away=not self._spool.meta["run_id"],
        )

    def log_metrics(self, metrics: Mapping[str, float], step: int = 0) -> None:
        now = int(time.time() * 1000)
        values = [[key, float(value), now, int(step)] for key, value in metrics.items() if key != "step"]
        self._sender.put({"op": "metrics", "values": values})

    def log_params(self, values: Mapping[str, Any]) -> None:
        flat = [[key, str(value)[:VALUE_LIMIT]] for key, value in flatten(values).items()]
        for start in range(0, len(flat), PARAMS_PER_CALL):
            self._sender.put({"op": "params", "values": flat[start : start + PARAMS_PER_CALL]})

    def log_artifact(self, path: Path, folder: str | None = None) -> None:
        kept = self._spool.keep_file(path)
        self._sender.put({"op": "artifact", "path": str(kept), "folder": folder})

    def set_tags(self, tags: Mapping[str, str]) -> None:
        self._sender.put({"op": "tags", "values": [[key, str(value)] for key, value in tags.items()]})

    def flush(self) -> None:
        """Until the store has all of it, or has not answered for `tracking.patience_s`."""
        self._sender.flush(self._params.tracking.patience_s)

    def end(self, status: str) -> None:
        """The last record; what cannot be delivered now stays on disk."""
        self._sender.put({"op": "end", "status": status, "time": int(time.time() * 1000)})
        delivered = self._sender.flush(self._params.tracking.patience_s)
        self._sender.stop()
        if not delivered:
            spool.say(
                f"the tracking store does not answer; the record of this run waits in {self._spool.folder}, "
                "the next run or `trunkline sync` delivers it"
            )

    def _deliver(self, kept: spool.Spool, records: list[spool.Record]) -> None:
        _send(self._params, kept, records)
        self.run_id = kept.meta["run_id"]


@contextmanager
def _ended(run: MlflowRun) -> Iterator[MlflowRun]:
    """FINISHED at the end, KILLED if interrupted, FAILED on other errors."""
    try:
        yield run
    except BaseException as error:
        killed = isinstance(error, Interrupted | KeyboardInterrupt | SystemExit)
        run.end("KILLED" if killed else "FAILED")
        raise
    run.end("FINISHED")


# ---- delivery ----------------------------------------------------------------------------------------------


def _send(params: Params, kept: spool.Spool, records: list[spool.Record]) -> None:
    """Records of one kind to the store. All of it may be repeated: a metric's time, step and value are its
    identity, a parameter, tag or file replaces its equal, the run is looked for before it is made again.

    Raises:
        Refused: the store says that these records are wrong.
        Exception: anything else, which may be different later.
    """
    from mlflow.entities import Metric, Param, RunTag
    from mlflow.exceptions import MlflowException

    connection = client(params)
    try:
        run_id = _find_run_of(params, kept)
        for record in records if records[0]["op"] != "metrics" else []:
            match record["op"]:
                case "params":
                    connection.log_batch(run_id, params=[Param(*pair) for pair in record["values"]])
                case "tags":
                    connection.log_batch(run_id, tags=[RunTag(*pair) for pair in record["values"]])
                case "artifact":
                    _send_file(connection, run_id, Path(record["path"]), record["folder"])
                case "abandoned" if connection.get_run(run_id).info.status != "RUNNING":
                    pass  # a later attempt has gone on with this run and ended it
                case "end" | "abandoned":
                    connection.set_terminated(run_id, status=record["status"], end_time=record["time"])
        metrics = [
            Metric(*value) for record in records if record["op"] == "metrics" for value in record["values"]
        ]
        for start in range(0, len(metrics), METRICS_PER_CALL):
            connection.log_batch(run_id, metrics=metrics[start : start + METRICS_PER_CALL])
    except MlflowException as error:
        if error.error_code in REFUSALS:
            raise spool.Refused(
                stores.without_password(" ".join(str(error).split()), tracking_uri(params))
            ) from None
        raise


def _find_run_of(params: Params, kept: spool.Spool) -> str:
    """The id of the spool's run, which is made if it has none yet.

    Raises:
        StoreAway: the store does not answer.
    """
    connection = client(params)
    if not kept.meta["run_id"]:
        again = kept.meta["attempted"]
        kept.set_meta(attempted=True)
        try:
            kept.set_meta(run_id=_make_run(params, connection, kept.meta["create"], kept.name, again))
        except Exception as error:
            if _is_absence(error, tracking_uri(params)):
                raise StoreAway(
                    f"the MLflow store {stores.shown(tracking_uri(params))} does not answer"
                ) from None
            raise
    return str(kept.meta["run_id"])


def _deliver_quietly(params: Params) -> None:
    with contextlib.suppress(Exception):
        deliver_leftovers(params)


def _send_file(connection: Any, run_id: str, path: Path, folder: str | None) -> None:
    if path.is_dir():
        connection.log_artifacts(run_id, str(path), folder or path.name)
    elif path.is_file():
        connection.log_artifact(run_id, str(path), folder)
    else:
        raise spool.Refused(f"{path} is gone, and there was no room for a copy")


def deliver_leftovers(params: Params) -> tuple[int, int]:
    """Send what processes that are gone left for this store; a run that none of them ended was killed.

    Returns:
        number of runs delivered, and of those left because they belong to another store.

    Raises:
        ResourceError: the store does not answer.
    """
    delivered = others = 0
    for kept in spool.leftovers(paths.home() / SPOOL):
        if kept.meta["store"] != store_identity(params):
            others += 1
            kept.close()
            continue
        try:
            if not kept.ends():
                kept.append({"op": "abandoned", "status": "KILLED", "time": int(time.time() * 1000)})
            spool.deliver_all(kept, functools.partial(_send, params))
        except BaseException:
            kept.close()
            raise
        kept.remove()
        delivered += 1
    return delivered, others


def store_identity(params: Params) -> str:
    """The server of `trunkline up` and the store behind it are the same one."""
    uri = tracking_uri(params)
    own = f"http://{params.services.host}:{params.services.mlflow_port}"
    return stores.identity(_absolute(params.tracking.uri) if uri.rstrip("/") == own else uri)


# ---- the store ---------------------------------------------------------------------------------------------


def tracking_uri(params: Params) -> str:
    """`MLFLOW_TRACKING_URI`, or the one in params, a relative SQLite path made absolute in the home clone."""
    return _absolute(os.environ.get("MLFLOW_TRACKING_URI") or params.tracking.uri)


def _absolute(uri: str) -> str:
    if uri.startswith(SQLITE) and not uri.startswith(SQLITE + "/"):
        return SQLITE + str(paths.home() / uri.removeprefix(SQLITE))
    return uri


def artifact_root(params: Params) -> str:
    """Where files of new experiments lie when the store is a database: an absolute path or a bucket's URI."""
    place = params.tracking.artifacts
    return place if "://" in place else str(paths.home() / place)


def client(params: Params) -> Any:
    """`MlflowClient` of the tracking store, whose schema exists.

    Raises:
        StoreAway: the store does not answer now.
        ResourceError: the store cannot be used.
    """
    uri = tracking_uri(params)
    os.environ["MLFLOW_TRACKING_URI"] = uri
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    # MLflow's own patience is several minutes per call
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", str(params.tracking.timeout_s))
    connected = _client(uri)
    import mlflow

    if mlflow.get_tracking_uri() != uri:  # some calls of MLflow know the global store only
        mlflow.set_tracking_uri(uri)
    return connected


@functools.cache
def _client(uri: str) -> Any:
    os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")
    import mlflow

    # it logs every database error with a stack trace and raises it all the same: whoever catches it says it
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)
    try:
        stores.probe(uri)
        # processes that meet an empty database all fail in its migration: one creates, the others wait
        with _exclusive("tracking"), stores.alone_with_schema(uri):
            mlflow.set_tracking_uri(uri)
            connected = mlflow.MlflowClient(uri)
            connected.search_experiments(max_results=1)
    except Exception as error:
        explained = explain(error)
        if explained is not None and explained is not error:
            raise explained from None
        reason = str(error).partition("[SQL:")[0]
        raise (StoreAway if _is_absence(error, uri) else ResourceError)(
            f"the MLflow store {stores.shown(uri)} cannot be used: "
            f"{stores.without_password(' '.join(reason.split()), uri)[:300]}; "
            "correct `tracking.uri` in params.yaml or MLFLOW_TRACKING_URI"
        ) from error
    return connected


def _is_absence(error: BaseException, uri: str) -> bool:
    """Whether the store may take the same call later, as opposed to a mistake."""
    if isinstance(error, StoreAway):
        return True
    text = str(error)
    if not stores.is_server(uri) or any(words in text for words in ("SSLError", "NameResolutionError")):
        return stores.is_postgres(uri) and getattr(error, "error_code", "") == "TEMPORARILY_UNAVAILABLE"
    code = getattr(error, "error_code", "")
    return code == "TEMPORARILY_UNAVAILABLE" or (
        text.startswith("API request to")
        and any(words in text for words in ("Max retries", "timeout", "onnection"))
    )


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
            location = None if stores.is_server(client.tracking_uri) else f"{artifacts}/{name}"
            return str(client.create_experiment(name, artifact_location=location))
        if found.lifecycle_stage == "deleted":
            client.restore_experiment(found.experiment_id)
        return str(found.experiment_id)


# ---- runs --------------------------------------------------------------------------------------------------


@contextmanager
def stage_run(stage: str, cell: str | None, params: Params) -> Iterator[Run]:
    """The run of one stage execution. If the store is away, the stage begins all the same: its run is made
    later."""
    if int(os.environ.get("RANK", "0")) != 0 or os.environ.get("TRUNKLINE_TRACKING") == "off":
        yield Run()
        return
    parent = os.environ.get(PARENT_VARIABLE, "")
    tags = {"trunkline.stage": f"{stage}@{cell}" if cell else stage, **provenance_tags()}
    if parent:
        tags["trunkline.pipeline_run"] = parent
    create = {"kind": stage, "name": cell or stage, "tags": tags, "time": int(time.time() * 1000)}
    if cell:
        create["group"] = parent or _origin(params)
    with _ended(MlflowRun(params, create=create)) as run:
        run.log_params(params.model_dump())
        yield run


def _make_run(params: Params, connection: Any, create: Mapping[str, Any], name: str, again: bool) -> str:
    """The run that `create` describes; with `again` the one that an earlier attempt may have made already."""
    kind = create["kind"]
    experiment = _experiment_id(connection, f"{params.tracking.experiment}/{kind}", artifact_root(params))
    if again and (
        found := connection.search_runs([experiment], f"tags.`{SPOOL_TAG}` = '{name}'", max_results=1)
    ):
        return str(found[0].info.run_id)
    tags = {**create["tags"], SPOOL_TAG: name}
    if group := create.get("group"):
        with _exclusive("tracking"):
            tags["mlflow.parentRunId"] = _group_run(connection, experiment, kind, group)
    made = connection.create_run(experiment, start_time=create["time"], run_name=create["name"], tags=tags)
    return str(made.info.run_id)


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
def pipeline_run(
    params: Params, name: str, tags: Mapping[str, str], experiment: str = "pipeline"
) -> Iterator[MlflowRun]:
    """The run of something that needs the store anyway, such as a pipeline: it has to answer at the start."""
    create = {
        "kind": experiment,
        "name": name,
        "tags": {**provenance_tags(), **tags},
        "time": int(time.time() * 1000),
    }
    with _ended(MlflowRun(params, create=create, at_once=True)) as run:
        run.log_params(params.model_dump())
        yield run


@contextmanager
def continued_run(
    params: Params, kind: str, name: str, tags: Mapping[str, str], run_id: str = ""
) -> Iterator[MlflowRun]:
    """A run of experiment `kind` that a later attempt goes on with: `run_id` if the store has it, else a new
    one."""
    connection = client(params)
    experiment = _experiment_id(connection, f"{params.tracking.experiment}/{kind}", artifact_root(params))
    known = run_id and connection.search_runs([experiment], f"attributes.run_id = '{run_id}'", max_results=1)
    told = {**provenance_tags(), **tags}  # from the first moment: by them a killed attempt's run is found
    create = {"kind": kind, "name": name, "tags": told, "time": int(time.time() * 1000)}
    with _ended(MlflowRun(params, run_id if known else "", create, at_once=True)) as run:
        connection.update_run(run.run_id, status="RUNNING")
        run.set_tags(told)
        yield run


def find_run(params: Params, kind: str, tags: Mapping[str, str]) -> str:
    """The newest run of experiment `kind` with these tags; empty if there is none."""
    connection = client(params)
    experiment = _experiment_id(connection, f"{params.tracking.experiment}/{kind}", artifact_root(params))
    wanted = " and ".join(f"tags.`{key}` = '{value}'" for key, value in tags.items())
    found = connection.search_runs([experiment], wanted, max_results=1)
    return str(found[0].info.run_id) if found else ""


def read_run(params: Params, run_id: str) -> tuple[str, Mapping[str, str]] | None:
    """Status and tags of a run; None when the store has no such run."""
    from mlflow.exceptions import MlflowException

    try:
        found = client(params).get_run(run_id)
    except MlflowException as error:
        if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            return None
        raise
    return str(found.info.status), dict(found.data.tags)


def close_abandoned_runs(params: Params, parent: str) -> int:
    """Mark the runs a killed stage left RUNNING under pipeline run `parent` as KILLED; returns how many."""
    try:
        connection = client(params)
    except StoreAway:
        return 0  # their spools end them
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
    if (manifest := paths.TEXT / "manifest.json").is_file():
        tags["text.digest"] = files.read_json(manifest)["digest"]
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
