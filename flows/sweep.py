"""The flow that tries many settings: several points at once, a table and a picture in the end.

A point is a workspace (`flows.workspace`) in which DVC runs the ordinary stages up to the sweep's metric;
there is no other way to train. Killed at any moment and started again, the flow passes over finished points
by their records; DVC and the stages' checkpoints continue the others. Nothing is registered, promoted or
served.
"""

from __future__ import annotations

import functools
import os
import queue
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from flows import environment

environment.prepare()

from prefect import flow, get_run_logger, task  # noqa: E402  # Prefect reads its settings at import
from prefect.artifacts import (  # noqa: E402
    create_progress_artifact,
    create_table_artifact,
    update_progress_artifact,
)
from prefect.futures import PrefectFuture  # noqa: E402
from prefect.task_runners import ThreadPoolTaskRunner  # noqa: E402

from flows import dvc_stage, params, paths, retries, tracking, workspace  # noqa: E402
from flows.errors import Interrupted, explain  # noqa: E402
from flows.params import Params  # noqa: E402
from flows.plots import format_duration  # noqa: E402
from flows.sweeps import experiments, outcomes, plan, results  # noqa: E402
from flows.sweeps.page import write_results  # noqa: E402
from flows.sweeps.planned import PlannedSweep, prepare  # noqa: E402
from flows.sweeps.points import Point  # noqa: E402
from flows.sweeps.results import Row  # noqa: E402
from flows.tracking import MlflowRun  # noqa: E402

environment.hide_traces_of_mistakes()


@task(task_run_name="{label}", **retries.STAGES)
def run_stages(
    label: str,
    root: Path,
    values: Mapping[str, Any],
    targets: Sequence[str],
    variables: dict[str, str],
    log: Path,
) -> list[str]:
    """DVC up to `targets` in a workspace; returns the stages that were executed."""
    logger = get_run_logger()
    log.parent.mkdir(parents=True, exist_ok=True)

    def tell(line: str) -> None:
        file.write(f"{line}\n")
        file.flush()
        if line.startswith("Running stage "):
            logger.info("%s: %s", label, line.removesuffix(":").lower())

    # the stage of a killed sweep may still be saving its checkpoint there
    with workspace.alone_in(root, lambda: not retries.stopping.is_set()) as lock, open(log, "a") as file:
        if retries.stopping.is_set():
            raise Interrupted("stopped before it began")
        workspace.populate(root, dict(values))
        return dvc_stage.reproduce(root, list(targets), variables, tell, [lock])


@flow(name="sweep", persist_result=False, log_prints=False)
def sweep(file: str, parallel: int = 0, retry_failed: bool = False) -> dict[str, Any]:
    """Run those points of sweep file `file` that are not done, `parallel` at once (0: as in params.yaml).

    Returns:
        A JSON-able summary: counts, best first rows, where the results lie.
    """
    retries.stopping.clear()
    planned = prepare(file, parallel)
    with open_run(planned) as (settings, run):
        board = Board(planned, settings, run, retry_failed)
        run_points(board)
        return board.write()


@contextmanager
def open_run(planned: PlannedSweep) -> Iterator[tuple[Params, MlflowRun]]:
    """Keep others out of the folder; the MLflow run that earlier attempts began, and the clone's params."""
    settings = params.load(paths.home() / "params.yaml")
    planned.folder.mkdir(parents=True, exist_ok=True)
    name = planned.folder.name
    tags = {f"trunkline.{planned.kind}": name, "trunkline.metric": planned.file.metric}
    with workspace.alone_in(planned.folder):
        earlier = tracking.find_run(settings, planned.kind, tags)
        with tracking.continued_run(settings, planned.kind, name, tags, earlier) as run:
            tracking.close_abandoned_runs(settings, run.run_id)
            yield settings, run


def run_points(board: Board) -> None:
    """All that is to be done; interrupted, what has come so far is written."""
    try:
        _work(board)
    except BaseException:
        board.stop()
        tracking.close_abandoned_runs(board.params, board.run.run_id)
        board.write()
        raise


# ------------------------------------------------------------------------------------------ order


@dataclass(frozen=True)
class Unit:
    """A task: a stage that points share, in the workspace of the first of them, or the rest of a point."""

    name: str
    point: Point
    targets: tuple[str, ...]
    needs: tuple[str, ...]
    sharers: tuple[str, ...] = ()

    @property
    def label(self) -> str:
        return f"{self.targets[0]} for {len(self.sharers)} points" if self.sharers else self.name


