"""Queries, keys and values: kept apart by transformers, stacked in one matrix by everyone else.

Swin V2 and the ViT of SimMIM have a query and a value bias and none for keys; Swin V1 and DeiT have one bias
for all three. torchvision stores Swin V2's as one vector whose middle third it ignores.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from models.checkpoints.errors import CheckpointError

NO_KEY_BIAS = ("swin_v2", "vit")
"""Families whose keys have no bias."""


def join_qkv(
    state: Mapping[str, Tensor], origin: Mapping[str, str]
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """``attn.q``, ``attn.k``, ``attn.v`` → ``attn.qkv`` (and ``q_bias``, ``v_bias``), in state and origins.

    Raises:
        CheckpointError: one of the three is missing.
    """
    joined: dict[str, Tensor] = {}
    origins: dict[str, str] = {}
    for name, tensor in state.items():
        stem, kind = name.rpartition(".")[::2]
        if not stem.endswith(("attn.q", "attn.k", "attn.v")):
            joined[name], origins[name] = tensor, origin[name]
        elif stem.endswith("attn.q"):
            stem = stem[:-1]
            parts = [f"{stem}{part}.{kind}" for part in "qkv"]
            if kind == "bias" and parts[1] not in state:
                for part in "qv":
                    joined[f"{stem}{part}_bias"] = _part(state, f"{stem}{part}.bias", origin[name])
                    origins[f"{stem}{part}_bias"] = origin[f"{stem}{part}.bias"]
                continue
            tensors = [_part(state, part, origin[name]) for part in parts]
            if len({tensor.shape for tensor in tensors}) > 1 or tensor.ndim == 0:
                shapes = ", ".join(str(tuple(tensor.shape)) for tensor in tensors)
                raise CheckpointError(f"{origin[name]} and its key and value differ in shape: {shapes}.")
            joined[f"{stem}qkv.{kind}"] = torch.cat(tensors)
            origins[f"{stem}qkv.{kind}"] = origin[name]
        elif stem[:-1] + f"q.{kind}" not in state:
            raise CheckpointError(f"{origin[name]} has no query beside it: the checkpoint is incomplete.")
    return joined, origins


def _part(state: Mapping[str, Tensor], name: str, beside: str) -> Tensor:
    if name not in state:
        raise CheckpointError(
            f"{beside} has no {'key' if '.k.' in name else 'value'} beside it: the checkpoint is incomplete."
        )
    return state[name]


def split_qkv(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of ``join_qkv``."""
    split: dict[str, Tensor] = {}
    for name, tensor in state.items():
        stem, _, kind = name.rpartition(".")
        if stem.endswith("attn.qkv"):
            for part, rows in zip("qkv", tensor.chunk(3), strict=True):
                split[f"{stem[:-3]}{part}.{kind}"] = rows
        elif kind in ("q_bias", "v_bias"):
            split[f"{stem}.{kind[0]}.bias"] = tensor
        else:
            split[name] = tensor
    return split


def split_ignored_key_bias(
    state: Mapping[str, Tensor], origin: Mapping[str, str]
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """torchvision's ``attn.qkv.bias`` of Swin V2 → ``q_bias``, ``v_bias``; its middle is ignored there."""
    result: dict[str, Tensor] = {}
    origins: dict[str, str] = {}
    for name, tensor in state.items():
        if name.endswith("attn.qkv.bias"):
            if tensor.ndim != 1 or len(tensor) % 3:
                raise CheckpointError(f"{origin[name]} of shape {tuple(tensor.shape)} has no three parts.")
            stem = name.removesuffix("qkv.bias")
            result[f"{stem}q_bias"], _, result[f"{stem}v_bias"] = tensor.chunk(3)
            origins[f"{stem}q_bias"] = origins[f"{stem}v_bias"] = origin[name]
        else:
            result[name], origins[name] = tensor, origin[name]
    return result, origins
