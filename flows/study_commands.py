"""The commands of `trunkline study`: run a grid of pretrainings, and tell what a table of them says."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from flows import environment, paths
from flows.errors import ConfigError, Interrupted, TrunklineError

study_app = typer.Typer(
    no_args_is_help=True, help="Data scaling: what data, model size and length are worth."
)


@study_app.callback()
def study() -> None:
    """Data scaling: what data, model size and training length are worth (docs/data_scaling.md)."""


@study_app.command()
def run(
    dataset: Annotated[
        str, typer.Option(help="digits, cifar10 or a folder of images; empty: as in params.yaml")
    ] = "",
    recipe: Annotated[str, typer.Option(help="name in recipes/ or path of an overlay of params.yaml")] = "",
    set_: Annotated[list[str], typer.Option("--set", help="key=value, may be repeated")] = [],  # noqa: B006
    parallel: Annotated[int, typer.Option(min=0, help="cells at once; 0: sweep.parallel of params.yaml")] = 0,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="print the grid, its cost and what each cell would run")
    ] = False,
    retry_failed: Annotated[
        bool, typer.Option("--retry-failed", help="also cells that would fail in the same way again")
    ] = False,
    strict: Annotated[bool, typer.Option("--strict", help="a failed cell makes the command fail")] = False,
    table: Annotated[str, typer.Option(help="also write the table of cells to this CSV file")] = "",
) -> None:
    """Pretrain and finetune every cell of section `study`, then analyse the table; it can be continued."""
    paths.workspace()
    from flows.sweeps.study_cells import print_plan, print_results, refuse_failures
    from flows.sweeps.study_grid import prepare_study

    planned = prepare_study(dataset, recipe, set_, parallel)  # finds mistakes before a server is started
    if dry_run:
        print_plan(planned, retry_failed)
        return
    source = Path(planned.checked.ingest.source)
    if not (source if source.is_absolute() else paths.home() / source).exists():
        raise ConfigError(f"`ingest.source`: {source} does not exist")
    from flows import workspace

    workspace.require_writable()
    from flows.study import study

    environment.interrupt_on_sigterm()
    try:
        summary = study(dataset, recipe, set_, parallel, retry_failed, table)
    except KeyboardInterrupt:
        raise Interrupted("stopped; the same command continues where it was") from None
    rows = {point.name: planned.known_row(point) for point in planned.points}
    print_results(planned, rows)
    counts = ", ".join(f"{count} {status}" for status, count in summary["counts"].items() if count)
    print(
        f"cells    {counts}; {len(summary['known'])} known before, {len(summary['executed'])} stages executed"
    )
    for name in ("table", "page"):
        if summary[name]:
            print(f"{name:<8} {summary[name]}")
    refuse_failures(summary["counts"], rows, strict)
    if summary["analysis"]:
        raise TrunklineError(f"the table is not analysed: {summary['analysis']}")


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
