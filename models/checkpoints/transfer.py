"""Position tables for another window, image or form of the model.

Swin V1 and the ViT of SimMIM learn one number per head and relative offset, DeiT one vector per place: where
the window or the image has another size, they are resized. SimMIM's ViT is pretrained with one table for all
blocks and finetuned with one for each. Swin V2 has nothing to transfer: its bias is a function of the offset.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from torch import Tensor

from models.backbones.bias_tables import TableMethod, resize_bias_table, resize_position_embedding
from models.checkpoints.description import table_window
from models.checkpoints.errors import CheckpointError

RELATIVE = "relative_position_bias_table"
SHARED = f"rel_pos_bias.{RELATIVE}"
ABSOLUTE = "pos_embed"
LAST_NORM = "normalises tokens for a decoder; finetuning normalises their mean, by a norm that starts fresh"


def is_position_table(name: str) -> bool:
    return name.endswith(RELATIVE) or name == ABSOLUTE


def resize_positions(name: str, table: Tensor, rows: int, method: TableMethod) -> Tensor:
    """The table for a model whose own has ``rows`` rows of positions.

    Raises:
        CheckpointError: the positions of either are no square.
    """
    try:
        if name == ABSOLUTE:
            side = round((rows - 1) ** 0.5)
            return resize_position_embedding(table, (side, side))
        return resize_bias_table(table, table_window(rows, name), method)
    except ValueError as error:
        raise CheckpointError(f"{name} cannot be resized: {error}") from None


def give_each_block_a_table(state: dict[str, Tensor], wanted: Iterable[str]) -> dict[str, str]:
    """Turn the pretraining form of SimMIM's ViT in ``state`` into that for finetuning, if that is ``wanted``.

    Answers with the names that are left out → why; those of ``fc_norm`` are then missing.
    """
    per_block = [name for name in wanted if re.fullmatch(rf"blocks\.\d+\.attn\.{RELATIVE}", name)]
    if SHARED not in state or not per_block:
        return {}
    shared = state.pop(SHARED)
    state |= dict.fromkeys(per_block, shared)
    left_out = [name for name in ("norm.weight", "norm.bias") if name in state]
    for name in left_out:
        del state[name]
    return dict.fromkeys(left_out, LAST_NORM)


def is_pretraining_form(state: Mapping[str, Tensor]) -> bool:
    return SHARED in state
