"""The report of a run of the language track: one HTML page that needs nothing but itself, like that of images
(flows.report). A section whose inputs are absent says why in one line.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from flows import files, params, paths, plots, results
from flows.markup import format_number, inline_svg, templates
from flows.params import Params

LABELS = {
    "bits_per_byte": ("bits per byte", 3),
    "perplexity": ("perplexity per token", 1),
    "top1": ("next token right, fraction", 3),
}


def render_language_report(workspace: Path, checked: Params, extra: Mapping[str, Any]) -> str:
    """The page as text; `extra` as `flows.report.build_report` takes it."""
    text, trained, judged, exported = (
        _metrics(workspace, name)
        for name in ("text", "language_pretrain", "language_evaluate", "language_export")
    )
    receipts = results.read_receipts(workspace, "causal_lm")
    environment = templates(number=format_number, duration=plots.format_duration)
    return environment.get_template("language_report.html.j2").render(
        generated=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        flat_params=params.flatten(checked.model_dump(mode="json")),
        extra={"registry": None, "tracking_uri": None, "git": None, "dirty": None, "executed": None, **extra},
        manifest=_read(workspace / paths.TEXT / "manifest.json"),
        text=text,
        trained=trained,
        curves=_curves(workspace),
        judged=judged,
        table=_table(judged) if judged else [],
        sample=_read(workspace / paths.LANGUAGE_EVALUATE / "sample.json"),
        exported=exported,
        receipts=receipts,
        total_s=sum(receipt.duration_s for receipt in receipts),
    )


def _metrics(workspace: Path, name: str) -> dict[str, Any] | None:
    return _read(workspace / paths.METRICS / f"{name}.json")


def _read(path: Path) -> dict[str, Any] | None:
    return dict(files.read_json(path)) if path.is_file() else None


def _curves(workspace: Path) -> list[Any]:
    history = plots.History.read(workspace / paths.LANGUAGE_PRETRAIN)
    pictures = plots.curve_panels({"language_pretrain": history}, "svg")
    return [inline_svg(svg, f"curve-{n}", title) for n, (title, svg) in enumerate(pictures.items())]


def _table(judged: Mapping[str, Any]) -> list[tuple[str, list[str]]]:
    """Rows of the comparison: what is measured, then decoder, bigram and unigram."""
    return [
        (label, [f"{judged[f'{prefix}{key}']:.{digits}f}" for prefix in ("", "bigram_", "unigram_")])
        for key, (label, digits) in LABELS.items()
    ]
