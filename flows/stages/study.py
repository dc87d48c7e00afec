"""Stage `study`: what a table of pretrainings says about data, model size and training length.

    in   the table that `study.cells` names (docs/data_scaling.md has its columns)
    out  artifacts/study              analysis.json, tables, figures, one page
         artifacts/metrics/study.json

Nothing is trained here: `trunkline study run` fills the table. By hand: `python -m flows.stages.study`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flows import files, paths
from flows.params import Params, flatten
from flows.stage import Stage, run_stage
from flows.studies.analysis import AnalysisSettings
from flows.studies.outputs import write_study


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
    """The numbers of analysis.json that `dvc metrics diff` should show; no lists, nothing unknown."""
    metrics = {
        "cells": found["cells"],
        "left_out": len(found["left_out"]),
        "series": found["series"],
        "overfitted_series": len(found["overfitted"]),
    }
    for name in ("correlations", "fit", "held_out"):
        for key, value in flatten({name: found[name] or {}}).items():
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            if is_number and math.isfinite(value) and "by_model" not in key:
                metrics[key] = value
    return metrics


def main(argv: list[str] | None = None) -> int:
    return run_stage("study", run, argv)


if __name__ == "__main__":
    raise SystemExit(main())
