"""What model a checkpoint is of: name, widths, depths, heads and windows, from its shapes, its saved tables
and the configuration beside it.

Swin V2 has no parameter whose shape tells the window, yet its position bias means something only relative to
the window it was trained with. Where a release saved its tables, they tell: the table of coordinates has
(2M−1)² entries for windows of M tokens, its largest value tells the window P that scaled it (section 3.3 of
arXiv 2111.09883 as released: log2(1 + 8·(M−1)/(P−1))/3), and a shift mask has one entry per window of the
map. Otherwise a ``config.json`` tells, or the caller.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

import models
from models.backbones.bias_tables import CLASS_TOKEN_ROWS
from models.checkpoints.errors import CheckpointError
from models.checkpoints.layouts import Recognized

SWIN = ("swin_v1", "swin_v2")


@dataclass(frozen=True)
class Description:
    """A model as far as a checkpoint tells; None where it does not.

    Attributes:
        family, task: as in ``Recognized``.
        name: of ``models.BACKBONES``; None if no size there is the same.
        num_heads: per stage; empty where it is not known (a DeiT of no named size).
        windows: window side per stage in tokens, after shrinking; empty for ViT.
        pretrained_windows: per stage the window that scales the coordinates of Swin V2.
        num_classes: of the head; None without one.
    """

    family: str
    task: str
    name: str | None
    embed_dim: int
    depths: tuple[int, ...]
    num_heads: tuple[int, ...]
    patch_size: int
    in_channels: int
    image_size: int | None
    window_size: int | None
    windows: tuple[int | None, ...]
    pretrained_windows: tuple[int | None, ...]
    num_classes: int | None

    def __str__(self) -> str:
        name = self.name or f"{self.family} of no named size"
        parts = [f"{self.embed_dim} channels, blocks {_series(self.depths)}"]
        parts += [f"heads {_series(self.num_heads)}"] if self.num_heads else []
        parts.append(f"patches of {self.patch_size} px")
        parts += [f"images of {self.image_size} px"] if self.image_size else []
        parts += [f"windows {_series(self.windows)}"] if any(self.windows) else []
        if any(self.pretrained_windows) and self.pretrained_windows != self.windows:
            parts.append(f"coordinates of windows {_series(self.pretrained_windows)}")
        parts += [f"{self.num_classes} classes"] if self.num_classes else []
        return f"{name} ({', '.join(parts)})"


def describe(recognized: Recognized, config: Mapping[str, Any] | None = None) -> Description:
    """
    Raises:
        CheckpointError: a tensor that tells a size is missing or has an impossible shape.
    """
    state, family = recognized.state, recognized.family
    embedding = _shape(recognized, "patch_embed.proj.weight", 4)
    embed_dim, in_channels, patch_size = embedding[:3]
    told = _told(config or {})
    windows: tuple[int | None, ...] = ()
    pretrained: tuple[int | None, ...] = ()
    image_size, window_size = told.image_size, told.window_size
    if family in SWIN:
        depths = _stage_depths(state)
        num_heads = tuple(_heads(recognized, stage) for stage in range(len(depths)))
        seen = [_Seen.of(recognized, stage) for stage in range(len(depths))]
        grids = [view.grid for view in seen]
        window_size = max((view.window for view in seen if view.window), default=window_size)
        for stage, view in enumerate(seen):
            # A window smaller than the others has shrunk to the whole map.
            if view.window and window_size and view.window < window_size:
                grids[stage] = grids[stage] or view.window
        image_size = next(
            (grid * patch_size * 2**stage for stage, grid in enumerate(grids) if grid), image_size
        )
        windows = stage_windows(image_size, patch_size, len(depths), window_size)
        windows = tuple(view.window or window for view, window in zip(seen, windows, strict=True))
        if family == "swin_v2":
            given = told.pretrained if any(told.pretrained) else (0,) * len(depths)
            if len(given) < len(depths):
                raise CheckpointError(
                    f"the configuration gives {len(given)} pretrained windows for {len(depths)} stages."
                )
            pretrained = tuple(
                view.pretrained or (given[stage] or windows[stage]) for stage, view in enumerate(seen)
            )
    else:
        depths = (_count(state, r"blocks\.(\d{1,3})\."),)
        num_heads = _vit_heads(recognized, told)
        if grid := _vit_grid(recognized):
            image_size = grid * patch_size
    num_classes = _shape(recognized, "head.weight", 2)[0] if "head.weight" in state else None
    name, num_heads = _find_size(family, embed_dim, depths, _extra_norm_period(state), num_heads)
    return Description(
        family=family,
        task=recognized.task,
        name=name,
        embed_dim=embed_dim,
        depths=depths,
        num_heads=num_heads,
        patch_size=patch_size,
        in_channels=in_channels,
        image_size=image_size,
        window_size=window_size,
        windows=windows,
        pretrained_windows=pretrained,
        num_classes=num_classes,
    )


def stage_windows(
    image_size: int | None, patch_size: int, stages: int, window_size: int | None
) -> tuple[int | None, ...]:
    """Window side per stage where maps smaller than the window shrink it; None where that is not known."""
    if window_size is None:
        return (None,) * stages
    if image_size is None:
        return (None,) * stages
    return tuple(min(window_size, image_size // (patch_size * 2**stage)) for stage in range(stages))


# ---- shapes ------------------------------------------------------------------------------------------------


def _shape(recognized: Recognized, name: str, ndim: int) -> tuple[int, ...]:
    tensor = recognized.state.get(name)
    if tensor is None or tensor.ndim != ndim or 0 in tensor.shape:
        found = "missing" if tensor is None else f"of shape {tuple(tensor.shape)}"
        raise CheckpointError(
            f"{recognized.origin.get(name, name)} is {found}, so the model's size is unknown."
        )
    return tuple(tensor.shape)


def _count(state: Mapping[str, Tensor], pattern: str) -> int:
    return 1 + max((int(match[1]) for name in state if (match := re.match(pattern, name))), default=-1)


def _stage_depths(state: Mapping[str, Tensor]) -> tuple[int, ...]:
    stages = _count(state, r"layers\.(\d{1,3})\.")
    return tuple(_count(state, rf"layers\.{stage}\.blocks\.(\d{{1,3}})\.") for stage in range(stages))


def _heads(recognized: Recognized, stage: int) -> int:
    attention = f"layers.{stage}.blocks.0.attn."
    if recognized.family == "swin_v2":
        return _shape(recognized, attention + "logit_scale", 3)[0]
    return _shape(recognized, attention + "relative_position_bias_table", 2)[1]


def _vit_heads(recognized: Recognized, told: _Told) -> tuple[int, ...]:
    """Empty where nothing tells: no shape of a DeiT does."""
    for name in ("rel_pos_bias", "blocks.0.attn"):
        if f"{name}.relative_position_bias_table" in recognized.state:
            return (_shape(recognized, f"{name}.relative_position_bias_table", 2)[1],)
    return (told.num_heads,) if told.num_heads else ()


def _vit_grid(recognized: Recognized) -> int | None:
    """Tokens per side."""
    state = recognized.state
    if "pos_embed" in state:
        return side_of(_shape(recognized, "pos_embed", 3)[1] - 1, "pos_embed")
    for name in ("rel_pos_bias", "blocks.0.attn"):
        if (table := f"{name}.relative_position_bias_table") in state:
            return table_window(_shape(recognized, table, 2)[0], table)
    return None


def table_window(rows: int, name: str) -> int:
    """M of a table of relative positions: (2M−1)² rows, and three more with a class token."""
    side = math.isqrt(max(rows, 0))
    if side * side != rows or side % 2 == 0:
        side = side_of(rows - CLASS_TOKEN_ROWS, name)
    return (side + 1) // 2


def side_of(cells: int, name: str) -> int:
    """The side of a square of so many cells."""
    side = math.isqrt(max(cells, 0))
    if side < 1 or side * side != cells:
        raise CheckpointError(f"{name} has room for {cells} positions, which are no square.")
    return side


def _extra_norm_period(state: Mapping[str, Tensor]) -> int:
    """Blocks of a stage between norms on the main branch; 0 without such norms."""
    found = [
        int(m[1]) for name in state if (m := re.match(r"layers\.\d+\.blocks\.(\d{1,3})\.norm3\.weight", name))
    ]
    return min(found, default=-1) + 1


def _find_size(
    family: str, embed_dim: int, depths: tuple[int, ...], period: int, num_heads: tuple[int, ...]
) -> tuple[str | None, tuple[int, ...]]:
    """The named size of these widths and depths, and its heads per stage; None and ``num_heads`` if there is
    none.

    The heads of a ViT have to be those of its size where they are known; a Swin's may be others (``create``
    takes them).
    """
    for name, size in models.BACKBONES.items():
        heads = size.num_heads if isinstance(size.num_heads, tuple) else (size.num_heads,)
        if (
            name.startswith(f"{family}_")
            and (size.embed_dim, size.depths) == (embed_dim, depths)
            and getattr(size, "extra_norm_period", 0) == period
            and (family in SWIN or num_heads in ((), heads))
        ):
            return name, num_heads or heads
    return None, num_heads


# ---- saved tables ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Seen:
    """What the buffers and tables of one stage show."""

    window: int | None = None
    pretrained: int | None = None
    grid: int | None = None

    @classmethod
    def of(cls, recognized: Recognized, stage: int) -> _Seen:
        window = pretrained = grid = None
        start = rf"layers\.{stage}\.blocks\.\d+\..*"
        found: dict[str, Tensor] = {}
        for name, tensor in (recognized.tables | recognized.state).items():
            if match := re.search(start + r"(coords_table|position_index|attn_mask|bias_table)$", name):
                found.setdefault(match[1], tensor)
        if (table := found.get("bias_table")) is not None and table.ndim == 2:
            window = table_window(table.shape[0], "relative_position_bias_table")
        if (index := found.get("position_index")) is not None:
            window = side_of(side_of(index.numel(), "relative_position_index"), "relative_position_index")
        if (coords := found.get("coords_table")) is not None:
            window = (side_of(coords.numel() // 2, "relative_coords_table") + 1) // 2
            pretrained = _pretrained_window(window, float(coords.max()))
        if (mask := found.get("attn_mask")) is not None and mask.ndim == 3:
            window = side_of(mask.shape[1], "attn_mask")
            grid = window * side_of(mask.shape[0], "attn_mask")
        return cls(window, pretrained, grid)


def _pretrained_window(window: int, largest: float) -> int | None:
    """P from the largest coordinate of a table for windows of M tokens; None where it does not tell."""
    if window == 1 or not 0.0 < largest < 100.0:
        return None
    span = 2.0 ** (3.0 * largest) - 1.0  # 8·(M−1)/(P−1)
    pretrained = 1.0 + 8.0 * (window - 1) / span
    return round(pretrained) if abs(pretrained - round(pretrained)) < 0.05 else None


# ---- config.json -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Told:
    image_size: int | None = None
    window_size: int | None = None
    pretrained: tuple[int, ...] = ()
    num_heads: int | None = None


def _told(config: Mapping[str, Any]) -> _Told:
    """The geometry in a configuration of ours, of transformers or of timm."""
    ours = config.get("backbone")
    source = ours if isinstance(ours, Mapping) else config
    image, window = _side(source.get("image_size")), source.get("window_size")
    published = config.get("pretrained_cfg")
    if isinstance(published, Mapping):  # timm: sizes of the input, windows only in the name
        image = _side(list(published.get("input_size") or [0])[-1])
        window, pretrained = _windows_in_name(str(config.get("architecture", "")))
    else:
        pretrained = source.get("pretrained_windows") or source.get("pretrained_window_sizes") or ()
    heads = source.get("num_attention_heads")
    return _Told(
        image_size=image,
        window_size=_side(window),
        pretrained=tuple(pretrained) if _are_counts(pretrained) else (),
        num_heads=_side(heads),
    )


def _windows_in_name(name: str) -> tuple[int | None, tuple[int, ...]]:
    """``…_window12to16_192to256`` → 16 and (12, 12, 12, 6); one number each where nothing was changed."""
    match = re.search(r"window(\d+)(?:to(\d+)_(\d+)to\d+)?", name)
    if not match:
        return None, ()
    if not match[2]:
        return int(match[1]), ()
    return int(match[2]), tuple(window or 0 for window in stage_windows(int(match[3]), 4, 4, int(match[1])))


def _side(value: object) -> int | None:
    if isinstance(value, list | tuple) and len(set(value)) == 1:
        value = value[0]
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None


def _are_counts(values: object) -> bool:
    return isinstance(values, Sequence) and all(type(value) is int and value >= 0 for value in values)


def _series(values: Sequence[int | None]) -> str:
    return "-".join("?" if value is None else str(value) for value in values)
