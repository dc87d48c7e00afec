"""Which layout a state dict has, told from its names and shapes alone, and its tensors under our names.

- ours: prefix ``backbone.``;
- official: ``patch_embed.proj``, merging at the end of a stage; bare (Swin, Swin V2, BEiT, DeiT) or under
  ``encoder.`` (SimMIM, MoBY);
- timm: the same, but merging at the start of a stage and ``head.fc`` (its ViT are as the official ones);
- transformers: ``embeddings.patch_embeddings.projection``; Swin, Swinv2, Beit and ViT, as in published files
  and as in memory;
- torchvision: ``features.0.0``; swin_* and swin_v2_*.

The one invariant: every tensor that came in is afterwards either under one of our names, or among the
dropped with a reason. A name that nobody knows keeps itself, and is refused where the model is known
(``fitting.py``).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from models.checkpoints import names
from models.checkpoints.attention import NO_KEY_BIAS, join_qkv, split_ignored_key_bias
from models.checkpoints.errors import CheckpointError, listed

REBUILT = "tables of the geometry, built again for the model"
MOBY = "of MoBY's pretraining, not of its online encoder"
POOLER = "the pooler of transformers' bare model, which classification does not use"
VISUAL_TOKENS = "predicts visual tokens, which no model here does"

_BUFFERS = ("relative_coords_table", "relative_position_index", "attn_mask")
_MOBY_PARTS = (
    *("encoder_k.", "projector.", "projector_k.", "predictor.", "queue"),
    *("target_backbone.", "target_projector.", "step"),
)
_WRAPPERS = ("module.", "_orig_mod.", "model.")
_TRANSFORMERS_PREFIXES = ("swin.", "swinv2.", "beit.", "deit.", "vit.", "")
_OFFICIAL_MARK = "patch_embed.proj.weight"
_TRANSFORMERS_MARK = "embeddings.patch_embeddings.projection.weight"


@dataclass(frozen=True)
class Recognized:
    """A checkpoint under our names.

    Attributes:
        layout: one of those above.
        family: swin_v1, swin_v2, vit (SimMIM's and BEiT's) or deit (class token and absolute positions).
        task: classifier, simmim, moby or backbone: what the checkpoint is of.
        state: the tensors; names are a backbone's without prefix, ``head``, ``mask_token``, ``decoder``.
        origin: for each of them the name it came from.
        tables: buffers that are not loaded but tell the windows the weights were trained with.
        dropped: names as they came, with the reason why each is left out.
    """

    layout: str
    family: str
    task: str
    state: dict[str, Tensor]
    origin: dict[str, str]
    tables: dict[str, Tensor]
    dropped: dict[str, str]


def recognize(tensors: Mapping[str, Tensor]) -> Recognized:
    """
    Raises:
        CheckpointError: no known layout, a known one that no model here can take, or two names for one
            parameter.
    """
    tensors = _unwrap(tensors)
    layout, to_ours = _choose(tensors)
    state: dict[str, Tensor] = {}
    origin: dict[str, str] = {}
    tables: dict[str, Tensor] = {}
    dropped: dict[str, str] = {}
    for theirs, tensor in tensors.items():
        reason = _reason_to_drop(theirs, tensors)
        ours = to_ours(theirs)
        if reason is None or reason == REBUILT:
            target = state if reason is None else tables
            if ours in target:
                twice = origin.get(ours, ours)
                raise CheckpointError(f"{twice} and {theirs} are the same parameter: which one is meant?")
            target[ours] = tensor
            origin[ours] = theirs
        if reason is not None:
            dropped[theirs] = reason
    family = _family(state)
    if layout == "torchvision" and family in NO_KEY_BIAS:
        state, origin = split_ignored_key_bias(state, origin)
    state, origin = join_qkv(state, origin)
    if family == "deit" and any(name in state for name in ("dist_token", "head_dist.weight")):
        raise CheckpointError(
            "this is a distilled DeiT: it has a distillation token besides the class token, which no model "
            "here has. The DeiT without distillation fits (in transformers it is published as a ViT)."
        )
    moby = MOBY in dropped.values()
    return Recognized(layout, family, "moby" if moby else _task(state), state, origin, tables, dropped)


def _unwrap(tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Without the prefixes that DDP, torch.compile and training frameworks put before every name."""
    while tensors and (
        wrapper := next((w for w in _WRAPPERS if all(name.startswith(w) for name in tensors)), None)
    ):
        tensors = {name.removeprefix(wrapper): tensor for name, tensor in tensors.items()}
    return tensors


