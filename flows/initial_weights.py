"""Pretext `none`: artifacts/pretrain without training, for supervised runs and for published weights.

What finetuning starts from is then random, or the backbone of the file that `pretrain.initialize_from` names:
an earlier pretraining, a classifier, or a released checkpoint (docs/checkpoints.md). The graph and everything
behind it stay the same.
"""

from __future__ import annotations

from pathlib import Path

import torch

import models
from flows import files, paths
from flows.data import load_manifest, preprocessing_for
from flows.errors import ConfigError
from flows.params import Params
from flows.published import load_published
from flows.training.outputs import write_weights

PREFIX = "backbone."


def write(params: Params) -> None:
    """Write artifacts/pretrain and its metrics.

    Raises:
        ConfigError: no such backbone, or its sizes do not fit.
        DataError: no such file, or its backbone is not the one of params.yaml.
    """
    torch.manual_seed(params.seed)
    sizes = params.model.model_dump(exclude={"backbone"})
    try:
        # a ViT has two forms; this one is finetuned, and a file of the other is brought into it
        backbone = models.create(params.model.backbone, **sizes)
    except ValueError as error:
        raise ConfigError(f"params.yaml: `model`: {error}") from None
    source = params.pretrain.initialize_from
    if source:
        report = load_published(Path(source), backbone, "pretrain.initialize_from")
        print("\n".join(report.lines()))
    weights = {PREFIX + name: value for name, value in backbone.state_dict().items()}

    manifest = load_manifest(paths.DATA)
    config = {
        "task": "none",
        "backbone": {"name": params.model.backbone, **sizes},
        "initialized_from": source,
        "preprocessing": preprocessing_for(manifest, params.model).to_dict(),
        "data_digest": manifest.digest,
    }
    with files.replace_folder(paths.PRETRAIN) as folder:
        write_weights(folder / "model.safetensors", weights)
        files.write_json(folder / "config.json", config)
    metrics = {
        "backbone": params.model.backbone,
        "parameters": sum(parameter.numel() for parameter in backbone.parameters()),
        "steps": 0,
        "images_seen": 0,
        "initialized_from": source,
    }
    files.write_json(paths.METRICS / "pretrain.json", metrics)
    print(f"pretrain: no training; finetuning starts from {source or 'random weights'}")
