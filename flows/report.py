"""The report of a run: one HTML page that needs nothing but itself (`artifacts/report.html`).

Numbers come from `flows.results`, pictures from `flows.plots` as inline SVG or data URIs, words from the
template `flows/templates/report.html.j2`. A section whose inputs are absent says why in one line.
"""

from __future__ import annotations

import io
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from markupsafe import Markup
from PIL import Image

from flows import files, params, paths, plots, results
from flows.language_report import render_language_report
from flows.markup import data_uri, format_number, format_size, inline_svg, percent, points, templates

if TYPE_CHECKING:
    from models.classification.metrics import Interval

SAMPLE_IMAGES = 40
WORST_MISTAKES = 24
QUARANTINE_ROWS = 20
CONFUSED_PAIRS = 8
THUMBNAIL = 128  # pixels, long side


@dataclass(frozen=True)
class Tile:
    """One headline number."""

    label: str
    value: str
    note: str
    tone: str = ""  # good | bad | ""


@dataclass(frozen=True)
class Thumbnail:
    uri: str
    is_tiny: bool  # to be enlarged without smoothing
    caption: str
    note: str = ""


@dataclass(frozen=True)
class StageCost:
    """One line of the cost table."""

    stage: str
    status: str  # executed | cached | ""
    duration: str
    device_hours: float
    git: str
    run_id: str
    url: str


def build_report(workspace: Path, extra: Mapping[str, Any]) -> Path:
    """Write the report of `workspace` and return its path.

    Args:
        workspace: folder with params.yaml and artifacts/.
        extra: what the files do not know, all optional: `registry` {"name", "version", "aliases"},
            `tracking_uri`, `executed` (labels of the stages that ran; the rest was restored), `git` (commit),
            `dirty` (bool), `lock_sha256`, `run_urls` {stage label: address of its tracking run}, `command`
            (that started the run).

    Raises:
        ConfigError: params.yaml is wrong.
        DataError: an artifact is damaged.
    """
    path = workspace / paths.REPORT
    files.write_text(path, render_report(workspace, extra))
    return path


def render_report(workspace: Path, extra: Mapping[str, Any]) -> str:
    """The page as text."""
    checked = params.load(workspace / "params.yaml")
    if checked.objective == "causal_lm":
        return render_language_report(workspace, checked, extra)
    data = results.read_data(workspace)
    evaluations = results.read_evaluations(workspace)
    if not checked.pipeline.control:  # of an earlier run of this workspace
        evaluations = {cell: found for cell, found in evaluations.items() if cell != "scratch"}
    gain = results.gain_of_pretraining(evaluations)
    parity = results.read_parity(workspace)
    export = results.read_export(workspace)
    receipts = results.read_receipts(workspace)
    unlabelled = data is not None and not data.manifest.classes
    environment = templates(
        percent=percent, points=points, number=format_number, size=format_size, duration=plots.format_duration
    )
    return environment.get_template("report.html.j2").render(
        generated=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        params=checked,
        flat_params=params.flatten(checked.model_dump(mode="json")),
        extra={
            "registry": None,
            "tracking_uri": None,
            "executed": None,
            "git": None,
            "dirty": None,
            "lock_sha256": _lock_sha256(workspace),
            "command": f"make run DATASET={_dataset_argument(checked)}",
            **extra,
        },
        unlabelled=unlabelled,
        quarantine_rows=QUARANTINE_ROWS,
        verdict=_verdict(unlabelled, evaluations, gain),
        tiles=_tiles(evaluations, gain, parity, export, receipts, extra),
        data=data,
        subsets=results.read_subsets(workspace),
        samples=_sample_images(workspace, checked.ingest.max_pixels) if data else [],
        pretraining=_pretraining(workspace),
        chance=2 * math.log(checked.pretrain.moby.queue_size + 1),
        finetuning=_finetuning(workspace),
        evaluations=evaluations,
        gain=gain,
        evaluation=_evaluation(workspace, data.manifest.classes, evaluations, checked)
        if data and evaluations
        else None,
        export=export,
        parity=_parity(parity) if parity else None,
        cost=_cost(receipts, extra) if receipts else None,
    )


def _lock_sha256(workspace: Path) -> str | None:
    lock = workspace / "dvc.lock"
    return files.sha256_file(lock) if lock.is_file() else None


def _dataset_argument(checked: params.Params) -> str:
    return checked.ingest.source if checked.ingest.dataset == "folder" else checked.ingest.dataset


# ------------------------------------------------------------------------------------------ headline


def _verdict(unlabelled: bool, evaluations: Mapping[str, results.Evaluation], gain: Interval | None) -> str:
    """One sentence; a difference counts only when its interval leaves zero out."""
    if unlabelled:
        return "Pretraining only: the images have no labels, so there is nothing to classify."
    if not evaluations:
        return "No classifier has been evaluated yet."
    if gain is None:
        cell, evaluation = next(iter(evaluations.items()))
        return f"The {cell} classifier answers {percent(evaluation.metrics['top1'])} of the images correctly."
    effect = f"{points(gain.value)} points of accuracy against training from scratch"
    limits = f"(95 % interval {points(gain.low)} to {points(gain.high)})"
    if gain.low > 0:
        return f"Pretraining helps: {effect} {limits}."
    if gain.high < 0:
        return f"Pretraining hurts: {effect} {limits}."
    return f"Pretraining makes no difference that these images can show: {effect} {limits}."


