"""Shared helpers of the model tests: weights that hide nothing, and the same weights in another package's
layout."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import Swinv2Config

from models.backbones.swin_v2 import SwinV2, SwinV2Size


def randomize(module: nn.Module, seed: int = 0) -> None:
    """Random norms, biases and logit scales: the zero-initialised norms would hide any mistake in the
    branches."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        with torch.no_grad():
            values = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            if name.endswith("logit_scale"):
                values = 1.0 + 3.5 * torch.rand(parameter.shape, generator=generator, dtype=torch.float64)
            elif "norm" in name and name.endswith("weight"):
                values = 0.5 + 0.15 * values
            elif parameter.ndim == 1:
                values = 0.3 * values
            else:
                values = values / parameter.flatten(1).shape[1] ** 0.5
            parameter.copy_(values)


def peer_config(size: SwinV2Size, backbone: SwinV2, window: int, pretrained: tuple[int, ...]) -> Swinv2Config:
    """The configuration of transformers' model of the same shape."""
    return Swinv2Config(
        image_size=backbone.image_size,
        patch_size=backbone.patch_size,
        embed_dim=size.embed_dim,
        depths=list(size.depths),
        num_heads=list(size.num_heads),
        window_size=window,
        pretrained_window_sizes=list(pretrained),
        drop_path_rate=0.0,
        encoder_stride=backbone.stride,
        num_labels=10,
    )


def peer_state(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state dict of ``Classifier`` or ``SimMIM`` with the names and shapes of transformers (prefix
    ``swinv2.``)."""
    replacements = (
        ("attn.proj.", "attention.output.dense."),
        ("attn.cpb_mlp.", "attention.self.continuous_position_bias_mlp."),
        ("attn.", "attention.self."),
        ("mlp.fc1.", "intermediate.dense."),
        ("mlp.fc2.", "output.dense."),
        ("norm1.", "layernorm_before."),
        ("norm2.", "layernorm_after."),
    )
    result: dict[str, Tensor] = {}
    for name, value in state.items():
        if name.startswith("head."):
            result[name.replace("head.", "classifier.")] = value
            continue
        if name.startswith("decoder."):
            result[name] = value
            continue
        if name == "mask_token":
            result["swinv2.embeddings.mask_token"] = value
            continue
        name = name.removeprefix("backbone.")
        for ours, theirs in (
            ("patch_embed.proj.", "embeddings.patch_embeddings.projection."),
            ("patch_embed.norm.", "embeddings.norm."),
            ("layers.", "encoder.layers."),
            ("norm.", "layernorm."),
        ):
            if name.startswith(ours):
                name = "swinv2." + theirs + name.removeprefix(ours)
                break
        for ours, theirs in replacements:
            if f".{ours}" in name:
                name = name.replace(f".{ours}", f".{theirs}")
                break
        stem = name.rpartition("attention.self.")[0] + "attention.self."
        if name.endswith("self.qkv.weight"):
            for part, rows in zip(("query", "key", "value"), value.chunk(3), strict=True):
                result[f"{stem}{part}.weight"] = rows
        elif name.endswith(("self.q_bias", "self.v_bias")):
            result[stem + ("query" if name.endswith("q_bias") else "value") + ".bias"] = value
        else:
            result[name] = value
    return result
