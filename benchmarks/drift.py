"""Does the monitor notice a shift, and is it quiet without one? Rates on CIFAR-10.

    python -m benchmarks.drift [--windows 200] [--quiet-windows 2000] [--set key=value]

The model comes from `dvc repro export` in a workspace of its own, with a training of a few minutes: drift is
a property of the images, and a mediocre network embeds them well enough. Test images, which neither training
nor the reference has seen, are served clean and corrupted (benchmarks/corruptions.py) through the exported
network; windows of them are judged by `flows.drift.compare`, as `trunkline monitor` does it. Writes
benchmarks/results/drift_cifar10.md and .json.
"""

from __future__ import annotations

import argparse
import os
import platform
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.corruptions import CORRUPTIONS, SEVERITIES, corrupt
from flows import drift, environment, files, paths, workspace
from flows.data import ImageDataset
from flows.imaging import Preprocessing, normalize, resize_and_crop
from flows.params import Params
from flows.serving.package import ModelPackage
from flows.serving.reference import Reference, describe_images, read_reference
from flows.serving.session import open_session
from flows.serving.statistics import Records
from models.classification.metrics import wilson_interval

SHORT_TRAINING = [
    "pretrain.training.steps=40",
    "pretrain.training.warmup_steps=4",
    "pretrain.training.validate_every=40",
    "finetune.training.steps=300",
    "finetune.training.validate_every=150",
]
SIZES = (50, 100, 200, 500)
ALPHAS = (0.001, 0.01, 0.05)
PRIOR_SHARES = (0.15, 0.2, 0.3, 0.4, 0.6)  # of one class, which has 0.1 in clean windows; by severity
ABLATIONS = {
    "all families": drift.FAMILIES,
    "embedding": ("embedding",),
    "pixels": ("pixels",),
    "predictions": ("predictions",),
    "confidence": ("confidence",),
}
RULES = {"with min_effect": (True, True), "p-value alone": (False, True), "no Bonferroni": (True, False)}
"""Whether a difference has to be as large as min_effect, and whether alpha is divided among the tests."""
MMD_ALPHA, MMD_SIZE, MMD_PERMUTATIONS, MMD_WINDOWS = 0.01, 100, 999, 20


@dataclass(frozen=True)
class Outcome:
    """Tests of one window: by family, effects and p-values."""

    effects: dict[str, NDArray[np.float64]]
    p_values: dict[str, NDArray[np.float64]]


def judge(reference: Records, window: Records) -> Outcome:
    tests = drift.compare(reference, window, alpha=0.5, min_effect=0.0)
    return Outcome(
        {name: np.asarray([t.effect for t in tests if t.family == name]) for name in drift.FAMILIES},
        {name: np.asarray([t.p_value for t in tests if t.family == name]) for name in drift.FAMILIES},
    )


def alarms(
    outcome: Outcome, alpha: float, min_effect: float, families: Sequence[str], correct: bool = True
) -> bool:
    """The decision of `drift.compare` for other levels, without computing the tests again."""
    return any(
        bool(
            np.any(
                (p <= (alpha / len(families) / len(p) if correct else alpha))
                & (outcome.effects[name] >= min_effect)
            )
        )
        for name, p in outcome.p_values.items()
        if name in families
    )


def check_decision(reference: Records, window: Records, min_effect: float) -> None:
    """`alarms` must be the monitor's own decision."""
    outcome = judge(reference, window)
    for alpha in ALPHAS:
        for families in ABLATIONS.values():
            for correct in (True, False):
                tests = drift.compare(
                    reference, window, alpha=alpha, min_effect=min_effect, families=families, correct=correct
                )
                if any(test.alarmed for test in tests) != alarms(
                    outcome, alpha, min_effect, families, correct
                ):
                    raise RuntimeError("the benchmark decides otherwise than the monitor")


# ---- the images ----


