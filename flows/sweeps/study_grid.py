"""The cells of a data-scaling study as the points of a sweep: models x subsets x lengths x seeds.

A cell is the workspace that `trunkline run --set …` with its settings has, so nothing is trained in a second
way, and a cell that ran before is known. Every cell has its whole schedule: its warm-up is a fraction of its
own steps, as the drop of the learning rate is; no checkpoint of a longer run stands for a shorter one.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from pydantic import ValidationError

from flows import dvc_stage, params, paths, workspace
from flows.errors import ConfigError
from flows.params import Params
from flows.studies import costs
from flows.sweeps import plan
from flows.sweeps.planned import PlannedSweep
from flows.sweeps.points import Point, SweepFile, point_name
from flows.sweeps.results import Row

MODEL, SUBSET, STEPS = "model.backbone", "pretrain.subset", "pretrain.training.steps"
WARMUP, SEED = "pretrain.training.warmup_steps", "seed"
LOSS = "pretrain.val_loss"
CELLS = "cells.csv"
"""The table, in the study's folder."""
NAME_LETTERS = 32


@dataclass(frozen=True)
class PlannedStudy(PlannedSweep):
    """A study that has been checked, with what is known of its cells."""

    base: Mapping[str, Any]
    """Params of the study itself, without the settings of a cell."""
    checked: Params
    """The same, typed."""

    kind: ClassVar[str] = "study"

    @property
    def folder(self) -> Path:
        """A workspace of its own, in which the stage `study` runs; the same for a grid that grows."""
        values = {
            key: value for key, value in params.flatten(self.base).items() if not key.startswith("study.")
        }
        digest = hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:8]
        return paths.workspaces() / f"study-{self.file.name}-{digest}"

    def open_points(self, rows: Mapping[str, Row]) -> dict[str, Mapping[str, str]]:
        """Dearest first: then the last cells to run are short ones, and no place waits long for the other."""
        found = super().open_points(rows)
        price = {point.name: costs.estimate(point.params).flops for point in self.points if point.params}
        return {name: found[name] for name in sorted(found, key=lambda name: -price[name])}

    @property
    def corpus(self) -> str:
        return self.checked.study.corpus or self.checked.ingest.dataset


def prepare_study(
    dataset: str = "", recipe: str = "", settings: Sequence[str] = (), parallel: int = 0
) -> PlannedStudy:
    """Read and check everything about the study that params.yaml, with these laid over it, asks for.

    Raises:
        ConfigError: one line that names the key.
    """
    home = paths.home()
    base = workspace.merge(dataset, recipe, settings)
    checked = params.check(base, "params.yaml with overrides")
    _check_grid(checked)
    file = _as_sweep(dataset, recipe, settings, checked)
    sweep = checked.sweep
    if parallel:
        sweep = sweep.model_copy(update={"parallel": parallel})
    points = [_point(base, chosen, recipe or dataset) for chosen in _combinations(checked)]
    if not points:
        raise ConfigError("params.yaml: `study.leave_out` leaves no cell")
    if len(points) > sweep.max_points:
        raise ConfigError(
            f"params.yaml: `study` asks for {len(points)} cells, more than `sweep.max_points` "
            f"{sweep.max_points}"
        )
    if all(point.problem for point in points):
        raise ConfigError(f"params.yaml: `study`: no cell is possible: {points[0].problem}")
    graph = plan.read_plan(file, dvc_stage.read_graph(home), home, "params.yaml: `study`")
    signatures = {p.name: plan.sign_stages(graph, p.values, home) for p in points if not p.problem}
    return PlannedStudy(file.name, file, sweep, points, 0, graph, signatures, base, checked)


def _check_grid(checked: Params) -> None:
    study, known = checked.study, checked.scale.percentages
    if unknown := [percentage for percentage in study.percentages if percentage not in known]:
        raise ConfigError(
            f"params.yaml: `study.percentages`: {', '.join(map(str, unknown))} is not among "
            f"scale.percentages {known}; add it there, so that the subset is drawn"
        )
    if checked.pretrain.pretext != "simmim":
        raise ConfigError(
            f"params.yaml: `pretrain.pretext` is {checked.pretrain.pretext}, but a study compares validation "
            "losses of masked image modelling; set it to simmim"
        )
    from models import BACKBONES  # torch takes its time

    for name in study.models:
        if name not in BACKBONES:
            raise ConfigError(
                f"params.yaml: `study.models`: backbone {name!r} is unknown; "
                f"choose from {', '.join(BACKBONES)}"
            )


def _as_sweep(dataset: str, recipe: str, settings: Sequence[str], checked: Params) -> SweepFile:
    study = checked.study
    fixed: dict[str, Any] = {}
    for setting in settings:
        fixed |= params.flatten(params.parse_setting(setting))
    fixed = {key: value for key, value in fixed.items() if not key.startswith("study.")}
    if study.extra_losses:
        fixed["pretrain.extra_losses"] = True
    stem = Path(recipe).stem or Path(dataset).stem or checked.ingest.dataset
    grid: dict[str, list[Any]] = {
        MODEL: study.models,
        SUBSET: study.percentages,
        STEPS: study.steps,
        SEED: study.seeds,
    }
    try:
        return SweepFile(
            name=re.sub(r"[^A-Za-z0-9_-]+", "-", stem)[:NAME_LETTERS].strip("-_") or "run",
            dataset=dataset,
            recipe=recipe,
            settings=fixed,
            metric=LOSS,
            direction="minimize",
            also=[study.metric] if study.metric else [],
            grid=grid,
        )
    except ValidationError as error:
        raise ConfigError(f"params.yaml: `study`: {params.first_problem(error)}") from None


def _combinations(checked: Params) -> Iterator[dict[str, Any]]:
    study = checked.study
    for model, percentage, steps, seed in itertools.product(
        study.models, study.percentages, study.steps, study.seeds
    ):
        if (model, percentage) not in study.leave_out:
            warmup = math.floor(study.warmup_fraction * steps)
            yield {MODEL: model, SUBSET: percentage, STEPS: steps, WARMUP: warmup, SEED: seed}


def _point(base: Mapping[str, Any], chosen: Mapping[str, Any], hint: str) -> Point:
    values = dict(base)
    if base["study"]["extra_losses"]:
        values = params.overlay(values, params.nest("pretrain.extra_losses", True), "study")
    # one by one they could contradict one another on the way: all are laid over the base, then checked
    for key, value in chosen.items():
        values = params.overlay(values, params.nest(key, value), "study")
    checked, problem = None, ""
    try:
        checked = Params.model_validate(values)
    except ValidationError as error:
        problem = params.first_problem(error)
    root = workspace.locate(values, checked, hint).root if checked else Path()
    return Point(point_name(chosen), chosen, values, checked, problem, root)
