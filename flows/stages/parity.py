"""Stage `parity`: do the exported networks answer as PyTorch does, and how fast? A gate, not a report only.

    in   artifacts/export, artifacts/finetune/pretrained, artifacts/data (validation split)
    out  artifacts/parity                 parity.json, latency.csv, errors.png, latency.png
         artifacts/metrics/parity.json    scalars

Both variants run on every execution provider at every batch size of `parity.batch_sizes`, on real validation
images, through the session code that serves. A number outside its limit fails the stage; the table of all
checks is printed first, because a failed stage keeps no outputs.
"""

from __future__ import annotations

import csv
import io
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from flows import files, paths, plots
from flows.classifiers import load_classifier
from flows.errors import DataError, GateFailed, Interrupted
from flows.params import Params, Parity
from flows.samples import draw_samples
from flows.serving.comparison import Check, Comparison, Logits, accuracy, compare, run_in_batches, worst
from flows.serving.measure import Measurement, measure_eager, measure_variant, processor_name
from flows.serving.package import ModelPackage
from flows.serving.session import (
    CPU,
    FEATURES,
    LOGITS,
    Session,
    available_threads,
    open_session,
    working_providers,
)
from flows.stage import Stage, run_stage
from models.classification import Classifier, WithFeatures

CELL = "pretrained"
VARIANTS = ("fp32", "int8")
REFERENCE_BATCH = 64


def run(params: Params, stage: Stage) -> None:
    package = ModelPackage.open(paths.EXPORT)
    model, config = load_classifier(paths.FINETUNE / CELL)
    if package.manifest.labels != config.classes or package.manifest.preprocessing != config.preprocessing:
        raise DataError(f"{paths.EXPORT} was exported from another model; run the export stage again")
    images, labels = draw_samples(
        paths.DATA,
        "val",
        params.parity.samples,
        seed=params.seed,
        preprocessing=config.preprocessing,
        max_pixels=params.ingest.max_pixels,
    )
    package.output(FEATURES)  # or an error that says what to do
    reference, features = eager_outputs(model, images)
    providers = chosen_providers(package, params.parity)

    comparisons, errors, feature_errors = compare_all(
        package, images, labels, reference, features, providers, params.parity, stage
    )
    reference_accuracy = accuracy(reference, labels)
    checks = gate(comparisons, feature_errors["fp32"], reference_accuracy, params.parity)
    print(check_table(checks), flush=True)
    if failed := [check for check in checks if not check.passed]:
        raise GateFailed("; ".join(_explain(check) for check in failed))

    rows = measure_all(package, providers, params.parity, stage)
    metrics = parity_metrics(comparisons, reference_accuracy, rows)
    report = {
        "format": 1,
        "passed": True,
        "name": package.manifest.name,
        "digests": {name: package.variant(name).digest for name in VARIANTS},
        "samples": len(images),
        "providers": providers,
        "accuracy": {"pytorch": reference_accuracy}
        | {name: worst(comparisons, name).accuracy for name in VARIANTS},
        "checks": [check.to_dict() for check in checks],
        "max_feature_error": feature_errors,
        "comparisons": [comparison.to_dict() for comparison in comparisons],
        "speed": speed_ratios(rows),
        "machine": {
            "processor": processor_name(),
            "threads": available_threads(),
            "torch": torch.__version__,
        },
    }
    write_outputs(paths.PARITY, report, rows, errors, params.parity)
    files.write_json(paths.METRICS / "parity.json", metrics)
    stage.run.log_metrics(metrics)
    for path in sorted(paths.PARITY.iterdir()):
        stage.run.log_artifact(path)


# ---- the numbers ----


def eager_outputs(model: Classifier, images: NDArray[np.float32]) -> tuple[Logits, NDArray[np.float32]]:
    """What PyTorch answers on the CPU in float32: logits (n, classes), features (n, C)."""
    both = WithFeatures(model)
    with torch.inference_mode():
        side_by_side = run_in_batches(
            lambda batch: torch.cat(both(torch.from_numpy(batch)), dim=1).numpy(), images, REFERENCE_BATCH
        )
    return side_by_side[:, : model.num_classes], side_by_side[:, model.num_classes :]


