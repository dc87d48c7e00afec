"""Stage `study`: what a table of pretrainings says about data, model size and training length.

    in   the table that `study.cells` names (docs/data_scaling.md has its columns)
    out  artifacts/study              analysis.json, tables, figures, one page
         artifacts/metrics/study.json

Nothing is trained here: `trunkline study run` fills the table. By hand: `python -m flows.stages.study`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flows import files, paths
from flows.params import Params, flatten
from flows.stage import Stage, run_stage
from flows.studies.analysis import AnalysisSettings
from flows.studies.outputs import write_study

GROUPS = ("all", "below_boundary", "at_or_above_boundary")
SHOWN = {
    **{
        f"{kind}_{group}": f"correlations.{group}.{kind}"
        for group in GROUPS
        for kind in ("pearson", "spearman")
    },
    **{f"exponent_{name}": f"fit.exponents.{name}.value" for name in ("parameters", "images", "iterations")},
    "fit_rmse": "fit.rmse",
    "held_out_error": "held_out.errors.mean_absolute",
}
"""Metric to its place in analysis.json."""


def run(params: Params, stage: Stage) -> None:
    said = params.study.analysis
    settings = AnalysisSettings(
        budget=said.budget or None,
        images=said.images or None,
        draws=said.draws,
        law_draws=said.law_draws,
        seed=said.seed,
    )
    with files.replace_folder(paths.STUDY) as folder:
        found = write_study(Path(params.study.cells), folder, settings)
    metrics = pick_metrics(found)
    files.write_json(paths.METRICS / "study.json", metrics)
    stage.run.log_metrics(metrics)
    for path in sorted(path for path in paths.STUDY.rglob("*") if path.is_file()):
        stage.run.log_artifact(path)
    print(f"study: {metrics['cells']} cells, page {paths.STUDY}/study.html")


def pick_metrics(found: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of analysis.json that `dvc metrics diff` should show; what is not known is not there."""
    metrics = {
        "cells": found["cells"],
        "left_out": len(found["left_out"]),
        "series": found["series"],
        "overfitted_series": len(found["overfitted"]),
    }
    flat = flatten({name: found[name] or {} for name in ("correlations", "fit", "held_out")})
    for name, key in SHOWN.items():
        if (value := flat.get(key)) is not None:
            metrics[name] = value
    return metrics


def main(argv: list[str] | None = None) -> int:
    return run_stage("study", run, argv)


if __name__ == "__main__":
    raise SystemExit(main())
