"""What `trunkline sweep` prints: the plan of a dry run, and the table in the end."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from flows import files
from flows.errors import TrunklineError
from flows.plots import format_duration
from flows.sweeps import results
from flows.sweeps.planned import PlannedSweep
from flows.sweeps.points import SweepFile
from flows.sweeps.results import Row

SHOWN = 40  # rows; all are in results.csv


def print_plan(planned: PlannedSweep, console: Console | None = None) -> None:
    """Points, and how many stages each has to run after those before it."""
    console = console or Console(highlight=False, soft_wrap=True)
    rows = {point.name: planned.known_row(point) for point in planned.points}
    left = planned.stages_to_run(rows)
    table = _table(planned.file, "to run")
    for name, row in rows.items():
        text = f"{len(left[name])}: {', '.join(left[name])}" if name in left else row.status
        if row.reason:
            text += f": {row.reason.splitlines()[0]}"
        table.add_row(name, *_cells(row), Text(text))
    console.print(table)
    total = sum(len(stages) for stages in left.values())
    console.print(
        f"{len(rows)} points, {len(left)} to run: at most {total} stages, "
        f"{planned.settings.parallel} points at once"
    )
    if planned.repeated:
        console.print(f"{planned.repeated} draws repeat an earlier point and are left out")
    console.print(
        f"metric  {planned.file.metric} ({planned.file.direction}), by {', '.join(planned.graph.targets)}"
    )
    console.print(f"folder  {planned.folder}")


def print_results(summary: Mapping[str, Any], console: Console | None = None) -> None:
    """Best points first, repeated seeds together, where everything lies and what to type next."""
    console = console or Console(highlight=False, soft_wrap=True)
    folder = Path(summary["folder"])
    sweep, rows = read_results(folder)
    console.print(points_table(sweep, rows))
    if len(rows) > SHOWN:
        console.print(f"… {len(rows) - SHOWN} more in results.csv", style="dim")
    if groups := results.group_by_seed(rows, sweep):
        console.print(groups_table(sweep, groups))
    counts = ", ".join(f"{count} {status}" for status, count in summary["counts"].items() if count)
    known = f" ({len(summary['known'])} known before)" if summary["known"] else ""
    stages = len(summary["executed"])
    console.print(
        f"points   {counts}{known}; {stages} stages executed in {format_duration(summary['seconds'])}"
    )
    console.print(f"results  {folder}/sweep.html, results.csv, results.json, parallel_coordinates.png")
    best = results.rank(rows, sweep)[0]
    if best.value is not None:
        console.print(f"best     {results.run_command(sweep, best)}")
        if best.experiment:
            console.print(f"         dvc exp apply {best.experiment}")


def read_results(folder: Path) -> tuple[SweepFile, list[Row]]:
    """What `results.json` says."""
    said = files.read_json(folder / "results.json")
    return SweepFile.model_validate(said["sweep"]), [Row(**point) for point in said["points"]]


def points_table(sweep: SweepFile, rows: Sequence[Row]) -> Table:
    table = _table(sweep, sweep.metric.partition(".")[2])
    for row in results.rank(rows, sweep)[:SHOWN]:
        if row.value is not None:
            text = Text(f"{row.value:.4f}")
        else:
            reason = f": {row.reason.splitlines()[0]}" if row.reason else ""
            text = Text(f"{row.status}{reason}", style="red" if row.status == "failed" else "dim")
        table.add_row(row.name, *_cells(row), text)
    return table


def groups_table(sweep: SweepFile, groups: Sequence[results.Group]) -> Table:
    seeds = results.seed_keys(sweep)
    table = Table(
        title=f"over {', '.join(seeds)}", title_justify="left", title_style="bold", box=None, pad_edge=False
    )
    for name in results.shorten(groups[0].settings):
        table.add_column(name)
    table.add_column("mean ± sd", justify="right")
    table.add_column("n", justify="right")
    for group in groups:
        deviation = "" if math.isnan(group.deviation) else f" ± {group.deviation:.4f}"
        failed = f" ({group.failed} failed)" if group.failed else ""
        cells = (results.show(value) for value in group.settings.values())
        table.add_row(*cells, f"{group.mean:.4f}{deviation}", f"{len(group.values)}{failed}")
    return table


def _table(sweep: SweepFile, last: str) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column("point", style="dim")
    for name in results.shorten(dict.fromkeys(sweep.keys)):
        table.add_column(name)
    table.add_column(last)
    return table


def _cells(row: Row) -> list[str]:
    return [results.show(value) for value in row.settings.values()]


def refuse_failures(summary: Mapping[str, Any], strict: bool) -> None:
    """
    Raises:
        TrunklineError: no point has a result, or `strict` and one has not.
    """
    counts = summary["counts"]
    failed = counts["failed"] + counts["impossible"]
    if failed and (strict or not counts["done"]):
        _, rows = read_results(Path(summary["folder"]))
        first = next(row for row in rows if row.status in ("failed", "impossible"))
        total = sum(counts.values())
        raise TrunklineError(
            f"{failed} of {total} points failed; {first.name}: {first.reason.splitlines()[0]}"
        )
