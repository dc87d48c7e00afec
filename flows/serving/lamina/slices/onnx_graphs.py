"""Programs → ONNX files, one for all programs that compute the same, weights outside.

While a graph is exported its weights are ordinary inputs: no optimisation can fold one of them into a
constant, which would tie the graph to the layer it was taken from. Afterwards they become initializers with
external data. The file names the weights of the first layer that uses it, so it is a complete model for any
tool; for the other layers theirs are put in their place when a session is made (runner.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import onnx
import torch
from onnx import TensorProto
from torch import Tensor, fx, nn

from flows import exporting
from flows.serving.lamina.slices.bundle import StoredTensor
from flows.serving.lamina.slices.programs import Program
from flows.serving.lamina.slices.tracing import EXAMPLE_ROWS, MAX_ROWS

ALIGNMENT = 64  # of a tensor in its file, bytes: a cache line
ELEMENTS = {
    "float32": TensorProto.FLOAT,
    "int64": TensorProto.INT64,
    "int32": TensorProto.INT32,
    "bool": TensorProto.BOOL,
}


def export_program(program: Program, opset: int) -> onnx.ModelProto:
    """The ONNX model of one program; its weights are inputs w0, w1, … after the inputs x0, x1, …."""
    examples: list[Tensor] = []
    shapes: list[dict[int, object]] = []
    rows = torch.export.Dim("rows", min=1, max=MAX_ROWS)
    for value in program.inputs:
        shape = value.shape()
        lengths = [EXAMPLE_ROWS if length == "rows" else int(length) for length in shape]
        examples.append(torch.zeros(lengths, dtype=getattr(torch, value.dtype)))
        shapes.append({axis: rows for axis, length in enumerate(shape) if length == "rows"})
    for node in program.weights:
        weight = node.meta["val"]
        examples.append(torch.zeros(tuple(weight.shape), dtype=weight.dtype))
        shapes.append({})
    names = [f"x{n}" for n in range(len(program.inputs))] + [f"w{n}" for n in range(len(program.weights))]
    with exporting.quiet_exporter(), torch.no_grad():
        exported = torch.onnx.export(
            fx.GraphModule(nn.Module(), program.graph),
            tuple(examples),
            dynamo=True,
            opset_version=opset,
            input_names=names,
            output_names=[f"y{n}" for n in range(len(program.outputs))],
            dynamic_shapes=tuple(shapes),
            verbose=False,
        )
    assert exported is not None  # None is only for the path-writing form
    model = exported.model_proto
    exporting.strip_annotations(model)
    return model


def write_graph(model: onnx.ModelProto, path: Path, weights: Sequence[StoredTensor]) -> None:
    """Turn the inputs w0… into the external initializers `weights`, write deterministic bytes, check them."""
    inputs = [value for value in model.graph.input if not value.name.startswith("w")]
    del model.graph.input[:]
    model.graph.input.extend(inputs)
    for index, stored in enumerate(weights):
        tensor = model.graph.initializer.add(
            name=f"w{index}",
            data_type=ELEMENTS[stored.dtype],
            dims=stored.shape,
            data_location=TensorProto.EXTERNAL,
        )
        where = {"location": stored.file, "offset": stored.offset, "length": stored.bytes}
        for key, value in where.items():
            tensor.external_data.add(key=key, value=str(value))
    path.write_bytes(model.SerializeToString(deterministic=True))
    onnx.checker.check_model(path)


class WeightFiles:
    """The data files of a bundle: each tensor of the model once, wherever it is first needed."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.tensors: dict[str, StoredTensor] = {}
        self.files: list[str] = []

    def store(self, step: int, weights: dict[str, Tensor]) -> None:
        """Append the tensors that are not stored yet to the file of a step."""
        new = {name: tensor for name, tensor in weights.items() if name not in self.tensors}
        if not new:
            return
        name = f"weights_{step:02d}.data"
        if name not in self.files:
            self.files.append(name)
        with open(self._folder / name, "ab") as file:
            for key, tensor in new.items():
                file.write(bytes(-file.tell() % ALIGNMENT))
                self.tensors[key] = StoredTensor(
                    name=key,
                    file=name,
                    offset=file.tell(),
                    shape=tuple(tensor.shape),
                    dtype=str(tensor.dtype).removeprefix("torch."),  # type: ignore[arg-type]  # checked by pydantic
                )
                file.write(tensor.contiguous().numpy().data)
