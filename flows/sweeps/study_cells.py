"""The table of a study's cells, as far as they have come, and how it looks on a terminal."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from flows import dvc_stage, files, paths
from flows.errors import ConfigError, TrunklineError
from flows.plots import format_duration
from flows.studies import costs
from flows.studies.cells import Cell, write_cells
from flows.studies.costs import Cost, Measured
from flows.sweeps.points import Point
from flows.sweeps.results import Row
from flows.sweeps.study_grid import CELLS, LOSS, MODEL, SEED, STEPS, SUBSET, PlannedStudy

WIDTH = 150
"""Of tables that do not go to a terminal, letters."""


def list_cells(planned: PlannedStudy, rows: Mapping[str, Row]) -> list[Cell]:
    """One per point, in the order of the grid; those that are not done have no loss.

    A cell whose number of images nobody knows yet is missing: before `scale` has run there is no table.
    """
    images = known_images(planned, list(rows.values()))
    cells = []
    for point in planned.points:
        row, percentage = rows[point.name], point.settings[SUBSET]
        if percentage in images:
            cost = estimate(point)
            if cost is not None:
                cells.append(_cell(planned, point, row, cost, images[percentage]))
    return cells


def _cell(planned: PlannedStudy, point: Point, row: Row, cost: Cost, images: int) -> Cell:
    study, metrics = planned.checked.study, row.metrics if row.status == "done" else {}
    measured = _measured(row)
    accuracy = metrics.get(study.metric)
    assert point.params is not None
    return Cell(
        model=point.settings[MODEL],
        parameters=cost.parameters,
        images=images,
        iterations=point.settings[STEPS],
        validation_loss=metrics.get(LOSS),
        finetuned_top1=None if accuracy is None else round(100 * accuracy, 4),
        data=f"{planned.corpus} {point.settings[SUBSET]}%",
        # of the same images in every cell, prepared as for validation; else the mean while training
        train_loss=metrics.get("pretrain.train_loss_eval", metrics.get("pretrain.train_loss")),
        batch_size=point.params.pretrain.training.batch_size,
        flops=cost.flops,
        images_seen=cost.images_seen,
        seconds=measured.seconds,
        device_hours=measured.device_hours,
        peak_memory_bytes=measured.peak_memory_bytes,
        validation_loss_drop_path=metrics.get("pretrain.val_loss_drop_path"),
        validation_loss_crops=metrics.get("pretrain.val_loss_crops"),
        status=row.status,
        run_id=row.run_id,
        point=point.name,
        experiment=row.experiment,
        seed=str(point.settings[SEED]),
    )


def estimate(point: Point) -> Cost | None:
    """None where the settings contradict one another."""
    try:
        return costs.estimate(point.params) if point.params else None
    except ConfigError:
        return None


def _measured(row: Row) -> Measured:
    """Of the execution whose results the row tells; a later one may have replaced its receipt."""
    if row.status != "done":
        return Measured()
    receipt = dvc_stage.read_receipt(Path(row.workspace), "pretrain")
    return costs.read_receipt(
        receipt if receipt.get("run_id", "") == row.stage_runs.get("pretrain", "") else {}
    )


def known_images(planned: PlannedStudy, rows: Sequence[Row]) -> dict[int, int]:
    """Percentage to training images, from the stage `scale` of any cell."""
    found: dict[str, float] = {}
    for row in rows:
        found |= {
            key.removeprefix("scale."): value for key, value in row.metrics.items() if "scale.images_" in key
        }
    if not found:  # no cell is done, but their common stages may be
        for point in planned.points:
            path = point.root / paths.METRICS / "scale.json"
            if not point.problem and path.is_file():
                found = files.read_json(path)
                break
    wanted = {percentage: f"images_{percentage:03d}" for percentage in planned.checked.study.percentages}
    return {percentage: int(found[key]) for percentage, key in wanted.items() if key in found}


def write_table(planned: PlannedStudy, rows: Mapping[str, Row]) -> list[Path]:
    """cells.csv in the study's folder, whole at any moment; nothing if no cell can be told yet."""
    cells = list_cells(planned, rows)
    if not cells:
        return []
    write_cells(planned.folder / CELLS, cells)
    return [planned.folder / CELLS]


