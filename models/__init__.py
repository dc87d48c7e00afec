"""Networks in plain PyTorch: backbones, pretext tasks and heads.

``create`` makes a backbone by name, ``constant_position_bias`` readies it for export. To add one, write a
file in ``models/backbones/``, lines in ``BACKBONES``, and a case in ``create``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from models.backbones.interface import Backbone
from models.backbones.swin import MlpNorm, constant_position_bias
from models.backbones.swin_v1 import SwinV1, SwinV1Size
from models.backbones.swin_v2 import SwinV2, SwinV2Size
from models.backbones.vit import DeiT, DeiTSize, ViT, ViTSize, finetuning_weights
from models.backbones.windows import MASKED_LOGIT, WindowRule

BACKBONES: dict[str, SwinV1Size | SwinV2Size | ViTSize] = {
    # For images of about 32 pixels.
    "swin_v2_pico": SwinV2Size(64, (2, 4), (2, 4)),
    "swin_v2_nano": SwinV2Size(64, (2, 4, 2), (2, 4, 8)),
    # Heads are embed_dim / 32 in the first stage and double from stage to stage for every published size.
    # Table 1 of arXiv 2111.09883: T, S, B, L.
    "swin_v2_tiny": SwinV2Size(96, (2, 2, 6, 2), (3, 6, 12, 24)),
    "swin_v2_small": SwinV2Size(96, (2, 2, 18, 2), (3, 6, 12, 24)),
    "swin_v2_base": SwinV2Size(128, (2, 2, 18, 2), (4, 8, 16, 32)),
    "swin_v2_large": SwinV2Size(192, (2, 2, 18, 2), (6, 12, 24, 48)),
    # H (658M), g (1.06B, arXiv 2206.04664) and G (3.0B). Of these the paper gives widths and depths only in
    # part: the heads of "huge" (whose other candidate is 8, 16, 32, 64: see num_heads of create) and all of
    # "1b" follow from that rule and from the published parameter counts.
    "swin_v2_huge": SwinV2Size(352, (2, 2, 18, 2), (11, 22, 44, 88), extra_norm_period=6),
    "swin_v2_1b": SwinV2Size(448, (2, 2, 18, 2), (14, 28, 56, 112)),
    "swin_v2_giant": SwinV2Size(512, (2, 2, 42, 4), (16, 32, 64, 128), extra_norm_period=6),
    # Section 3.3 of arXiv 2103.14030: T, S, B, L; before them one for images of about 32 pixels.
    "swin_v1_pico": SwinV1Size(64, (2, 4), (2, 4)),
    "swin_v1_tiny": SwinV1Size(96, (2, 2, 6, 2), (3, 6, 12, 24)),
    "swin_v1_small": SwinV1Size(96, (2, 2, 18, 2), (3, 6, 12, 24)),
    "swin_v1_base": SwinV1Size(128, (2, 2, 18, 2), (4, 8, 16, 32)),
    "swin_v1_large": SwinV1Size(192, (2, 2, 18, 2), (6, 12, 24, 48)),
    # The ViT of SimMIM (arXiv 2111.09886, which publishes B), with one for images of about 32 pixels.
    "vit_pico": ViTSize(128, 6, 4, patch_size=4),
    "vit_small": ViTSize(384, 12, 6),
    "vit_base": ViTSize(768, 12, 12),
    "vit_large": ViTSize(1024, 24, 16),
    # DeiT (arXiv 2012.12877, table 1), of which MoBY (arXiv 2105.04553) trains S.
    "deit_pico": DeiTSize(128, 6, 4, patch_size=4),
    "deit_small": DeiTSize(384, 12, 6),
}

# What create refuses to change for a backbone without windows.
WITHOUT_WINDOWS: dict[str, Any] = {
    "num_heads": None,
    "attention_chunk": 0,
    "window_rule": "shrink",
    "masked_logit": MASKED_LOGIT,
    "pretrained_windows": None,
    "mlp_norm": "layer",
    "stage_norms": False,
}


def create(
    name: str,
    *,
    image_size: int,
    window_size: int | None = None,
    patch_size: int | None = None,
    in_channels: int = 3,
    num_heads: Sequence[int] | None = None,
    drop_path: float = 0.0,
    activation_checkpointing: bool | int | Sequence[bool] = False,
    attention_chunk: int = 0,
    window_rule: WindowRule = "shrink",
    masked_logit: float = MASKED_LOGIT,
    pretrained_windows: Sequence[int] | None = None,
    mlp_norm: MlpNorm = "layer",
    stage_norms: bool = False,
    pretraining: bool = False,
) -> SwinV1 | SwinV2 | ViT | DeiT:
    """The backbone ``name`` of ``BACKBONES`` with fresh weights.

    ``num_heads`` replaces the heads per stage of the named Swin, ``pretraining`` is an argument of ``ViT``
    and means nothing to others, and those of ``Swin`` from ``attention_chunk`` to ``stage_norms`` need one.
    ``window_size`` is ignored where there are no windows, so that a backbone can be exchanged by its name.
    ``patch_size`` None is the usual one of the named size.

    Raises:
        ValueError: the name is unknown (the message lists the known ones) or the sizes do not fit one
            another.
    """
    if name not in BACKBONES:
        raise ValueError(f"backbone {name!r} is unknown: choose one of {', '.join(BACKBONES)}.")
    size = BACKBONES[name]
    common: dict[str, Any] = {
        "image_size": image_size,
        "patch_size": patch_size,
        "in_channels": in_channels,
        "drop_path": drop_path,
        "activation_checkpointing": activation_checkpointing,
    }
    windowed: dict[str, Any] = {
        "num_heads": num_heads,
        "attention_chunk": attention_chunk,
        "window_rule": window_rule,
        "masked_logit": masked_logit,
        "pretrained_windows": pretrained_windows,
        "mlp_norm": mlp_norm,
        "stage_norms": stage_norms,
    }
    try:
        if isinstance(size, ViTSize):
            if wrong := [key for key, value in windowed.items() if value != WITHOUT_WINDOWS[key]]:
                raise ValueError(f"{', '.join(wrong)} cannot be set: it has no windows and no stages.")
            if isinstance(size, DeiTSize):
                return DeiT(size, **common)
            return ViT(size, **common, pretraining=pretraining)
        if window_size is None:
            raise ValueError("window_size is missing: give the side of its windows in tokens.")
        if (heads := windowed.pop("num_heads")) is not None:
            size = replace(size, num_heads=tuple(heads))
        kind = SwinV2 if isinstance(size, SwinV2Size) else SwinV1
        return kind(size, window_size=window_size, **common, **windowed)
    except ValueError as error:
        raise ValueError(f"{name} cannot be built: {error}") from error


__all__ = [
    "BACKBONES",
    "Backbone",
    "DeiT",
    "SwinV1",
    "SwinV2",
    "ViT",
    "constant_position_bias",
    "create",
    "finetuning_weights",
]
