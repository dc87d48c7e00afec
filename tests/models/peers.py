"""Weights of Swin V1, ViT and DeiT under the names of transformers, to compare on the same numbers."""

from __future__ import annotations

import re

from torch import Tensor

_COMMON = (
    (r"\.attn\.proj\.", ".attention.o_proj."),
    (r"\.norm1\.", ".layernorm_before."),
    (r"\.norm2\.", ".layernorm_after."),
    (r"^patch_embed\.proj\.", "embeddings.patch_embeddings.projection."),
    (r"^patch_embed\.norm\.", "embeddings.norm."),
    (r"^norm\.", "layernorm."),
)
_SWIN = (
    (r"^layers\.", "encoder.layers."),
    (r"\.attn\.(relative_position_bias_table)$", r".attention.relative_position_bias.\1"),
)
_VIT = (
    (r"^blocks\.", "layers."),
    (r"\.attn\.(relative_position_bias_table)$", r".relative_position_bias.\1"),
    (r"^rel_pos_bias\.", "shared_position_bias."),
    (r"^cls_token$", "embeddings.cls_token"),
    (r"^pos_embed$", "embeddings.position_embeddings"),
    (r"\.gamma_", ".lambda_"),
    (r"^fc_norm\.", "pooler.layernorm."),
)


def swin_state(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our Swin V1's as that of ``SwinModel``."""
    return _renamed(state, _SWIN)


def vit_state(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our ViT's or DeiT's as that of ``BeitModel`` or ``ViTModel``."""
    return _renamed(state, _VIT)


def _renamed(state: dict[str, Tensor], rules: tuple[tuple[str, str], ...]) -> dict[str, Tensor]:
    result: dict[str, Tensor] = {}
    for name, value in state.items():
        stem, _, part = name.rpartition(".attn.")
        projections: dict[str, Tensor] = {}
        if part in ("qkv.weight", "qkv.bias"):
            kind = part.removeprefix("qkv.")
            projections = {f"{p}_proj.{kind}": rows for p, rows in zip("qkv", value.chunk(3), strict=True)}
        elif part in ("q_bias", "v_bias"):
            projections = {f"{part[0]}_proj.bias": value}
        renamed = {f"{stem}.attention.{key}": rows for key, rows in projections.items()} or {name: value}
        for key, rows in renamed.items():
            for pattern, replacement in (*rules, *_COMMON):
                key = re.sub(pattern, replacement, key)
            result[key] = rows
    return result
