"""Models of llama2.c (version 0) and their tokenizers: bytes → what `Decoder` and its peers understand.

A checkpoint is 7 int32 and then float32 matrices in a fixed order; nothing in it says what it is, so every
size is checked against the number of bytes. Its rotary embeddings turn neighbouring elements (2i, 2i+1) of a
head; ours turn halves, so the rows of wq and wk are put in that order, which leaves every product q·k as it
was.

A tokenizer is a list of tokens with scores. Encoding joins the neighbouring pair with the highest score again
and again, which is what byte-pair encoding does with its merges in the order of the scores.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass

import torch
from torch import Tensor

from models.language.decoder import DecoderConfig

HEADER = struct.Struct("<7i")
LARGEST = 1 << 24
"""Of any size in the header: above it a file is something else, or damaged."""
RMS_NORM_EPS = 1e-5
UNKNOWN, BEGIN, END = 0, 1, 2
BYTES = range(3, 259)
"""Tokens that stand for one byte each."""
SPACE = "\u2581"  # how the published tokenizer formats write a space inside a token


class Llama2cError(ValueError):
    """A file is not what it should be; one sentence without its name."""


def read_checkpoint(content: bytes | memoryview) -> tuple[DecoderConfig, dict[str, Tensor]]:
    """Sizes and weights, under the names of `Decoder`. A tied output matrix is left out.

    Raises:
        Llama2cError: truncated, too long, or with a header that makes no sense.
    """
    if len(content) < HEADER.size:
        raise Llama2cError(f"has {len(content)} bytes, its header alone has {HEADER.size}")
    dim, hidden, layers, heads, kv_heads, vocabulary, length = HEADER.unpack_from(content)
    tied, vocabulary = vocabulary > 0, abs(vocabulary)
    sizes = {"dim": dim, "hidden_dim": hidden, "n_layers": layers, "n_heads": heads, "n_kv_heads": kv_heads,
             "vocab_size": vocabulary, "max_seq_len": length}  # fmt: skip
    for name, size in sizes.items():
        if not 1 <= size <= LARGEST:
            raise Llama2cError(f"has the header of no llama2.c model (version 0): {name} is {size}")
    if dim % heads or heads % kv_heads or (dim // heads) % 2:
        raise Llama2cError(
            f"has an impossible header: {dim} dimensions, {heads} heads, {kv_heads} heads for keys and values"
        )
    head = dim // heads
    shapes: dict[str, tuple[int, ...]] = {
        "embedding": (vocabulary, dim),
        "attention_norm": (layers, dim),
        "wq": (layers, dim, dim),
        "wk": (layers, kv_heads * head, dim),
        "wv": (layers, kv_heads * head, dim),
        "wo": (layers, dim, dim),
        "ffn_norm": (layers, dim),
        "w1": (layers, hidden, dim),
        "w2": (layers, dim, hidden),
        "w3": (layers, hidden, dim),
        "norm": (dim,),
        "cosines": (length, head // 2),
        "sines": (length, head // 2),
    }
    if not tied:
        shapes["output"] = (vocabulary, dim)
    expected = HEADER.size + 4 * sum(map(math.prod, shapes.values()))
    if len(content) != expected:
        what = "is truncated" if len(content) < expected else "is too long"
        raise Llama2cError(f"{what}: {len(content)} bytes, by its header it has {expected}")
    found = _split(content, shapes)
    config = DecoderConfig(
        vocab_size=vocabulary,
        hidden_size=dim,
        intermediate_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head,
        max_position_embeddings=length,
        rms_norm_eps=RMS_NORM_EPS,
        tie_word_embeddings=tied,
    )
    return config, _name(found, layers, head)


def _split(content: bytes | memoryview, shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    numbers = torch.frombuffer(bytearray(content[HEADER.size :]), dtype=torch.float32)
    found: dict[str, Tensor] = {}
    start = 0
    for name, shape in shapes.items():
        count = math.prod(shape)
        found[name] = numbers[start : start + count].view(shape)
        start += count
        if not found[name].isfinite().all():
            raise Llama2cError(f"holds numbers in {name} that are not finite")
    return found


def _name(found: dict[str, Tensor], layers: int, head: int) -> dict[str, Tensor]:
    named = {"model.embed_tokens.weight": found["embedding"], "model.norm.weight": found["norm"]}
    if "output" in found:
        named["lm_head.weight"] = found["output"]
    for layer in range(layers):
        parts = {
            "input_layernorm": found["attention_norm"][layer],
            "self_attn.q_proj": halves_from_pairs(found["wq"][layer], head),
            "self_attn.k_proj": halves_from_pairs(found["wk"][layer], head),
            "self_attn.v_proj": found["wv"][layer],
            "self_attn.o_proj": found["wo"][layer],
            "post_attention_layernorm": found["ffn_norm"][layer],
            "mlp.gate_proj": found["w1"][layer],
            "mlp.down_proj": found["w2"][layer],
            "mlp.up_proj": found["w3"][layer],
        }
        named |= {f"model.layers.{layer}.{name}.weight": tensor for name, tensor in parts.items()}
    return {name: tensor.clone() for name, tensor in named.items()}


def halves_from_pairs(weight: Tensor, head: int) -> Tensor:
    """Rows (2i, 2i+1) of every head → rows (i, i + head/2): (heads·head, in), as it was otherwise."""
    return weight.view(-1, head // 2, 2, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


# --- tokenizer --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Vocabulary:
    """Tokens by id, each with the score of being made by a merge."""

    tokens: tuple[str, ...]  # spaces as `SPACE`
    scores: tuple[float, ...]

    def merges(self) -> list[tuple[str, str]]:
        """Every pair that makes a token, the one with the highest score first; of the pairs of one token the
        one whose parts have the lower ids."""
        ids = {token: number for number, token in enumerate(self.tokens) if number > BYTES[-1]}
        found = []
        for token, number in ids.items():
            for cut in range(1, len(token)):
                left, right = ids.get(token[:cut]), ids.get(token[cut:])
                if left is not None and right is not None:
                    found.append((-self.scores[number], number, left, right))
        return [(self.tokens[left], self.tokens[right]) for _, _, left, right in sorted(found)]


def read_tokenizer(content: bytes | memoryview, size: int) -> Vocabulary:
    """The `size` tokens of a tokenizer file.

    Raises:
        Llama2cError: truncated, of another size, or not a tokenizer with bytes as tokens 3 to 258.
    """
    if size <= BYTES[-1]:
        raise Llama2cError(
            f"cannot belong to a model of {size} tokens: bytes and marks alone are {BYTES[-1] + 1}"
        )
    if len(content) < 4:
        raise Llama2cError("is truncated: it has no header")
    (longest,) = struct.unpack_from("<i", content)
    tokens: list[str] = []
    scores: list[float] = []
    at = 4
    while at < len(content):
        if len(tokens) == size:
            raise Llama2cError(f"has more than the model's {size} tokens; it belongs to another model")
        if at + 8 > len(content):
            raise Llama2cError(f"is truncated in token {len(tokens)}")
        score, length = struct.unpack_from("<fi", content, at)
        at += 8
        if not math.isfinite(score) or not 0 <= length <= max(longest, 16) or at + length > len(content):
            raise Llama2cError(f"is truncated or damaged in token {len(tokens)} (length {length})")
        try:
            token = bytes(content[at : at + length]).decode()
        except UnicodeDecodeError:
            raise Llama2cError(f"has a token {len(tokens)} that is not UTF-8") from None
        at += length
        tokens.append(token.replace(" ", SPACE))
        scores.append(score)
    if len(tokens) < size:
        raise Llama2cError(
            f"has {len(tokens)} tokens, the model {size}; it belongs to another model or is truncated"
        )
    for number in BYTES:
        if tokens[number] != f"<0x{number - BYTES[0]:02X}>":
            raise Llama2cError(f"has {tokens[number]!r} as token {number}, where the byte should be")
    tokens[: BYTES[0]] = ["<unk>", "<s>", "</s>"]
    if len(set(tokens)) < len(tokens):
        raise Llama2cError("has the same token twice")
    return Vocabulary(tuple(tokens), tuple(scores))