class Served:
    """Test images as the server would see them, clean or corrupted."""

    def __init__(self, params: Params) -> None:
        self.package = ModelPackage.open(paths.EXPORT)
        assert self.package.manifest.reference is not None
        self.reference: Reference = read_reference(paths.EXPORT / self.package.manifest.reference.file)
        self.session = open_session(self.package.path("fp32"))
        dataset = ImageDataset(paths.DATA, "test", cache_mb=0, max_pixels=params.ingest.max_pixels)
        self.preprocessing: Preprocessing = self.package.manifest.preprocessing
        pixels = [resize_and_crop(dataset.image(row), self.preprocessing) for row in range(len(dataset))]
        self.images = np.stack(pixels).astype(np.float32) / 255  # (n, S, S, 3)
        self.labels = np.asarray(dataset.labels)
        self.clean = self.describe(self.images)

    def describe(self, images: NDArray[np.float32]) -> Records:
        """Images in 0-1 → records, through preprocessing and the exported network."""
        batch = normalize(np.round(255 * images).astype(np.uint8), self.preprocessing)
        return describe_images(self.session, batch, self.reference.projection)


def draw(generator: np.random.Generator, count: int, size: int) -> NDArray[np.int64]:
    return generator.choice(count, size, replace=False)


def draw_shifted(
    generator: np.random.Generator, labels: NDArray[np.int64], size: int, share: float
) -> NDArray[np.int64]:
    """Rows in which one class, chosen at random, has about `share` instead of its tenth."""
    favoured = generator.integers(labels.max() + 1)
    weights = np.where(
        labels == favoured, share / (labels == favoured).sum(), (1 - share) / (labels != favoured).sum()
    )
    # with replacement: there are not enough images of one class for a large window of them
    return generator.choice(len(labels), size, p=weights / weights.sum())


# ---- the rates ----


def false_alarms(served: Served, windows: int, min_effect: float) -> list[dict[str, Any]]:
    """Clean windows, against the real reference and one redrawn each time from all held-out images."""
    generator = np.random.default_rng(1)
    reference, clean = served.reference.records["fp32"], served.clean
    everything = Records.concatenate([reference, clean])
    rows = []
    for size in SIZES:
        fixed = [judge(reference, clean[draw(generator, len(clean), size)]) for _ in range(windows)]
        redrawn = []
        for _ in range(windows):
            order = generator.permutation(len(everything))
            redrawn.append(
                judge(everything[order[: len(reference)]], everything[order[len(reference) :][:size]])
            )
        for name, outcomes in (("exported", fixed), ("redrawn", redrawn)):
            for alpha in ALPHAS:
                for rule, (floored, correct) in RULES.items():
                    floor = min_effect if floored else 0.0
                    hits = sum(alarms(o, alpha, floor, drift.FAMILIES, correct) for o in outcomes)
                    row = {"reference": name, "window": size, "alpha": alpha, "rule": rule}
                    rows.append(row | rate(hits, windows))
    return rows


def rate(hits: int, windows: int) -> dict[str, Any]:
    interval = wilson_interval(hits, windows)
    return {
        "alarms": hits,
        "windows": windows,
        "rate": interval.value,
        "low": interval.low,
        "high": interval.high,
    }


def detections(served: Served, windows: int, alpha: float, min_effect: float) -> list[dict[str, Any]]:
    """Shifted windows, by shift, severity and size; the ablations use the whole `alpha` for what is left."""
    generator = np.random.default_rng(2)
    reference, rows = served.reference.records["fp32"], []
    shifts = {(name, severity): None for name in CORRUPTIONS for severity in SEVERITIES}
    shifts |= {("class prior", severity): None for severity in SEVERITIES}
    for name, severity in shifts:
        records = served.clean
        if name in CORRUPTIONS:
            records = served.describe(corrupt(name, served.images, severity, seed=severity))
        accuracy = float((records.predicted == served.labels).mean()) if name in CORRUPTIONS else None
        for size in SIZES:
            outcomes = []
            for _ in range(windows):
                chosen = (
                    draw(generator, len(records), size)
                    if name in CORRUPTIONS
                    else draw_shifted(generator, served.labels, size, PRIOR_SHARES[severity - 1])
                )
                outcomes.append(judge(reference, records[chosen]))
            check_decision(reference, records[chosen], min_effect)
            row: dict[str, Any] = {"shift": name, "severity": severity, "window": size, "accuracy": accuracy}
            for label, families in ABLATIONS.items():
                row[label] = sum(alarms(o, alpha, min_effect, families) for o in outcomes) / windows
            rows.append(row)
        print(f"{name} {severity}: {rows[-3]['all families']:.0%} of windows of {SIZES[1]}", flush=True)
    return rows


