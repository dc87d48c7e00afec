"""Tiny random models of families whose attention differs, and what was made of them before ONNX."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from flows.serving.lamina.slices import cutting, marker, programs, tracing

SIZES = {"vocab_size": 61, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3,
         "num_attention_heads": 4, "max_position_embeddings": 64, "initializer_range": 0.2}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    # a window in every other layer, soft caps, heads whose sizes do not add up to the hidden size
    "gemma2": {"num_key_value_heads": 2, "head_dim": 8, "sliding_window": 5},
    # q, k and v from one projection; the feed-forward part beside attention
    "gpt_neox": {},
}


@dataclass(frozen=True)
class Sliced:
    """A model in memory and its steps, before anything became ONNX."""

    model: Any
    trace: tracing.Trace
    boundaries: list[cutting.Boundary]
    steps: list[programs.Step]


def make_model(family: str, **changes: Any) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    marker.install()
    torch.manual_seed(0)
    ends = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    config = AutoConfig.for_model(family, **(SIZES | FAMILIES.get(family, {}) | ends | changes))
    return AutoModelForCausalLM.from_config(config, attn_implementation=marker.ATTENTION).eval()


def slice_model(family: str) -> Sliced:
    model = make_model(family)
    trace = tracing.trace(model, SIZES["num_hidden_layers"])
    boundaries = cutting.cut(trace)
    return Sliced(model, trace, boundaries, programs.build_steps(trace, boundaries))
