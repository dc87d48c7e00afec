"""Pretext `none`: artifacts/pretrain without training, for supervised runs and for published weights.

What finetuning starts from is then random, or the backbone of the file that `pretrain.initialize_from` names:
an earlier pretraining, a classifier, or what `trunkline convert` made of a released checkpoint. The graph and
everything behind it stay the same.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

import models
from flows import files, paths
from flows.data import load_manifest, preprocessing_for
from flows.errors import ConfigError, DataError
from flows.params import Params
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
        # a ViT has two forms, and a file may hold either
        forms = [models.create(params.model.backbone, **sizes, pretraining=form) for form in (False, True)]
    except ValueError as error:
        raise ConfigError(f"params.yaml: `model`: {error}") from None
    states = [{PREFIX + name: value for name, value in form.state_dict().items()} for form in forms]
    source = params.pretrain.initialize_from
    weights = read_backbone(Path(source), states) if source else states[0]

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
        "parameters": sum(parameter.numel() for parameter in forms[0].parameters()),
        "steps": 0,
        "images_seen": 0,
        "initialized_from": source,
    }
    files.write_json(paths.METRICS / "pretrain.json", metrics)
    print(f"pretrain: no training; finetuning starts from {source or 'random weights'}")


def read_backbone(path: Path, forms: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """The tensors `backbone.…` of a file of weights; they have to be those of one of `forms`.

    Raises:
        DataError: no such file, or they are not.
    """
    try:
        found = {name: value for name, value in load_file(path).items() if name.startswith(PREFIX)}
    except (OSError, SafetensorError) as error:
        raise DataError(f"`pretrain.initialize_from`: {path} cannot be read ({error})") from None
    shapes = {name: value.shape for name, value in found.items()}
    wanted = [{name: value.shape for name, value in form.items()} for form in forms]
    if shapes not in wanted:
        names = sorted(shapes.keys() | wanted[0].keys())
        wrong = [name for name in names if shapes.get(name) != wanted[0].get(name)]
        raise DataError(
            f"`pretrain.initialize_from`: {path} does not hold the backbone of params.yaml: "
            f"{', '.join(wrong[:5])}"
        )
    return found
