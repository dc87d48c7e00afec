"""Do the pretexts learn? Probes and finetuning of SimMIM and MoBY against random weights, on 10k of CIFAR-10.

    python -m benchmarks.pretraining_learning [--seeds 0 1 2] [--dataset PATH] [--set key=value]

One budget for all: the same network, the same number of images seen in pretraining, in finetuning and by the
linear probe. Each cell is the pipeline itself in a workspace of its own, so that DVC shares what cells have
in common, and a killed run goes on where it was. Writes benchmarks/results/pretraining_learning.md.
"""

from __future__ import annotations

import argparse
import os
import platform
import shlex
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from flows import environment, files, paths, workspace

PRETRAIN, FINETUNE, PROBE = (400, 128), (200, 128), (120, 256)
"""Steps and images per step."""
BUDGET = (
    "ingest.val_fraction=0.05",
    "knn.images=9500",
    "pretrain.training.threads=1",
    f"pretrain.training.steps={PRETRAIN[0]}",
    f"pretrain.training.batch_size={PRETRAIN[1]}",
    "pretrain.training.lr=2e-3",
    "pretrain.training.warmup_steps=40",
    f"pretrain.training.validate_every={PRETRAIN[0]}",
)
PRETEXTS = {
    "SimMIM": ("pretrain.pretext=simmim",),
    "MoBY": (
        "pretrain.pretext=moby",
        "pretrain.moby.queue_size=1024",
        "pretrain.moby.views.crop_scale=[0.2, 1.0]",
        "pretrain.moby.views.flip=0.5",
        "pretrain.moby.views.blur=[0.0, 0.0]",
        "pretrain.moby.views.solarize=[0.0, 0.0]",
    ),
}
TASKS = {
    "finetuned": (
        "finetune.training.threads=1",
        f"finetune.training.steps={FINETUNE[0]}",
        "finetune.training.warmup_steps=20",
        f"finetune.training.validate_every={FINETUNE[0]}",
    ),
    "linear probe": (
        "finetune.task=linear_probe",
        "finetune.linear_probe.lr_factors=[0.1, 0.3, 1.0, 3.0]",
        "finetune.mixup=0.0",
        "finetune.label_smoothing=0.0",
        "finetune.training.threads=1",
        "finetune.training.optimizer=sgd",
        "finetune.training.zero_stage=0",
        f"finetune.training.steps={PROBE[0]}",
        f"finetune.training.batch_size={PROBE[1]}",
        "finetune.training.lr=0.5",
        "finetune.training.warmup_lr=0.0",
        "finetune.training.min_lr=0.0",
        "finetune.training.warmup_steps=6",
        "finetune.training.weight_decay=0.0",
        "finetune.training.clip_grad=0.0",
        f"finetune.training.validate_every={PROBE[0]}",
    ),
}
RANDOM = "random weights"
COLUMNS = ("linear probe", "kNN", "finetuned")

Scores = dict[str, dict[str, float]]
"""Test top-1 in percent, by start (a pretext or random weights) and column."""


def run_cell(settings: Sequence[str], dataset: str, cells: Sequence[str]) -> dict[str, dict[str, float]]:
    """Metrics of `evaluate` by cell, from the pipeline in a workspace of its own."""
    place = workspace.prepare(dataset, "", settings)
    variables = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "TRUNKLINE_TRACKING": "off",
    }
    targets = [f"evaluate@{cell}" for cell in cells]
    command = [sys.executable, "-m", "dvc", "--wait-for-lock", "repro", *targets]
    subprocess.run(command, cwd=place.root, env=variables, check=True)
    return {cell: files.read_json(place.root / paths.METRICS / f"evaluate-{cell}.json") for cell in cells}


def run_seed(seed: int, dataset: str, extra: Sequence[str]) -> Scores:
    scores: Scores = {name: {} for name in (RANDOM, *PRETEXTS)}
    for number, (pretext, choice) in enumerate(PRETEXTS.items()):
        for task, budget in TASKS.items():
            print(f"seed {seed}: {pretext}, {task}", flush=True)
            # random weights are the same for both pretexts: measured with the first one
            cells = ("pretrained", "scratch") if number == 0 else ("pretrained",)
            found = run_cell([*BUDGET, *choice, *budget, *extra, f"seed={seed}"], dataset, cells)
            for cell, metrics in found.items():
                row = scores[pretext if cell == "pretrained" else RANDOM]
                row[task] = 100 * metrics["top1"]
                if task == "linear probe":  # its backbone is as pretraining left it
                    row["kNN"] = 100 * metrics["knn_top1"]
    return scores


def table(results: dict[int, Scores]) -> str:
    lines = [f"| start | {' | '.join(COLUMNS)} |", "| :--- |" + " ---: |" * len(COLUMNS)]
    for name in (RANDOM, *PRETEXTS):
        cells = [spread([scores[name][column] for scores in results.values()]) for column in COLUMNS]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    lines += ["", f"| seed | start | {' | '.join(COLUMNS)} |", "| ---: | :--- |" + " ---: |" * len(COLUMNS)]
    for seed, scores in results.items():
        for name, row in scores.items():
            lines.append(f"| {seed} | {name} | {' | '.join(f'{row[column]:.2f}' for column in COLUMNS)} |")
    return "\n".join(lines)


def spread(values: list[float]) -> str:
    mean = f"{statistics.mean(values):.2f}"
    return f"{mean} ± {statistics.stdev(values):.2f}" if len(values) > 1 else mean


def verdicts(results: dict[int, Scores]) -> list[str]:
    """The two claims of the literature, each with its paired differences."""
    claims = (("MoBY", "SimMIM", "linear probe"), ("MoBY", "SimMIM", "kNN"), ("SimMIM", RANDOM, "finetuned"))
    lines = []
    for winner, loser, column in claims:
        gains = [scores[winner][column] - scores[loser][column] for scores in results.values()]
        word = "holds" if min(gains) > 0 else "does not hold for every seed"
        lines.append(f"- {column}: {winner} minus {loser} {spread(gains)} points; that it is ahead {word}.")
    return lines


def processor() -> str:
    names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line]
    return names[0].partition(":")[2].strip() if names else platform.machine()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dataset", default="cifar10")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--set", action="append", default=[], dest="settings")
    arguments = parser.parse_args()
    environment.prepare()
    results: dict[int, Scores] = {}
    for seed in arguments.seeds:
        results[seed] = run_seed(seed, arguments.dataset, arguments.settings)
        text = "\n".join(
            [
                "# Do the pretexts learn? Test top-1 (%) on CIFAR-10, 10,000 training images",
                "",
                f"`python -m benchmarks.pretraining_learning {shlex.join(sys.argv[1:])}`, one thread of "
                f"{processor()}.",
                "",
                "Mean ± standard deviation over seeds; swin_v2_pico (0.95 M parameters), pretrained for "
                f"{PRETRAIN[0]} steps of {PRETRAIN[1]} images, finetuned for {FINETUNE[0]} of {FINETUNE[1]}, "
                f"probed for {PROBE[0]} of {PROBE[1]}. 9,500 images train, 500 choose the probe's rate, "
                "2,000 test.",
                "",
                table(results),
                "",
                *verdicts(results),
                "",
            ]
        )
        files.write_text(Path("benchmarks/results/pretraining_learning.md"), text)
        print(text, flush=True)


if __name__ == "__main__":
    main()
