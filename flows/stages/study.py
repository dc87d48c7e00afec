"""Stage `study`: what a table of pretrainings says about data, model size and training length.

    in   the table that `study.cells` names (docs/data_scaling.md has its columns)
    out  artifacts/study              analysis.json, tables, figures, one page
         artifacts/metrics/study.json

Nothing is trained here: `trunkline study run` fills the table. By hand: `python -m flows.stages.study`.
"""

from __future__ import annotations

from pathlib import Path

from flows import files, paths
from flows.params import Params, flatten
from flows.stage import Stage, run_stage
from flows.studies.analysis import AnalysisSettings, write_study


def run(params: Params, stage: Stage) -> None:
    settings = AnalysisSettings(**params.study.analysis.model_dump())
    with files.replace_folder(paths.STUDY) as folder:
        found = write_study(Path(params.study.cells), folder, settings)
    files.write_json(paths.METRICS / "study.json", found)
    numbers = flatten(found).items()
    stage.run.log_metrics({key: value for key, value in numbers if isinstance(value, int | float)})
    for path in sorted(path for path in paths.STUDY.rglob("*") if path.is_file()):
        stage.run.log_artifact(path)
    print(f"study: {paths.STUDY}")


def main(argv: list[str] | None = None) -> int:
    return run_stage("study", run, argv)


if __name__ == "__main__":
    raise SystemExit(main())
