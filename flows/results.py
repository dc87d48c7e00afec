"""What a workspace's artifacts say, as typed values; the only thing computed is the paired difference.

Every reader returns None when its stage has not left its file: with unlabelled data only the first half of
the pipeline runs, and a report must still be possible. A file that is there but damaged is an error.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flows import files, paths
from flows.errors import DataError
from flows.plots import History

if TYPE_CHECKING:
    from flows.data import Manifest
    from models.classification.metrics import Interval, ReliabilityBin

CELLS = ("pretrained", "scratch")


@dataclass(frozen=True)
class DataSet:
    """artifacts/data: the manifest and what was quarantined with which reason."""

    manifest: Manifest
    quarantine: Sequence[Mapping[str, str]]  # {"path", "reason"}


@dataclass(frozen=True)
class TrainingRun:
    """One training: its curves and final scalars, and the picture of its pretext if it made one."""

    history: History
    metrics: Mapping[str, Any]
    picture: bytes | None


@dataclass(frozen=True)
class Prediction:
    row: int
    key: str
    label: int
    predicted: int
    confidence: float

    @property
    def is_correct(self) -> bool:
        return self.label == self.predicted


@dataclass(frozen=True)
class Evaluation:
    """One finetuned classifier on the evaluation split."""

    metrics: Mapping[str, float]
    predictions: Sequence[Prediction]
    per_class: Sequence[Mapping[str, str]]
    reliability: Sequence[ReliabilityBin]
    throughput: Mapping[str, Any]

    def mistakes(self) -> list[Prediction]:
        """Wrong answers, the most confident first."""
        return worst_mistakes(self.predictions)


@dataclass(frozen=True)
class Export:
    opset: int
    size_bytes: Mapping[str, int]  # by variant
    digests: Mapping[str, str]


@dataclass(frozen=True)
class Parity:
    report: Mapping[str, Any]  # parity.json
    latency: Sequence[Mapping[str, str]]  # latency.csv
    errors_picture: bytes | None


@dataclass(frozen=True)
class Receipt:
    """Who made the bytes of a stage, when and at what cost."""

    stage: str
    run_id: str
    git: str
    duration_s: float
    device_hours: float
    peak_memory_bytes: int = 0  # receipts of earlier versions have none
    peak_gpu_memory_bytes: int = 0


def worst_mistakes(predictions: Sequence[Prediction]) -> list[Prediction]:
    """Wrong answers, the most confident first; equal confidence keeps the order of the data set."""
    wrong = [entry for entry in predictions if not entry.is_correct]
    return sorted(wrong, key=lambda entry: (-entry.confidence, entry.row))


# ------------------------------------------------------------------------------------------ readers


def read_data(workspace: Path) -> DataSet | None:
    from flows.data import manifest

    folder = workspace / paths.DATA
    if not folder.is_dir():
        return None
    return DataSet(manifest.load(folder), _read_json(folder / "quarantine.json") or [])


def read_subsets(workspace: Path) -> Sequence[Mapping[str, Any]]:
    """The nested subsets of the training split: percentage, count, sha256."""
    value = _read_json(workspace / paths.SUBSETS / "subsets.json")
    return value["subsets"] if value else []


def read_pretraining(workspace: Path) -> TrainingRun | None:
    return _read_training(workspace, workspace / paths.PRETRAIN, "pretrain")


def read_finetuning(workspace: Path) -> dict[str, TrainingRun]:
    """By cell, those that exist."""
    found = {
        cell: _read_training(workspace, workspace / paths.FINETUNE / cell, f"finetune-{cell}")
        for cell in CELLS
    }
    return {cell: run for cell, run in found.items() if run is not None}


def _read_training(workspace: Path, folder: Path, metrics: str) -> TrainingRun | None:
    if not folder.is_dir():
        return None
    picture = folder / "examples.png"
    return TrainingRun(
        history=History.read(folder),
        metrics=_read_json(workspace / paths.METRICS / f"{metrics}.json") or {},
        picture=picture.read_bytes() if picture.is_file() else None,
    )


def read_evaluations(workspace: Path) -> dict[str, Evaluation]:
    """By cell, those that exist."""
    found = {cell: _read_evaluation(workspace, cell) for cell in CELLS}
    return {cell: evaluation for cell, evaluation in found.items() if evaluation is not None}


def _read_evaluation(workspace: Path, cell: str) -> Evaluation | None:
    from models.classification.metrics import ReliabilityBin

    folder = workspace / paths.EVALUATE / cell
    metrics = _read_json(workspace / paths.METRICS / f"evaluate-{cell}.json")
    predictions = _read_csv(folder / "predictions.csv")
    if metrics is None or predictions is None:
        return None
    return Evaluation(
        metrics=metrics,
        predictions=[
            Prediction(
                row=int(row["row"]),
                key=row["key"],
                label=int(row["label"]),
                predicted=int(row["predicted"]),
                confidence=float(row["confidence"]),
            )
            for row in predictions
        ],
        per_class=_read_csv(folder / "per_class.csv") or [],
        reliability=[
            ReliabilityBin(
                lower=float(row["lower"]),
                upper=float(row["upper"]),
                count=int(row["count"]),
                confidence=float(row["confidence"]),
                accuracy=float(row["accuracy"]),
            )
            for row in _read_csv(folder / "reliability.csv") or []
        ],
        throughput=_read_json(folder / "throughput.json") or {},
    )


def gain_of_pretraining(evaluations: Mapping[str, Evaluation]) -> Interval | None:
    """Top-1 of pretrained minus top-1 of scratch on the same images; None unless both saw the same ones."""
    import torch

    from models.classification.metrics import paired_difference

    if not all(cell in evaluations for cell in CELLS):
        return None
    answers = [{entry.row: entry.is_correct for entry in evaluations[cell].predictions} for cell in CELLS]
    rows = sorted(answers[0])
    if not rows or rows != sorted(answers[1]):
        return None
    first, second = (torch.tensor([answer[row] for row in rows]) for answer in answers)
    return paired_difference(first, second)


def read_export(workspace: Path) -> Export | None:
    manifest = _read_json(workspace / paths.EXPORT / "manifest.json")
    if manifest is None:
        return None
    return Export(
        opset=manifest["opset"],
        size_bytes={name: variant["bytes"] for name, variant in manifest["variants"].items()},
        digests={name: variant["digest"] for name, variant in manifest["variants"].items()},
    )


def read_parity(workspace: Path) -> Parity | None:
    folder = workspace / paths.PARITY
    report = _read_json(folder / "parity.json")
    if report is None:
        return None
    picture = folder / "errors.png"
    return Parity(
        report=report,
        latency=_read_csv(folder / "latency.csv") or [],
        errors_picture=picture.read_bytes() if picture.is_file() else None,
    )


STAGES = {
    "image": ("ingest", "scale", "pretrain", "finetune", "evaluate", "export", "parity"),
    "causal_lm": ("text", "language_pretrain", "language_evaluate", "language_export"),
}
"""Of each `objective`, in the order of the pipeline."""


def read_receipts(workspace: Path, objective: str = "image") -> list[Receipt]:
    """In the order of the pipeline; without those of the other track."""
    found = [_read_json(path) for path in sorted((workspace / paths.RECEIPTS).glob("*.json"))]
    receipts = [Receipt(**value) for value in found if value is not None]
    others = {stage for name, stages in STAGES.items() if name != objective for stage in stages}
    order = STAGES[objective]

    def position(receipt: Receipt) -> tuple[int, str]:
        stage = receipt.stage.partition("@")[0]
        return order.index(stage) if stage in order else len(order), receipt.stage

    return sorted((receipt for receipt in receipts if receipt.stage not in others), key=position)


# ------------------------------------------------------------------------------------------ files


def _read_json(path: Path) -> Any:
    try:
        return files.read_json(path)
    except FileNotFoundError:
        return None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DataError(f"{path} is damaged ({error}); run its stage again") from None


def _read_csv(path: Path) -> list[dict[str, str]] | None:
    if not path.is_file():
        return None
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))
