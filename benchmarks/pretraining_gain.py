"""What pretraining is worth: test accuracy, pretrained against from scratch, over several seeds.

    python -m benchmarks.pretraining_gain --dataset cifar10 --seeds 0 1 2 [--recipe NAME] [--set key=value]

Each seed is the pipeline itself (`dvc repro evaluate`) in a workspace of its own: pretraining, both
finetunings and the evaluation all use that seed; data and splits stay the same. Prints and writes
benchmarks/results/<name>.md.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import subprocess
import sys
from pathlib import Path

from flows import environment, files, paths, workspace

CELLS = ("pretrained", "scratch")


def run_seed(seed: int, dataset: str, recipe: str, settings: list[str]) -> dict[str, float]:
    """Test top-1 of both cells, in percent."""
    place = workspace.prepare(dataset, recipe, [*settings, f"seed={seed}"])
    print(f"seed {seed}: {place.root}", flush=True)
    variables = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "TRUNKLINE_TRACKING": "off",
    }
    targets = [f"evaluate@{cell}" for cell in CELLS]
    command = [sys.executable, "-m", "dvc", "--wait-for-lock", "repro", *targets]
    subprocess.run(command, cwd=place.root, env=variables, check=True)
    found = {
        cell: files.read_json(place.root / paths.METRICS / f"evaluate-{cell}.json")["top1"] for cell in CELLS
    }
    return {cell: 100 * float(value) for cell, value in found.items()}


def table(results: dict[int, dict[str, float]]) -> str:
    lines = ["| seed | pretrained | from scratch | gain |", "| ---: | ---: | ---: | ---: |"]
    for seed, found in results.items():
        gain = found["pretrained"] - found["scratch"]
        lines.append(f"| {seed} | {found['pretrained']:.2f} | {found['scratch']:.2f} | {gain:+.2f} |")
    columns = [[found[cell] for found in results.values()] for cell in CELLS]
    columns.append([first - second for first, second in zip(*columns, strict=True)])
    if len(results) > 1:
        cells = [f"{statistics.mean(column):.2f} ± {statistics.stdev(column):.2f}" for column in columns]
        lines.append(f"| mean ± sd | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dataset", default="digits")
    parser.add_argument("--recipe", default="")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--set", action="append", default=[], dest="settings")
    arguments = parser.parse_args()
    environment.prepare()
    results = {
        seed: run_seed(seed, arguments.dataset, arguments.recipe, arguments.settings)
        for seed in arguments.seeds
    }
    title = f"Test top-1 (%) on {arguments.dataset}, {platform.machine()}, {os.cpu_count()} cores"
    command = f"python -m benchmarks.pretraining_gain {' '.join(sys.argv[1:])}"
    text = f"# {title}\n\n`{command}`\n\n{table(results)}\n"
    files.write_text(Path("benchmarks/results") / f"pretraining_gain_{Path(arguments.dataset).name}.md", text)
    print(text)


if __name__ == "__main__":
    main()