def _tiles(
    evaluations: Mapping[str, results.Evaluation],
    gain: Interval | None,
    parity: results.Parity | None,
    export: results.Export | None,
    receipts: Sequence[results.Receipt],
    extra: Mapping[str, Any],
) -> list[Tile]:
    tiles = []
    for cell, evaluation in evaluations.items():
        m = evaluation.metrics
        note = f"95 % interval {percent(m['top1_low'])} to {percent(m['top1_high'])}, {m['images']:,} images"
        tiles.append(Tile(f"Top-1, {cell}", percent(m["top1"]), note))
    if gain is not None:
        tone = "good" if gain.low > 0 else "bad" if gain.high < 0 else ""
        note = f"paired 95 % interval {points(gain.low)} to {points(gain.high)}"
        tiles.append(Tile("Gain of pretraining", f"{points(gain.value)} points", note, tone))
    if parity is not None:
        checks = parity.report["checks"]
        passed = sum(check["passed"] for check in checks)
        error = max(c["max_abs_error"] for c in parity.report["comparisons"] if c["variant"] == "fp32")
        tone = "good" if passed == len(checks) else "bad"
        note = f"largest fp32 logit error {error:.1e}"
        tiles.append(Tile("Export parity", f"{passed} of {len(checks)} pass", note, tone))
    if export is not None and {"fp32", "int8"} <= export.size_bytes.keys():
        small, large = export.size_bytes["int8"], export.size_bytes["fp32"]
        note = f"{large / small:.1f} × smaller than fp32 ({format_size(large)})"
        if parity is not None and (speed := parity.report["speed"].get("int8_over_fp32")):
            batch = max(speed, key=int)
            note += f"; {speed[batch]:.2f} × its speed at batch {batch}"
        tiles.append(Tile("int8 model", format_size(small), note))
    if registry := extra.get("registry"):
        aliases = registry.get("aliases") or ["no alias"]
        tiles.append(
            Tile("Registered", f"version {registry['version']}", f"{registry['name']} · {', '.join(aliases)}")
        )
    if receipts:
        total = sum(receipt.duration_s for receipt in receipts)
        hours = sum(receipt.device_hours for receipt in receipts)
        tiles.append(Tile("Cost of all stages", plots.format_duration(total), f"{hours:.3g} device-hours"))
    return tiles


# ------------------------------------------------------------------------------------------ sections


def _sample_images(workspace: Path, max_pixels: int) -> list[Thumbnail]:
    """The first training images of each class, classes in turn, so that all are seen."""
    from flows.data import ImageDataset

    dataset = ImageDataset(workspace / paths.DATA, "train", cache_mb=0, max_pixels=max_pixels)
    by_class: dict[int, list[int]] = {}
    for row, label in enumerate(dataset.labels.tolist()):
        by_class.setdefault(label, []).append(row)
    turns = itertools.zip_longest(*(rows for _, rows in sorted(by_class.items())))
    chosen = [row for turn in turns for row in turn if row is not None][:SAMPLE_IMAGES]
    classes = dataset.manifest.classes
    return [_thumbnail(dataset.image(row), classes[dataset.labels[row]] if classes else "") for row in chosen]


def _pretraining(workspace: Path) -> dict[str, Any] | None:
    run = results.read_pretraining(workspace)
    if run is None:
        return None
    return {
        "metrics": run.metrics,
        "curves": _inline_all(plots.curve_panels({"pretrain": run.history}, "svg"), "pretrain"),
        "examples": data_uri(run.picture) if run.picture else None,
    }


def _finetuning(workspace: Path) -> dict[str, Any] | None:
    runs = results.read_finetuning(workspace)
    if not runs:
        return None
    histories = {cell: run.history for cell, run in runs.items()}
    return {"curves": _inline_all(plots.curve_panels(histories, "svg"), "finetune")}


def _evaluation(
    workspace: Path,
    classes: Sequence[str],
    evaluations: Mapping[str, results.Evaluation],
    checked: params.Params,
) -> dict[str, Any]:
    from models.classification.metrics import Interval

    shown, first = next(iter(evaluations.items()))
    intervals = {
        cell: Interval(e.metrics["top1"], e.metrics["top1_low"], e.metrics["top1_high"])
        for cell, e in evaluations.items()
    }
    split = checked.evaluate.split
    tables = {cell: e.reliability for cell, e in evaluations.items()}
    notes = {cell: f"(ECE {percent(e.metrics['ece'])})" for cell, e in evaluations.items()}
    return {
        "shown": shown,
        "split": split,
        "comparison": inline_svg(
            plots.comparison(intervals, f"{split} accuracy (top-1), %, with 95 % interval", "svg"),
            "comparison",
            "Accuracy of each classifier with its 95 % interval",
        ),
        "confusions": {
            cell: inline_svg(
                plots.confusion(_confusion(classes, e.predictions), classes, "svg"),
                f"confusion-{cell}",
                f"Confusion matrix of the {cell} classifier: rows actual, columns predicted class",
            )
            for cell, e in evaluations.items()
        },
        "confused": _confused_pairs(classes, first.predictions),
        "reliability": inline_svg(
            plots.reliability(tables, notes, "svg"),
            "reliability",
            "Reliability diagrams: accuracy against confidence",
        ),
        "mistakes": len(first.mistakes()),
        "worst": _worst(workspace, classes, first, checked),
    }