# ---- a test of the whole embedding, for comparison ----


def mmd_p_value(
    first: NDArray[np.float32], second: NDArray[np.float32], permutations: int, generator: np.random.Generator
) -> float:
    """Permutation p-value of the kernel two-sample test (Gretton et al., 2012): Gaussian, median width."""
    joint = np.concatenate([first, second]).astype(np.float32)
    squares = (joint**2).sum(axis=1)
    distances = np.maximum(squares[:, None] + squares[None, :] - 2 * joint @ joint.T, 0)
    kernel = np.exp(-distances / np.median(distances))
    n, m = len(first), len(second)
    weights = np.concatenate([np.full(n, 1 / n), np.full(m, -1 / m)]).astype(np.float32)
    signs = np.stack([weights, *(generator.permutation(weights) for _ in range(permutations))])
    statistics = ((signs @ kernel) * signs).sum(axis=1)
    return float((statistics >= statistics[0]).mean())


def compare_with_mmd(served: Served) -> list[dict[str, Any]]:
    """The embedding alone at `MMD_ALPHA`: Kolmogorov-Smirnov with Bonferroni against MMD, same windows."""
    generator = np.random.default_rng(3)
    reference, rows = served.reference.records["fp32"], []
    cases = [("none", 0), *((name, severity) for name in CORRUPTIONS for severity in (1, 2, 3))]
    for name, severity in cases:
        records = (
            served.clean
            if name == "none"
            else served.describe(corrupt(name, served.images, severity, severity))
        )
        windows = 5 * MMD_WINDOWS if name == "none" else MMD_WINDOWS
        ks = mmd = 0
        for _ in range(windows):
            window = records[draw(generator, len(records), MMD_SIZE)]
            ks += alarms(judge(reference, window), MMD_ALPHA, 0.0, ("embedding",))
            p_value = mmd_p_value(reference.embedding, window.embedding, MMD_PERMUTATIONS, generator)
            mmd += p_value <= MMD_ALPHA
        rows.append(
            {
                "shift": name,
                "severity": severity,
                "windows": windows,
                "ks": ks / windows,
                "mmd": mmd / windows,
            }
        )
        print(f"MMD {name} {severity}: ks {ks / windows:.2f}, mmd {mmd / windows:.2f}", flush=True)
    return rows


# ---- the page ----