def list_units(planned: PlannedSweep, rows: Mapping[str, Row]) -> list[Unit]:
    """What is to run: shared stages first, each before the points that need it."""
    points = {point.name: point for point in planned.points}
    open_points = planned.open_points(rows)
    shared = plan.find_shared(planned.graph, open_points, planned.computed(rows))
    units = [Unit(s.name, points[s.points[0]], (s.stage,), s.needs, s.points) for s in shared]
    for name in open_points:
        needs = tuple(item.name for item in shared if name in item.points)
        units.append(Unit(name, points[name], planned.graph.targets, needs))
    return units


def _work(board: Board) -> None:
    """Submit each unit when its needs are met and a place is free, until none is left."""
    waiting = {unit.name: unit for unit in list_units(board.planned, board.rows)}
    ended: queue.SimpleQueue[str] = queue.SimpleQueue()
    running: dict[str, tuple[Unit, PrefectFuture[Any]]] = {}
    places = list(range(board.planned.settings.parallel))
    taken: dict[str, int] = {}
    board.begin()
    runner: ThreadPoolTaskRunner[Any] = ThreadPoolTaskRunner(max_workers=len(places))
    with runner:
        try:
            while waiting or running:
                for unit in list(waiting.values()):
                    if places and not any(need in waiting or need in running for need in unit.needs):
                        del waiting[unit.name]
                        taken[unit.name] = places.pop(0)
                        future = _submit(runner, unit, board, taken[unit.name])
                        running[unit.name] = (unit, future)
                        future.add_done_callback(functools.partial(_tell_end, ended, unit.name))
                unit, future = running.pop(ended.get())
                places.append(taken.pop(unit.name))
                board.settle(unit, future.result(raise_on_failure=False))
                # points of a shared stage that failed, and what they alone share, cannot run any more
                waiting = {name: left for name, left in waiting.items() if board.is_wanted(left)}
        except BaseException:
            # before the runner waits for its threads: what ends now must not be tried again
            retries.stopping.set()
            _stop_children()
            raise


def _tell_end(ended: queue.SimpleQueue[str], name: str, future: PrefectFuture[Any]) -> None:
    ended.put(name)


def _submit(runner: ThreadPoolTaskRunner[Any], unit: Unit, board: Board, place: int) -> PrefectFuture[Any]:
    variables = {
        tracking.PARENT_VARIABLE: board.run.run_id,
        "TRUNKLINE_FLOW_PID": str(os.getpid()),
        "MLFLOW_TRACKING_URI": tracking.tracking_uri(board.params),
    }
    variables |= gpus_of(place, board.planned.settings.gpus_per_point)
    board.begun[unit.name] = time.monotonic()
    return runner.submit(
        run_stages.with_options(retries=board.params.pipeline.retries),
        parameters={
            "label": unit.label,
            "root": unit.point.root,
            "values": unit.point.values,
            "targets": unit.targets,
            "variables": variables,
            "log": board.planned.folder / "logs" / f"{unit.point.name}.log",
        },
    )


def gpus_of(place: int, count: int) -> dict[str, str]:
    """Points that run at once see different GPUs."""
    if not count:
        return {}
    return {"CUDA_VISIBLE_DEVICES": ",".join(str(place * count + gpu) for gpu in range(count))}


def _stop_children() -> None:
    """End all points at once, so that each checkpoints instead of going on as an orphan."""
    import psutil

    pids = [child.pid for child in psutil.Process().children() if "dvc" in " ".join(child.cmdline())]
    threads = [threading.Thread(target=dvc_stage.terminate_tree, args=(pid,)) for pid in pids]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


# ------------------------------------------------------------------------------------------ outcomes


