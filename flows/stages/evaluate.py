"""Stage `evaluate`: how good is a finetuned classifier, and how far can its confidence be trusted?

    in   artifacts/finetune/<cell>, artifacts/data (the split `evaluate.split`)
    out  artifacts/evaluate/<cell>    predictions.csv, confusion.csv, per_class.csv, reliability.csv,
                                      confusion.png, worst.png, throughput.json
         artifacts/metrics/evaluate-<cell>.json

Run by hand: `python -m flows.stages.evaluate --cell pretrained`. Images pass through the preprocessing that
was stored with the weights, the one that the exported model is served with. Everything but throughput.json is
the same for equal inputs: speed differs between runs and stays out of the metrics that DVC compares.
"""

from __future__ import annotations

import csv
import io
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from flows import files, knn, paths, plots
from flows.classifiers import load_classifier
from flows.data import Batch, ImageDataset, eval_batches, to_model_input
from flows.data import manifest as manifests
from flows.errors import DataError, Diverged, Interrupted
from flows.imaging import Preprocessing
from flows.params import Params
from flows.results import CELLS, Prediction, worst_mistakes
from flows.stage import Stage, run_stage
from models.classification import Classifier, metrics

WORST_IMAGES = 24
PICTURE_PIXELS = 256  # longest side of an image in worst.png


def run(params: Params, stage: Stage) -> None:
    assert stage.cell is not None
    manifest = manifests.load(paths.DATA)
    if not manifest.classes:
        raise DataError(
            f"the data set {manifest.name} has no labels (pretraining only); there is nothing to evaluate"
        )
    model, config = load_classifier(paths.FINETUNE / stage.cell)
    if config.data_digest != manifest.digest:
        # with other splits, images of this test set may have been trained on
        raise DataError(
            f"{paths.FINETUNE / stage.cell} was trained on another state of the data; run finetune again"
        )
    dataset = ImageDataset(
        paths.DATA,
        params.evaluate.split,
        cache_mb=0,  # every image is read once, the few pictured ones twice
        max_pixels=params.ingest.max_pixels,
    )
    if not len(dataset):
        raise DataError(f"the {params.evaluate.split} split has no images; set evaluate.split to val or test")

    batches = eval_batches(dataset, config.preprocessing, params.evaluate.batch_size)
    logits, labels, speed = classify(model, batches, config.preprocessing, stage)
    if not bool(torch.isfinite(logits).all()):
        raise Diverged(
            f"{paths.FINETUNE / stage.cell} answers with values that are not finite; train it again"
        )

    bins = params.evaluate.calibration_bins
    summary = summarize(logits, labels, bins)
    if params.knn.images:
        summary["knn_top1"] = round(ask_neighbours(model, params, dataset, config.preprocessing), 6)
    predictions = list_predictions(logits, labels, dataset.keys)
    worst = draw_worst(predictions, manifest.classes, dataset)
    folder = paths.EVALUATE / stage.cell
    write_results(folder, logits, labels, predictions, manifest.classes, bins, worst, speed)
    files.write_json(paths.METRICS / f"evaluate-{stage.cell}.json", summary)

    stage.run.log_metrics({**summary, "images_per_s": speed["images_per_s"]})
    for path in sorted(folder.iterdir()):
        stage.run.log_artifact(path)
    print(
        f"{stage.cell}: top-1 {100 * summary['top1']:.2f} % on {summary['images']:,} images "
        f"(95 % interval {100 * summary['top1_low']:.2f} to {100 * summary['top1_high']:.2f}), "
        f"ECE {100 * summary['ece']:.2f} %, {speed['images_per_s']:,.0f} images/s",
        flush=True,
    )


