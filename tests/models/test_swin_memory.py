"""What saves memory changes no result: checkpointing per stage and attention in chunks of windows."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

from models.backbones import swin, window_attention
from models.backbones.swin import Swin
from models.backbones.swin_v1 import SwinV1, SwinV1Size
from models.backbones.swin_v2 import SwinV2, SwinV2Size
from tests.models.conftest import randomize

KINDS = {"v1": (SwinV1, SwinV1Size), "v2": (SwinV2, SwinV2Size)}


def build(kind: str, **arguments: object) -> Swin:
    cls, size = KINDS[kind]
    settings: dict[str, object] = {"image_size": 16, "window_size": 2, "patch_size": 2, **arguments}
    model = cls(size(16, (2, 2, 1), (1, 2, 4)), **settings)  # type: ignore[arg-type]
    randomize(model)
    return model


def step(model: Swin) -> list[Tensor]:
    """Loss and gradients of one training step, drop path included."""
    torch.manual_seed(3)
    images = torch.randn(3, 3, 16, 16)
    loss = model.train()(images).square().sum()
    loss.backward()
    return [loss.detach(), *(parameter.grad for parameter in model.parameters())]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("choice", "flags"),
    [
        (True, [True, True, True]),
        (False, [False, False, False]),
        (2, [True, True, False]),
        (0, [False, False, False]),
        ((False, True, False), [False, True, False]),
    ],
)
def test_stages_that_are_recomputed(
    kind: str, choice: bool | int | Sequence[bool], flags: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    recomputed: list[nn.Module] = []
    original = swin.checkpoint

    def watched(block: nn.Module, *arguments: object, **options: object) -> object:
        recomputed.append(block)
        return original(block, *arguments, **options)

    monkeypatch.setattr(swin, "checkpoint", watched)
    model = build(kind, activation_checkpointing=choice, drop_path=0.5)
    expected = step(build(kind, drop_path=0.5))
    assert all(torch.equal(a, b) for a, b in zip(step(model), expected, strict=True))
    assert [any(block in recomputed for block in stage.blocks) for stage in model.layers] == flags


@pytest.mark.parametrize(("choice", "message"), [(4, "is 4, but there are 3"), ((True,), "has 1 entries")])
def test_wrong_number_of_stages(choice: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build("v2", activation_checkpointing=choice)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rule", ["shrink", "pad"])
@pytest.mark.parametrize("chunk", [3, 7, 1000])  # one image has 16 and 4 windows in the first stages
def test_chunks_equal_the_whole(kind: str, rule: str, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    largest: list[int] = []
    original = window_attention._attend

    def watched(q: Tensor, *arguments: Tensor) -> Tensor:
        largest.append(q.shape[0])
        return original(q, *arguments)

    expected = step(build(kind, window_rule=rule))
    monkeypatch.setattr(window_attention, "_attend", watched)
    model = build(kind, window_rule=rule, attention_chunk=chunk)
    for result, reference in zip(step(model), expected, strict=True):
        torch.testing.assert_close(result, reference, rtol=1e-4, atol=1e-5 * float(reference.abs().max()))
    assert max(largest) == min(chunk, 3 * 16)  # the last stage, never cut, goes through fused_attention.py
    model.eval()
    with torch.no_grad():
        images = torch.randn(2, 3, 16, 16)
        whole = build(kind, window_rule=rule).eval()
        torch.testing.assert_close(model(images), whole(images), rtol=1e-5, atol=1e-5)


def test_chunks_hold_in_half_precision_and_under_checkpointing() -> None:
    plain = build("v2", activation_checkpointing=True)
    chunked = build("v2", activation_checkpointing=2, attention_chunk=5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for result, reference in zip(step(chunked), step(plain), strict=True):
            scale = float(reference.float().abs().max())
            # A logit scale's gradient, (h, 1, 1), is a sum that nearly cancels: in bf16 both ways are off
            # from fp32 by a third of it.
            tolerance = 0.05 if reference.ndim != 3 else 0.6
            torch.testing.assert_close(result, reference, rtol=tolerance, atol=tolerance * scale)


def test_chunks_keep_no_logits_for_the_backward_pass() -> None:
    def logits_kept(chunk: int) -> set[int]:
        kept: set[int] = set()

        def pack(tensor: Tensor) -> Tensor:
            if (
                tensor.ndim == 4
                and tensor.shape[-2:] == (64, 64)
                and tensor.sum() > 0.9 * tensor[..., 0].numel()
            ):
                kept.add(tensor.shape[1])  # heads, which tell the stages apart
            return tensor

        model = build("v2", image_size=64, window_size=8, attention_chunk=chunk).train()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model(torch.randn(2, 3, 64, 64))
        return kept

    assert logits_kept(0) == {1, 2, 4}
    assert logits_kept(4) == {4}  # the last stage is never cut


def test_a_negative_chunk_is_refused() -> None:
    with pytest.raises(ValueError, match="attention_chunk is -1"):
        build("v1", attention_chunk=-1)
