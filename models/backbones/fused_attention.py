"""Attention within windows for training: the plain operators' mathematics, with a backward pass by hand.

Around the small products of a window, memory traffic costs as much as the products themselves. Written out,

- shifting the map, cutting windows, splitting heads and separating q, k, v is one gather, and so is the way
  back, in both directions of time (a roll along two axes alone is two copies);
- queries and keys are normalised in place, and one tensor of the size of the logits is kept, not three.

Only training takes this way; evaluation and export use the plain operators, which a tracer understands.

Precision: q and k are normalised, multiplied and put through the softmax in fp32 whatever they come in; the
weights and the logits' gradient meet v, q and k in the type of the model.

Shape legend: B batch, H×W tokens, C channels, h heads, d = C/h, M window side, N = M·M, nW windows per image.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable


class WindowOrders(NamedTuple):
    """Where the d channels of each head of each token lie, as rows to gather; int64.

    Attributes:
        split: rows of (B, H, W, 3, h) in the order (3, B, nW, h, N).
        unsplit: the way back.
        merge: rows of (B, nW, h, N) in the order (B, H, W, h).
        unmerge: the way back.
    """

    split: Tensor
    unsplit: Tensor
    merge: Tensor
    unmerge: Tensor


def window_orders(
    batch: int, height: int, width: int, heads: int, window: int, shift: int, device: torch.device
) -> WindowOrders:
    """The orders for maps of height × width tokens, multiples of the window, rolled by ``-shift``."""
    tokens = torch.arange(height * width, device=device).view(height, width)
    tokens = tokens.roll((-shift, -shift), (0, 1))
    tokens = tokens.view(height // window, window, width // window, window).permute(0, 2, 1, 3)
    tokens = tokens.reshape(-1, 1, window**2)  # (nW, 1, N)
    image = torch.arange(batch, device=device).view(-1, 1, 1, 1)
    head = torch.arange(heads, device=device).view(-1, 1)
    part = torch.arange(3, device=device).view(-1, 1, 1, 1, 1)
    unmerge = ((image * height * width + tokens) * heads + head).flatten()
    split = (((image * height * width + tokens) * 3 + part) * heads + head).flatten()
    return WindowOrders(split, _inverse(split), _inverse(unmerge), unmerge)


def attend_windows(
    qkv: Tensor,
    scale: Tensor | None,
    bias: Tensor,
    mask: Tensor | None,
    orders: WindowOrders,
    min_norm: float,
) -> Tensor:
    """softmax(scale·cos(q, k) + bias + mask)·v in every window; without a scale, of q·k/√d.

    Args:
        qkv: (B, H, W, 3C), H and W multiples of the window.
        scale: (h, 1, 1), at least fp32.
        bias: (h, N, N), at least fp32.
        mask: (nW, 1, N, N) without gradient, or None.
        min_norm: shorter queries and keys count as the zero vector.

    Returns:
        (B, H, W, C).
    """
    apply = cast("Callable[..., Tensor]", _AttendWindows.apply)
    return apply(qkv, scale, bias, mask, orders, min_norm)


def _inverse(order: Tensor) -> Tensor:
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(order.numel(), device=order.device)
    return inverse


class _AttendWindows(Function):
    @staticmethod
    def forward(
        ctx: Any,
        qkv: Tensor,
        scale: Tensor | None,
        bias: Tensor,
        mask: Tensor | None,
        orders: WindowOrders,
        min_norm: float,
    ) -> Tensor:
        heads, tokens = bias.shape[:2]
        d = qkv.shape[-1] // (3 * heads)
        parts = qkv.reshape(-1, d).index_select(0, orders.split).view(3, -1, heads, tokens, d)
        pair, v = parts[:2].to(bias.dtype), parts[2]

        gain = None
        if scale is None:
            pair[0].mul_(d**-0.5)
        else:
            norm = torch.linalg.vector_norm(pair, dim=-1, keepdim=True)
            gain = norm.reciprocal().masked_fill_(norm < min_norm, 0.0)
            gain[0].mul_(scale)
            pair.mul_(gain)  # q·scale/‖q‖ and k/‖k‖
        q, k = pair.unbind(0)

        logits = q @ k.transpose(-2, -1)  # (B·nW, h, N, N)
        if mask is None:
            logits.add_(bias)
        else:
            logits.view(-1, mask.shape[0], *bias.shape).add_(bias + mask)
        weights = logits.softmax(dim=-1).to(v.dtype)
        ctx.save_for_backward(pair, v, gain, scale, weights)
        ctx.orders, ctx.shape, ctx.bias_dtype = orders, qkv.shape, bias.dtype
        x = (weights @ v).view(-1, d).index_select(0, orders.merge)
        return x.view(*qkv.shape[:3], heads * d)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dx: Tensor) -> tuple[Tensor | None, ...]:
        pair, v, gain, scale, weights = ctx.saved_tensors
        dx = dx.reshape(-1, v.shape[-1]).index_select(0, ctx.orders.unmerge).view(v.shape)
        gradient = torch.empty((3, *v.shape), dtype=v.dtype, device=v.device)
        torch.matmul(weights.transpose(-2, -1), dx, out=gradient[2])
        dlogits = torch._softmax_backward_data(dx @ v.transpose(-2, -1), weights, -1, weights.dtype)
        dbias = dlogits.sum(dim=0).to(ctx.bias_dtype)  # accumulated in fp32 in any case
        q, k = pair.to(v.dtype).unbind(0)
        torch.matmul(dlogits, k, out=gradient[0])
        torch.matmul(dlogits.transpose(-2, -1), q, out=gradient[1])

        dscale = None
        exact = gradient[:2].to(pair.dtype)
        if gain is None:
            exact[0].mul_(v.shape[-1] ** -0.5)
        else:
            # With u = s·x/‖x‖ and its gradient g: dx = s/‖x‖·(g − u·(u·g)/s²), and ds = Σ u·g/s; s = 1 for k.
            along = (pair * exact).sum(dim=-1, keepdim=True)
            dscale = along[0].sum(dim=(0, 2)).view_as(scale) / scale
            along[0].div_(scale * scale)
            exact.addcmul_(pair, along, value=-1.0).mul_(gain)
        if exact.dtype != gradient.dtype:
            gradient[:2].copy_(exact)
        dqkv = gradient.view(-1, v.shape[-1]).index_select(0, ctx.orders.unsplit).view(ctx.shape)
        return dqkv, dscale, dbias, None, None, None
