"""The real Prefect flow on a clone of one-line stages; only what follows the stages is replaced."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny_clone

from flows import decision, files, paths, pipeline, registration, smoke, tracking, workspace
from flows.decision import Decision
from flows.dvc_stage import StageFailed
from flows.gates import Gate
from flows.params import Params
from flows.registry import Version

ROOT = Path(__file__).resolve().parents[2]
ORDER = ["ingest", "pretrain", "finetune-scratch", "parity"]


@pytest.fixture
def clone(home: Path, prefect_server: None, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A clone whose pipeline runs at once and delivers to a registry in memory."""
    champion = Version("trunkline-vision-digits", "1", ("champion",), {"onnx.digest": "abc"}, "nowhere")
    made = Decision(champion, (Gate("quality", True, "fine"),), True, champion, "all gates passed")

    def report(root: Path, extra: dict[str, Any]) -> Path:
        files.write_json(root / paths.REPORT, extra)
        return root / paths.REPORT

    monkeypatch.setattr(registration, "register_export", lambda params, root, run: champion)
    monkeypatch.setattr(decision, "choose", lambda params, name, version: champion)
    monkeypatch.setattr(decision, "decide", lambda params, root, version, **options: made)
    monkeypatch.setattr(smoke, "smoke_test", lambda params, root, version: smoke.SmokeResult(8, 7, 1.0))
    monkeypatch.setattr(pipeline, "build_report", report)
    monkeypatch.setattr(pipeline.run_stage, "retry_delay_seconds", [0, 0])
    return tiny_clone.build(home)


def stages(summary: dict[str, Any]) -> dict[str, str]:
    return {outcome["stage"]: outcome["status"] for outcome in summary["stages"]}


def recorded(checked: Params) -> Any:
    """The newest run of the pipeline in MLflow."""
    connection = tracking.client(checked)
    experiment = connection.get_experiment_by_name("trunkline/pipeline")
    return connection.search_runs(
        [experiment.experiment_id], order_by=["attributes.start_time DESC"], max_results=1
    )[0]


def test_a_run_executes_every_stage_and_the_next_none(clone: Path, home_params: Params) -> None:
    first = pipeline.pipeline()
    assert tiny_clone.executed(clone) == ORDER
    assert set(stages(first).values()) == {"executed"}
    assert first["executed"] == ["ingest", "pretrain", "finetune@scratch", "parity"]
    assert first["metrics"]["pretrain"] == {"top1": 0.5}
    assert first["registry"]["aliases"] == ["champion"]
    assert first["registry"]["gates"] == [
        {"name": "quality", "passed": True, "reason": "fine", "figures": {}}
    ]
    assert first["smoke"] == {"images": 8, "correct": 7, "seconds": 1.0}
    assert {outcome["receipt"]["run_id"] for outcome in first["stages"]} == {f"run-{name}" for name in ORDER}

    run = recorded(home_params)
    assert (run.info.run_id, run.info.status) == (first["run_id"], "FINISHED")
    assert run.data.metrics["pretrain.top1"] == 0.5
    assert run.data.metrics["stages_executed"] == 4
    assert run.data.tags["dvc.lock_sha256"] == files.sha256_file(clone / "dvc.lock")
    assert run.data.tags["data.digest"] == "d"
    assert run.data.tags["prefect.flow_run_id"]
    artifacts = {entry.path for entry in tracking.client(home_params).list_artifacts(run.info.run_id)}
    assert artifacts == {"dvc.lock", "manifest.json", "params.yaml", "report.html"}
    told = files.read_json(clone / paths.REPORT)
    assert told["registry"]["version"] == "1"
    assert told["executed"] == first["executed"]

    second = pipeline.pipeline()
    assert tiny_clone.executed(clone) == ORDER, "nothing ran again"
    assert set(stages(second).values()) == {"unchanged"}
    assert second["executed"] == []
    assert second["run_id"] != first["run_id"]
    again = subprocess.run(
        [sys.executable, "-m", "dvc", "repro"], cwd=clone, capture_output=True, text=True, check=True
    )
    assert "Data and pipelines are up to date" in again.stdout
    assert tiny_clone.executed(clone) == ORDER


