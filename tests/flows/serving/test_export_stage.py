"""The export stage: equal weights give equal bytes, and the file says how to feed it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from serving_workspace import BLOCKS, ROOT, Exported, inside
from torch import nn

from flows import exporting, files, paths
from flows.errors import DataError
from flows.exporting import export_onnx, write_onnx
from flows.serving.comparison import accuracy
from flows.serving.package import describe_variant, load_onnx, read_metadata
from flows.serving.quantization import quantize
from flows.serving.session import CPU, open_session
from flows.stage import Stage
from flows.stages import export


class SmallNet(nn.Module):
    """Two products with weights and one without, as in attention."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3 * 8 * 8, 32)
        self.second = nn.Linear(32, 4)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.first(images.reshape(-1, 1, 3 * 8 * 8)))
        x = x.transpose(1, 2) @ x @ x.transpose(1, 2) * 1e-3
        return self.second(x.squeeze(2))


def test_a_second_run_elsewhere_gives_the_same_bytes(workspace: Path, exported: Exported) -> None:
    """Another process, folder and hash seed."""
    command = "import serving_workspace; from flows.stages.export import main; raise SystemExit(main())"
    environment = {
        **os.environ,
        "PYTHONPATH": f"{ROOT}{os.pathsep}{Path(__file__).parents[1]}",
        "PYTHONHASHSEED": "7",
    }
    answer = subprocess.run([sys.executable, "-c", command], env=environment, capture_output=True, text=True)
    assert answer.returncode == 0, answer.stderr
    assert "exported trunkline-vision-digits" in answer.stdout
    for name in ("model.onnx", "model_int8.onnx", "manifest.json"):
        again, first = workspace / paths.EXPORT / name, exported.root / paths.EXPORT / name
        assert again.read_bytes() == first.read_bytes(), name


def test_nothing_of_the_machine_is_left_in_the_files(exported: Exported) -> None:
    for name in ("model.onnx", "model_int8.onnx", "manifest.json"):
        data = (exported.root / paths.EXPORT / name).read_bytes()
        for trace in (str(exported.root), str(ROOT), "site-packages", 'File "', "aten."):
            assert trace.encode() not in data, (name, trace)


def test_the_graph_is_as_promised(exported: Exported) -> None:
    manifest = exported.package.manifest
    for variant in ("fp32", "int8"):
        path = exported.package.path(variant)
        onnx.checker.check_model(path, full_check=True)
        model = load_onnx(path)
        dimensions = model.graph.input[0].type.tensor_type.shape.dim
        assert [entry.version for entry in model.opset_import if entry.domain == ""] == [manifest.opset]
        assert [value.name for value in model.graph.input] == ["images"]
        outputs = {value.name: value.type.tensor_type.shape.dim[-1].dim_value for value in model.graph.output}
        assert outputs == {spec.name: spec.shape[1] for spec in manifest.outputs}
        assert list(outputs) == ["logits", "features"]
        assert dimensions[0].dim_param == "batch"
        assert [entry.dim_value for entry in dimensions[1:]] == [3, 16, 16]
        assert read_metadata(model) == (manifest.preprocessing, manifest.labels)


def test_int8_is_smaller_and_answers_like_fp32(exported: Exported) -> None:
    fp32, int8 = (open_session(exported.package.path(name), [CPU], 1) for name in ("fp32", "int8"))
    reference, quantized = fp32.run(exported.images), int8.run(exported.images)
    difference = np.abs(reference - quantized)
    assert 0 < difference.mean() < 0.15 * np.abs(reference).mean()
    assert (reference.argmax(1) == quantized.argmax(1)).mean() >= 0.9
    assert accuracy(reference, exported.labels) > 0.8  # the agreement is about something
    metrics = files.read_json(exported.root / paths.METRICS / "export.json")
    assert metrics["int8_size_ratio"] < 0.5
    assert metrics["int8_mb"] == pytest.approx(exported.package.path("int8").stat().st_size / 1e6, abs=1e-3)


def test_products_with_weights_are_quantised_and_others_are_not(exported: Exported) -> None:
    model = load_onnx(exported.package.path("int8"))
    made_by = {name: node.op_type for node in model.graph.node for name in node.output}
    products = [node for node in model.graph.node if node.op_type in ("MatMul", "Gemm")]
    quantized = [node for node in products if made_by.get(node.input[1]) == "DequantizeLinear"]
    weightless = [node for node in products if node.input[1] in made_by and node not in quantized]
    # per block qkv, proj and two MLP layers; patch embedding, patch merging, head
    assert len(quantized) == BLOCKS * 4 + 3
    assert len(weightless) == BLOCKS * 2  # inside attention
    others = [node.input[1] for node in products if node not in quantized and node not in weightless]
    assert all("cpb_mlp" in name for name in others)  # position biases, which no image changes


def test_data_of_another_digest_is_refused(workspace: Path, exported: Exported) -> None:
    folder = paths.FINETUNE / "pretrained"
    config = files.read_json(folder / "config.json")
    files.write_json(folder / "config.json", config | {"data_digest": "0" * 64})
    before = (paths.EXPORT / "manifest.json").read_bytes()
    with pytest.raises(DataError, match="trained on other data"):
        export.run(exported.params, Stage("export"))
    assert (paths.EXPORT / "manifest.json").read_bytes() == before


def test_large_weights_go_beside_the_graph(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = SmallNet().eval()
    arguments = {"image_size": 8, "opset": 20, "max_batch": 16, "metadata": {"trunkline.labels": "[]"}}
    export_onnx(model, tmp_path / "model.onnx", **arguments)
    whole = describe_variant(tmp_path / "model.onnx")
    monkeypatch.setattr(exporting, "EXTERNAL_DATA_BYTES", 1000)
    for _ in range(2):  # the second must not append to the first's weights
        write_onnx(load_onnx(tmp_path / "model.onnx"), tmp_path / "model.onnx", arguments["metadata"])
    divided = describe_variant(tmp_path / "model.onnx")

    assert [part["file"] for part in divided.external] == ["model.onnx.data"]
    assert divided.digest == whole.digest
    assert divided.bytes < 1.1 * whole.bytes
    images = np.random.default_rng(0).standard_normal((5, 3, 8, 8), dtype=np.float32)
    with torch.inference_mode():
        expected = model(torch.from_numpy(images)).numpy()
    logits = open_session(tmp_path / "model.onnx", [CPU], 1).run(images)
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-5)


def test_calibration_needs_images_and_weights(exported: Exported, tmp_path: Path) -> None:
    path = exported.package.path("fp32")
    with inside(tmp_path), pytest.raises(DataError, match="at least one image"):
        quantize(path, exported.images[:0])

    identity = onnx.helper.make_model(
        onnx.helper.make_graph(
            [onnx.helper.make_node("Relu", ["images"], ["logits"])],
            "g",
            [onnx.helper.make_tensor_value_info("images", 1, ["batch", 3, 8, 8])],
            [onnx.helper.make_tensor_value_info("logits", 1, ["batch", 3, 8, 8])],
        )
    )
    onnx.save(identity, tmp_path / "relu.onnx")
    with pytest.raises(DataError, match="nothing to quantise"):
        quantize(tmp_path / "relu.onnx", exported.images[:1])
