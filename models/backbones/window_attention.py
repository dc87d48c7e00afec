"""Scaled cosine attention within windows, with a continuous position bias (arXiv 2111.09883, section 3.3).

Cutting windows, splitting heads and separating q, k, v is one permutation. The part between the projections
runs in fp32 whatever the type of the weights or of autocast. Keys have no bias, so the key of a padded token
is exactly zero: its cosine with everything is defined as 0, and so is its gradient, where a plain
normalisation overflows in fp16.

Matrix products with a softmax between them are faster here than ``F.scaled_dot_product_attention``: in
training the bias needs a gradient, which on the CPU excludes the fused kernel.

Shape legend: B batch, H×W tokens, C channels, h heads, d = C/h, M window side, N = M·M, nW windows per image.
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.backbones.fused_attention import attend_windows
from models.backbones.position_bias import BiasCache
from models.backbones.windows import WindowGeometry

MAX_LOGIT_SCALE = math.log(100.0)  # temperatures stay above 0.01
# Queries and keys shorter than this count as the zero vector. It bounds the gain of the normalisation's
# gradient to 2e4, inside the range of fp16.
MIN_NORM = 5e-5


class WindowAttention(nn.Module):
    """Attention of one block; the geometry of the windows comes from the stage."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(dim))
        self.v_bias = nn.Parameter(torch.zeros(dim))
        self.logit_scale = nn.Parameter(torch.full((num_heads, 1, 1), math.log(10.0)))
        self.cpb_mlp = nn.Sequential(nn.Linear(2, 512), nn.ReLU(), nn.Linear(512, num_heads, bias=False))
        self.proj = nn.Linear(dim, dim)
        self._bias_cache = BiasCache()
        self.constant_bias: Tensor | None  # set by constant_position_bias for the time of an export
        self.register_buffer("constant_bias", None, persistent=False)

    def forward(self, x: Tensor, windows: WindowGeometry, shift_mask: Tensor | None) -> Tensor:
        """(B, H, W, C) → (B, H, W, C); ``shift_mask`` (nW, 1, N, N) marks a shifted block."""
        height, width, dim = x.shape[1:]
        pad_rows, pad_columns = windows.padding(height, width)
        if pad_rows or pad_columns:
            x = F.pad(x, (0, 0, 0, pad_columns, 0, pad_rows))
        # Keys have no bias; it would not cancel in the softmax of cosines.
        qkv_bias = torch.cat((self.q_bias, torch.zeros_like(self.q_bias), self.v_bias))
        if torch.is_grad_enabled() and not _is_traced():
            qkv = F.linear(x, self.qkv.weight, qkv_bias)
            x = self._attend_fused(qkv, windows, shift_mask)
        else:
            x = self._attend(x, qkv_bias, windows, shift_mask)
        if pad_rows or pad_columns:
            x = x[:, :height, :width]
        return cast(Tensor, self.proj(x))

    def _attend_fused(self, qkv: Tensor, windows: WindowGeometry, shift_mask: Tensor | None) -> Tensor:
        orders = windows.orders(qkv, self.num_heads, shift_mask is not None)
        with _without_autocast(qkv):
            scale = self.logit_scale.to(_at_least_fp32(qkv.dtype)).clamp(max=MAX_LOGIT_SCALE).exp()
            return attend_windows(qkv, scale, self.position_bias(windows), shift_mask, orders, MIN_NORM)

    def _attend(
        self, x: Tensor, qkv_bias: Tensor, windows: WindowGeometry, shift_mask: Tensor | None
    ) -> Tensor:
        shift = windows.shift if shift_mask is not None else 0
        if shift:
            x = torch.roll(x, (-shift, -shift), (1, 2))
        dim = x.shape[-1]
        M, h, d = windows.window, self.num_heads, dim // self.num_heads
        rows, columns = x.shape[1] // M, x.shape[2] // M
        qkv = F.linear(x, self.qkv.weight, qkv_bias)
        qkv = qkv.reshape(-1, rows, M, columns, M, 3, h, d).permute(5, 0, 1, 3, 6, 2, 4, 7)
        q, k, v = qkv.reshape(3, -1, h, M * M, d).unbind(0)  # each (B·nW, h, N, d)

        with _without_autocast(x):
            exact = _at_least_fp32(x.dtype)
            q, k = q.to(exact), k.to(exact)
            scale = self.logit_scale.to(exact).clamp(max=MAX_LOGIT_SCALE).exp()
            q = q * (_inverse_norm(q) * scale)
            k = k * _inverse_norm(k)
            bias = self.position_bias(windows)  # (h, N, N)
            logits = q @ k.transpose(-2, -1)  # (B·nW, h, N, N)
            if shift_mask is None:
                logits = logits + bias
            else:
                logits = logits.reshape(-1, rows * columns, h, M * M, M * M) + (bias + shift_mask)
                logits = logits.reshape(-1, h, M * M, M * M)
            weights = logits.softmax(dim=-1)
        x = weights.to(v.dtype) @ v

        x = x.reshape(-1, rows, columns, h, M, M, d).permute(0, 1, 4, 2, 5, 3, 6)
        x = x.reshape(-1, rows * M, columns * M, dim)
        return torch.roll(x, (shift, shift), (1, 2)) if shift else x

    def position_bias(self, windows: WindowGeometry) -> Tensor:
        """(h, N, N), at least fp32. It depends on weights alone, so evaluation computes it once."""
        if self.constant_bias is not None:
            return self.constant_bias
        weights = tuple(self.cpb_mlp.parameters())
        differentiable = torch.is_grad_enabled() and any(w.requires_grad for w in weights)
        if self.training or differentiable or torch.compiler.is_compiling():
            return self.compute_position_bias(windows)
        return self._bias_cache.get(weights, windows, lambda: self.compute_position_bias(windows))

    def compute_position_bias(self, windows: WindowGeometry) -> Tensor:
        """As ``position_bias``, from the weights as they are now."""
        first, last = cast(nn.Linear, self.cpb_mlp[0]), cast(nn.Linear, self.cpb_mlp[2])
        exact = _at_least_fp32(first.weight.dtype)
        with _without_autocast(first.weight):
            hidden = F.linear(windows.relative_coords.to(exact), first.weight.to(exact), first.bias.to(exact))
            table = 16.0 * torch.sigmoid(F.linear(F.relu(hidden), last.weight.to(exact)))  # ((2M-1)², h)
        # A look-up by embedding: unlike that of indexing, its backward is both fast and deterministic.
        tokens = windows.window**2
        pairs = F.embedding(windows.relative_index, table)  # (N·N, h)
        return pairs.t().reshape(self.num_heads, tokens, tokens)

    def train(self, mode: bool = True) -> WindowAttention:
        self._bias_cache.clear()
        return super().train(mode)


def _inverse_norm(x: Tensor) -> Tensor:
    """1/‖x‖ along the last axis (kept), 0 where ‖x‖ < MIN_NORM: value and gradient are finite everywhere."""
    square = (x * x).sum(dim=-1, keepdim=True)
    is_zero = square < MIN_NORM**2
    return torch.rsqrt(square.masked_fill(is_zero, 1.0)).masked_fill(is_zero, 0.0)


def _is_traced() -> bool:
    return torch.compiler.is_compiling() or torch.jit.is_tracing()


def _at_least_fp32(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _without_autocast(x: Tensor) -> AbstractContextManager[object]:
    device = x.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return torch.autocast(device, enabled=False)
    return nullcontext()
