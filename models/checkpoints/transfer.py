"""Position tables for another number of positions.

Swin V1 and the ViT of SimMIM learn one number per head and relative offset, DeiT one vector per place: where
the window or the image has another size, they are resized bicubically, as the released fine-tuning does. Swin
V2 has nothing to resize: its bias is a function of the offset.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from models.checkpoints.description import side_of

RELATIVE = "relative_position_bias_table"
SHARED = f"rel_pos_bias.{RELATIVE}"
ABSOLUTE = "pos_embed"


def is_position_table(name: str) -> bool:
    return name.endswith(RELATIVE) or name == ABSOLUTE


def resize_positions(name: str, table: Tensor, shape: torch.Size, class_rows: int) -> Tensor:
    """A table of the same width for as many positions as ``shape`` has rows.

    ``class_rows`` of a relative table, at its end, and the first row of an absolute one belong to the class
    token and are kept as they are.

    Raises:
        CheckpointError: the positions of either are no square.
    """
    if name == ABSOLUTE:  # (1, 1 + L, C)
        first, places = table[:, :1], table[0, 1:]
        return torch.cat((first, _resize(name, places, shape[1] - 1)[None]), dim=1)
    offsets, kept = table[: len(table) - class_rows], table[len(table) - class_rows :]
    return torch.cat((_resize(name, offsets, shape[0] - class_rows), kept))


def _resize(name: str, table: Tensor, rows: int) -> Tensor:
    """(L, C) → (rows, C), both L and rows squares of a side."""
    old, new = side_of(len(table), name), side_of(rows, name)
    if old == new:
        return table
    square = table.float().t().reshape(1, -1, old, old)
    square = F.interpolate(square, size=(new, new), mode="bicubic", align_corners=False)
    return square.reshape(-1, rows).t().to(table.dtype)
