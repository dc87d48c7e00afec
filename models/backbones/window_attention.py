"""Attention within windows (arXiv 2103.14030), and the scaled cosine one with a continuous position bias of
Swin V2 (arXiv 2111.09883, section 3.3).

Cutting windows, splitting heads and separating q, k, v is one permutation. The part between the projections
runs in fp32 whatever the type of the weights or of autocast. Keys of V2 have no bias, so the key of a padded
token is exactly zero: its cosine with everything is defined as 0, and so is its gradient, where a plain
normalisation overflows in fp16.

Matrix products with a softmax between them are faster here than ``F.scaled_dot_product_attention``: in
training the bias needs a gradient, which on the CPU excludes the fused kernel. Where gradients are needed,
``fused_attention.py`` does the same with fewer copies.

Shape legend: B batch, H×W tokens, C channels, h heads, d = C/h, M window side, N = M·M, nW windows per image.
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from typing import Self, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from models.backbones.fused_attention import attend_windows
from models.backbones.position_bias import BiasCache
from models.backbones.windows import WindowGeometry

MAX_LOGIT_SCALE = math.log(100.0)  # temperatures stay above 0.01
# Queries and keys shorter than this count as the zero vector. It bounds the gain of the normalisation's
# gradient to 2e4, inside the range of fp16.
MIN_NORM = 5e-5


class BiasedWindowAttention(nn.Module):
    """Attention of one block within windows; the geometry of the windows comes from the stage.

    The two kinds below (V2) and in ``swin_v1.py`` own the weights and say what the logits are made of.
    """

    qkv: nn.Linear
    proj: nn.Linear
    constant_bias: Tensor | None  # set by constant_position_bias for the time of an export

    def __init__(self, num_heads: int, attention_chunk: int = 0) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.attention_chunk = attention_chunk
        self._bias_cache = BiasCache()
        self.register_buffer("constant_bias", None, persistent=False)

    def qkv_bias(self) -> Tensor:
        """(3C,), added to the queries, keys and values."""
        raise NotImplementedError

    def scale_queries_and_keys(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Both (B·nW, h, N, d), at least fp32 → what the logits are the products of."""
        raise NotImplementedError

    def cosine_scale(self, dtype: torch.dtype) -> Tensor | None:
        """(h, 1, 1), what cosines are multiplied by; None: the logits are plain products over √d."""
        return None

    def bias_weights(self) -> tuple[Tensor, ...]:
        """The parameters that the position bias depends on, and nothing else."""
        raise NotImplementedError

    def bias_table(self, windows: WindowGeometry) -> Tensor:
        """((2M-1)², h), the bias of each relative position."""
        raise NotImplementedError

    def forward(self, x: Tensor, windows: WindowGeometry, shift_mask: Tensor | None) -> Tensor:
        """(B, H, W, C) → (B, H, W, C); ``shift_mask`` (nW, 1, N, N) marks a shifted block."""
        height, width = x.shape[1:3]
        pad_rows, pad_columns = windows.padding(height, width)
        if pad_rows or pad_columns:
            x = F.pad(x, (0, 0, 0, pad_columns, 0, pad_rows))
        if self._is_fused():
            x = self._attend_fused(x, windows, shift_mask)
        else:
            x = self._attend_plainly(x, windows, shift_mask)
        if pad_rows or pad_columns:
            x = x[:, :height, :width]
        return cast(Tensor, self.proj(x))

    def _is_fused(self) -> bool:
        """Whether gradients are needed: then the written-out backward pass is worth its while."""
        return torch.is_grad_enabled() and not self.attention_chunk and not _is_traced()

    def _attend_fused(self, x: Tensor, windows: WindowGeometry, shift_mask: Tensor | None) -> Tensor:
        qkv = F.linear(x, self.qkv.weight, self.qkv_bias())
        orders = windows.orders(qkv, self.num_heads, shift_mask is not None)
        with _without_autocast(qkv):
            scale = self.cosine_scale(_at_least_fp32(qkv.dtype))
            return attend_windows(qkv, scale, self.position_bias(windows), shift_mask, orders, MIN_NORM)

    def _attend_plainly(self, x: Tensor, windows: WindowGeometry, shift_mask: Tensor | None) -> Tensor:
        shift = windows.shift if shift_mask is not None else 0
        if shift:
            x = torch.roll(x, (-shift, -shift), (1, 2))
        height, width, dim = x.shape[1:]
        M, h, d = windows.window, self.num_heads, dim // self.num_heads
        rows, columns = height // M, width // M
        qkv = F.linear(x, self.qkv.weight, self.qkv_bias())
        qkv = qkv.reshape(-1, rows, M, columns, M, 3, h, d).permute(5, 0, 1, 3, 6, 2, 4, 7)
        q, k, v = qkv.reshape(3, -1, h, M * M, d).unbind(0)  # each (B·nW, h, N, d)

        with _without_autocast(x):
            exact = _at_least_fp32(x.dtype)
            q, k = self.scale_queries_and_keys(q.to(exact), k.to(exact))
            bias = self.position_bias(windows)  # (h, N, N)
        if self.attention_chunk and not _is_traced():
            x = _attend_in_chunks(q, k, v, bias, shift_mask, self.attention_chunk)
        else:
            x = _attend(q, k, v, bias, shift_mask)

        x = x.reshape(-1, rows, columns, h, M, M, d).permute(0, 1, 4, 2, 5, 3, 6)
        x = x.reshape(-1, rows * M, columns * M, dim)
        return torch.roll(x, (shift, shift), (1, 2)) if shift else x

    def position_bias(self, windows: WindowGeometry) -> Tensor:
        """(h, N, N), at least fp32. It depends on weights alone, so evaluation computes it once."""
        if self.constant_bias is not None:
            return self.constant_bias
        weights = self.bias_weights()
        differentiable = torch.is_grad_enabled() and any(w.requires_grad for w in weights)
        if self.training or differentiable or torch.compiler.is_compiling():
            return self.compute_position_bias(windows)
        return self._bias_cache.get(weights, windows, lambda: self.compute_position_bias(windows))

    def compute_position_bias(self, windows: WindowGeometry) -> Tensor:
        """As ``position_bias``, from the weights as they are now."""
        table = self.bias_table(windows)
        # A look-up by embedding: unlike that of indexing, its backward is both fast and deterministic.
        tokens = windows.window**2
        pairs = F.embedding(windows.relative_index, table.to(_at_least_fp32(table.dtype)))  # (N·N, h)
        return pairs.t().reshape(self.num_heads, tokens, tokens)

    def train(self, mode: bool = True) -> Self:
        self._bias_cache.clear()
        return super().train(mode)


