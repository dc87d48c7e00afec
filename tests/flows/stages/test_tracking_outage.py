"""A real MLflow server is killed while a real stage trains: training does not notice, the record is whole."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import training_workspace
from training_workspace import STEPS, Attempt, weights

from flows import ports, services
from flows.supervisor import fetch

PATIENCE_S = 180.0
LOGGED = [*range(3, STEPS + 1, 3)]


class Server:
    """`mlflow server` on SQLite; the same port and database every time it starts."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.port = folder, ports.free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        arguments = ["--default-artifact-root", str(self.folder / "files"), "--no-serve-artifacts"]
        self.process = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "mlflow",
                "server",
                "--port",
                str(self.port),
                "--workers",
                "1",
                *arguments,
            ],
            cwd=self.folder,
            env={
                **os.environ,
                "MLFLOW_TRACKING_URI": "",
                "MLFLOW_BACKEND_STORE_URI": f"sqlite:///{self.folder}/mlflow.db",
                **services.MLFLOW_QUIET,
            },
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        deadline = time.monotonic() + PATIENCE_S
        while True:
            try:
                fetch(f"{self.url}/health")
                return
            except OSError:
                assert self.process.poll() is None, "the server ended by itself"
                assert time.monotonic() < deadline, "the server does not answer"
                time.sleep(0.2)

    def kill(self) -> None:
        if self.process is not None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self.process = None

    def runs(self) -> list[Any]:
        import mlflow

        client = mlflow.MlflowClient(self.url)
        experiment = client.get_experiment_by_name("trunkline/pretrain")
        return list(client.search_runs([experiment.experiment_id])) if experiment else []

    def steps(self, run_id: str, key: str) -> list[int]:
        import mlflow

        return [point.step for point in mlflow.MlflowClient(self.url).get_metric_history(run_id, key)]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    made = Server(tmp_path_factory.mktemp("server"))
    made.start()
    yield made
    made.kill()


def begin(server: Server, ingested: Path, target: Path, patience_s: float) -> tuple[Path, Attempt]:
    workspace = training_workspace.copy(ingested, target, {"tracking": {"patience_s": patience_s}})
    return workspace, Attempt(workspace, "pretrain", TRUNKLINE_TRACKING="on", MLFLOW_TRACKING_URI=server.url)


def assert_recorded_once(server: Server, run: Any) -> None:
    assert run.info.status == "FINISHED"
    for key in ("train_loss", "lr", "grad_norm"):
        assert server.steps(run.info.run_id, key) == LOGGED
    assert server.steps(run.info.run_id, "val_loss") == [*range(24, STEPS + 1, 24)]
    assert run.data.params["pretrain.training.steps"] == str(STEPS)


def test_a_server_killed_in_mid_training_and_back_has_every_step_once(
    server: Server, ingested: Path, tmp_path: Path
) -> None:
    """Compared with a training that logs nothing at all."""
    undisturbed = training_workspace.copy(ingested, tmp_path / "undisturbed")
    quiet = Attempt(undisturbed, "pretrain")
    workspace, training = begin(server, ingested, tmp_path / "disturbed", PATIENCE_S)
    try:
        training.wait_for_step(9)
        server.kill()
        training.wait_for(f" step {STEPS}/{STEPS}  loss")  # it does not wait for the server
        server.start()
        assert training.wait() == 0, training.output
        assert quiet.wait() == 0, quiet.output
    finally:
        training.close()
        quiet.close()
    assert training.output.count("does not answer") == training.output.count("is back") == 1
    assert "Traceback" not in training.output
    assert weights(workspace) == weights(undisturbed)
    [run] = server.runs()
    assert_recorded_once(server, run)
    assert not any((workspace / ".trunkline/spool").iterdir())


def test_a_server_that_stays_away_gets_the_record_from_sync(
    server: Server, ingested: Path, tmp_path: Path
) -> None:
    known = {run.info.run_id for run in server.runs()}
    workspace, training = begin(server, ingested, tmp_path / "disturbed", 1.0)
    try:
        training.wait_for_step(9)
        server.kill()
        assert training.wait() == 0, training.output
    finally:
        training.close()
    assert "`trunkline sync` delivers it" in training.output
    sync = [sys.executable, "-m", "flows.cli", "sync"]
    variables = training_workspace.environment(workspace, MLFLOW_TRACKING_URI=server.url)
    answer = subprocess.run(sync, cwd=workspace, env=variables, capture_output=True, text=True)
    assert answer.returncode == 74
    assert answer.stderr.startswith(f"error: the MLflow store {server.url} cannot be used")
    server.start()
    answer = subprocess.run(sync, cwd=workspace, env=variables, capture_output=True, text=True)
    assert (answer.returncode, answer.stdout) == (0, "runs delivered: 1\n"), answer
    [run] = [run for run in server.runs() if run.info.run_id not in known]
    assert_recorded_once(server, run)
    answer = subprocess.run(sync, cwd=workspace, env=variables, capture_output=True, text=True)
    assert answer.stdout == "nothing to deliver\n"
