"""A Llama-style decoder: RMSNorm, rotary positions, grouped-query attention, SwiGLU (arXiv 2302.13971).

Parameters have the names and layouts of Hugging Face's `LlamaForCausalLM`, so a state dict of either fits the
other. Rotary embeddings turn the halves of a head against each other (i with i + hd/2), as that layout wants;
files with neighbouring pairs (llama2.c, Meta's own) need their wq and wk permuted first.

    B batch · T new tokens · S tokens so far, new ones included · H query heads · K kv heads · G = H/K
    D hidden size · E head size · V vocabulary
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


@dataclass(frozen=True)
class DecoderConfig:
    """Sizes and constants; field names are those of Hugging Face's config.json."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int  # tokens
    rope: bool = True  # false: no positions at all, the causal mask alone tells order (arXiv 2305.19466)
    rope_theta: float = 10_000.0
    rms_norm_eps: float = 1e-5
    tie_word_embeddings: bool = False

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if not isinstance(value, bool) and value <= 0:
                raise ValueError(f"{name} is {value}, must be positive")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"{self.num_attention_heads} query heads do not share {self.num_key_value_heads} kv heads "
                "evenly"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim is {self.head_dim}; rotary embeddings turn pairs, so it must be even")

    def to_dict(self) -> dict[str, Any]:
        """The content of a config.json that `LlamaForCausalLM` understands; without rotary embeddings one for
        `SmolLM3ForCausalLM`, which is the same decoder with layers that may lack them."""
        sizes = asdict(self)
        theta, rope = sizes.pop("rope_theta"), sizes.pop("rope")
        kind: dict[str, Any] = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
        if not rope:
            kind = {
                "architectures": ["SmolLM3ForCausalLM"],
                "model_type": "smollm3",
                "no_rope_layers": [0] * self.num_hidden_layers,  # 1 would be a layer with them
                "use_sliding_window": False,
                "pad_token_id": None,  # its own default may lie outside of the vocabulary
            }
        return {
            **kind,
            **sizes,
            "hidden_act": "silu",
            "attention_bias": False,
            "mlp_bias": False,
            "rope_parameters": {"rope_type": "default", "rope_theta": theta},
            "rope_theta": theta,  # where transformers before version 5 looks for it
        }

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> DecoderConfig:
        """Inverse of `to_dict`, for any config.json of a Llama.

        Raises:
            ValueError: another kind of model, or one with parts that this decoder lacks.
        """
        rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
        kind = rope.get("rope_type", rope.get("type", "default"))
        has_rope = config.get("model_type") != "smollm3" or any(config.get("no_rope_layers") or [1])
        known_type = "llama" if has_rope else "smollm3"
        asked = {"model_type": (config.get("model_type"), known_type), "rope_type": (kind, "default"),
                 "hidden_act": (config.get("hidden_act", "silu"), "silu"),
                 "attention_bias": (config.get("attention_bias", False), False),
                 "mlp_bias": (config.get("mlp_bias", False), False)}  # fmt: skip
        for key, (found, known) in asked.items():
            if found != known:
                raise ValueError(f"`{key}` is {found!r}; this decoder has {known!r} only")
        heads = config["num_attention_heads"]
        return cls(
            vocab_size=config["vocab_size"],
            hidden_size=config["hidden_size"],
            intermediate_size=config["intermediate_size"],
            num_hidden_layers=config["num_hidden_layers"],
            num_attention_heads=heads,
            num_key_value_heads=config.get("num_key_value_heads") or heads,
            head_dim=config.get("head_dim") or config["hidden_size"] // heads,
            max_position_embeddings=config["max_position_embeddings"],
            rope=has_rope,
            rope_theta=float(rope.get("rope_theta", config.get("rope_theta", 10_000.0))),
            rms_norm_eps=config.get("rms_norm_eps", 1e-6),
            tie_word_embeddings=config.get("tie_word_embeddings", False),
        )


Cache = list[tuple[Tensor, Tensor]]
"""K and V of every layer, each (B, K, S, E), rotated already."""


class RMSNorm(nn.Module):
    """x / rms(x) · weight, the mean of squares in float32."""

    def __init__(self, size: int, epsilon: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.epsilon = epsilon

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        return self.weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.epsilon)).to(
            x.dtype
        )


