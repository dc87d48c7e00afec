"""The sweep flow on a clone of one-line stages: once each, continued after a kill, failures as rows."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import tiny_clone
import yaml

from flows import files, sweep, tracking
from flows.errors import ResourceError, TrunklineError
from flows.params import Params
from flows.sweeps import planned, summary
from flows.sweeps.results import Row

ROOT = Path(__file__).resolve().parents[2]
GRID = {"grid": {"pretrain.mask_ratio": [0.25, 0.5], "seed": [0, 1]}}

# the tiny clone's pretrain stage, with a result that depends on its params, and a fault on demand
SCRIPT = """
value() { grep -E "^ *$1:" params.yaml | head -1 | sed 's/.*: *//; s/ *#.*//'; }
echo "$1 $(value mask_ratio) $(value seed)" >> "$TRUNKLINE_HOME/all"
if test -f "$TRUNKLINE_HOME/$1.sh"; then . "$TRUNKLINE_HOME/$1.sh"; fi
"""
RESULT = """echo "{\\"top1\\": $(value mask_ratio), \\"seed\\": $(value seed)}" > artifacts/metrics/$1.json"""


@pytest.fixture
def clone(home: Path, prefect_server: None, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(sweep.run_stages, "retry_delay_seconds", [0, 0])
    tiny_clone.build(home)
    script = home / "flows/stage.sh"
    old = "echo '{\"top1\": 0.5}' > artifacts/metrics/$1.json"
    assert old in script.read_text()
    script.write_text(SCRIPT + script.read_text().replace(old, RESULT))
    write_sweep(home, GRID)
    return home


def write_sweep(clone: Path, said: dict[str, Any], name: str = "mine") -> None:
    text = yaml.safe_dump({"metric": "pretrain.top1", **said}, sort_keys=False)
    (clone / f"{name}.yaml").write_text(text)


def executed(clone: Path) -> list[str]:
    """Stage, mask ratio and seed of everything that has run anywhere."""
    path = clone / "all"
    return path.read_text().splitlines() if path.is_file() else []


def rows(answer: dict[str, Any]) -> list[Row]:
    return summary.read_results(Path(answer["folder"]))[1]


def mlflow_runs(checked: Params) -> tuple[Any, dict[str, Any]]:
    """The sweep's run and those of its points, by name."""
    connection = tracking.client(checked)
    experiment = connection.get_experiment_by_name("trunkline/sweep")
    found = connection.search_runs([experiment.experiment_id])
    parents = [run for run in found if "mlflow.parentRunId" not in run.data.tags]
    assert len(parents) == 1
    nested = {run.info.run_name: run for run in found if run is not parents[0]}
    assert len(nested) == len(found) - 1
    assert {run.data.tags["mlflow.parentRunId"] for run in nested.values()} <= {parents[0].info.run_id}
    return parents[0], nested


def test_points_run_once_and_what_they_share_runs_once(clone: Path, home_params: Params) -> None:
    before = (clone / "params.yaml").read_bytes()
    first = sweep.sweep("mine.yaml", parallel=4)
    ran = executed(clone)
    assert sorted(line.split()[0] for line in ran) == ["ingest", *["pretrain"] * 4]
    assert len(set(ran)) == 5, "points that start together compute ingest once"
    assert first["counts"]["done"] == 4
    found = rows(first)
    assert [row.value for row in found] == [0.5, 0.5, 0.25, 0.25], "best first"
    assert {row.status for row in found} == {"done"}
    assert found[0].metrics["pretrain.top1"] == 0.5
    assert found[0].stage_runs == {"ingest": "run-ingest", "pretrain": "run-pretrain"}
    assert (clone / "params.yaml").read_bytes() == before
    assert not (clone / "artifacts").exists(), "the clone itself is not touched"

    run, nested = mlflow_runs(home_params)
    assert (run.info.run_id, run.info.status) == (first["run_id"], "FINISHED")
    assert run.data.metrics["best pretrain.top1"] == 0.5
    assert set(nested) == {row.name for row in found}
    best = nested[found[0].name]
    assert (best.info.run_id, best.info.status) == (found[0].run_id, "FINISHED")
    assert best.data.metrics["pretrain.top1"] == 0.5
    assert best.data.params["pretrain.mask_ratio"] == "0.5"
    assert best.data.tags["stage.pretrain"] == "run-pretrain"
    names = {entry.path for entry in tracking.client(home_params).list_artifacts(run.info.run_id)}
    assert names == {"results.csv", "results.json", "parallel_coordinates.png", "sweep.html"}
    assert {path.name for path in Path(first["folder"]).iterdir()} == names | {"logs"}

    second = sweep.sweep("mine.yaml")
    assert executed(clone) == ran
    assert (second["executed"], len(second["known"])) == ([], 4)
    assert (second["run_id"], second["folder"]) == (first["run_id"], first["folder"])
    assert rows(second) == found
    assert set(mlflow_runs(home_params)[1]) == set(nested), "nothing is recorded twice"


