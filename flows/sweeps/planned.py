"""A sweep that has been read, checked and planned, and what is known of its points. Nothing is made here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

from flows import dvc_stage, params, paths
from flows.errors import ConfigError
from flows.sweeps import plan
from flows.sweeps.plan import Graph
from flows.sweeps.points import Point, SweepFile, list_points, read_file
from flows.sweeps.results import Row

EXAMPLES = Path("recipes/sweeps")
FIELDS = tuple(Row.__dataclass_fields__)


@dataclass(frozen=True)
class PlannedSweep:
    given: str
    """How its author names the file."""
    file: SweepFile
    settings: params.Sweep
    points: list[Point]
    repeated: int
    """Random draws left out because an earlier one is equal."""
    graph: Graph
    signatures: Mapping[str, Mapping[str, str]]
    """Of the possible points, by name."""

    kind: ClassVar[str] = "sweep"
    """What it is called in MLflow and Prefect."""

    @property
    def folder(self) -> Path:
        return paths.home() / ".trunkline" / "sweeps" / f"{self.file.name}-{self.file.digest}"

    @property
    def metric_key(self) -> str:
        return self.file.metric.partition(".")[2]

    def known_row(self, point: Point, retry_failed: bool = False) -> Row:
        """What is recorded of `point`; `waiting` if it has to run."""
        fresh = Row(point.name, point.settings, workspace=str(point.root))
        if point.problem:
            return replace(fresh, status="impossible", reason=point.problem, workspace="")
        record = plan.read_record(point.root, self.signatures[point.name])
        if record is None or (record["status"] == "failed" and (retry_failed or not record.get("is_final"))):
            return fresh
        return self.judge(replace(fresh, **{key: record[key] for key in FIELDS if key in record}))

    def judge(self, row: Row) -> Row:
        """With the value of this sweep's metric, which the same point need not have in another's."""
        if row.status != "done":
            return row
        if self.file.metric in row.metrics:
            return replace(row, value=row.metrics[self.file.metric])
        file = self.file.metric.partition(".")[0]
        there = sorted(key for key in row.metrics if key.startswith(f"{file}."))
        reason = f"no number `{self.file.metric}` among the results; there are {', '.join(there) or 'none'}"
        return replace(row, status="failed", reason=reason)

    def open_points(self, rows: Mapping[str, Row]) -> dict[str, Mapping[str, str]]:
        """Signatures of the points that have to run, by name."""
        return {name: self.signatures[name] for name, row in rows.items() if row.status == "waiting"}

    def computed(self, rows: Mapping[str, Row]) -> frozenset[str]:
        """Signatures whose results are in DVC's cache."""
        done = [name for name, row in rows.items() if row.status == "done"]
        return frozenset(signature for name in done for signature in self.signatures[name].values())

    def stages_to_run(self, rows: Mapping[str, Row]) -> dict[str, list[str]]:
        """Per point the stages that neither a record nor an earlier point in the list has. DVC's cache may
        know even more of them, from runs outside sweeps."""
        computed = set(self.computed(rows))
        left = {}
        for name, signatures in self.open_points(rows).items():
            left[name] = [stage for stage, signature in signatures.items() if signature not in computed]
            computed.update(signatures.values())
        return left


def prepare(name: str, parallel: int = 0) -> PlannedSweep:
    """Read and check everything about a sweep: the path of its file, or its name in recipes/sweeps/.

    Raises:
        ConfigError: one line that names the key.
    """
    home = paths.home()
    settings = params.load(home / "params.yaml").sweep
    if parallel:
        settings = settings.model_copy(update={"parallel": parallel})
    path = _find(name, home)
    file = read_file(path)
    found = list_points(file, str(path), settings.max_points)
    graph = plan.read_plan(file, dvc_stage.read_graph(home), home, str(path))
    signatures = {p.name: plan.sign_stages(graph, p.values, home) for p in found.points if not p.problem}
    return PlannedSweep(name, file, settings, found.points, found.repeated, graph, signatures)


def _find(name: str, home: Path) -> Path:
    known = {path.stem: path for path in sorted((home / EXAMPLES).glob("*.yaml"))}
    path = known.get(name) or Path(name)
    if not path.is_file():
        raise ConfigError(
            f"no sweep file `{name}`; there are {', '.join(known) or 'none'} in {EXAMPLES}/, or give a path"
        )
    return path
