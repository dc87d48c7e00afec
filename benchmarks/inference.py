"""Classification through ONNX Runtime, as served, against transformers in eager mode; and what int8 costs.

    python -m benchmarks.inference [--rounds 7] [--steps 150]

SwinV2-T at 64 px, window 8, batch 8, on 2000 training images of CIFAR-10 enlarged to 64 px: trained for a few
steps from random weights, exported and quantised by the pipeline's own code (int8 calibrated on 128 training
images), then judged on 2000 test images. transformers runs the very same weights. The accuracy is that of a
short training and only good for the difference between fp32 and int8. Writes benchmarks/results/inference.md.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from transformers import Swinv2ForImageClassification

import models
from benchmarks.cifar10 import load_cifar10, preprocessing
from benchmarks.interleaved import describe_machine, interleave
from flows import files
from flows.exporting import export_onnx
from flows.serving.package import metadata
from flows.serving.quantization import quantize
from flows.serving.session import open_session
from models.backbones.swin_v2 import SwinV2
from models.classification import Classifier, WithFeatures
from tests.models.conftest import peer_config, peer_state

RESULTS = Path("benchmarks/results/inference.md")
SIDE, WINDOW, BATCH, IMAGES, CLASSES = 64, 8, 8, 2000, 10
GOALS = {"fp32": 1.2, "int8": 2.0}
MAX_LOSS_POINTS = 0.5


def train_briefly(images: torch.Tensor, labels: torch.Tensor, steps: int) -> Classifier:
    torch.manual_seed(0)
    backbone = models.create("swin_v2_tiny", image_size=SIDE, window_size=WINDOW)
    model = Classifier(backbone, CLASSES).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-4, weight_decay=0.05, fused=True)
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        rows = torch.randint(len(images), (32,), generator=generator)
        loss = F.cross_entropy(model(images[rows]), labels[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


def accuracy(
    run: Callable[[NDArray[np.float32]], NDArray[np.float32]], images: torch.Tensor, labels: torch.Tensor
) -> float:
    answers = [run(part.numpy()).argmax(axis=1) for part in images.split(100)]
    return 100.0 * float((np.concatenate(answers) == labels.numpy()).mean())


def run(rounds: int = 7, steps: int = 150) -> str:
    machine = describe_machine()
    train_images, train_labels = load_cifar10("train", IMAGES, SIDE)
    test_images, test_labels = load_cifar10("test", IMAGES, SIDE)
    model = train_briefly(train_images, train_labels, steps)
    assert isinstance(model.backbone, SwinV2)
    peer = Swinv2ForImageClassification(
        peer_config(models.BACKBONES["swin_v2_tiny"], model.backbone, WINDOW, (0, 0, 0, 0))
    ).eval()
    peer.load_state_dict(peer_state(model.state_dict()), strict=True)

    with tempfile.TemporaryDirectory() as folder:
        path, small = Path(folder) / "model.onnx", Path(folder) / "int8.onnx"
        export_onnx(
            WithFeatures(model), path, image_size=SIDE, opset=20, max_batch=1024, metadata=metadata(preprocessing(SIDE), tuple(map(str, range(CLASSES)))),  # noqa: E501
            outputs=("logits", "features"),
        )  # fmt: skip
        onnx.save(quantize(path, train_images[:128].numpy()), small)
        fp32, int8 = (
            open_session(path, ["CPUExecutionProvider"]),
            open_session(small, ["CPUExecutionProvider"]),
        )
        batch = test_images[:BATCH]
        array = batch.numpy()

        def eager() -> object:
            with torch.inference_mode():
                return peer(batch).logits

        def ours() -> object:
            with torch.inference_mode():
                return model(batch)

        found = interleave(
            {
                "transformers": eager,
                "eager": ours,
                "fp32": lambda: fp32.run(array),
                "int8": lambda: int8.run(array),
            },
            rounds,
            repeats=5,
            pause_s=0.3,
        )
        scores = {
            "fp32": accuracy(fp32.run, test_images, test_labels),
            "int8": accuracy(int8.run, test_images, test_labels),
        }

    lines = [
        "| rate over transformers eager | median | rounds | goal | reached |",
        "| --- | ---: | ---: | ---: | --- |",
    ]
    for name, title in (
        ("eager", "ours, PyTorch eager"),
        ("fp32", "ONNX Runtime fp32"),
        ("int8", "ONNX Runtime int8"),
    ):
        low, high = found.spread(name, "transformers")
        value, goal = found.speedup(name, "transformers"), GOALS.get(name)
        verdict = "" if goal is None else ("yes" if value >= goal else "no")
        shown = "" if goal is None else f"≥ {goal:g}"
        lines.append(f"| {title} | {value:.2f} | {low:.2f}–{high:.2f} | {shown} | {verdict} |")
    lost = scores["fp32"] - scores["int8"]
    lines += ["", f"Test top-1: fp32 {scores['fp32']:.2f} %, int8 {scores['int8']:.2f} %: {lost:.2f} points lost "  # noqa: E501
              f"(goal: at most {MAX_LOSS_POINTS}; one image is {100 / IMAGES:.2f})."]  # fmt: skip
    setting = f"swin_v2_tiny, {SIDE} px, window {WINDOW}, batch {BATCH}; {steps} training steps"
    text = f"# Inference\n\n{machine}\n\n{setting}\n\n" + "\n".join(lines) + "\n"
    files.write_text(RESULTS, text)
    return text


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--steps", type=int, default=150, help="of the short training")
    arguments = parser.parse_args(argv)
    print(run(arguments.rounds, arguments.steps), file=sys.stdout)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