def test_outputs_are_dropped_and_come_back(clone: Path) -> None:
    write_sweep(clone, {"grid": {"pretrain.mask_ratio": [0.25]}})
    root = Path(rows(sweep.sweep("mine.yaml"))[0].workspace)
    assert not (root / "artifacts/data").exists()
    assert (root / "artifacts/metrics/pretrain.json").is_file()
    ran = executed(clone)
    subprocess.run([sys.executable, "-m", "dvc", "repro", "-q", "pretrain"], cwd=root, check=True)
    assert (root / "artifacts/pretrain/result.txt").read_text() == "pretrain\n"
    assert executed(clone) == ran, "restored, not computed"


def test_a_longer_sweep_runs_only_what_is_new(clone: Path) -> None:
    said = {"random": {"pretrain.mask_ratio": {"uniform": [0.2, 0.8]}}, "samples": 2}
    write_sweep(clone, said)
    first = sweep.sweep("mine.yaml")
    known = rows(first)
    write_sweep(clone, {**said, "samples": 3})
    second = sweep.sweep("mine.yaml")
    assert second["folder"] == first["folder"]
    assert second["executed"] == ["pretrain"]
    assert {row.name for row in known} < {row.name for row in rows(second)}
    assert len(executed(clone)) == 1 + 3

    # points belong to their settings, not to the file that asked for them
    write_sweep(
        clone, {"grid": {"pretrain.mask_ratio": [known[0].settings["pretrain.mask_ratio"], 0.9]}}, "b"
    )
    third = sweep.sweep("b.yaml")
    assert third["executed"] == ["pretrain"]
    assert third["folder"] != first["folder"]


def test_a_record_holds_only_for_what_it_was_made_from(clone: Path) -> None:
    from flows.sweeps import plan

    write_sweep(clone, {"grid": {"pretrain.mask_ratio": [0.25]}})
    sweep.sweep("mine.yaml")
    lock = planned.prepare("mine.yaml").points[0].root / "dvc.lock"
    changes = {
        clone / "flows/stage.sh": ("", "\n"),
        clone / "params.yaml": ("split_seed: 0", "split_seed: 1"),
        clone / "constraints.txt": ("", " "),
        lock: ("pretrain:", "pretrained:"),
    }
    for path, (old, new) in changes.items():
        plan._digest.cache_clear()
        assert planned_known(clone) == 1
        text = path.read_text()
        path.write_text(text.replace(old, new) if old else text + new)
        plan._digest.cache_clear()
        assert planned_known(clone) == 0, path
        path.write_text(text)


def planned_known(clone: Path) -> int:
    found = planned.prepare("mine.yaml")
    return sum(found.known_row(point).status == "done" for point in found.points)


def test_a_failing_point_is_a_row_with_its_reason(clone: Path, home_params: Params) -> None:
    """Diverged and contradictory points; the sweep goes on, and does not try in vain again."""
    (clone / "pretrain.sh").write_text(
        'test "$(value seed)" = 0 || { echo "error: pretrain: the loss is not finite" >&2; exit 12; }\n'
    )
    write_sweep(
        clone, {"grid": {"seed": [0, 1], "ingest.val_fraction": [0.15, 0.9], "pretrain.mask_ratio": [0.25]}}
    )
    first = sweep.sweep("mine.yaml")
    assert first["counts"] == {"done": 1, "failed": 1, "impossible": 2, "stopped": 0, "waiting": 0}
    found = {row.status: row for row in rows(first)}
    assert found["failed"].reason == "pretrain: the loss is not finite"
    assert "val_fraction" in found["impossible"].reason
    run, nested = mlflow_runs(home_params)
    assert run.info.status == "FINISHED"
    assert nested[found["failed"].name].info.status == "FAILED"

    summary.refuse_failures(first, strict=False)
    with pytest.raises(TrunklineError, match="3 of 4 points failed"):
        summary.refuse_failures(first, strict=True)

    (clone / "pretrain.sh").unlink()
    assert sweep.sweep("mine.yaml")["executed"] == [], "it would diverge again"
    again = sweep.sweep("mine.yaml", retry_failed=True)
    assert again["executed"] == ["pretrain"]
    assert again["counts"]["failed"] == 0
    assert mlflow_runs(home_params)[1][found["failed"].name].info.status == "FINISHED"