def chosen_providers(package: ModelPackage, parity: Parity) -> list[str]:
    """The providers of params.yaml; `auto` is every one that works on this machine."""
    if parity.providers == "auto":
        return working_providers(package.path("fp32"))
    return list(parity.providers)


def compare_all(
    package: ModelPackage,
    images: NDArray[np.float32],
    labels: NDArray[np.int64],
    reference: Logits,
    features: NDArray[np.float32],
    providers: list[str],
    parity: Parity,
    stage: Stage,
) -> tuple[list[Comparison], dict[str, NDArray[np.float64]], dict[str, float]]:
    """Every variant, provider and batch size; also, per variant, the absolute errors of the logits, for the
    histogram, and the largest error of the features."""
    comparisons: list[Comparison] = []
    feature_errors: dict[str, float] = {}
    errors: dict[str, list[NDArray[np.float64]]] = {name: [] for name in VARIANTS}
    for variant in VARIANTS:
        for provider in providers:
            session = open_session(package.path(variant), [provider])
            for size in parity.batch_sizes:
                _stop_if_asked(stage)
                side_by_side = run_in_batches(partial(_run_both, session), images, size)
                logits, found = side_by_side[:, : reference.shape[1]], side_by_side[:, reference.shape[1] :]
                comparisons.append(
                    compare(reference, logits, labels, variant=variant, provider=provider, batch_size=size)
                )
                errors[variant].append(np.abs(reference.astype(np.float64) - logits))
                largest = float(np.abs(features.astype(np.float64) - found).max())
                feature_errors[variant] = float(
                    np.maximum(feature_errors.get(variant, 0.0), largest)
                )  # NaN wins
    return comparisons, {name: np.concatenate(values) for name, values in errors.items()}, feature_errors


def _run_both(session: Session, images: NDArray[np.float32]) -> NDArray[np.float32]:
    answers = session.run_all(images)
    return np.concatenate([answers[LOGITS], answers[FEATURES]], axis=1)


def gate(
    comparisons: list[Comparison], fp32_feature_error: float, reference_accuracy: float, parity: Parity
) -> list[Check]:
    """The limits of params.yaml, each against the worst provider and batch size."""
    fp32, int8 = worst(comparisons, "fp32"), worst(comparisons, "int8")
    drop = reference_accuracy - int8.accuracy
    return [
        Check(
            "fp32 largest logit error",
            fp32.max_abs_error,
            "<=",
            parity.fp32_max_abs_error,
            "fp32_max_abs_error",
        ),
        Check(
            "fp32 largest feature error",
            fp32_feature_error,
            "<=",
            parity.fp32_max_abs_error,
            "fp32_max_abs_error",
        ),
        Check("fp32 top-1 agreement", fp32.agreement, ">=", parity.fp32_min_agreement, "fp32_min_agreement"),
        Check(
            "int8 mean logit error",
            int8.mean_abs_error,
            "<=",
            parity.int8_max_mean_error,
            "int8_max_mean_error",
        ),
        Check("int8 top-1 agreement", int8.agreement, ">=", parity.int8_min_agreement, "int8_min_agreement"),
        Check("int8 accuracy drop", drop, "<=", parity.int8_max_accuracy_drop, "int8_max_accuracy_drop"),
    ]


def measure_all(
    package: ModelPackage, providers: list[str], parity: Parity, stage: Stage
) -> list[Measurement]:
    """Latency and memory of PyTorch eager and of both variants on every provider, one process each."""
    sizes, runs, threads = parity.latency_batch_sizes, parity.latency_runs, available_threads()
    rows = measure_eager(paths.FINETUNE / CELL, sizes, runs, threads)
    for provider in providers:
        for variant in VARIANTS:
            _stop_if_asked(stage)
            rows += measure_variant(package.path(variant), variant, provider, sizes, runs, threads)
    return rows