class Board:
    """The rows of a running sweep, shown and written after every change."""

    def __init__(self, planned: PlannedSweep, params: Params, run: MlflowRun, retry_failed: bool) -> None:
        self.planned, self.params, self.run = planned, params, run
        self.points = {point.name: point for point in planned.points}
        self.rows = {point.name: planned.known_row(point, retry_failed) for point in planned.points}
        self.known = [name for name, row in self.rows.items() if row.status != "waiting"]
        self.begun: dict[str, float] = {}
        self.took: list[float] = []
        self.executed: list[str] = []
        self.progress: Any = None
        self.started = time.monotonic()
        self.log = get_run_logger()
        self.record_experiments = planned.settings.record_experiments and self._can_record()

    def _can_record(self) -> bool:
        try:
            experiments.baseline(paths.home())
        except experiments.NotRecorded as error:
            self.log.warning("points are not shown in `dvc exp show`: %s", error)
            return False
        return True

    def begin(self) -> None:
        self.log.info(
            "%s %s: %d points, %d known before",
            self.planned.kind,
            self.planned.folder,
            len(self.rows),
            len(self.known),
        )
        self.progress = create_progress_artifact(
            self._fraction(), key=self.planned.kind, description="Points that have ended"
        )

    def is_wanted(self, unit: Unit) -> bool:
        return any(self.rows[name].status == "waiting" for name in unit.sharers or (unit.name,))

    def settle(self, unit: Unit, outcome: Any) -> None:
        """Take note of how `unit` ended."""
        if not isinstance(outcome, BaseException):
            self.executed += outcome
            if not unit.sharers:
                self.took.append(time.monotonic() - self.begun[unit.name])
                self._set(self._keep(unit.point))
            return
        reason, code = _reason(outcome)
        if unit.sharers:
            reason = f"{unit.targets[0]}, which {len(unit.sharers)} points share: {reason}"
        for name in unit.sharers or (unit.name,):
            point = self.points[name]
            self._set(
                outcomes.keep_failure(self.planned, point, self.params, self.run, reason, code, self.log)
            )

    def _set(self, row: Row) -> None:
        self.rows[row.name] = row
        what = (
            f"{self.planned.metric_key} {row.value:.4g}"
            if row.value is not None
            else row.reason.splitlines()[0]
        )
        self.log.info("%s %s: %s (%s)", row.name, row.status, what, results.describe(row.settings))
        self.log.info("%s", self.progress_line())
        self.write_files(final=False)
        update_progress_artifact(self.progress, self._fraction())

    def _keep(self, point: Point) -> Row:
        return outcomes.keep_result(
            self.planned, point, self.params, self.run, self.record_experiments, self.log
        )

    def progress_line(self) -> str:
        rows = list(self.rows.values())
        ended = sum(row.status != "waiting" for row in rows)
        failed = sum(row.status in ("failed", "impossible") for row in rows)
        text = f"{ended} of {len(rows)} points" + (f", {failed} failed" if failed else "")
        best = results.rank(rows, self.planned.file)[0]
        if best.value is not None:
            text += f"; best {self.planned.metric_key} {best.value:.4g}: {results.describe(best.settings)}"
        if self.took and ended < len(rows):
            mean = sum(self.took) / len(self.took)
            left_s = mean * (len(rows) - ended) / self.planned.settings.parallel
            text += f"; about {format_duration(left_s)} left"
        return text

    def _fraction(self) -> float:
        """Percent."""
        return 100 * sum(row.status != "waiting" for row in self.rows.values()) / len(self.rows)

    def stop(self) -> None:
        for name, row in self.rows.items():
            if row.status == "waiting" and name in self.begun:
                self.rows[name] = replace(row, status="stopped")

    def write(self) -> dict[str, Any]:
        """All files of the sweep's folder, the tables in Prefect and MLflow; the summary."""
        written = self.write_files(final=True)
        for path in written:
            self.run.log_artifact(path)
        best = results.rank(list(self.rows.values()), self.planned.file)[0]
        if best.value is not None:
            self.run.log_metrics({f"best {self.planned.file.metric}": best.value})
        counts = {status: sum(row.status == status for row in self.rows.values()) for status in results.NAMES}
        self.run.log_metrics({f"points {status}": count for status, count in counts.items()})
        table = [
            {
                "point": row.name,
                **{key: results.show(value) for key, value in row.settings.items()},
                self.planned.file.metric: "" if row.value is None else f"{row.value:.4g}",
                "status": row.status,
                "reason": row.reason,
            }
            for row in results.rank(list(self.rows.values()), self.planned.file)
        ]
        create_table_artifact(
            table, key=f"{self.planned.kind}-points", description=f"{self.planned.folder.name}, best first"
        )
        return {
            "folder": str(self.planned.folder),
            "counts": counts,
            "known": self.known,
            "executed": self.executed,
            "seconds": time.monotonic() - self.started,
            "run_id": self.run.run_id,
        }

    def write_files(self, final: bool) -> list[Path]:
        """After every point, and with the pictures in the end."""
        return write_results(self.planned, list(self.rows.values()), self.run.run_id, pictures=final)


def _reason(outcome: BaseException) -> tuple[str, int]:
    """One line and an exit code; a bug's trace is in Prefect's log."""
    explained = explain(outcome)
    if explained is None:
        return f"{type(outcome).__name__}: {outcome}".splitlines()[0], 1
    return str(explained).splitlines()[0], explained.exit_code
