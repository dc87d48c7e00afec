"""How the optimiser treats each parameter: which ones decay, and how deep they lie (layer-wise lr decay).

Pure functions of names. A name may carry the prefixes of the wrappers around a backbone (``module.``,
``backbone.``); the rules look at whole path components, not at how a name begins. In the released code a
prefix kept the rules from matching, so that logit scales and position bias networks were decayed in
pretraining; here they never are.
"""

from __future__ import annotations

import re
from typing import Protocol

from torch import Tensor

_NEVER_DECAYED = {
    "absolute_pos_embed",
    "cls_token",
    "cpb_mlp",
    "logit_scale",
    "mask_token",
    "pos_embed",
    "q_bias",
    "relative_position_bias_table",
    "v_bias",
}
_WRAPPERS = re.compile(r"^(?:(?:module|backbone)\.)*")
_BLOCK = re.compile(r"^(?:layers\.(\d+)\.)?blocks\.(\d+)\.")
_DOWNSAMPLE = re.compile(r"^layers\.(\d+)\.downsample\.")
_STEM = re.compile(r"^(?:patch_embed\.|(?:mask_token|cls_token|pos_embed|absolute_pos_embed)$)")


class Layered(Protocol):
    """What the layer ids need to know of a backbone: blocks per stage."""

    @property
    def depths(self) -> tuple[int, ...]: ...


def no_weight_decay(name: str, parameter: Tensor) -> bool:
    """Whether it is exempt: vectors, biases, tokens, logit scales, positions and their biases."""
    components = name.split(".")
    return parameter.ndim <= 1 or components[-1] == "bias" or not _NEVER_DECAYED.isdisjoint(components)


def num_layer_ids(backbone: Layered) -> int:
    """Number of different layer ids: the stem, one per block, and the top."""
    return sum(backbone.depths) + 2


def layer_id(name: str, backbone: Layered) -> int:
    """Depth of a parameter for the layer-wise learning rate, whose factor is decay^(num_layer_ids − 1 − id).

    Patch embedding, tokens and absolute positions are 0, block k (over all stages) is k + 1, the merging
    after a stage counts with the stage's last block, and everything else (final norm, head, a table of
    position biases that all blocks share) is at the top.
    """
    name = _WRAPPERS.sub("", name)
    if _STEM.match(name):
        return 0
    if found := _BLOCK.match(name):
        stage, block = int(found[1] or 0), int(found[2])  # a ViT is one stage
        return sum(backbone.depths[:stage]) + block + 1
    if found := _DOWNSAMPLE.match(name):
        return sum(backbone.depths[: int(found[1]) + 1])
    return sum(backbone.depths) + 1
