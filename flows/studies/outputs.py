"""What a study's folder holds: analysis.json, cells.csv, pictures, study.html; each file whole or as it was.

Everything is computed and drawn before the first byte is written, so a mistake in the table leaves the
results of an earlier run untouched. Other files in the folder are left alone.
"""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

from flows import files
from flows.errors import ConfigError, ResourceError
from flows.studies import figures, page
from flows.studies.analysis import Analysis, AnalysisSettings, analyse, judged_rows, to_dict
from flows.studies.cells import read_cells, write_value


def write_study(cells_path: Path, out: Path, settings: AnalysisSettings) -> dict[str, Any]:
    """Analyse the table in `cells_path` and write everything into `out`; what analysis.json holds."""
    return to_dict(study(cells_path, out, settings))


def study(cells_path: Path, out: Path, settings: AnalysisSettings) -> Analysis:
    if out.exists() and not out.is_dir():
        raise ConfigError(f"{out} is a file; give a folder for the results")
    analysis = analyse(read_cells(cells_path), settings)
    made = render(analysis)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ResourceError(f"cannot create the folder {out}: {error.strerror}") from None
    for name in figures.NAMES:
        if f"{name}.png" not in made:
            (out / f"{name}.png").unlink(missing_ok=True)  # of an earlier table that had more columns
    for name, data in made.items():
        files.write_bytes(out / name, data)
    return analysis


def render(analysis: Analysis) -> dict[str, bytes]:
    """File name → content; analysis.json last, so that it never tells of files that are not there."""
    drawn = figures.draw(analysis, "png")
    made = {f"{name}.png": data for name, data in drawn.items()}
    made["cells.csv"] = _csv(analysis).encode()
    made["study.html"] = page.render_page(analysis).encode()
    text = json.dumps(to_dict(analysis), indent=2, allow_nan=False, ensure_ascii=False)
    made["analysis.json"] = f"{text}\n".encode()
    return made


def _csv(analysis: Analysis) -> str:
    names, rows = judged_rows(analysis)
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(names)
    table.writerows([write_value(value) for value in row] for row in rows)
    return text.getvalue()
