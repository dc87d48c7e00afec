"""The exported graph is exact for every batch size and holds position biases as constants."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import onnx
import onnxruntime
import pytest
import torch

from models import constant_position_bias
from models.backbones.interface import Backbone
from models.backbones.swin_v1 import SwinV1, SwinV1Size
from models.backbones.swin_v2 import SwinV2, SwinV2Size
from models.backbones.vit import DeiT, DeiTSize, ViT, ViTSize
from models.classification import Classifier
from tests.models.conftest import randomize

SMALL = SwinV2Size(16, (2, 1), (2, 4))
CASES = {"shrink": (32, "shrink"), "pad": (36, "pad")}
OTHERS: dict[str, Callable[[], Backbone]] = {
    "swin_v1": lambda: SwinV1(SwinV1Size(16, (2,), (2,)), image_size=36, window_size=4, window_rule="pad"),
    "swin_v2-chunks": lambda: SwinV2(
        SwinV2Size(16, (2,), (2,)), image_size=32, window_size=4, attention_chunk=3
    ),
    "vit": lambda: ViT(ViTSize(16, 1, 2), image_size=16, patch_size=4),
    "deit": lambda: DeiT(DeiTSize(16, 1, 2), image_size=16, patch_size=4),
}


def classifier(case: str) -> Classifier:
    image, rule = CASES[case]
    backbone = SwinV2(SMALL, image_size=image, window_size=4, window_rule=rule)  # type: ignore[arg-type]
    model = Classifier(backbone, num_classes=5).eval()
    randomize(model)
    return model


def test_torch_export_is_exact_for_any_batch() -> None:
    model = classifier("shrink")
    batch = torch.export.Dim("batch", min=1, max=64)
    with torch.no_grad():  # where the cache is in use: tracing must neither fill nor read it
        program = torch.export.export(model, (torch.randn(2, 3, 32, 32),), dynamic_shapes=({0: batch},))
        for size in (1, 3):
            images = torch.randn(size, 3, 32, 32)
            torch.testing.assert_close(program.module()(images), model(images), atol=1e-6, rtol=0)


@pytest.mark.parametrize("case", CASES)
def test_onnx_is_exact_for_any_batch(case: str, tmp_path: Path) -> None:
    model = classifier(case)
    side = model.backbone.image_size
    with torch.no_grad():
        model(torch.randn(1, 3, side, side))  # a filled cache must not leak into the graph
    for attention in (block.attn for stage in model.backbone.layers for block in stage.blocks):
        attention.cpb_mlp[2].weight.data.mul_(-1)  # unseen by the cache; the context must compute anew
    path = tmp_path / "model.onnx"
    export(model, path, batch=2)
    graph = onnx.load(path).graph
    assert not [n for n in graph.node if n.op_type == "Sigmoid"]  # only the bias networks have one
    model.train().eval()
    assert_equal_for_any_batch(path, model)


@pytest.mark.parametrize("name", OTHERS)
def test_onnx_of_other_backbones_is_exact_for_any_batch(name: str, tmp_path: Path) -> None:
    model = Classifier(OTHERS[name](), num_classes=5).eval()
    randomize(model)
    export(model, tmp_path / "model.onnx", batch=1)
    assert_equal_for_any_batch(tmp_path / "model.onnx", model)


def export(model: Classifier, path: Path, batch: int) -> None:
    side = model.backbone.image_size
    with constant_position_bias(model):
        torch.onnx.export(
            model,
            (torch.randn(batch, 3, side, side),),
            path,
            dynamo=True,
            dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=64)},),
            input_names=["images"],
            output_names=["logits"],
            opset_version=20,
            verbose=False,
        )


@torch.no_grad()
def assert_equal_for_any_batch(path: Path, model: Classifier) -> None:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for size in (1, 2, 3):
        images = torch.randn(size, 3, model.backbone.image_size, model.backbone.image_size)
        logits = torch.from_numpy(session.run(None, {"images": images.numpy()})[0])
        expected = model(images)
        assert expected.std() > 0.01
        torch.testing.assert_close(logits, expected, atol=1e-5, rtol=0)


def test_constant_bias_ends_with_the_context() -> None:
    model = classifier("shrink")
    attention = model.backbone.layers[0].blocks[0].attn
    with constant_position_bias(model):
        assert attention.constant_bias is not None
    assert attention.constant_bias is None


def test_constant_bias_ends_with_an_error() -> None:
    model = classifier("shrink")
    with pytest.raises(ValueError, match="48x48"), constant_position_bias(model):
        model(torch.randn(1, 3, 48, 48))
    assert model.backbone.layers[0].blocks[0].attn.constant_bias is None
