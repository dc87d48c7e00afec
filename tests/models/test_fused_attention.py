"""The attention with a backward pass by hand against autograd through the plain operators."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from models.backbones.swin import Swin
from models.backbones.swin_v1 import SwinV1, SwinV1Size
from models.backbones.swin_v2 import SwinV2, SwinV2Size
from models.backbones.window_attention import BiasedWindowAttention
from models.backbones.windows import KEPT_ORDERS, WindowGeometry
from tests.models.conftest import randomize

KINDS = {"v1": (SwinV1, SwinV1Size), "v2": (SwinV2, SwinV2Size)}


def build(kind: str, rule: str) -> Swin:
    cls, size = KINDS[kind]
    model = cls(
        size(8, (2, 2), (1, 2)), image_size=24, window_size=4, patch_size=2, window_rule=rule
    )  # 12 and 6 tokens a side: windows that divide and, under "pad", windows that do not
    randomize(model)
    return model.double()


def gradients(model: Swin, images: Tensor) -> list[Tensor]:
    images = images.clone().requires_grad_()
    result = model(images)
    result.square().sum().backward()
    assert images.grad is not None
    return [result.detach(), images.grad, *(parameter.grad for parameter in model.parameters())]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rule", ["pad", "shrink"])
def test_gradients_are_those_of_autograd(kind: str, rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if rule == "shrink":  # 6 tokens are no multiple of 4
        cls, size = KINDS[kind]
        models = [
            cls(size(8, (2, 2), (1, 2)), image_size=32, window_size=4, patch_size=2).double()
            for _ in range(2)
        ]
        for model in models:
            randomize(model)
    else:
        models = [build(kind, rule) for _ in range(2)]
    images = torch.randn(3, 3, models[0].image_size, models[0].image_size, dtype=torch.float64)
    found = gradients(models[0], images)
    monkeypatch.setattr(BiasedWindowAttention, "_is_fused", lambda self: False)
    for result, expected in zip(found, gradients(models[1], images), strict=True):
        assert expected.abs().max() > 0
        torch.testing.assert_close(result, expected, rtol=1e-9, atol=1e-10 * float(expected.abs().max()))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_zero_keys_of_padding_have_finite_gradients(dtype: torch.dtype) -> None:
    model = build("v2", "pad").to(dtype)
    images = torch.zeros(2, 3, 24, 24, dtype=dtype, requires_grad=True)
    with torch.no_grad():
        model.patch_embed.norm.bias.zero_()  # tokens, and with them queries and keys, of length zero
    model(images).float().square().mean().backward()
    assert images.grad is not None
    assert images.grad.isfinite().all()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_orders_are_kept_for_a_few_sizes_only() -> None:
    windows = WindowGeometry(8, 4, "pad")
    first = windows.orders(torch.empty(1, 8, 8, 6), 2, True)
    assert windows.orders(torch.empty(1, 8, 8, 6), 2, True) is first
    for batch in range(2, 20):
        windows.orders(torch.empty(batch, 8, 8, 6), 2, False)
    assert len(windows._orders) <= KEPT_ORDERS
    moved = torch.arange(3 * 8 * 8 * 2)
    assert torch.equal(moved[first.split][first.unsplit][: 3 * 8 * 8 * 2], moved)