def _confusion(classes: Sequence[str], predictions: Sequence[results.Prediction]) -> np.ndarray[Any, Any]:
    counts = np.zeros((len(classes), len(classes)), dtype=np.int64)
    np.add.at(counts, ([p.label for p in predictions], [p.predicted for p in predictions]), 1)
    return counts


def _confused_pairs(
    classes: Sequence[str], predictions: Sequence[results.Prediction]
) -> list[tuple[str, str, int, float]]:
    """The most frequent kinds of mistake: actual, predicted, count, share of the actual class."""
    counts = _confusion(classes, predictions)
    support = counts.sum(axis=1)
    np.fill_diagonal(counts, 0)
    order = np.argsort(-counts, axis=None, kind="stable")[:CONFUSED_PAIRS]
    pairs = [divmod(int(index), len(classes)) for index in order]
    return [
        (
            classes[row],
            classes[column],
            int(counts[row, column]),
            counts[row, column] / support[row],
        )
        for row, column in pairs
        if counts[row, column]
    ]


def _worst(
    workspace: Path, classes: Sequence[str], evaluation: results.Evaluation, checked: params.Params
) -> list[Thumbnail]:
    from flows.data import ImageDataset

    dataset = ImageDataset(
        workspace / paths.DATA, checked.evaluate.split, cache_mb=0, max_pixels=checked.ingest.max_pixels
    )
    return [
        _thumbnail(
            dataset.image(mistake.row),
            f"{classes[mistake.label]} → {classes[mistake.predicted]}",
            f"{percent(mistake.confidence)} sure",
        )
        for mistake in evaluation.mistakes()[:WORST_MISTAKES]
    ]


def _parity(parity: results.Parity) -> dict[str, Any]:
    lines: dict[str, list[Mapping[str, str]]] = {}
    for row in parity.latency:
        lines.setdefault(_runner(row), []).append(row)
    series = [
        plots.Latency(
            label,
            [int(row["batch"]) for row in rows],
            [float(row["p50_ms"]) for row in rows],
            [float(row["p95_ms"]) for row in rows],
        )
        for label, rows in lines.items()
    ]
    return {
        "report": parity.report,
        "rows": [(_runner(row), row) for row in parity.latency],
        "latency": inline_svg(plots.latency(series, "svg"), "latency", "Latency and throughput by batch size")
        if series
        else None,
        "errors": data_uri(parity.errors_picture) if parity.errors_picture else None,
    }


def _runner(row: Mapping[str, str]) -> str:
    if row["variant"] == "pytorch":
        return "PyTorch eager"
    return f"{row['variant']} · {row['provider'].removesuffix('ExecutionProvider')}"


def _cost(receipts: Sequence[results.Receipt], extra: Mapping[str, Any]) -> dict[str, Any]:
    executed = extra.get("executed")
    urls = extra.get("run_urls") or {}
    chart = plots.durations({r.stage: r.duration_s for r in receipts}, executed, "svg")
    fresh = [r for r in receipts if executed is not None and r.stage in executed]
    return {
        "chart": inline_svg(chart, "durations", "Duration of each stage"),
        "stages": [
            StageCost(
                stage=r.stage,
                status="" if executed is None else "executed" if r.stage in executed else "cached",
                duration=plots.format_duration(r.duration_s),
                device_hours=r.device_hours,
                git=r.git,
                run_id=r.run_id,
                url=urls.get(r.stage, ""),
            )
            for r in receipts
        ],
        "total_s": sum(r.duration_s for r in receipts),
        "device_hours": sum(r.device_hours for r in receipts),
        "fresh_s": sum(r.duration_s for r in fresh),
        "fresh": None if executed is None else len(fresh),
    }


# ------------------------------------------------------------------------------------------ pictures


def _thumbnail(image: Image.Image, caption: str, note: str = "") -> Thumbnail:
    """The image at most THUMBNAIL pixels wide and high: PNG when tiny, else JPEG."""
    buffer = io.BytesIO()
    if max(image.size) <= THUMBNAIL // 2:
        image.save(buffer, "PNG")
        return Thumbnail(data_uri(buffer.getvalue()), True, caption, note)
    image.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS)
    image.save(buffer, "JPEG", quality=85)
    return Thumbnail(data_uri(buffer.getvalue(), "image/jpeg"), False, caption, note)


def _inline_all(pictures: Mapping[str, bytes], name: str) -> list[Markup]:
    return [
        inline_svg(picture, f"{name}-{index}", f"{title} over optimiser steps ({name})")
        for index, (title, picture) in enumerate(pictures.items())
    ]