def classify(
    model: Classifier, batches: Iterable[Batch], preprocessing: Preprocessing, stage: Stage
) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """Run the model over all batches, on the accelerator if there is one.

    Returns:
        Logits (N, C) and labels (N,) on the CPU, and the speed: images/s with and without reading images.

    Raises:
        Interrupted: a stop was requested.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = model.to(device).eval()
    all_logits, all_labels, network_s = [], [], 0.0
    started = time.perf_counter()
    with torch.inference_mode():
        for batch in batches:
            if stage.stop_requested():
                raise Interrupted("stopped; run the same command again")
            before = time.perf_counter()
            images = to_model_input(batch.images.to(device), preprocessing.mean, preprocessing.std)
            all_logits.append(model(images).cpu())  # waits for the device
            network_s += time.perf_counter() - before
            all_labels.append(batch.labels)
    elapsed_s = time.perf_counter() - started
    logits, labels = torch.cat(all_logits), torch.cat(all_labels)
    return (
        logits,
        labels,
        {
            "images_per_s": round(len(labels) / elapsed_s, 2),
            "network_images_per_s": round(len(labels) / network_s, 2),
            "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
            "threads": torch.get_num_threads(),
        },
    )


def ask_neighbours(
    model: Classifier, params: Params, dataset: ImageDataset, preprocessing: Preprocessing
) -> float:
    """Top-1 of the nearest images of the whole training split, by what the head reads."""
    rows = range(dataset.manifest.splits["train"].count)
    known = ImageDataset(
        paths.DATA,
        "train",
        rows=knn.choose_voters(rows, params.knn.images),
        cache_mb=0,
        max_pixels=params.ingest.max_pixels,
    )
    size, device = params.evaluate.batch_size, next(model.parameters()).device
    voters = ((batch, 1.0) for batch in eval_batches(known, preprocessing, size))
    queries = ((batch, 1.0) for batch in eval_batches(dataset, preprocessing, size))
    return knn.top1(model.features, voters, queries, params.knn, preprocessing, device)


def summarize(logits: Tensor, labels: Tensor, bins: int) -> dict[str, float]:
    """The scalars for `dvc metrics`, rounded: digits beyond the sixth are the machine's, not the model's."""
    return {name: round(value, 6) for name, value in asdict(metrics.summarize(logits, labels, bins)).items()}


def list_predictions(logits: Tensor, labels: Tensor, keys: Sequence[str]) -> list[Prediction]:
    """One prediction per image, in the order of the split."""
    predicted, confidence = metrics.predict(logits)
    values = zip(keys, labels.tolist(), predicted.tolist(), confidence.tolist(), strict=True)
    return [
        Prediction(row, key, label, answer, round(sure, 6))
        for row, (key, label, answer, sure) in enumerate(values)
    ]


def write_results(
    folder: Path,
    logits: Tensor,
    labels: Tensor,
    predictions: Sequence[Prediction],
    classes: Sequence[str],
    bins: int,
    worst: bytes,
    speed: dict[str, Any],
) -> None:
    """Replace `folder` by the tables and pictures of one evaluation, as flows.results reads them."""
    predicted, confidence = metrics.predict(logits)
    confusion = metrics.confusion_matrix(labels, predicted, len(classes))
    scores = metrics.class_scores(confusion)
    table = metrics.reliability_table(confidence, predicted == labels, bins)
    with files.replace_folder(folder) as target:
        _write_csv(
            target / "predictions.csv",
            ("row", "key", "label", "predicted", "confidence"),
            ((p.row, p.key, p.label, p.predicted, f"{p.confidence:.6f}") for p in predictions),
        )
        _write_csv(
            target
            / "confusion.csv",  # one line per image: what the `confusion` template of `dvc plots` counts
            ("actual", "predicted"),
            ((classes[p.label], classes[p.predicted]) for p in predictions),
        )
        columns = (scores.precision.tolist(), scores.recall.tolist(), scores.f1.tolist())
        _write_csv(
            target / "per_class.csv",
            ("class", "precision", "recall", "f1", "support"),
            (
                (name, *(f"{value:.6f}" for value in values), support)
                for name, *values, support in zip(classes, *columns, scores.support.tolist(), strict=True)
            ),
        )
        _write_csv(
            target / "reliability.csv",
            ("lower", "upper", "count", "confidence", "accuracy"),
            (
                (f"{b.lower:.6f}", f"{b.upper:.6f}", b.count, f"{b.confidence:.6f}", f"{b.accuracy:.6f}")
                for b in table
            ),
        )
        files.write_bytes(target / "confusion.png", plots.confusion(confusion.numpy(), classes))
        files.write_bytes(target / "worst.png", worst)
        files.write_json(target / "throughput.json", speed)


def draw_worst(predictions: Sequence[Prediction], classes: Sequence[str], dataset: ImageDataset) -> bytes:
    """PNG of the most confident mistakes; of the least certain answers when all are right."""
    chosen, title = worst_mistakes(predictions)[:WORST_IMAGES], "Most confident mistakes"
    if not chosen:
        chosen = sorted(predictions, key=lambda entry: (entry.confidence, entry.row))[:WORST_IMAGES]
        title = "No mistakes; the least certain answers"
    return plots.image_grid(
        [_picture(dataset.image(entry.row)) for entry in chosen],
        [
            f"{_shorten(classes[entry.label])}\nas {_shorten(classes[entry.predicted])}, "
            f"{100 * entry.confidence:.0f} %"
            for entry in chosen
        ],
        title=title,
    )


def _picture(image: Image.Image) -> NDArray[np.uint8]:
    image.thumbnail((PICTURE_PIXELS, PICTURE_PIXELS), Image.Resampling.LANCZOS)
    return np.asarray(image)


def _shorten(name: str) -> str:
    return name if len(name) <= 14 else name[:13] + "…"


def _write_csv(path: Path, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    files.write_text(path, text.getvalue())


def main(argv: list[str] | None = None) -> int:
    return run_stage("evaluate", run, argv, cells=list(CELLS), stops_itself=True)


if __name__ == "__main__":
    raise SystemExit(main())