def markdown(result: dict[str, Any]) -> str:
    alpha = result["alpha"]
    lines = [
        f"# What the monitor notices on CIFAR-10 ({result['machine']})",
        "",
        f"`{result['command']}`",
        "",
        f"Reference: {result['reference_images']} validation images. Served: {result['test_images']} test "
        f"images, clean or corrupted, in random windows. The network's test accuracy is "
        f"{result['accuracy']:.1%}. Limits: alpha {alpha:g} over all tests, min_effect "
        f"{result['min_effect']:g}.",
        "",
        "## False alarms on clean windows",
        "",
        f"{result['quiet_windows']} windows each, in per cent with the 95 % Wilson interval. *exported*: "
        "against the reference in the export, as in production; *redrawn*: reference and window redrawn from "
        "all held-out images every time, which shows the level of the tests themselves.",
        "",
        "| reference | window, images | alpha, % | alarms, % | by p-value alone, % | no Bonferroni, % |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    found = {(r["reference"], r["window"], r["alpha"], r["rule"]): r for r in result["false_alarms"]}

    def shown(row: dict[str, Any]) -> str:
        return f"{100 * row['rate']:.2f} ({100 * row['low']:.2f}–{100 * row['high']:.2f})"

    for name in ("exported", "redrawn"):
        for size in SIZES:
            for level in ALPHAS:
                cells = " | ".join(shown(found[name, size, level, rule]) for rule in RULES)
                lines.append(f"| {name} | {size} | {100 * level:g} | {cells} |")
    lines += [
        "",
        "## Detection",
        "",
        f"Per cent of {result['windows']} windows that alarm, by severity 1 / 2 / 3 / 4 / 5.",
        "",
        "| shift | " + " | ".join(f"{size} images" for size in SIZES) + " | accuracy on it |",
        "| --- | " + "---: | " * (len(SIZES) + 1),
    ]
    by_key = {(r["shift"], r["severity"], r["window"]): r for r in result["detections"]}
    for name in (*CORRUPTIONS, "class prior"):
        cells = [
            " / ".join(f"{100 * by_key[name, s, size]['all families']:.0f}" for s in SEVERITIES)
            for size in SIZES
        ]
        accuracies = [by_key[name, s, SIZES[0]]["accuracy"] for s in SEVERITIES]
        cells.append(" / ".join(f"{100 * a:.0f}" for a in accuracies) if accuracies[0] is not None else "")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    lines += [
        "",
        "Class prior: one class has "
        + ", ".join(f"{share:.0%}" for share in PRIOR_SHARES)
        + " instead of 10 %.",
        "",
        "## Which family finds it",
        "",
        f"Each family alone with the whole alpha; per cent of the windows of {SIZES[2]} images, mean over "
        "the severities.",
        "",
        "| shift | " + " | ".join(ABLATIONS) + " |",
        "| --- | " + "---: | " * len(ABLATIONS),
    ]
    for name in (*CORRUPTIONS, "class prior"):
        cells = [
            f"{100 * np.mean([by_key[name, s, SIZES[2]][label] for s in SEVERITIES]):.0f}"
            for label in ABLATIONS
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    if result["mmd"]:
        none, rest = result["mmd"][0], result["mmd"][1:]
        lines += [
            "",
            "## A kernel test of the whole embedding instead?",
            "",
            f"Maximum mean discrepancy with {MMD_PERMUTATIONS} permutations against Kolmogorov-Smirnov with "
            f"Bonferroni, both on the embedding alone at alpha {MMD_ALPHA:g}, same windows of {MMD_SIZE} "
            f"images: on {none['windows']} clean windows {none['mmd']:.1%} against {none['ks']:.1%} alarm, "
            f"on corrupted ones (severities 1–3, {MMD_WINDOWS} windows each) "
            f"{np.mean([r['mmd'] for r in rest]):.1%} against {np.mean([r['ks'] for r in rest]):.1%}.",
        ]
    return "\n".join([*lines, ""])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--windows", type=int, default=200, help="shifted windows per case")
    parser.add_argument("--quiet-windows", type=int, default=2000, help="clean windows per case")
    parser.add_argument("--no-mmd", action="store_true", help="leave out the comparison with the kernel test")
    parser.add_argument("--set", action="append", default=[], dest="settings")
    arguments = parser.parse_args()
    environment.prepare()
    home = Path.cwd()
    place = workspace.prepare("cifar10", "", [*SHORT_TRAINING, *arguments.settings])
    variables = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "TRUNKLINE_TRACKING": "off",
    }
    command = [sys.executable, "-m", "dvc", "--wait-for-lock", "repro", "export"]
    subprocess.run(command, cwd=place.root, env=variables, check=True)

    started = time.monotonic()
    os.chdir(place.root)
    served, settings = Served(place.params), place.params.monitor
    result = {
        "command": f"python -m benchmarks.drift {' '.join(sys.argv[1:])}".strip(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "alpha": settings.alpha,
        "min_effect": settings.min_effect,
        "windows": arguments.windows,
        "quiet_windows": arguments.quiet_windows,
        "reference_images": len(served.reference.records["fp32"]),
        "test_images": len(served.clean),
        "accuracy": float((served.clean.predicted == served.labels).mean()),
        "false_alarms": false_alarms(served, arguments.quiet_windows, settings.min_effect),
        "detections": detections(served, arguments.windows, settings.alpha, settings.min_effect),
        "mmd": [] if arguments.no_mmd else compare_with_mmd(served),
    }
    result["seconds"] = round(time.monotonic() - started, 1)
    os.chdir(home)
    files.write_json(Path("benchmarks/results/drift_cifar10.json"), result)
    text = markdown(result)
    files.write_text(Path("benchmarks/results/drift_cifar10.md"), text)
    print(text)


if __name__ == "__main__":
    main()
