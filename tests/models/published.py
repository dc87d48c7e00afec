"""State dicts as the releases have them, made from one of ours by renaming it by hand.

Independent of `models.checkpoints`: written from the table of layouts with plain string replacement, with
the buffers that a release saves beside its weights.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from models.backbones.swin import Swin

State = dict[str, Tensor]


def plain(model: nn.Module) -> State:
    """Our weights as the official classification release names them."""
    return {name.removeprefix("backbone."): value.clone() for name, value in model.state_dict().items()}


def official(model: nn.Module) -> State:
    """With the buffers that the official code saves: index, coordinates (V2), and masks of shifted blocks."""
    state = plain(model)
    backbone: Swin = getattr(model, "backbone", model)
    for i, stage in enumerate(backbone.layers):
        windows = stage.windows
        side, tokens = windows.window, windows.window**2
        for j in range(len(stage.blocks)):
            block = f"layers.{i}.blocks.{j}."
            state[block + "attn.relative_position_index"] = torch.zeros(tokens, tokens, dtype=torch.long)
            if any("logit_scale" in name for name in state):
                steps = torch.arange(-(side - 1), side, dtype=torch.float32)
                steps = steps / max(windows.pretrained_window - 1, 1) * 8
                steps = torch.sign(steps) * torch.log2(steps.abs() + 1.0) / math.log2(8)
                grid = torch.stack(torch.meshgrid([steps, steps], indexing="ij"))
                state[block + "attn.relative_coords_table"] = grid.permute(1, 2, 0).contiguous()[None]
            if windows.shift and j % 2:
                count = (windows.grid // side) ** 2
                state[block + "attn_mask"] = torch.zeros(count, tokens, tokens)
    return state


def simmim(model: nn.Module) -> State:
    """The SimMIM release: everything under `encoder.`, the position bias' network under its older name."""
    state = {}
    for name, value in official(model).items():
        name = name.replace("cpb_mlp", "rpe_mlp")
        state[name if name.startswith("decoder") else "encoder." + name] = value
    return state


def moby(model: nn.Module) -> State:
    """The MoBY release: two encoders, of which the second is not the one to take."""
    state = {}
    for name, value in official(model).items():
        state["encoder." + name] = value
        state["encoder_k." + name] = torch.full_like(value, 9)
    for part in ("projector", "projector_k", "predictor"):
        state[f"{part}.linear_hidden.1.weight"] = torch.ones(8, 4)
        state[f"{part}.linear_hidden.2.num_batches_tracked"] = torch.tensor(3)
    return {**state, "queue1": torch.ones(4, 8), "queue2": torch.ones(4, 8), "queue_ptr": torch.zeros(1)}


def timm(model: nn.Module) -> State:
    """timm's Swin: merging belongs to the stage after it, the head is `head.fc`."""
    state = {}
    for name, value in plain(model).items():
        parts = name.split(".")
        if "downsample" in parts:
            parts[1] = str(int(parts[1]) + 1)
        if parts[0] == "head":
            parts.insert(1, "fc")
        state[".".join(parts)] = value
    return state


def torchvision(model: nn.Module) -> State:
    """torchvision's Swin: one sequence `features`, a dense bias with a third for keys."""
    state = {}
    given = official(model)
    for name, value in given.items():
        name = name.replace("patch_embed.proj", "features.0.0").replace("patch_embed.norm", "features.0.2")
        name = name.replace("mlp.fc1", "mlp.0").replace("mlp.fc2", "mlp.3")
        if name.startswith("layers."):
            _, stage, kind, rest = name.split(".", 3)
            place = 2 * int(stage) + (1 if kind == "blocks" else 2)
            name = f"features.{place}.{rest}"
        if name.endswith(("attn_mask", "attn.v_bias")):
            continue
        if name.endswith("relative_position_index"):
            value = value.flatten()
        if name.endswith("attn.q_bias"):
            stem = name.removesuffix("q_bias")
            ours = f"layers.{stage}.blocks.{rest.removesuffix('q_bias')}v_bias"
            name, value = stem + "qkv.bias", torch.cat((value, torch.zeros_like(value), given[ours]))
        state[name] = value
    return state
