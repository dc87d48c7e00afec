"""What is kept of a point that has ended: its record, its run in MLflow, its experiment in DVC."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import yaml

from flows import dvc_stage, files, paths, tracking, workspace
from flows.errors import ConfigError, Diverged, GateFailed, ResourceError
from flows.params import Params
from flows.sweeps import experiments, plan
from flows.sweeps.planned import PlannedSweep
from flows.sweeps.points import Point
from flows.sweeps.results import Row, read_metrics
from flows.tracking import MlflowRun

FINAL_EXIT_CODES = frozenset({GateFailed.exit_code, ConfigError.exit_code, Diverged.exit_code})
"""The same settings fail in the same way again."""
KEPT = (paths.METRICS, paths.RECEIPTS)


def keep_result(
    planned: PlannedSweep, point: Point, params: Params, run: MlflowRun, record_experiment: bool, log: Any
) -> Row:
    """Of a point whose stages have all run. Only the record is needed; what else fails is a warning."""
    root = point.root
    receipts = {info.name: dvc_stage.read_receipt(root, info.name) for info in planned.graph.stages}
    row = Row(
        point.name,
        point.settings,
        "done",
        metrics=read_metrics(
            root / paths.METRICS, {out for info in planned.graph.stages for out in info.outs}
        ),
        seconds=round(sum(receipt.get("duration_s", 0.0) for receipt in receipts.values()), 3),
        device_hours=round(sum(receipt.get("device_hours", 0.0) for receipt in receipts.values()), 6),
        stage_runs={stage: receipt.get("run_id", "") for stage, receipt in receipts.items() if receipt},
        workspace=str(root),
    )
    if record_experiment:
        name = f"{planned.file.name}-{point.name}"
        try:
            experiments.record(paths.home(), root, name, point.values)
            row = replace(row, experiment=name)
        except experiments.NotRecorded as error:
            log.warning("%s is not shown in `dvc exp show`: %s", point.name, error)
    row = planned.judge(_track(planned, point, params, run, row, log))
    _write(planned, point, replace(row, status="done", reason="", value=None))
    if not planned.settings.keep_files:
        drop_files(root)
    return row


def keep_failure(
    planned: PlannedSweep, point: Point, params: Params, run: MlflowRun, reason: str, exit_code: int, log: Any
) -> Row:
    row = Row(point.name, point.settings, "failed", reason, workspace=str(point.root))
    row = _track(planned, point, params, run, row, log)
    point.root.mkdir(parents=True, exist_ok=True)
    _write(planned, point, row, {"is_final": exit_code in FINAL_EXIT_CODES})
    return row


def _write(planned: PlannedSweep, point: Point, row: Row, more: Mapping[str, Any] | None = None) -> None:
    plan.write_record(point.root, planned.signatures[point.name], {**asdict(row), **(more or {})})


def _track(planned: PlannedSweep, point: Point, params: Params, run: MlflowRun, row: Row, log: Any) -> Row:
    """One nested run per point, also when the point ends a second time."""
    lock = point.root / "dvc.lock"
    tags = {
        "mlflow.parentRunId": run.run_id,
        f"trunkline.{planned.kind}": planned.folder.name,
        "trunkline.point": point.name,
        "trunkline.workspace": str(point.root),
        "trunkline.status": row.status,
        "trunkline.reason": row.reason[:4000],
        "dvc.experiment": row.experiment,
        "dvc.lock_sha256": files.sha256_file(lock) if lock.is_file() else "",
        **{f"stage.{stage.replace('@', '-')}": run_id for stage, run_id in row.stage_runs.items()},
    }
    try:
        earlier = tracking.find_run(
            params, planned.kind, {"mlflow.parentRunId": run.run_id, "trunkline.point": point.name}
        )
        with tracking.continued_run(params, planned.kind, point.name, tags, earlier) as nested:
            nested.log_params(point.values)
            nested.log_metrics(row.metrics)
        tracking.client(params).set_terminated(
            nested.run_id, "FINISHED" if row.status == "done" else "FAILED"
        )
        return replace(row, run_id=nested.run_id)
    except Exception as error:  # a store that is away for a while must not turn a result into a failure
        log.warning("%s is not recorded in MLflow: %s", point.name, " ".join(str(error).split())[:300])
        return row


def drop_files(root: Path) -> None:
    """Remove outputs that lie in DVC's cache too: copies of the data in every workspace would fill the disk.
    `dvc repro STAGE` in the workspace, like any later run there, brings them back."""
    try:
        with workspace.alone_in(root):
            for out in _cached_outputs(root):
                path = root / out
                if path.is_dir():
                    shutil.rmtree(path)
                else:
                    path.unlink(missing_ok=True)
    except ResourceError:  # another run uses them
        return


def _cached_outputs(root: Path) -> list[str]:
    locked = yaml.safe_load((root / "dvc.lock").read_text())["stages"]
    found = []
    for out in (out for stage in locked.values() for out in stage.get("outs", ())):
        path = Path(out["path"])
        kept = path.is_absolute() or ".." in path.parts or any(folder in path.parents for folder in KEPT)
        if not kept and experiments.is_cached(paths.home(), out):
            found.append(out["path"])
    return found
