"""The files of a sweep's folder: results.csv and .json, parallel_coordinates.png, sweep.html."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from markupsafe import Markup

from flows import files, plots, tracking
from flows.markup import format_number, templates
from flows.sweeps import coordinates, results
from flows.sweeps.planned import PlannedSweep
from flows.sweeps.results import Row


def write_results(planned: PlannedSweep, rows: Sequence[Row], run_id: str, pictures: bool) -> list[Path]:
    """Write the tables, and with `pictures` what is drawn; the paths."""
    folder = planned.folder
    about = {
        "folder": str(folder),
        "mlflow_run": run_id,
        "git": tracking.git_commit(),
        "dirty": tracking.git_is_dirty(),
        "repeated_draws": planned.repeated,
    }
    written = [folder / "results.csv", folder / "results.json"]
    results.write_csv(written[0], rows, planned.file)
    results.write_json(written[1], rows, planned.file, about)
    if pictures:
        found = coordinates.coordinates(rows, planned.file)
        if found.lines:
            written.append(folder / "parallel_coordinates.png")
            files.write_bytes(written[-1], plots.parallel_coordinates(found))
        written.append(folder / "sweep.html")
        files.write_text(written[-1], render_page(planned, rows))
    return written


def render_page(planned: PlannedSweep, rows: Sequence[Row]) -> str:
    """One page that makes no request."""
    sweep = planned.file
    environment = templates(number=format_number, show=results.show, duration=plots.format_duration)
    ranked = results.rank(rows, sweep)
    done = [row for row in ranked if row.value is not None]
    found = coordinates.coordinates(rows, sweep)
    data = json.dumps(coordinates.page_data(found, rows), ensure_ascii=False)
    seeds = results.seed_keys(sweep)
    metrics = sorted({key for row in rows for key in row.metrics} & {sweep.metric, *sweep.also})
    return environment.get_template("sweep.html.j2").render(
        generated=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        sweep=sweep,
        # `<` could end the script element
        data=Markup(data.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")),
        is_drawn=bool(found.lines),
        rows=ranked,
        best_settings=results.shorten(done[0].settings) if done else {},
        best=done[0] if done else None,
        extra_metrics=[key for key in metrics if key != sweep.metric],
        names=list(results.shorten(dict.fromkeys(sweep.keys))),
        groups=results.group_by_seed(rows, sweep),
        isnan=math.isnan,
        counts={status: sum(row.status == status for row in rows) for status in results.NAMES},
        status_names=results.NAMES,
        git=tracking.git_commit(),
        dirty=tracking.git_is_dirty(),
        file=planned.given,
        worst=done[-1].value if done else None,
        group_names=list(results.shorten(dict.fromkeys(k for k in sweep.keys if k not in seeds))),
        run_command=results.run_command(sweep, done[0]) if done else "",
    )
