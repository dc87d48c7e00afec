"""A workspace as the pipeline leaves it, in seconds: real digits, real (linear) classifiers, invented curves.

Data, evaluation tables and pictures are written by the code that writes them in earnest; only trainings,
export and parity are made up, in the format of their stages. To look at one with its report:
`python tests/flows/fake_workspace.py FOLDER`.
"""

from __future__ import annotations

import csv
import hashlib
import io
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression

from flows import files, paths, plots
from flows.data import ImageDataset, manifest
from flows.data.shards import SplitWriter
from flows.stages import evaluate

ROOT = Path(__file__).resolve().parents[2]
SPLITS = {"train": 300, "val": 60, "test": 240}
PLACEHOLDER = "0" * 64


def build(workspace: Path, *, labelled: bool = True, classes: Sequence[str] | None = None) -> Path:
    """Everything up to parity, or up to pretraining if not `labelled`."""
    workspace.mkdir(parents=True, exist_ok=True)
    shutil.copy(ROOT / "params.yaml", workspace / "params.yaml")
    write_data(workspace / paths.DATA, labelled=labelled, classes=classes)
    write_subsets(workspace)
    write_pretraining(workspace)
    stages = ["ingest", "scale", "pretrain"]
    if labelled:
        for cell, share in (("pretrained", 1.0), ("scratch", 0.12)):
            write_finetuning(workspace, cell)
            write_evaluation(workspace, cell, share)
        write_export_and_parity(workspace)
        stages += ["finetune@pretrained", "finetune@scratch", "evaluate@pretrained", "evaluate@scratch"]
        stages += ["export", "parity"]
    write_receipts(workspace, stages)
    (workspace / "dvc.lock").write_text("schema: '2.0'\n")
    return workspace


def extra() -> dict[str, object]:
    """What the flow would tell the report."""
    return {
        "registry": {
            "name": "trunkline-vision-digits",
            "version": "3",
            "aliases": ["challenger", "champion"],
        },
        "tracking_uri": "sqlite:///mlflow.db",
        "executed": ["pretrain", "finetune@pretrained"],
        "git": "4e6ab4c0ffee4e6ab4c0ffee4e6ab4c0ffee4e6a",
        "dirty": True,
    }


def write_data(folder: Path, *, labelled: bool = True, classes: Sequence[str] | None = None) -> None:
    """Shards, indexes, manifest and quarantine of some handwritten digits."""
    folder.mkdir(parents=True)
    images, labels = load_digits(return_X_y=True)
    names = list(classes or (str(digit) for digit in range(10))) if labelled else []
    splits, start = {}, 0
    for split, count in SPLITS.items():
        with SplitWriter(folder, split, shard_mb=1, num_classes=len(names)) as writer:
            for row in range(start, start + count):
                pixels = (images[row].reshape(8, 8) * (255 / 16)).astype(np.uint8)
                buffer = io.BytesIO()
                Image.fromarray(pixels).save(buffer, "PNG")
                label = int(labels[row]) if labelled else None
                writer.add(f"{row:04d}.png", buffer.getvalue(), label, PLACEHOLDER)
        splits[split] = writer.split()
        start += count
    described = manifest.Manifest(
        name="digits",
        source="scikit-learn, load_digits",
        licence="CC BY 4.0",
        classes=names,
        mean=(0.305, 0.305, 0.305),
        std=(0.376, 0.376, 0.376),
        median_short_side=8,
        splits=splits,
        quarantined=1,
    )
    manifest.save(described.sealed(), folder)
    files.write_json(folder / "quarantine.json", [{"path": "<odd>/1.png", "reason": "empty file"}])


def write_subsets(workspace: Path) -> None:
    subsets = [
        {
            "percentage": p,
            "file": f"train-{p:03d}.txt",
            "count": SPLITS["train"] * p // 100,
            "per_class": [],
            "sha256": PLACEHOLDER,
        }
        for p in (10, 20, 50, 100)
    ]
    files.write_json(
        workspace / paths.SUBSETS / "subsets.json", {"seed": 0, "of": SPLITS["train"], "subsets": subsets}
    )