def speed_ratios(rows: list[Measurement]) -> dict[str, Any]:
    """How many times faster, from median latencies on the CPU: int8 against fp32, fp32 against PyTorch, by
    batch size."""
    medians = {
        (row.variant, row.batch): row.p50_ms
        for row in rows
        if row.provider == CPU or row.variant == "pytorch"
    }
    batches = sorted({batch for _, batch in medians})

    def ratio(slower: str, faster: str) -> dict[str, float]:
        pairs = {batch: (medians.get((slower, batch)), medians.get((faster, batch))) for batch in batches}
        return {str(batch): round(a / b, 3) for batch, (a, b) in pairs.items() if a and b}

    return {"int8_over_fp32": ratio("fp32", "int8"), "fp32_over_pytorch": ratio("pytorch", "fp32")}


def parity_metrics(
    comparisons: list[Comparison], reference_accuracy: float, rows: list[Measurement]
) -> dict[str, float]:
    """Scalars for `dvc metrics` and the tracker; speeds at the largest batch size measured."""
    metrics: dict[str, float] = {"pytorch_top1": reference_accuracy}
    for name in VARIANTS:
        folded = worst(comparisons, name)
        metrics |= {
            f"{name}_top1": folded.accuracy,
            f"{name}_agreement": folded.agreement,
            f"{name}_max_abs_error": folded.max_abs_error,
            f"{name}_mean_abs_error": folded.mean_abs_error,
            f"{name}_min_cosine": folded.min_cosine,
        }
    for name, by_batch in speed_ratios(rows).items():
        if by_batch:
            metrics[f"speed_{name}"] = by_batch[max(by_batch, key=int)]
    return metrics


# ---- what people read ----


def check_table(checks: list[Check]) -> str:
    """Fixed-width text: check, value, limit, verdict."""
    rows = [
        (
            check.name,
            f"{check.value:.3g}",
            f"{check.relation} {check.limit:g}",
            "ok" if check.passed else "FAILED",
        )
        for check in checks
    ]
    rows.insert(0, ("check", "value", "limit", ""))
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    return "\n".join(
        f"{name:<{widths[0]}}  {value:>{widths[1]}}  {limit:<{widths[2]}}  {verdict}".rstrip()
        for name, value, limit, verdict in rows
    )


def write_outputs(
    folder: Path,
    report: dict[str, Any],
    rows: list[Measurement],
    errors: dict[str, NDArray[np.float64]],
    parity: Parity,
) -> None:
    """Replace the folder artifacts/parity."""
    table = io.StringIO()
    writer = csv.DictWriter(table, list(Measurement.__annotations__), lineterminator="\n")
    writer.writeheader()
    writer.writerows(row.to_dict() for row in rows)
    limits = {"fp32": ("max", parity.fp32_max_abs_error), "int8": ("mean", parity.int8_max_mean_error)}
    with files.replace_folder(folder) as target:
        files.write_json(target / "parity.json", report)
        files.write_text(target / "latency.csv", table.getvalue())
        files.write_bytes(target / "errors.png", plots.error_histogram(errors, limits))
        files.write_bytes(target / "latency.png", plots.latency(latency_series(rows)))


def latency_series(rows: list[Measurement]) -> list[plots.Latency]:
    """One line of the picture per variant and provider."""
    runners = dict.fromkeys((row.variant, row.provider) for row in rows)
    series = []
    for variant, provider in runners:
        mine = [row for row in rows if (row.variant, row.provider) == (variant, provider)]
        name = provider.removesuffix("ExecutionProvider")
        series.append(
            plots.Latency(
                label=name if variant == "pytorch" else f"ONNX Runtime {name} {variant}",
                batch_sizes=[row.batch for row in mine],
                median_ms=[row.p50_ms for row in mine],
                tail_ms=[row.p95_ms for row in mine],
            )
        )
    return series


def _explain(check: Check) -> str:
    opposite = "above" if check.relation == "<=" else "below"
    return f"{check.name} {check.value:.3g} is {opposite} parity.{check.key} {check.limit:g}"


def _stop_if_asked(stage: Stage) -> None:
    if stage.stop_requested():
        raise Interrupted("stopped; run the same command again")


def main(argv: list[str] | None = None) -> int:
    return run_stage("parity", run, argv, stops_itself=True)


if __name__ == "__main__":
    raise SystemExit(main())
