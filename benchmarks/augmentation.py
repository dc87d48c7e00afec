"""Images per second and core that decoding and the augmentations of finetuning take.

    python -m benchmarks.augmentation [--rounds 15] [--image-size 224]

One JPEG of 500×375 pixels (the typical size in ImageNet; noise over shapes, quality 90) is decoded and
augmented in turns by each contestant, by the CPU's clock of one thread. A GPU that trains n images per second
needs n divided by these figures cores, which `loader.workers` gives it. Writes
benchmarks/results/augmentation.md.
"""

from __future__ import annotations

import argparse
import io
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from benchmarks.interleaved import describe_machine, interleave
from flows import files
from flows.data import Augmentation, RandAugment
from flows.imaging import decode

RESULT = Path("benchmarks/results/augmentation.md")
PUBLISHED = RandAugment(operations=2, magnitude=9.0, magnitude_std=0.5, probability=0.5)
IMAGES = 32  # per round


def photograph() -> bytes:
    """A JPEG whose size and content cost about what a photograph does."""
    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(0, 256, (25, 34, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize((500, 375), Image.Resampling.BICUBIC)).astype(int)
    noisy = np.clip(smooth + rng.normal(0, 6, smooth.shape), 0, 255).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noisy).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--image-size", type=int, default=224)
    options = parser.parse_args(argv)
    torch.set_num_threads(1)

    encoded = photograph()
    decoded = decode(encoded, max_pixels=10**6)
    augmentation = partial(Augmentation, options.image_size, (0.08, 1.0), flip=True)
    contestants = {
        "decoding alone": None,
        "crop and mirror, bilinear (today's default)": augmentation(),
        "the same, bicubic": augmentation(interpolation="bicubic"),
        "bicubic, RandAugment": augmentation(interpolation="bicubic", rand_augment=PUBLISHED),
        "bicubic, colour jitter": augmentation(interpolation="bicubic", color_jitter=0.4),
        "bicubic, erasing": augmentation(interpolation="bicubic", erasing=0.25),
        "as published: bicubic, RandAugment, erasing": augmentation(
            interpolation="bicubic", rand_augment=PUBLISHED, erasing=0.25
        ),
    }

    def work(augment: Augmentation | None) -> None:
        for seed in range(IMAGES):
            if augment is None:
                decode(encoded, max_pixels=10**6)
            else:
                augment(decoded, np.random.default_rng(seed))

    works = {name: partial(work, augment) for name, augment in contestants.items()}
    found = interleave(works, options.rounds, clock=time.process_time)
    decoding = found.median("decoding alone") / IMAGES
    rows = []
    for name in contestants:
        alone = found.median(name) / IMAGES
        both = alone if name == "decoding alone" else alone + decoding
        rows.append(f"| {name} | {1e3 * alone:.2f} | {1 / both:.0f} |")
    text = "\n".join(
        [
            "# Decoding and augmentation",
            "",
            f"{describe_machine()}, by the CPU's clock; {options.rounds} rounds of {IMAGES} images; "
            f"a JPEG of 500×375 pixels ({len(encoded) / 1000:.0f} kB) to {options.image_size} pixels. "
            "`python -m benchmarks.augmentation`",
            "",
            "| step | ms per image | images per second and core, with decoding |",
            "|---|---:|---:|",
            *rows,
            "",
        ]
    )
    files.write_text(RESULT, text)
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