class WindowAttention(BiasedWindowAttention):
    """Scaled cosine attention with the continuous position bias of Swin V2."""

    def __init__(self, dim: int, num_heads: int, attention_chunk: int = 0) -> None:
        super().__init__(num_heads, attention_chunk)
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(dim))
        self.v_bias = nn.Parameter(torch.zeros(dim))
        self.logit_scale = nn.Parameter(torch.full((num_heads, 1, 1), math.log(10.0)))
        self.cpb_mlp = nn.Sequential(nn.Linear(2, 512), nn.ReLU(), nn.Linear(512, num_heads, bias=False))
        self.proj = nn.Linear(dim, dim)

    def qkv_bias(self) -> Tensor:
        # Keys have no bias; it would not cancel in the softmax of cosines.
        return torch.cat((self.q_bias, torch.zeros_like(self.q_bias), self.v_bias))

    def scale_queries_and_keys(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        return q * (_inverse_norm(q) * self.cosine_scale(q.dtype)), k * _inverse_norm(k)

    def cosine_scale(self, dtype: torch.dtype) -> Tensor:
        return self.logit_scale.to(dtype).clamp(max=MAX_LOGIT_SCALE).exp()

    def bias_weights(self) -> tuple[Tensor, ...]:
        return tuple(self.cpb_mlp.parameters())

    def bias_table(self, windows: WindowGeometry) -> Tensor:
        first, last = cast(nn.Linear, self.cpb_mlp[0]), cast(nn.Linear, self.cpb_mlp[2])
        exact = _at_least_fp32(first.weight.dtype)
        with _without_autocast(first.weight):
            hidden = F.linear(windows.relative_coords.to(exact), first.weight.to(exact), first.bias.to(exact))
            return 16.0 * torch.sigmoid(F.linear(F.relu(hidden), last.weight.to(exact)))


def _attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, shift_mask: Tensor | None) -> Tensor:
    """Softmax of q·kᵀ + bias, times v, for all windows (…, h, N, d); masks repeat over the images."""
    with _without_autocast(q):
        logits = q @ k.transpose(-2, -1)  # (B·nW, h, N, N)
        if shift_mask is None:
            logits = logits + bias
        else:
            shape = logits.shape[1:]
            logits = (logits.reshape(-1, shift_mask.shape[0], *shape) + (bias + shift_mask)).reshape(
                -1, *shape
            )
        weights = logits.softmax(dim=-1)
    return weights.to(v.dtype) @ v


def _attend_in_chunks(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor, shift_mask: Tensor | None, chunk: int
) -> Tensor:
    """As ``_attend``, a chunk of windows after the other (arXiv 2111.09883, section 3.4).

    The backward pass computes the logits of a chunk again: kept, those of all chunks would take what the
    chunks are there to save.
    """
    results = []
    for start in range(0, q.shape[0], chunk):
        part = slice(start, start + chunk)
        mask = None
        if shift_mask is not None:
            windows = torch.arange(start, min(start + chunk, q.shape[0]), device=q.device)
            mask = shift_mask[windows % shift_mask.shape[0]]
        arguments = (q[part], k[part], v[part], bias, mask)
        if torch.is_grad_enabled():
            result = checkpoint(_attend, *arguments, use_reentrant=False, preserve_rng_state=False)
        else:
            result = _attend(*arguments)
        results.append(result)
    return torch.cat(results)


def _inverse_norm(x: Tensor) -> Tensor:
    """1/‖x‖ along the last axis (kept), 0 where ‖x‖ < MIN_NORM: value and gradient are finite everywhere.

    A traced graph has no gradients to bound and takes 1/MIN_NORM there: times x it is 0 for the zero vector
    too, and the comparisons would cost ONNX Runtime 6 % (fp32) to 10 % (int8) of its time.
    """
    square = (x * x).sum(dim=-1, keepdim=True)
    if _is_traced():
        return torch.rsqrt(square.clamp(min=MIN_NORM**2))
    is_zero = square < MIN_NORM**2
    return torch.rsqrt(square.masked_fill(is_zero, 1.0)).masked_fill(is_zero, 0.0)


def _is_traced() -> bool:
    """A traced graph must not depend on how many windows its example had."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing()  # type: ignore[attr-defined,no-untyped-call]


def _at_least_fp32(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _without_autocast(x: Tensor) -> AbstractContextManager[object]:
    device = x.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return torch.autocast(device, enabled=False)
    return nullcontext()