def test_a_failing_stage_stops_what_needs_it_and_is_not_tried_again(clone: Path, home_params: Params) -> None:
    (clone / "finetune-scratch.sh").write_text("echo 'error: finetune@scratch: gate failed' >&2; exit 10\n")
    with pytest.raises(StageFailed) as caught:
        pipeline.pipeline()
    assert caught.value.exit_code == 10
    assert str(caught.value).startswith("finetune@scratch: gate failed")
    ran = tiny_clone.executed(clone)
    assert ran.count("finetune-scratch") == 1
    assert "parity" not in ran
    assert recorded(home_params).info.status == "FAILED"

    (clone / "finetune-scratch.sh").unlink()
    repaired = stages(pipeline.pipeline())
    assert repaired["ingest"] == repaired["pretrain"] == "unchanged", "what was done stays done"
    assert repaired["finetune@scratch"] == repaired["parity"] == "executed"


def test_a_stage_killed_once_is_tried_again(clone: Path) -> None:
    (clone / "pretrain.sh").write_text("test -e killed || { touch killed; kill -KILL $$; }\n")
    summary = pipeline.pipeline()
    assert tiny_clone.executed(clone).count("pretrain") == 2
    assert stages(summary)["pretrain"] == "executed"
    assert len(summary["executed"]) == 4


def test_retries_end(clone: Path) -> None:
    root = workspace.prepare(settings=["pipeline.retries=1"]).root
    (root / "ingest.sh").write_text("kill -KILL $$\n")
    with pytest.raises(StageFailed) as caught:
        pipeline.pipeline(settings=["pipeline.retries=1"])
    assert caught.value.exit_code == 137
    assert tiny_clone.executed(root) == ["ingest", "ingest"]
    assert tiny_clone.executed(clone) == [], "overrides run in a folder of their own"


def test_without_labels_it_ends_with_pretraining(clone: Path) -> None:
    tiny_clone.build(clone, classes="[]")
    summary = pipeline.pipeline()
    assert stages(summary) == {"ingest": "executed", "pretrain": "executed"}
    assert tiny_clone.executed(clone) == ["ingest", "pretrain"]
    assert "registry" not in summary
    assert "smoke" not in summary
    assert summary["report"] == str(clone / paths.REPORT)


FLOW = """
import os
from flows import pipeline
from flows.errors import Interrupted
try:
    pipeline.pipeline()
except KeyboardInterrupt:
    raise SystemExit(Interrupted.exit_code)
"""


def test_ctrl_c_stops_the_stage_and_nothing_is_tried_again(clone: Path, home_params: Params) -> None:
    """SIGINT to the flow alone: the stage does not get it from the terminal."""
    from prefect.settings import PREFECT_API_URL

    (clone / "pretrain.sh").write_text(
        "trap 'touch saved; exit 75' TERM; echo $$ > pid; touch begun; while :; do sleep 0.1 || true; done\n"
    )
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "TRUNKLINE_HOME": str(clone),
        "PREFECT_API_URL": str(PREFECT_API_URL.value()),
    }
    with open(clone / "log", "w") as log:
        flow = subprocess.Popen(
            [sys.executable, "-c", FLOW], cwd=clone, env=environment, stdout=log, stderr=log
        )
        try:
            wait_for(clone / "begun", flow)
            flow.send_signal(signal.SIGINT)
            assert flow.wait(100) == 75, (clone / "log").read_text()
        finally:
            flow.kill()
    assert (clone / "saved").exists(), "the stage was asked to stop and wrote its checkpoint"
    assert tiny_clone.executed(clone).count("pretrain") == 1
    assert not Path(f"/proc/{(clone / 'pid').read_text().strip()}").exists()
    assert recorded(home_params).info.status == "KILLED"


def wait_for(path: Path, process: subprocess.Popen[bytes]) -> None:
    import time

    while not path.exists():
        assert process.poll() is None, "ended before"
        time.sleep(0.1)


def test_a_smoke_run_promotes_and_announces_nothing_and_a_control_may_be_left_out(
    clone: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (clone / "dvc.yaml").write_text(
        tiny_clone.STAGES.replace("artifacts/finetune/scratch]", "artifacts/data]")
    )

    def refuse(*arguments: Any, **options: Any) -> None:
        raise AssertionError("a smoke run asks for no promotion and tells nobody")

    monkeypatch.setattr(decision, "decide", refuse)
    monkeypatch.setattr(pipeline, "emit_event", refuse)
    summary = pipeline.pipeline(settings=["pipeline.control=false"], smoke=True)
    assert summary["smoke_run"]
    assert list(stages(summary)) == ["ingest", "pretrain", "parity"], "without finetune@scratch"
    assert summary["registry"]["promoted"] is False
    assert Path(summary["workspace"]).name.startswith("smoke-digits-")
    assert set(summary["metrics"]) == {"ingest", "pretrain", "parity"}
