"""The commands of `trunkline study`: what a table of pretrainings says about data, size and length."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

study_app = typer.Typer(
    no_args_is_help=True, help="Data scaling: what data, model size and length are worth."
)


@study_app.callback()
def study() -> None:
    """Data scaling: what data, model size and training length are worth (docs/data_scaling.md)."""


@study_app.command()
def analyse(
    cells: Annotated[Path, typer.Argument(metavar="CELLS.csv", help="table, one row per pretraining")],
    out: Annotated[Path, typer.Option(help="folder for the page, figures and analysis.json")],
    budget: Annotated[
        float, typer.Option(min=0.0, help="compute to advise for, in the unit of the table; 0: dearest cell")
    ] = 0.0,
    images: Annotated[
        float, typer.Option(min=0.0, help="training images at hand; 0: the most the table has")
    ] = 0.0,
    batch_size: Annotated[
        float, typer.Option(min=0.0, help="images a step; 0: the table's, else 2048")
    ] = 0.0,
    draws: Annotated[int, typer.Option(help="resamples for correlations; a tenth or so for the law")] = 2000,
    seed: Annotated[int, typer.Option(help="of all resampling")] = 0,
) -> None:
    """Analyse a table of cells: correlations, overfitting, power laws, advice; also one from elsewhere.

    Columns: model, parameters, images, iterations, validation_loss, finetuned_top1 (may be empty).
    """
    from flows.studies.analysis import AnalysisSettings
    from flows.studies.outputs import study as run_study
    from flows.studies.summary import print_study

    settings = AnalysisSettings(
        budget or None, images or None, batch_size or None, draws, max(20, round(0.15 * draws)), seed
    )
    print_study(run_study(cells, out, settings), out)
