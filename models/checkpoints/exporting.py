"""Our parameters under the names of another layout, and the configuration transformers wants beside them.

The reverse of ``layouts.py``, through the same tables. A file is written in the names that published files
have, which transformers itself renames when it reads one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

from torch import Tensor

from models.checkpoints import names
from models.checkpoints.attention import split_qkv
from models.checkpoints.description import SWIN, Description
from models.checkpoints.errors import CheckpointError, listed

Target = Literal["ours", "official", "timm", "transformers"]
TARGETS: tuple[str, ...] = get_args(Target)
_MODEL_TYPES = {"swin_v1": "swin", "swin_v2": "swinv2", "vit": "beit", "deit": "vit"}
_CLASSES = {"swin_v1": "Swin", "swin_v2": "Swinv2", "vit": "Beit", "deit": "ViT"}


def export(state: Mapping[str, Tensor], family: str, task: str, target: Target) -> dict[str, Tensor]:
    """Tensors under our names without prefix → a state dict in the layout ``target``.

    Raises:
        CheckpointError: that layout has no place for some of them.
    """
    if target == "ours":
        return {_ours(name): tensor for name, tensor in state.items()}
    if target == "official":
        return {_official(name, family, task): tensor for name, tensor in state.items()}
    if target == "timm":
        if task == "simmim":
            raise CheckpointError(
                "timm has no model for SimMIM: export a backbone or classifier (--head drop)."
            )
        return {_timm(name, family): tensor for name, tensor in state.items()}
    if family == "vit" and task == "simmim":
        raise CheckpointError(
            "transformers has no Beit with SimMIM's decoder: export the backbone (head='drop', --head drop)."
        )
    return _transformers(state, family)


def _ours(name: str) -> str:
    return name if name.startswith(("head.", "decoder.", "mask_token")) else f"backbone.{name}"


def _official(name: str, family: str, task: str) -> str:
    if task != "simmim" or name.startswith("decoder."):
        return name
    # The release calls the network of the position bias so; only Swin V2 has one.
    return "encoder." + name.replace(".attn.cpb_mlp.", ".attn.rpe_mlp.")


def _timm(name: str, family: str) -> str:
    if family not in SWIN:
        return name
    return names.shift_downsample(name, 1).replace("head.", "head.fc.")


def _transformers(state: Mapping[str, Tensor], family: str) -> dict[str, Tensor]:
    table = names.SWIN_IN_TRANSFORMERS if family in SWIN else names.VIT_IN_TRANSFORMERS
    renamed: dict[str, Tensor] = {}
    homeless = []
    for name, tensor in split_qkv(state).items():
        if theirs := names.HEADS_IN_TRANSFORMERS.to_theirs(name):
            renamed[theirs] = tensor
        elif theirs := table.to_theirs(name):
            renamed[f"{_MODEL_TYPES[family]}.{theirs}"] = tensor
        else:
            homeless.append(name)
    if homeless:
        raise CheckpointError(f"transformers has no place for {listed(homeless)}.")
    return renamed


def transformers_config(
    model: Description,
    *,
    image_size: int,
    window_size: int,
    pretrained_windows: Sequence[int] = (),
    labels: Sequence[str] = (),
    shared_table: bool = False,
) -> dict[str, Any]:
    """The ``config.json`` with which ``from_pretrained`` builds the same model."""
    task = {"classifier": "ForImageClassification", "simmim": "ForMaskedImageModeling"}.get(
        model.task, "Model"
    )
    config: dict[str, Any] = {
        "architectures": [_CLASSES[model.family] + task],
        "model_type": _MODEL_TYPES[model.family],
        "image_size": image_size,
        "patch_size": model.patch_size,
        "num_channels": model.in_channels,
        "hidden_act": "gelu",
    }
    if model.family in SWIN:
        config |= {
            "embed_dim": model.embed_dim,
            "depths": list(model.depths),
            "num_heads": list(model.num_heads),
            "window_size": window_size,
            "mlp_ratio": 4.0,
            "qkv_bias": True,
            "layer_norm_eps": 1e-5,
            "encoder_stride": model.patch_size * 2 ** (len(model.depths) - 1),
        }
        if model.family == "swin_v2":
            config["pretrained_window_sizes"] = list(pretrained_windows)
    else:
        config |= {
            "hidden_size": model.embed_dim,
            "num_hidden_layers": model.depths[0],
            "num_attention_heads": model.num_heads[0],
            "intermediate_size": 4 * model.embed_dim,
            "layer_norm_eps": 1e-6,
            "encoder_stride": model.patch_size,
        }
    if model.family == "vit":
        config |= {
            "use_relative_position_bias": not shared_table,
            "use_shared_relative_position_bias": shared_table,
            "use_absolute_position_embeddings": False,
            "use_mean_pooling": not shared_table,
            "use_mask_token": False,
            "layer_scale_init_value": 0.1,
        }
    if model.num_classes:
        named = list(labels) or [f"LABEL_{i}" for i in range(model.num_classes)]
        config["id2label"] = {str(i): label for i, label in enumerate(named)}
        config["label2id"] = {label: i for i, label in enumerate(named)}
    return config
