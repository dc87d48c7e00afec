"""The flow of a data-scaling study: a grid of pretrainings, the table of what came of them, its analysis.

The cells are points of a sweep (`flows.sweep`): workspaces in which DVC runs the ordinary stages, several at
once, shared stages first. Killed at any moment and started again, only missing cells run, and the interrupted
ones resume from their checkpoints. After every cell the table in the study's folder is whole.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flows import environment

environment.prepare()

from prefect import flow, get_run_logger, task  # noqa: E402  # Prefect reads its settings at import
from prefect.artifacts import create_markdown_artifact, create_table_artifact  # noqa: E402

from flows import dvc_stage, files, params, paths, retries, tracking, workspace  # noqa: E402
from flows.dvc_stage import StageFailed  # noqa: E402
from flows.sweep import Board, open_run, run_points  # noqa: E402
from flows.sweeps.results import show  # noqa: E402
from flows.sweeps.study_cells import list_cells, write_table  # noqa: E402
from flows.sweeps.study_grid import CELLS, PlannedStudy, prepare_study  # noqa: E402

STAGE = "study"


@task(name="analyse", **retries.STAGES)
def analyse(root: Path, variables: dict[str, str], log: Path) -> list[str]:
    """The stage `study` on the table, in the study's folder; returns the stages that were executed."""
    logger = get_run_logger()
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "a") as file:

        def tell(line: str) -> None:
            file.write(f"{line}\n")
            file.flush()
            logger.info("%s", line)

        return dvc_stage.reproduce(root, ["--single-item", STAGE], variables, tell)


class StudyBoard(Board):
    """The rows of a running study; its files are the table of cells."""

    planned: PlannedStudy

    def write_files(self, final: bool) -> list[Path]:
        return write_table(self.planned, self.rows)


@flow(name="study", persist_result=False, log_prints=False)
def study(
    dataset: str = "",
    recipe: str = "",
    settings: list[str] | None = None,
    parallel: int = 0,
    retry_failed: bool = False,
    table: str = "",
) -> dict[str, Any]:
    """Run the cells that are missing, `parallel` at once (0: as in params.yaml), then analyse all of them.

    Args:
        table: also write the table of cells to this file.

    Returns:
        A JSON-able summary: counts, where table and page lie, why there is no analysis if there is none.
    """
    retries.stopping.clear()
    planned = prepare_study(dataset, recipe, settings or [], parallel)
    with open_run(planned) as (checked, run):
        board = StudyBoard(planned, checked, run, retry_failed)
        run_points(board)
        summary = board.write()
        summary |= {"table": "", "page": "", "analysis": "no cell is done"}
        source = planned.folder / CELLS
        if source.is_file():
            summary["table"] = str(source)
            if table:
                files.write_bytes(Path(table), source.read_bytes())
        if summary["counts"]["done"]:
            variables = {
                tracking.PARENT_VARIABLE: run.run_id,
                "TRUNKLINE_FLOW_PID": str(os.getpid()),
                "MLFLOW_TRACKING_URI": tracking.tracking_uri(checked),
            }
            summary |= _analyse(planned, variables)
            for path in sorted((planned.folder / paths.STUDY).rglob("*")):
                if path.is_file() and not summary["analysis"]:
                    run.log_artifact(path, "study")
        _show(planned, board, summary)
        return summary


def _analyse(planned: PlannedStudy, variables: dict[str, str]) -> dict[str, Any]:
    """The cells stand, whatever comes of their analysis: a grid may be too small for a fit."""
    values = params.overlay(planned.base, {"study": {"cells": CELLS}}, "study")
    workspace.populate(planned.folder, values)
    try:
        analyse(planned.folder, variables, planned.folder / "logs" / "study.log")
    except StageFailed as error:
        return {"analysis": str(error).splitlines()[0]}
    page = next(iter(sorted((planned.folder / paths.STUDY).glob("*.html"))), None)
    return {"analysis": "", "page": str(page or "")}


def _show(planned: PlannedStudy, board: StudyBoard, summary: Mapping[str, Any]) -> None:
    rows = [
        {
            "model": cell.model,
            "data": cell.data_label,
            "steps": show(cell.iterations),
            "validation loss": "" if cell.validation_loss is None else f"{cell.validation_loss:.4f}",
            "top-1": "" if cell.finetuned_top1 is None else f"{cell.finetuned_top1:.2f}",
            "status": cell.status,
        }
        for cell in list_cells(planned, board.rows)
    ]
    if rows:
        create_table_artifact(rows, key="study-cells", description=planned.folder.name)
    said = summary["analysis"] or f"Page: `{summary['page']}`"
    create_markdown_artifact(f"Table: `{summary['table']}`\n\n{said}", key="study-summary")


if __name__ == "__main__":
    study()
