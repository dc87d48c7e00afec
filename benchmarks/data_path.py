"""Decoding and augmenting against training: images per second of the loader over those of a step.

    python -m benchmarks.data_path [--rounds 5]

The loader's work is that of one process: decode JPEG, random resized crop, mirror. It is measured on one
core, the training step on all of them, in turns; so the ratio is what one loading process achieves beside
the training. Photographs of 500×375 pixels stand for ImageNet (made of smooth noise, encoded at quality 90).
Writes benchmarks/results/data_path.md.
"""

from __future__ import annotations

import argparse
import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from benchmarks.interleaved import describe_machine, interleave
from benchmarks.train_step import CASES, Case, Data, our_step
from flows import files
from flows.data import Augmentation

RESULTS = Path("benchmarks/results/data_path.md")
GOAL, LOADED = 2.0, 64


def photographs(width: int, height: int, count: int = 8) -> list[bytes]:
    generator = np.random.default_rng(0)
    found = []
    for _ in range(count):
        coarse = generator.integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8)
        image = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=90)
        found.append(buffer.getvalue())
    return found


def loader(case: Case, encoded: list[bytes]) -> Callable[[], object]:
    augmentation = Augmentation(case.image_size, (0.67, 1.0), flip=True)
    generator = np.random.default_rng(0)

    def load() -> None:
        for index in range(LOADED):
            with Image.open(io.BytesIO(encoded[index % len(encoded)])) as image:
                augmentation(image.convert("RGB"), generator)

    return load


def run(rounds: int = 5) -> str:
    machine = describe_machine()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    lines = [
        "| step, images | loader / step, images per s | rounds | goal | reached |",
        "| --- | ---: | ---: | ---: | --- |",
    ]
    sources = {"simmim": photographs(500, 375), "classify": photographs(32, 32)}
    for name, encoded in sources.items():
        case = CASES[name]
        data = Data.random(case, device)
        contestants: dict[str, Callable[[], object]] = {"loader": loader(case, encoded)}
        for precision, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
            contestants[precision] = our_step(case, data, dtype, device)
        found = interleave(contestants, rounds, device)
        size = "500×375" if name == "simmim" else "32×32"
        for precision in ("fp32", "bf16"):
            factor = LOADED / case.batch
            value = factor * found.speedup("loader", precision)
            low, high = (factor * bound for bound in found.spread("loader", precision))
            reached = "yes" if value >= GOAL else "no"
            lines.append(
                f"| {case.title()}, {precision}; JPEG {size} | {value:.1f} | {low:.1f}–{high:.1f} | ≥ {GOAL:g} | {reached} |"  # noqa: E501
            )
    text = f"# Data path\n\n{machine}\n\n" + "\n".join(lines) + "\n"
    files.write_text(RESULTS, text)
    return text


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    print(run(parser.parse_args(argv).rounds))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