def write_pretraining(workspace: Path) -> None:
    folder = workspace / paths.PRETRAIN
    write_curves(folder, steps=800, start=0.9, end=0.11, top1=None)
    inputs = pixels(workspace, "val", range(8))
    masked = inputs.copy()
    masked[:, 8:24, 8:24] = 127
    blurred = (inputs.reshape(-1, 8, 4, 8, 4, 3).mean(axis=(2, 4)).repeat(4, 1).repeat(4, 2)).astype(np.uint8)
    files.write_bytes(folder / "examples.png", plots.triple_grid(inputs, masked, blurred))
    metrics = {"train_loss": 0.1134, "val_loss": 0.1172, "parameters": 1_143_232, "images_seen": 102_400}
    files.write_json(workspace / paths.METRICS / "pretrain.json", metrics)


def write_finetuning(workspace: Path, cell: str) -> None:
    pretrained = cell == "pretrained"
    folder = workspace / paths.FINETUNE / cell
    write_curves(folder, 400, 2.3, 0.55 if pretrained else 0.7, 0.975 if pretrained else 0.93)
    files.write_json(
        workspace / paths.METRICS / f"finetune-{cell}.json", {"train_loss": 0.6, "val_top1": 0.97}
    )


def write_curves(folder: Path, steps: int, start: float, end: float, top1: float | None) -> None:
    rng = np.random.default_rng(0)
    step, coarse = np.arange(20, steps + 1, 20), np.arange(steps // 4, steps + 1, steps // 4)

    def decay(at: NDArray[np.int64]) -> NDArray[np.float64]:
        return end + (start - end) * np.exp(-6.0 * at / steps)

    warm = np.minimum(step / 80, 0.5 * (1 + np.cos(np.pi * step / steps)))
    noise = rng.normal(0, 0.01 * start, len(step))
    write_table(
        folder / "curves.csv",
        {
            "step": step,
            "train_loss": decay(step) + noise,
            "lr": 1e-3 * warm,
            "grad_norm": 0.3 + 2 * np.exp(-4 * step / steps) + 5 * np.abs(noise),
            "images_per_s": 900 + 2000 * noise,
            "memory_mb": 700 + step / steps,
        },
    )
    validation = {"step": coarse, "val_loss": decay(coarse) * 1.04}
    if top1 is not None:
        validation["val_top1"] = top1 - 0.4 * np.exp(-7 * coarse / steps)
    write_table(folder / "validation.csv", validation)


def write_table(path: Path, columns: Mapping[str, NDArray[np.float64]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows(zip(*(values.tolist() for values in columns.values()), strict=True))


def write_evaluation(workspace: Path, cell: str, share: float) -> None:
    """A linear classifier, trained on `share` of the images, evaluated by the stage's own functions."""
    train, test = dataset(workspace, "train"), dataset(workspace, "test")
    used = int(share * len(train))
    model = LogisticRegression(max_iter=300, C=3.0).fit(flat(train)[:used], train.labels[:used])
    logits = torch.full((len(test), 10), -20.0, dtype=torch.float64)
    logits[:, torch.from_numpy(model.classes_)] = torch.from_numpy(model.decision_function(flat(test)))
    labels = torch.from_numpy(test.labels)
    predictions = evaluate.list_predictions(logits, labels, test.keys)
    classes = test.manifest.classes
    worst = evaluate.draw_worst(predictions, classes, test)
    speed = {"images_per_s": 1234.5, "network_images_per_s": 1500.0, "device": "cpu", "threads": 1}
    folder = workspace / paths.EVALUATE / cell
    evaluate.write_results(folder, logits, labels, predictions, classes, 15, worst, speed)
    summary = evaluate.summarize(logits, labels, 15)
    files.write_json(workspace / paths.METRICS / f"evaluate-{cell}.json", summary)


def write_export_and_parity(workspace: Path) -> None:
    variants = {
        "fp32": {"bytes": 4_650_000, "digest": "a" * 64},
        "int8": {"bytes": 1_310_000, "digest": "b" * 64},
    }
    files.write_json(workspace / paths.EXPORT / "manifest.json", {"opset": 20, "variants": variants})
    names = ["variant", "provider", "batch_size", "max_abs_error", "mean_abs_error"]
    names += ["min_cosine", "mean_cosine", "agreement", "accuracy"]
    rows = [("fp32", size, 3.1e-6, 4.2e-7, 1.0, 1.0, 1.0, 0.967) for size in (1, 2, 7)]
    rows += [("int8", size, 0.41, 0.083, 0.9991, 0.9998, 0.992, 0.963) for size in (1, 2, 7)]
    comparisons = [
        dict(zip(names, (variant, "CPUExecutionProvider", *rest), strict=True)) for variant, *rest in rows
    ]
    checks = [
        ("fp32 largest logit error", 3.1e-6, "<=", 1e-4, "fp32_max_abs_error"),
        ("fp32 top-1 agreement", 1.0, ">=", 1.0, "fp32_min_agreement"),
        ("int8 mean logit error", 0.083, "<=", 0.5, "int8_max_mean_error"),
        ("int8 top-1 agreement", 0.992, ">=", 0.97, "int8_min_agreement"),
        ("int8 accuracy drop", 0.004, "<=", 0.02, "int8_max_accuracy_drop"),
    ]
    report = {
        "format": 1,
        "passed": True,
        "samples": 60,
        "providers": ["CPUExecutionProvider"],
        "checks": [
            {"name": name, "value": value, "relation": relation, "limit": limit, "key": key, "passed": True}
            for name, value, relation, limit, key in checks
        ],
        "comparisons": comparisons,
        "speed": {"int8_over_fp32": {"1": 1.1, "8": 1.31, "32": 1.42}, "fp32_over_pytorch": {"32": 1.9}},
        "machine": {"processor": "a processor", "threads": 2, "torch": "2.13.0"},
    }
    folder = workspace / paths.PARITY
    files.write_json(folder / "parity.json", report)
    medians = {"pytorch": (5.9, 14.8, 44.0), "fp32": (1.3, 6.2, 22.7), "int8": (1.2, 4.7, 16.0)}
    lines = ["provider,variant,batch,p50_ms,p95_ms,p99_ms,images_per_s,peak_memory_mb"]
    for variant, times in medians.items():
        for batch, p50 in zip((1, 8, 32), times, strict=True):
            provider = "PyTorch eager CPU" if variant == "pytorch" else "CPUExecutionProvider"
            tail = f"{p50},{1.2 * p50:.3f},{1.4 * p50:.3f},{1000 * batch / p50:.1f},{40 + batch}"
            lines.append(f"{provider},{variant},{batch},{tail}")
    (folder / "latency.csv").write_text("\n".join(lines) + "\n")


def write_receipts(workspace: Path, stages: Sequence[str]) -> None:
    durations = {
        "ingest": 2.4,
        "scale": 0.9,
        "pretrain": 131.0,
        "finetune": 71.5,
        "evaluate": 6.1,
        "export": 14.2,
    }
    for label in stages:
        seconds = durations.get(label.partition("@")[0], 21.0)
        receipt = {
            "stage": label,
            "run_id": hashlib.md5(label.encode()).hexdigest(),
            "git": "4e6ab4c0ffee4e6ab4c0ffee4e6ab4c0ffee4e6a",
            "duration_s": seconds,
            "device_hours": round(seconds / 3600, 6),
        }
        files.write_json(workspace / paths.RECEIPTS / f"{label.replace('@', '-')}.json", receipt)


def dataset(workspace: Path, split: str) -> ImageDataset:
    return ImageDataset(workspace / paths.DATA, split, cache_mb=1, max_pixels=1000)


def flat(images: ImageDataset) -> NDArray[np.float64]:
    return np.stack([np.asarray(images.image(i))[..., 0].ravel() / 255.0 for i in range(len(images))])


def pixels(workspace: Path, split: str, rows: range) -> NDArray[np.uint8]:
    """Images (N, 32, 32, 3)."""
    images = dataset(workspace, split)
    return np.stack([np.asarray(images.image(i)).repeat(4, 0).repeat(4, 1) for i in rows])


if __name__ == "__main__":
    from flows.report import build_report

    print(build_report(build(Path(sys.argv[1])), extra()))