def test_a_failing_shared_stage_fails_its_points_once(clone: Path) -> None:
    (clone / "ingest.sh").write_text("exit 10\n")
    answer = sweep.sweep("mine.yaml")
    assert answer["counts"]["failed"] == 4
    assert len(executed(clone)) == 1
    assert all(row.reason.startswith("ingest, which 4 points share") for row in rows(answer))
    with pytest.raises(TrunklineError, match="4 of 4"):
        summary.refuse_failures(answer, strict=False)


def test_a_killed_stage_is_tried_again_within_the_sweep(clone: Path) -> None:
    (clone / "pretrain.sh").write_text(
        'test -e "$TRUNKLINE_HOME/killed" || { touch "$TRUNKLINE_HOME/killed"; kill -KILL $$; }\n'
    )
    write_sweep(clone, {"grid": {"pretrain.mask_ratio": [0.25]}})
    assert sweep.sweep("mine.yaml")["counts"]["done"] == 1
    assert len(executed(clone)) == 3


def test_a_metric_that_is_not_there_is_named(clone: Path) -> None:
    write_sweep(clone, {"metric": "pretrain.top5", "grid": {"pretrain.mask_ratio": [0.25]}})
    (row,) = rows(sweep.sweep("mine.yaml"))
    assert row.status == "failed"
    assert "pretrain.top5" in row.reason
    assert "pretrain.top1" in row.reason
    write_sweep(clone, {"grid": {"pretrain.mask_ratio": [0.25]}})
    assert sweep.sweep("mine.yaml")["executed"] == [], "its results are those of another metric, too"


def test_a_store_that_fails_in_mid_sweep_loses_no_result(
    clone: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object) -> str:
        raise ConnectionError("the server is away")

    found = tracking.find_run
    monkeypatch.setattr(
        tracking, "find_run", lambda p, k, tags: fail() if "trunkline.point" in tags else found(p, k, tags)
    )
    write_sweep(clone, {"grid": {"pretrain.mask_ratio": [0.25]}})
    answer = sweep.sweep("mine.yaml")
    assert answer["counts"]["done"] == 1
    assert [row.run_id for row in rows(answer)] == [""]


def test_gpus_are_dealt_out_by_place() -> None:
    assert sweep.gpus_of(0, 0) == {}
    assert sweep.gpus_of(0, 1) == {"CUDA_VISIBLE_DEVICES": "0"}
    assert sweep.gpus_of(3, 2) == {"CUDA_VISIBLE_DEVICES": "6,7"}


def test_a_workspace_that_is_busy_is_waited_for_and_a_second_sweep_refused(clone: Path) -> None:
    from flows import workspace

    folder = planned.prepare("mine.yaml").folder
    folder.mkdir(parents=True)
    with workspace.alone_in(folder), pytest.raises(ResourceError, match="another run is active"):
        sweep.sweep("mine.yaml")
    asked: list[int] = []

    def patience() -> bool:
        asked.append(1)
        return len(asked) < 3

    with workspace.alone_in(folder), pytest.raises(ResourceError), workspace.alone_in(folder, patience):
        pass
    assert len(asked) == 3


# ---- as processes ----

FLOW = """
from flows import environment
environment.interrupt_on_sigterm()  # as the command does
from flows import sweep
from flows.errors import Interrupted
try:
    sweep.sweep("mine.yaml", parallel=2)
except KeyboardInterrupt:
    raise SystemExit(Interrupted.exit_code)
"""


