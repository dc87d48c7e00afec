"""What `trunkline study analyse` prints."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from flows.studies import words
from flows.studies.analysis import Analysis
from flows.studies.correlations import Correlation

SHOWN_NOTES = 8
NAMES = {
    "all": "all cells",
    "below_boundary": "below the boundary",
    "at_or_above_boundary": "at or above it",
}


def print_study(analysis: Analysis, out: Path, console: Console | None = None) -> None:
    """Conclusions, the correlations as a table, what was left out, where the results lie."""
    console = console or Console(highlight=False)
    left_out = f", {len(analysis.table.left_out)} left out" if analysis.table.left_out else ""
    console.print(
        Text(
            f"{analysis.table.name}: {len(analysis.cells)} cells in {len(analysis.series)} series{left_out}"
        ),
        style="bold",
    )
    table = Table.grid(padding=(0, 2, 1, 0))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for name, said in words.conclude(analysis).items():
        table.add_row(name.replace("_", " "), Text(said))
    console.print(table)
    if analysis.correlations["all"].pearson is not None:
        console.print(_correlations(analysis))
    for note in analysis.notes[:SHOWN_NOTES]:
        console.print(Text(f"note     {note}"), style="yellow")
    if len(analysis.notes) > SHOWN_NOTES:
        console.print(f"… {len(analysis.notes) - SHOWN_NOTES} more notes in analysis.json", style="dim")
    console.print(Text(f"results  {out}/study.html, analysis.json, cells.csv and figures"), soft_wrap=True)


def _correlations(analysis: Analysis) -> Table:
    table = Table(box=None, pad_edge=False)
    for name in ("loss and accuracy", "cells", "Pearson", "95 %", "Spearman", "95 %"):
        table.add_column(name, justify="left" if name == "loss and accuracy" else "right")
    rows: list[tuple[str, Correlation]] = [
        (NAMES[name], found) for name, found in analysis.correlations.items()
    ]
    rows += [(f"model {name}", found) for name, found in analysis.correlations_by_model.items()]
    for name, found in rows:
        table.add_row(
            name,
            str(found.cells),
            words.signed(found.pearson),
            words.interval(found.pearson_interval),
            words.signed(found.spearman),
            words.interval(found.spearman_interval),
        )
    return table
