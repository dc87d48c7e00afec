"""What a sweep came to: one row per point, groups of repeated seeds, CSV and JSON files."""

from __future__ import annotations

import csv
import io
import json
import math
import shlex
import statistics
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from flows import files
from flows.params import flatten
from flows.sweeps.points import SweepFile

Status = Literal["done", "failed", "impossible", "stopped", "waiting"]
NAMES = {
    "done": "done",
    "failed": "failed",
    "impossible": "impossible: params contradict one another",
    "stopped": "stopped before its end",
    "waiting": "not begun",
}


@dataclass(frozen=True)
class Row:
    """One point."""

    name: str
    settings: Mapping[str, Any]
    status: Status = "waiting"
    reason: str = ""
    value: float | None = None
    """Of the sweep's metric."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    """From start to end of its execution, whenever that was."""
    device_hours: float = 0.0
    """Of all its stages, also those it shares."""
    run_id: str = ""
    stage_runs: Mapping[str, str] = field(default_factory=dict)
    workspace: str = ""
    experiment: str = ""


@dataclass(frozen=True)
class Group:
    """Points that differ in their seeds only."""

    settings: Mapping[str, Any]
    values: tuple[float, ...]
    failed: int

    @property
    def mean(self) -> float:
        return statistics.fmean(self.values)

    @property
    def deviation(self) -> float:
        """Standard deviation of the sample; NaN of a single value."""
        return statistics.stdev(self.values) if len(self.values) > 1 else math.nan


def rank(rows: Sequence[Row], sweep: SweepFile) -> list[Row]:
    """Best first; rows without a value last, in their order."""
    sign = -1 if sweep.direction == "maximize" else 1
    return sorted(rows, key=lambda row: (row.value is None, sign * (row.value or 0.0)))


def seed_keys(sweep: SweepFile) -> list[str]:
    """Axes that only repeat: `seed`, `scale.subset_seed`, …"""
    return [key for key in sweep.keys if key.rpartition(".")[2].endswith("seed")]


def group_by_seed(rows: Sequence[Row], sweep: SweepFile) -> list[Group]:
    """Best mean first; empty if no seed is among the axes."""
    seeds = seed_keys(sweep)
    if not seeds:
        return []
    found: dict[str, list[Row]] = {}
    for row in rows:
        rest = {key: value for key, value in row.settings.items() if key not in seeds}
        found.setdefault(json.dumps(rest, sort_keys=True), []).append(row)
    groups = []
    for members in found.values():
        values = tuple(row.value for row in members if row.value is not None)
        if values:
            rest = {key: value for key, value in members[0].settings.items() if key not in seeds}
            groups.append(Group(rest, values, sum(row.status in ("failed", "impossible") for row in members)))
    sign = -1 if sweep.direction == "maximize" else 1
    return sorted(groups, key=lambda group: sign * group.mean)


def read_metrics(folder: Path, outputs: Collection[str]) -> dict[str, float]:
    """All finite numbers of those metrics files in `folder` that are among `outputs`, as `file.key`."""
    found = {}
    for path in sorted(folder.glob("*.json")):
        if not any(Path(out).name == path.name and Path(out).parent.name == folder.name for out in outputs):
            continue  # of a stage that this sweep does not run
        for key, value in flatten(files.read_json(path)).items():
            if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
                found[f"{path.stem}.{key}"] = value
    return found


def show(value: Any) -> str:
    """A setting as a person would write it."""
    return (
        f"{value:.6g}"
        if isinstance(value, float)
        else json.dumps(value)
        if not isinstance(value, str)
        else value
    )


def show_exactly(value: Any) -> str:
    """A setting for `--set` and `-S`: nothing is lost."""
    return value if isinstance(value, str) else json.dumps(value)


def run_command(sweep: SweepFile, row: Row) -> str:
    """`trunkline run` with the settings of `row`: in the same workspace, so that no stage runs again."""
    given = (("dataset", sweep.dataset), ("recipe", sweep.recipe))
    options = [f"--{name} {shlex.quote(value)}" for name, value in given if value]
    settings = {**sweep.settings, **row.settings}
    options += [f"--set {shlex.quote(f'{key}={show_exactly(value)}')}" for key, value in settings.items()]
    return " ".join(["trunkline run", *options])


def describe(settings: Mapping[str, Any]) -> str:
    return " ".join(f"{short}={show(value)}" for short, value in shorten(settings).items())


def shorten(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Keys without their sections, where that is not ambiguous."""
    lasts = [key.rpartition(".")[2] for key in settings]
    return {
        last if lasts.count(last) == 1 else key: value
        for (key, value), last in zip(settings.items(), lasts, strict=True)
    }


# ------------------------------------------------------------------------------------------ files


def write_csv(path: Path, rows: Sequence[Row], sweep: SweepFile) -> None:
    """Best first; a column per axis and metric."""
    metrics = sorted({key for row in rows for key in row.metrics})
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(
        [
            "point",
            *sweep.keys,
            "status",
            "reason",
            *metrics,
            "seconds",
            "device_hours",
            "mlflow_run",
            "experiment",
            "workspace",
        ]
    )
    for row in rank(rows, sweep):
        table.writerow(
            [
                row.name,
                *(_cell(row.settings[key]) for key in sweep.keys),
                row.status,
                row.reason,
                *(row.metrics.get(key, "") for key in metrics),
                round(row.seconds, 3),
                row.device_hours,
                row.run_id,
                row.experiment,
                row.workspace,
            ]
        )
    files.write_text(path, text.getvalue())


def _cell(value: Any) -> Any:
    return value if isinstance(value, str | int | float) else json.dumps(value)


def write_json(path: Path, rows: Sequence[Row], sweep: SweepFile, about: Mapping[str, Any]) -> None:
    groups = [
        {
            "settings": dict(group.settings),
            "mean": group.mean,
            "sd": None if math.isnan(group.deviation) else group.deviation,
            "values": list(group.values),
            "failed": group.failed,
        }
        for group in group_by_seed(rows, sweep)
    ]
    files.write_json(
        path,
        {
            "sweep": sweep.model_dump(mode="json", exclude_none=True),
            **about,
            "points": [asdict(row) for row in rank(rows, sweep)],
            "groups": groups,
        },
    )
