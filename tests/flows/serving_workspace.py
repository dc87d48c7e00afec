"""A workspace with real digits and a classifier that knows them, made in seconds.

The backbone keeps random weights, with its norms switched on so that every block matters; only the linear
head is fitted, by ridge regression on the features. That gives well separated logits without training.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from numpy.typing import NDArray
from torch import nn

import models
from flows import params, paths
from flows.classifiers import ClassifierConfig, save_classifier
from flows.data import ImageDataset, preprocessing_for
from flows.data import manifest as manifests
from flows.params import Params
from flows.samples import draw_samples
from flows.serving.package import ModelPackage
from flows.stage import Stage
from flows.stages import export, ingest
from models.backbones.swin_v2 import SwinV2Size
from models.classification import Classifier

ROOT = Path(__file__).resolve().parents[2]
IMAGE_SIZE = 16
BACKBONE = {"name": "swin_v2_test", "image_size": IMAGE_SIZE, "window_size": 4, "patch_size": 2}
BLOCKS = 3
models.BACKBONES["swin_v2_test"] = SwinV2Size(64, (2, 1), (2, 4))  # every kind of part, and quick to export
FITTED_IMAGES = 1100


@dataclass(frozen=True)
class Exported:
    """A workspace after the export stage."""

    root: Path
    params: Params
    images: NDArray[np.float32]  # preprocessed test images (n, 3, S, S)
    labels: NDArray[np.int64]
    encoded: list[bytes]  # the first test images as they came: PNG files of 8x8 digits
    encoded_labels: list[int]

    @property
    def package(self) -> ModelPackage:
        return ModelPackage.open(self.root / paths.EXPORT)


@contextmanager
def inside(folder: Path) -> Iterator[None]:
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def write_params(folder: Path, changes: dict[str, Any]) -> Params:
    """params.yaml of the repository with `changes` (dotted keys) in `folder`."""
    values = params.read(ROOT / "params.yaml")
    for key, value in changes.items():
        change = value
        for part in reversed(key.split(".")):
            change = {part: change}
        values = params.overlay(values, change, "test")
    (folder / "params.yaml").write_text(yaml.safe_dump(values))
    return params.load(folder / "params.yaml")


def make_workspace(folder: Path) -> Params:
    """Ingest the digits and write artifacts/finetune/pretrained."""
    (folder / "constraints.txt").write_text("")
    checked = write_params(
        folder,
        {
            "model.image_size": IMAGE_SIZE,
            "model.window_size": 4,
            "model.patch_size": 2,
            "export.int8_calibration_images": 64,
            "export.dynamic_batch_max": 64,
            "parity.samples": 100,
            "parity.latency_batch_sizes": [1, 4],
            "parity.latency_runs": 3,
        },
    )
    with inside(folder):
        ingest.run(checked, Stage("ingest"))
        data = manifests.load(paths.DATA)
        preprocessing = preprocessing_for(data, checked.model)
        images, labels = draw_samples(
            paths.DATA, "train", FITTED_IMAGES, seed=0, preprocessing=preprocessing, max_pixels=10**6
        )
        model = fitted_classifier(BACKBONE, torch.from_numpy(images), labels)
        config = ClassifierConfig(BACKBONE, tuple(data.classes), preprocessing, data.digest, "")
        save_classifier(paths.FINETUNE / "pretrained", model, config)
    return checked


def export_workspace(root: Path) -> Exported:
    """`make_workspace`, then the export stage."""
    checked = make_workspace(root)
    with inside(root):
        export.run(checked, Stage("export"))
        preprocessing = ModelPackage.open(paths.EXPORT).manifest.preprocessing
        images, labels = draw_samples(
            paths.DATA, "test", 40, seed=1, preprocessing=preprocessing, max_pixels=10**6
        )
        dataset = ImageDataset(paths.DATA, "test", cache_mb=0, max_pixels=10**6)
        encoded = [dataset.encoded(row) for row in range(12)]
    return Exported(root, checked, images, labels, encoded, [int(label) for label in dataset.labels[:12]])


def fitted_classifier(backbone: dict[str, Any], images: torch.Tensor, labels: np.ndarray) -> Classifier:
    torch.manual_seed(0)
    arguments = dict(backbone)
    model = Classifier(models.create(arguments.pop("name"), **arguments), int(labels.max()) + 1).eval()
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            nn.init.constant_(module.weight, 0.5)
        elif isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=module.in_features**-0.5)
    with torch.inference_mode():
        features = model.backbone(images).mean(dim=(2, 3)).double()
    targets = 6.0 * torch.nn.functional.one_hot(torch.from_numpy(labels)).double() - 3.0
    design = torch.cat([features, torch.ones(len(features), 1, dtype=torch.float64)], dim=1)
    penalty = 1e-2 * torch.eye(design.shape[1], dtype=torch.float64)
    solution = torch.linalg.solve(design.T @ design + penalty, design.T @ targets)
    with torch.no_grad():
        model.head.weight.copy_(solution[:-1].T)
        model.head.bias.copy_(solution[-1])
    return model