class Attention(nn.Module):
    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        queries = config.num_attention_heads * config.head_dim
        keys = config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, queries, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, keys, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, keys, bias=False)
        self.o_proj = nn.Linear(queries, config.hidden_size, bias=False)

    def forward(
        self,
        x: Tensor,
        rotation: tuple[Tensor, Tensor] | None,
        seen: Tensor,
        past: tuple[Tensor, Tensor] | None,
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """
        Args:
            seen: bool, broadcast to (B, heads, T, S): which tokens each new one attends to.
        """
        q, k, v = (
            projection(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # (B, heads, T, E)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        if rotation is not None:
            q, k = rotate(q, *rotation), rotate(k, *rotation)
        if past is not None:
            k, v = torch.cat((past[0], k), 2), torch.cat((past[1], v), 2)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, enable_gqa=True)
        return self.o_proj(mixed.transpose(1, 2).flatten(2)), (k, v)


class FeedForward(nn.Module):
    """SwiGLU: down(silu(gate x) · up x)."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        product: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return product


class Layer(nn.Module):
    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.self_attn = Attention(config)
        self.mlp = FeedForward(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self,
        x: Tensor,
        rotation: tuple[Tensor, Tensor] | None,
        seen: Tensor,
        past: tuple[Tensor, Tensor] | None,
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        mixed, kept = self.self_attn(self.input_layernorm(x), rotation, seen, past)
        x = x + mixed
        return x + self.mlp(self.post_attention_layernorm(x)), kept


class Trunk(nn.Module):
    """Embedding, layers and last norm; its name in a state dict is `model`."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class Decoder(nn.Module):
    """Token ids → logits of the next token at every position.

    Args:
        recomputed_layers: first layers whose activations the backward pass computes again: less memory, more
            time.
    """

    def __init__(self, config: DecoderConfig, recomputed_layers: int = 0) -> None:
        super().__init__()
        self.config = config
        self.recomputed_layers = recomputed_layers
        self.model = Trunk(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def forward(
        self, input_ids: Tensor, past: Cache | None = None, documents: Tensor | None = None
    ) -> tuple[Tensor, Cache]:
        """
        Args:
            input_ids: (B, T) tokens that follow those of `past`.
            documents: (B, T) numbers, equal for the tokens of one document, which stand together: several
                documents in a row do not see one another, and each counts its positions from 0. Not beside
                `past`.

        Returns:
            Logits (B, T, V), and the cache with the new tokens.
        """
        start = past[0][0].shape[2] if past else 0
        new, device = input_ids.shape[1], input_ids.device
        positions = torch.arange(start, start + new, device=device)
        # Query t of the T new ones is token S - T + t, and sees all tokens up to itself.
        seen = torch.ones(new, start + new, dtype=torch.bool, device=device).tril(start)
        if documents is not None:
            positions = positions_within(documents)[:, None]  # (B, 1, T), the same for all heads
            seen = seen & (documents[:, None, :, None] == documents[:, None, None, :])
        x = self.model.embed_tokens(input_ids)
        rotation = None
        if self.config.rope:
            rotation = angles(positions, self.config.head_dim, self.config.rope_theta, x.dtype)
        kept: Cache = []
        for index, layer in enumerate(self.model.layers):
            before = past[index] if past else None
            if self.training and index < self.recomputed_layers:
                x, both = checkpoint(layer, x, rotation, seen, before, use_reentrant=False)
            else:
                x, both = layer(x, rotation, seen, before)
            kept.append(both)
        return self.lm_head(self.model.norm(x)), kept

    @torch.no_grad()
    def generate(self, input_ids: Tensor, max_tokens: int, end: int | None = None) -> Tensor:
        """Append the likeliest token again and again: (B, T) → (B, T + at most `max_tokens`).

        Stops early when every text of the batch has had the token `end`; the others go on.

        Raises:
            ValueError: more tokens than the decoder has positions, or no prompt.
        """
        if input_ids.shape[1] < 1 or input_ids.shape[1] + max_tokens > self.config.max_position_embeddings:
            raise ValueError(
                f"{input_ids.shape[1]} tokens and {max_tokens} more, but the decoder takes 1 to "
                f"{self.config.max_position_embeddings}"
            )
        text, new = input_ids, input_ids
        past: Cache | None = None
        ended = torch.zeros(len(text), dtype=torch.bool, device=text.device)
        for _ in range(max_tokens):
            logits, past = self(new, past)
            new = logits[:, -1:].argmax(-1)
            text = torch.cat((text, new), 1)
            if end is not None:
                ended |= new[:, 0] == end
                if ended.all():
                    break
        return text


def positions_within(documents: Tensor) -> Tensor:
    """(B, T) numbers of documents → (B, T) places within them, counted from where each begins in its row."""
    places = torch.arange(documents.shape[1], device=documents.device).expand_as(documents)
    begins = torch.zeros_like(places)
    begins[:, 1:] = torch.where(documents[:, 1:] != documents[:, :-1], places[:, 1:], 0)
    return places - begins.cummax(1).values


def angles(positions: Tensor, head_dim: int, theta: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines of positions (…, T), each (…, T, E): the E/2 frequencies twice, side by side."""
    even = torch.arange(0, head_dim, 2, device=positions.device).float()
    turns = positions.float()[..., None] * theta ** -(even / head_dim)
    turns = torch.cat((turns, turns), -1)
    return turns.cos().to(dtype), turns.sin().to(dtype)


def rotate(x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """Turn element i of each head with element i + E/2: (B, heads, T, E)."""
    first, second = x.chunk(2, -1)
    return x * cosines + torch.cat((-second, first), -1) * sines
