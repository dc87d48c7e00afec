"""Networks in plain PyTorch: backbones, pretext tasks and heads.

``create`` makes a backbone by name, ``constant_position_bias`` readies it for export. To add one, write a
file in ``models/backbones/`` and a line in ``BACKBONES``.
"""

from __future__ import annotations

from collections.abc import Sequence

from models.backbones.interface import Backbone
from models.backbones.swin_v2 import SwinV2, SwinV2Size, constant_position_bias
from models.backbones.windows import WindowRule

# Heads are embed_dim / 32 in the first stage and double from stage to stage for every published size. Of the
# last three the paper gives widths and depths only in part: the heads of "huge" and all of "1b" follow from
# that rule and from the published parameter counts.
BACKBONES: dict[str, SwinV2Size] = {
    # For images of about 32 pixels.
    "swin_v2_pico": SwinV2Size(64, (2, 4), (2, 4)),
    "swin_v2_nano": SwinV2Size(64, (2, 4, 2), (2, 4, 8)),
    # Table 1 of arXiv 2111.09883: T, S, B, L.
    "swin_v2_tiny": SwinV2Size(96, (2, 2, 6, 2), (3, 6, 12, 24)),
    "swin_v2_small": SwinV2Size(96, (2, 2, 18, 2), (3, 6, 12, 24)),
    "swin_v2_base": SwinV2Size(128, (2, 2, 18, 2), (4, 8, 16, 32)),
    "swin_v2_large": SwinV2Size(192, (2, 2, 18, 2), (6, 12, 24, 48)),
    # H (658M), g (1.06B, arXiv 2206.04664) and G (3.0B).
    "swin_v2_huge": SwinV2Size(352, (2, 2, 18, 2), (11, 22, 44, 88), extra_norm_period=6),
    "swin_v2_1b": SwinV2Size(448, (2, 2, 18, 2), (14, 28, 56, 112)),
    "swin_v2_giant": SwinV2Size(512, (2, 2, 42, 4), (16, 32, 64, 128), extra_norm_period=6),
}


def create(
    name: str,
    *,
    image_size: int,
    window_size: int,
    patch_size: int = 4,
    drop_path: float = 0.0,
    activation_checkpointing: bool = False,
    window_rule: WindowRule = "shrink",
    pretrained_windows: Sequence[int] | None = None,
) -> SwinV2:
    """The backbone ``name`` of ``BACKBONES`` with fresh weights; the arguments are those of ``SwinV2``.

    Raises:
        ValueError: the name is unknown (the message lists the known ones) or the sizes do not fit one
            another.
    """
    if name not in BACKBONES:
        raise ValueError(f"backbone {name!r} is unknown: choose one of {', '.join(BACKBONES)}.")
    try:
        return SwinV2(
            BACKBONES[name],
            image_size=image_size,
            window_size=window_size,
            patch_size=patch_size,
            drop_path=drop_path,
            activation_checkpointing=activation_checkpointing,
            window_rule=window_rule,
            pretrained_windows=pretrained_windows,
        )
    except ValueError as error:
        raise ValueError(f"{name} cannot be built: {error}") from error


__all__ = ["BACKBONES", "Backbone", "SwinV2", "constant_position_bias", "create"]
