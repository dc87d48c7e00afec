"""The marker: one operator that stands where a decoder computes attention, so that a trace can be cut there.

transformers lets a caller name the function that computes attention. Ours calls the operator
`trunkline::attention`, which carries everything an attention worker has to know: q, k and v as the model
gives them (K and V not repeated over the query heads of their group) and the layer's scale, window and soft
cap. What the operator cannot carry (sinks, biases, masks) is refused by name: a model that is cut must be the
same model.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from flows.errors import DataError

ATTENTION = "trunkline_marker"
"""What `attn_implementation` is set to."""
CARRIED = {"position_ids", "use_cache", "cache_position", "is_causal", "output_attentions", "dropout"}
"""Arguments of transformers' interface without effect here: the position of a row is known to the worker, and
models that attend to the future are refused."""


@torch.library.custom_op("trunkline::attention", mutates_args=())
def marked_attention(
    q: Tensor, k: Tensor, v: Tensor, layer: int, scale: float, window: int, soft_cap: float
) -> Tensor:
    """Causal attention of one sequence: q (1, H, T, hd), k and v (1, KV, T, hd) → (1, T, H, hd).

    `window` is how many tokens a query sees, itself included, 0 for all; `soft_cap` c makes c·tanh(s/c) of a
    score, 0 leaves it.
    """
    tokens = torch.arange(q.shape[2])
    seen = tokens[:, None] >= tokens
    if window:
        seen = seen & (tokens[:, None] - tokens < window)
    groups = q.shape[1] // k.shape[1]
    scores = q @ k.repeat_interleave(groups, 1).transpose(2, 3) * scale
    if soft_cap:
        scores = soft_cap * torch.tanh(scores / soft_cap)
    weights = scores.masked_fill(~seen, -math.inf).softmax(-1)
    return (weights @ v.repeat_interleave(groups, 1)).transpose(1, 2).contiguous()


@marked_attention.register_fake
def _shape(q: Tensor, k: Tensor, v: Tensor, layer: int, scale: float, window: int, soft_cap: float) -> Tensor:
    return q.new_empty(q.shape[0], q.shape[2], q.shape[1], v.shape[3])


def install() -> None:
    """Make `ATTENTION` known to transformers. No mask function goes with it: then no mask is computed."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS.register(ATTENTION, mark)


def mark(
    module: nn.Module,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """The attention function that transformers calls.

    Raises:
        DataError: the layer computes something that the marker cannot carry.
    """
    layer = int(getattr(module, "layer_idx", -1))
    where = f"layer {layer}"
    if s_aux is not None:
        raise DataError(f"{where} has attention sinks, which Lamina does not support")
    if attention_mask is not None:
        raise DataError(f"{where} gives attention a mask of its own, which Lamina does not support")
    if not getattr(module, "is_causal", True) or others.get("is_causal") is False:
        raise DataError(f"{where} attends to later tokens; Lamina serves causal decoders only")
    if unknown := sorted(name for name, value in others.items() if value is not None and name not in CARRIED):
        raise DataError(f"{where} passes {', '.join(unknown)} to attention, which Lamina does not support")
    if k.shape[-1] != v.shape[-1] or q.shape[-1] != k.shape[-1]:
        raise DataError(
            f"{where} has heads of {q.shape[-1]} for q, {k.shape[-1]} for k and {v.shape[-1]} for v; Lamina "
            "needs one size"
        )
    scale = q.shape[-1] ** -0.5 if scaling is None else float(scaling)
    return marked_attention(q, k, v, layer, scale, int(sliding_window or 0), float(softcap or 0.0)), None