@pytest.fixture
def start(clone: Path) -> Any:
    """The flow as a process of its own, ended in the end."""
    from prefect.settings import PREFECT_API_URL

    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "TRUNKLINE_HOME": str(clone),
        "PREFECT_API_URL": str(PREFECT_API_URL.value()),
    }
    started: list[subprocess.Popen[bytes]] = []

    def run() -> subprocess.Popen[bytes]:
        log = open(clone / "log", "ab")  # noqa: SIM115  # the process has it
        started.append(
            subprocess.Popen([sys.executable, "-c", FLOW], cwd=clone, env=environment, stdout=log, stderr=log)
        )
        return started[-1]

    yield run
    for process in started:
        process.kill()
        process.wait()


# waits at the first point only, so that the other one is finished; dies with the flow as real stages do
SLOW = """
if test "$(value mask_ratio)" = 0.25 && ! test -e "$TRUNKLINE_HOME/go"; then
  trap 'touch "$TRUNKLINE_HOME/saved"; exit 75' TERM
  echo $$ >> "$TRUNKLINE_HOME/pids"
  while kill -0 $TRUNKLINE_FLOW_PID 2>/dev/null; do sleep 0.1; done
  sleep 1; touch "$TRUNKLINE_HOME/saved"; exit 75
fi
"""


def wait_until(true: Callable[[], bool], process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 120
    while not true():
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.1)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_sweep_that_ends_in_the_middle_is_continued(
    how: signal.Signals, clone: Path, start: Callable[[], subprocess.Popen[bytes]], home_params: Params
) -> None:
    write_sweep(clone, {"grid": {"pretrain.mask_ratio": [0.25, 0.5, 0.75]}})
    (clone / "pretrain.sh").write_text(SLOW)
    process = start()
    wait_until(lambda: (clone / "pids").exists() and planned_done(clone) == 2, process, clone / "log")
    process.send_signal(how)
    code = process.wait(100)
    assert code == (-9 if how == signal.SIGKILL else 75), (clone / "log").read_text()
    if how != signal.SIGKILL:
        assert (clone / "saved").exists(), "the stage was asked to stop and wrote its checkpoint"
        assert not any(psutil.pid_exists(int(pid)) for pid in (clone / "pids").read_text().split())
        run, _ = mlflow_runs(home_params)
        assert run.info.status == "KILLED"
        statuses = [p["status"] for p in files.read_json(results_of(clone))["points"]]
        assert sorted(statuses) == ["done", "done", "stopped"]

    # at once, although what the killed one left is still ending: its lock is waited for
    (clone / "go").touch()
    before = executed(clone)
    answer = sweep.sweep("mine.yaml")
    assert answer["counts"]["done"] == 3
    assert len(answer["known"]) == 2
    assert executed(clone) == [*before, "pretrain 0.25 0"], "only the interrupted stage ran again"
    assert (clone / "saved").exists()
    run, nested = mlflow_runs(home_params)
    assert run.info.status == "FINISHED"
    assert len(nested) == 3


def planned_done(clone: Path) -> int:
    path = results_of(clone)
    return sum(p["status"] == "done" for p in files.read_json(path)["points"]) if path.is_file() else 0


def results_of(clone: Path) -> Path:
    return next(iter((clone / ".trunkline/sweeps").glob("*/results.json")), Path())


def test_a_single_point_killed_from_outside_does_not_disturb_the_others(
    clone: Path, start: Callable[[], subprocess.Popen[bytes]]
) -> None:
    text = (clone / "params.yaml").read_text()
    (clone / "params.yaml").write_text(text.replace("retries: 2", "retries: 0"))
    write_sweep(clone, {"grid": {"pretrain.mask_ratio": [0.25, 0.5]}})
    (clone / "pretrain.sh").write_text(SLOW)
    process = start()
    wait_until((clone / "pids").exists, process, clone / "log")
    os.kill(int((clone / "pids").read_text().split()[0]), signal.SIGKILL)
    assert process.wait(100) == 0, (clone / "log").read_text()
    found = files.read_json(results_of(clone))["points"]
    assert [point["status"] for point in found] == ["done", "failed"]
    (clone / "go").touch()
    answer = sweep.sweep("mine.yaml")
    assert answer["executed"] == ["pretrain"], "a kill is no verdict on the settings: it runs again"
    assert answer["counts"]["done"] == 2