# ------------------------------------------------------------------------------------------ terminal


def print_plan(planned: PlannedStudy, retry_failed: bool = False, console: Console | None = None) -> None:
    """The grid: what each cell is, costs, and has to run after those before it."""
    console = console or wide_console()
    rows = {point.name: planned.known_row(point, retry_failed) for point in planned.points}
    left = planned.stages_to_run(rows)
    images = known_images(planned, list(rows.values()))
    table = _table("parameters", "images", "images seen", "FLOPs", "epochs", "to run")
    total = {"all": 0, "to run": 0}
    for point in planned.points:
        row, cost = rows[point.name], estimate(point)
        total["all"] += cost.flops if cost else 0
        total["to run"] += cost.flops if cost and point.name in left else 0
        text = ", ".join(left[point.name]) if point.name in left else row.status
        if row.reason:
            text += f": {row.reason.splitlines()[0]}"
        count = images.get(point.settings[SUBSET])
        table.add_row(
            *_names(planned, point),
            f"{cost.parameters:,}" if cost else "",
            f"{count:,}" if count else "?",
            f"{cost.images_seen:,}" if cost else "",
            f"{cost.flops:.3g}" if cost else "",
            f"{cost.images_seen / count:.1f}" if cost and count else "?",
            Text(text),
        )
    console.print(table)
    console.print(
        f"{len(rows)} cells, {len(left)} to run: {total['to run']:.3g} of {total['all']:.3g} FLOPs of "
        f"pretraining, {planned.settings.parallel} cells at once"
    )
    if not images:
        console.print("images  known when the stage `scale` has run")
    console.print(f"folder  {planned.folder}")


def print_results(planned: PlannedStudy, rows: Mapping[str, Row], console: Console | None = None) -> None:
    console = console or wide_console()
    table = _table("images", "loss", "trained on", "top-1", "seconds", "")
    for cell, point in zip(list_cells(planned, rows), planned.points, strict=False):
        row = rows[point.name]
        table.add_row(
            *_names(planned, point),
            f"{cell.images:,.0f}",
            "" if cell.validation_loss is None else f"{cell.validation_loss:.4f}",
            "" if cell.train_loss is None else f"{cell.train_loss:.4f}",
            "" if cell.finetuned_top1 is None else f"{cell.finetuned_top1:.2f}",
            "" if cell.seconds is None else format_duration(cell.seconds),
            Text("" if row.status == "done" else f"{row.status}: {row.reason}".splitlines()[0], style="red"),
        )
    console.print(table)


def wide_console() -> Console:
    """As wide as the terminal; in a file or a pipe wide enough."""
    return Console(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else WIDTH)


def refuse_failures(counts: Mapping[str, int], rows: Mapping[str, Row], strict: bool) -> None:
    """
    Raises:
        TrunklineError: no cell has a result, or `strict` and one has not.
    """
    failed = [row for row in rows.values() if row.status in ("failed", "impossible")]
    if failed and (strict or not counts["done"]):
        raise TrunklineError(
            f"{len(failed)} of {len(rows)} cells failed; {failed[0].name}: {failed[0].reason.splitlines()[0]}"
        )


def _table(*more: str) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column("cell", style="dim", no_wrap=True)
    table.add_column("model", no_wrap=True)
    for name in ("data", "steps", *more[:-1]):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column(more[-1])
    return table


def _names(planned: PlannedStudy, point: Point) -> list[str]:
    settings = point.settings
    seed = f" · seed {settings[SEED]}" if len(planned.checked.study.seeds) > 1 else ""
    return [point.name, settings[MODEL], f"{settings[SUBSET]} %", f"{settings[STEPS]:,}{seed}"]
