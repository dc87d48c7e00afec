"""What is recorded, where, and what survives many processes at once (conventions, sections 6 and 10)."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from flows import files, params, paths, registry, tracking
from flows.errors import GateFailed, Interrupted, ResourceError, TrunklineError
from flows.params import Params
from flows.registry import Version
from flows.tracking import MlflowRun, stage_run

ROOT = Path(__file__).resolve().parents[2]
MODEL = "trunkline-vision-digits"


def runs(checked: Params, *names: str) -> list[Any]:
    """All runs of the experiments trunkline/<name>, oldest first."""
    connection = tracking.client(checked)
    found = [connection.get_experiment_by_name(f"trunkline/{name}") for name in names]
    ids = [experiment.experiment_id for experiment in found if experiment]
    return list(connection.search_runs(ids, order_by=["attributes.start_time ASC"])) if ids else []


# ---- the store ----

WRITERS = """
import os
from flows import environment
environment.prepare()
import mlflow
from flows import params, tracking
from flows.tracking import stage_run
checked = params.load()
children = []
for _ in range(4):
    pid = os.fork()
    if pid == 0:
        with stage_run("ingest", None, checked) as run:
            run.log_metrics({"loss": 1.0}, step=3)
        os._exit(0)
    children.append(pid)
raise SystemExit(sum(os.waitpid(pid, 0)[1] != 0 for pid in children))
"""


def test_four_processes_meet_an_empty_store(home: Path, home_params: Params) -> None:
    (home / "mlflow.db").unlink()
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    answer = subprocess.run(
        [sys.executable, "-c", WRITERS], cwd=home, env=environment, capture_output=True, text=True
    )
    assert answer.returncode == 0, answer.stderr
    recorded = runs(home_params, "ingest")
    assert [run.info.status for run in recorded] == ["FINISHED"] * 4
    assert [run.data.metrics for run in recorded] == [{"loss": 1.0}] * 4


@pytest.mark.parametrize("inner", ["", ".trunkline/workspaces/cifar10-1234", ".dvc/tmp/exps/tmpabc"])
def test_a_relative_store_lies_in_the_clone(
    inner: str, in_folder: Path, raw_params: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TRUNKLINE_HOME")
    folder = in_folder / inner
    folder.mkdir(parents=True, exist_ok=True)
    monkeypatch.chdir(folder)
    assert tracking.tracking_uri(params.check(raw_params, "test")) == f"sqlite:///{in_folder}/mlflow.db"


def test_the_environment_chooses_another_store(
    in_folder: Path, raw_params: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://mlflow.example:5000")
    assert tracking.tracking_uri(params.check(raw_params, "test")) == "http://mlflow.example:5000"


@pytest.mark.parametrize(
    ("uri", "reason"),
    [
        ("sqlite:///{folder}/params.yaml/mlflow.db", "File exists"),
        ("sqlite:///{folder}", "unable to open database file"),
        ("sqlite:///{folder}/params.yaml", "file is not a database"),
        ("gopher://store", "unsupported URI"),
        ("file://{folder}/mlruns", "mlflow migrate-filestore"),
        ("http://127.0.0.1:1", "Connection refused"),
    ],
)
def test_an_unusable_store_is_one_clear_line(uri: str, reason: str, home: Path, raw_params: Any) -> None:
    raw_params["tracking"]["uri"] = uri.format(folder=home)
    with pytest.raises(ResourceError) as caught:
        tracking.client(params.check(raw_params, "test"))
    message = str(caught.value)
    assert uri.format(folder=home) in message
    assert reason in message
    assert "tracking.uri" in message
    assert "\n" not in message


# ---- runs of stages ----


@pytest.mark.parametrize("variable", [("RANK", "1"), ("TRUNKLINE_TRACKING", "off")])
def test_other_ranks_log_nothing(
    variable: tuple[str, str], home: Path, home_params: Params, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(*variable)
    with stage_run("pretrain", None, home_params) as run:
        run.log_metrics({"loss": 1.0}, step=1)
        run.log_params({"a": 1})
        run.log_artifact(home / "params.yaml")
        run.set_tags({"a": "b"})
        run.flush()
    assert run.run_id == ""
    assert runs(home_params, "pretrain") == []


def test_a_run_tells_parameters_origin_and_curves(home: Path, home_params: Params, monkeypatch: Any) -> None:
    (home / "dvc.lock").write_text("schema: '2.0'\n")
    files.write_json(paths.DATA / "manifest.json", {"digest": "d" * 64})
    for arguments in (["init", "-q"], ["add", "params.yaml"], ["commit", "-qm", "first"]):
        subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@b", *arguments], cwd=home, check=True)
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=home, capture_output=True, text=True, check=True
    ).stdout.strip()
    monkeypatch.setenv(tracking.PARENT_VARIABLE, "parent")
    monkeypatch.setenv("DVC_EXP_NAME", "shy-fox")
    (home / "picture.png").write_bytes(b"png")
    with stage_run("pretrain", None, home_params) as run:
        for step in range(5):
            run.log_metrics({"loss": 1.0 / (step + 1), "step": step}, step=step)
        run.log_artifact(home / "picture.png")
    recorded = runs(home_params, "pretrain")[0]
    data = recorded.data
    assert recorded.info.status == "FINISHED"
    assert data.params["pretrain.training.lr"] == "0.001"
    assert set(params.flatten(home_params.model_dump())) == set(data.params)
    assert data.tags["git.commit"] == commit
    assert data.tags["git.dirty"] == "false"
    assert data.tags["data.digest"] == "d" * 64
    assert data.tags["dvc.lock_sha256"] == files.sha256_file(home / "dvc.lock")
    assert data.tags["dvc.experiment"] == "shy-fox"
    assert data.tags["trunkline.pipeline_run"] == "parent"
    assert data.tags["trunkline.stage"] == "pretrain"
    connection = tracking.client(home_params)
    history = connection.get_metric_history(run.run_id, "loss")
    assert [(point.step, point.value) for point in history] == [(s, 1.0 / (s + 1)) for s in range(5)]
    assert "step" not in data.metrics
    assert [entry.path for entry in connection.list_artifacts(run.run_id)] == ["picture.png"]
    assert (home / "mlartifacts" / "trunkline" / "pretrain").is_dir(), "artifacts lie in the clone"


def test_a_changed_file_makes_the_tree_dirty(home: Path) -> None:
    for arguments in (["init", "-q"], ["add", "params.yaml"], ["commit", "-qm", "first"]):
        subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@b", *arguments], cwd=home, check=True)
    (home / "params.yaml").write_text("seed: 1\n")
    assert tracking.provenance_tags()["git.dirty"] == "true"


def test_outside_git_the_commit_is_unknown(home: Path) -> None:
    assert tracking.provenance_tags() == {"git.commit": "unknown", "git.dirty": "false"}


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (ValueError("bug"), "FAILED"),
        (GateFailed("too bad"), "FAILED"),
        (Interrupted("stopped"), "KILLED"),
        (KeyboardInterrupt(), "KILLED"),
        (SystemExit(1), "KILLED"),
    ],
)
def test_an_error_ends_the_run_and_loses_no_metric(
    error: BaseException, status: str, home_params: Params
) -> None:
    def fail() -> None:
        with stage_run("scale", None, home_params) as run:
            run.log_metrics({"loss": 2.0}, step=7)
            raise error

    with pytest.raises(type(error)):
        fail()
    recorded = runs(home_params, "scale")[0]
    assert (recorded.info.status, recorded.data.metrics) == (status, {"loss": 2.0})
    assert recorded.info.end_time


def run_cells(checked: Params, cells: list[str]) -> None:
    """Cells of finetune in threads that start together, each in a run of its own."""
    errors: list[BaseException] = []

    def body(cell: str) -> None:
        try:
            with stage_run("finetune", cell, checked):
                pass
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=body, args=[cell]) for cell in cells]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors


def test_cells_that_start_at_once_share_one_group(
    home_params: Params, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(tracking.PARENT_VARIABLE, "pipeline-a")
    connection = tracking.client(home_params)

    def slowly(function: Callable[..., Any]) -> Callable[..., Any]:
        def look_then_wait(*arguments: Any, **options: Any) -> Any:
            found = function(*arguments, **options)
            time.sleep(0.3)  # the other cell would look too, before this one acts on what it saw
            return found

        return look_then_wait

    with monkeypatch.context() as patch:
        for name in ("get_experiment_by_name", "search_runs"):
            patch.setattr(connection, name, slowly(getattr(connection, name)))
        run_cells(home_params, ["pretrained", "scratch"])
    by_name = {run.info.run_name: run for run in runs(home_params, "finetune")}
    assert sorted(by_name) == ["finetune", "pretrained", "scratch"]
    group = by_name["finetune"].info.run_id
    for cell in ("pretrained", "scratch"):
        assert by_name[cell].data.tags["mlflow.parentRunId"] == group
        assert by_name[cell].data.tags["trunkline.stage"] == f"finetune@{cell}"
    assert by_name["finetune"].info.status == "FINISHED"


def test_every_pipeline_run_has_its_own_group(home_params: Params, monkeypatch: pytest.MonkeyPatch) -> None:
    for parent in ("pipeline-a", "pipeline-b"):
        monkeypatch.setenv(tracking.PARENT_VARIABLE, parent)
        run_cells(home_params, ["pretrained"])
    recorded = runs(home_params, "finetune")
    groups = {run.info.run_id for run in recorded if run.info.run_name == "finetune"}
    assert len(groups) == 2
    assert {run.data.tags.get("mlflow.parentRunId") for run in recorded} == {*groups, None}


def test_without_a_pipeline_equal_params_form_one_group(home_params: Params) -> None:
    run_cells(home_params, ["pretrained"])
    run_cells(home_params, ["scratch"])
    assert sorted(run.info.run_name for run in runs(home_params, "finetune")) == [
        "finetune",
        "pretrained",
        "scratch",
    ]


def test_an_experiment_deleted_by_hand_comes_back(home_params: Params) -> None:
    with stage_run("scale", None, home_params):
        pass
    connection = tracking.client(home_params)
    connection.delete_experiment(connection.get_experiment_by_name("trunkline/scale").experiment_id)
    with stage_run("scale", None, home_params):
        pass
    assert connection.get_experiment_by_name("trunkline/scale").lifecycle_stage == "active"


def test_runs_that_a_killed_stage_left_are_closed(
    home_params: Params, monkeypatch: pytest.MonkeyPatch
) -> None:
    with tracking.pipeline_run(home_params, "home", {"colour": "red"}) as pipeline:
        monkeypatch.setenv(tracking.PARENT_VARIABLE, pipeline.run_id)
        with stage_run("ingest", None, home_params):
            pass
        connection = tracking.client(home_params)
        experiment = connection.create_experiment("trunkline/pretrain")
        ours = connection.create_run(experiment, tags={"trunkline.pipeline_run": pipeline.run_id})
        other = connection.create_run(experiment, tags={"trunkline.pipeline_run": "another"})
        assert tracking.close_abandoned_runs(home_params, pipeline.run_id) == 1
        assert tracking.close_abandoned_runs(home_params, pipeline.run_id) == 0
    status = {run.info.run_id: run.info.status for run in runs(home_params, "ingest", "pretrain", "pipeline")}
    assert status[ours.info.run_id] == "KILLED"
    assert status[other.info.run_id] == "RUNNING"
    assert status[pipeline.run_id] == "FINISHED"
    assert sorted(status.values()) == ["FINISHED", "FINISHED", "KILLED", "RUNNING"]


def test_a_pipeline_that_fails_is_recorded_as_failed(home_params: Params) -> None:
    with pytest.raises(TrunklineError), tracking.pipeline_run(home_params, "home", {"colour": "red"}):
        raise TrunklineError("no")
    recorded = runs(home_params, "pipeline")[0]
    assert recorded.info.status == "FAILED"
    assert recorded.data.tags["colour"] == "red"
    assert recorded.data.params["seed"] == "0"


# ---- registry ----


def write_package(folder: Path, *, external: bool = False, scale: float = 1.0) -> np.ndarray:
    """A linear "network" of 3x4x4 images and 10 classes with a second variant; returns an example input."""
    rng = np.random.default_rng(0)
    weights = (scale * rng.normal(size=(48, 10))).astype(np.float32)
    graph = helper.make_graph(
        [
            helper.make_node("Flatten", ["images"], ["flat"]),
            helper.make_node("MatMul", ["flat", "weights"], ["logits"]),
        ],
        "linear",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, ["batch", 3, 4, 4])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 10])],
        [numpy_helper.from_array(weights, "weights")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    folder.mkdir()
    onnx.save_model(model, folder / "model_int8.onnx")
    if external:
        onnx.save_model(
            model,
            folder / "model.onnx",
            save_as_external_data=True,
            location="model.onnx.data",
            size_threshold=0,
        )
    else:
        onnx.save_model(model, folder / "model.onnx")
    files.write_json(folder / "manifest.json", {"weights": weights.tolist()})
    return rng.normal(size=(1, 3, 4, 4)).astype(np.float32)


def register(checked: Params, folder: Path, example: np.ndarray, digest: str = "abc") -> Version:
    with tracking.pipeline_run(checked, "home", {}) as run:
        return registry.register_folder(checked, run, MODEL, folder, example, {"onnx.digest": digest})


def hashes(folder: Path) -> dict[str, str]:
    return {path.name: files.sha256_file(path) for path in folder.iterdir() if path.is_file()}


@pytest.mark.parametrize("external", [False, True], ids=["one file", "external weights"])
def test_a_registered_folder_comes_back_byte_for_byte_and_predicts(
    external: bool, home: Path, home_params: Params
) -> None:
    import mlflow.pyfunc

    folder = home / "export"
    example = write_package(folder, external=external)
    version = register(home_params, folder, example)
    assert (version.name, version.version, version.tags) == (MODEL, "1", {"onnx.digest": "abc"})

    fetched = home / "fetched"
    fetched.mkdir()
    registry.download_version(home_params, version, fetched)
    original = hashes(folder)
    assert {name: hashes(fetched).get(name) for name in original} == original

    loaded = mlflow.pyfunc.load_model(f"models:/{MODEL}/1")
    signature = loaded.metadata.signature
    assert [spec.to_dict()["tensor-spec"] for spec in signature.inputs] == [
        {"dtype": "float32", "shape": (-1, 3, 4, 4)}
    ]
    assert signature.outputs.inputs[0].shape == (-1, 10)
    given = loaded.metadata.load_input_example(str(fetched))
    assert np.array_equal(np.asarray(given["images"], dtype=np.float32), example)
    weights = np.asarray(files.read_json(folder / "manifest.json")["weights"], dtype=np.float32)
    batch = np.concatenate([example, 2 * example, -example])
    answer = loaded.predict({"images": batch})["logits"]
    np.testing.assert_allclose(answer, batch.reshape(3, -1) @ weights, rtol=1e-5, atol=1e-5)


def test_aliases_move_and_versions_are_found(home: Path, home_params: Params) -> None:
    assert registry.versions(home_params, MODEL) == []
    assert registry.model_names(home_params) == []
    assert registry.alias(home_params, MODEL, "champion") is None
    assert registry.find_version(home_params, MODEL, "one") is None
    example = write_package(home / "first")
    write_package(home / "second", scale=2.0)
    first = register(home_params, home / "first", example, "one")
    second = register(home_params, home / "second", example, "two")
    assert [first.version, second.version] == ["1", "2"]

    registry.set_alias(home_params, MODEL, "champion", "1")
    registry.set_alias(home_params, MODEL, "challenger", "2")
    found = registry.alias(home_params, MODEL, "champion")
    assert found
    assert (found.version, found.aliases) == ("1", ("champion",))
    registry.set_alias(home_params, MODEL, "champion", "2")
    assert [entry.aliases for entry in registry.versions(home_params, MODEL)] == [
        (),
        ("challenger", "champion"),
    ]
    registry.delete_alias(home_params, MODEL, "challenger")
    assert registry.alias(home_params, MODEL, "challenger") is None
    assert registry.alias(home_params, MODEL, "Champion") is None, "aliases know upper and lower case"

    by_digest = registry.find_version(home_params, MODEL, "two")
    assert by_digest
    assert (by_digest.version, by_digest.aliases) == ("2", ("champion",))
    registry.tag_version(home_params, second, {"gate.accuracy": "passed: fine"})
    assert registry.version_of(home_params, MODEL, "2").tags["gate.accuracy"] == "passed: fine"
    assert registry.model_names(home_params) == [MODEL]


def test_the_newest_version_of_a_digest_is_found(home: Path, home_params: Params) -> None:
    example = write_package(home / "first")
    for _ in range(2):
        register(home_params, home / "first", example, "same")
    found = registry.find_version(home_params, MODEL, "same")
    assert found
    assert found.version == "2"


def test_a_folder_is_logged_under_its_name(home: Path, home_params: Params) -> None:
    write_package(home / "export")
    with tracking.pipeline_run(home_params, "home", {}) as run:
        assert isinstance(run, MlflowRun)
        run.log_artifact(home / "export")
    listed = tracking.client(home_params).list_artifacts(run.run_id, "export")
    assert sorted(Path(entry.path).name for entry in listed) == [
        "manifest.json",
        "model.onnx",
        "model_int8.onnx",
    ]