def _choose(tensors: Mapping[str, Tensor]) -> tuple[str, Callable[[str], str]]:
    """The layout, and the function from its names to ours."""
    if "features.0.0.weight" in tensors:
        return "torchvision", _from_torchvision
    for prefix in _TRANSFORMERS_PREFIXES:
        if prefix + _TRANSFORMERS_MARK in tensors:
            return "transformers", _from_transformers(prefix, tensors)
    if any(".meta_mlp." in name for name in tensors):
        raise CheckpointError(
            "this is timm's swinv2_cr, another architecture than Swin V2 (its position bias is not bounded, "
            "its keys have a bias): its weights fit no model here. timm's swinv2_* without cr do."
        )
    if "backbone." + _OFFICIAL_MARK in tensors:
        return "ours", lambda name: _old_names(name.removeprefix("backbone."))
    if "encoder." + _OFFICIAL_MARK in tensors:
        return "official", lambda name: _old_names(name.removeprefix("encoder."))
    if _OFFICIAL_MARK in tensors:
        merging = {int(m[1]) for name in tensors if (m := re.match(r"layers\.(\d{1,3})\.downsample\.", name))}
        if "head.fc.weight" in tensors or (merging and 0 not in merging):
            return "timm", _from_timm
        return "official", _old_names
    found = [name for name in tensors if name.endswith((_OFFICIAL_MARK, _TRANSFORMERS_MARK))]
    hint = f"only {listed(found)} is there, under an unknown prefix" if found else "it is missing"
    raise CheckpointError(
        "the names are of no known layout (ours, official, timm, transformers, torchvision; Swin, Swin V2, "
        f"ViT, DeiT), which are told by {_OFFICIAL_MARK}: {hint}; the first names are "
        f"{listed(sorted(tensors))}."
    )


def _old_names(name: str) -> str:
    """The names of today for what the SimMIM release and the authors' extended code call otherwise."""
    return name.replace(".attn.rpe_mlp.", ".attn.cpb_mlp.").replace(".enorm.", ".norm3.")


def _from_timm(name: str) -> str:
    return names.shift_downsample(name, -1).replace("head.fc.", "head.")


def _from_torchvision(name: str) -> str:
    plain = names.torchvision_stages(name)
    for buffer in _BUFFERS:  # they need our name too: the windows are read off them
        if match := re.fullmatch(rf"blocks\.(\d+)\.(\d+)\.attn\.{buffer}", plain):
            return f"layers.{match[1]}.blocks.{match[2]}.attn.{buffer}"
    return names.SWIN_IN_TORCHVISION.to_ours(plain) or name


def _from_transformers(prefix: str, tensors: Mapping[str, Tensor]) -> Callable[[str], str]:
    is_swin = any(name.startswith(f"{prefix}encoder.layers.0.blocks.") for name in tensors)
    tables = (
        (names.SWIN_IN_TRANSFORMERS, names.SWIN_IN_MEMORY)
        if is_swin
        else (names.VIT_IN_TRANSFORMERS, names.VIT_IN_MEMORY)
    )

    def to_ours(name: str) -> str:
        if prefix and not name.startswith(prefix):
            if name.startswith("layernorm."):  # of Beit's masked-image model, outside its backbone
                return name.removeprefix("layer")
            return names.HEADS_IN_TRANSFORMERS.to_ours(name) or name
        bare = name.removeprefix(prefix)
        for table in tables:
            if ours := table.to_ours(bare):
                return ours
        return name

    return to_ours


def _reason_to_drop(name: str, tensors: Mapping[str, Tensor]) -> str | None:
    if name.rpartition(".")[2] in _BUFFERS:
        return REBUILT
    if name.startswith(_MOBY_PARTS):
        return MOBY
    if re.fullmatch(r"(\w+\.)?pooler\.dense\.(weight|bias)", name):
        return POOLER
    if name.startswith("layernorm.") and "beit.layernorm.weight" in tensors:
        return VISUAL_TOKENS  # a second one: the norm of that head
    return VISUAL_TOKENS if name.startswith("lm_head.") else None


def _family(state: Mapping[str, Tensor]) -> str:
    """
    Raises:
        CheckpointError: it is none of the four, or has marks of two.
    """
    last = {name.rpartition(".")[2] for name in state}
    marks = {"swin_v2": "logit_scale", "swin_v1": "relative_position_bias_table"}
    if any(name.startswith("layers.") for name in state):
        found = [family for family, mark in marks.items() if mark in last]
        if len(found) == 1:
            return found[0]
        raise CheckpointError(
            f"this Swin Transformer has {'both' if found else 'neither'} logit_scale (V2) and "
            "relative_position_bias_table (V1), so it is neither version."
        )
    if any(name.startswith("blocks.") for name in state):
        relative = bool(last & {"relative_position_bias_table", "gamma_1"})
        absolute = "pos_embed" in state
        if relative != absolute:
            return "vit" if relative else "deit"
        raise CheckpointError(
            f"this ViT has {'both' if absolute else 'neither'} absolute positions (DeiT) and relative ones "
            "(SimMIM, BEiT): no model here is like that."
        )
    raise CheckpointError(f"there are no blocks among the weights: {listed(sorted(state))}.")


def _task(state: Mapping[str, Tensor]) -> str:
    if any(name.startswith("decoder.") for name in state) or "mask_token" in state:
        return "simmim"
    return "classifier" if "head.weight" in state else "backbone"
