"""From a PyTorch network to an ONNX file that is the same byte for byte whenever the weights are the same.

The exporter annotates every node with stack traces and module paths of the machine it ran on. They would make
equal models differ, tell strangers about file systems, and triple the size of small graphs: all of it is
removed.
"""

from __future__ import annotations

import logging
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import onnx
import torch
from torch import fx, nn

EXTERNAL_DATA_BYTES = 1_500_000_000
"""Weights above this go into a second file: protobuf holds at most 2 GB, and graphs need room too."""


def export_onnx(
    model: nn.Module,
    path: Path,
    *,
    image_size: int,
    opset: int,
    max_batch: int,
    metadata: Mapping[str, str],
    outputs: Sequence[str] = ("logits",),
) -> None:
    """Write `model` with input `images`, float32 (batch, 3, image_size, image_size), and the named `outputs`.

    The batch dimension is free from 1 to `max_batch`; everything else is fixed. The network is traced at
    batch 2, because a batch of 1 would be taken for a constant.

    Raises:
        onnx.checker.ValidationError: the exported graph is not valid ONNX.
    """
    example = torch.zeros(2, 3, image_size, image_size)
    batch = torch.export.Dim("batch", min=1, max=max_batch)
    with quiet_exporter():
        program = torch.onnx.export(
            model.eval().cpu(),
            (example,),
            dynamo=True,
            opset_version=opset,
            input_names=["images"],
            output_names=list(outputs),
            dynamic_shapes=({0: batch},),
            verbose=False,
        )
        assert program is not None  # None is only for the path-writing form
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            raw = Path(folder) / path.name
            program.save(raw, external_data=True)
            exported = onnx.load(raw)
    write_onnx(exported, path, metadata)


def write_onnx(model: onnx.ModelProto, path: Path, metadata: Mapping[str, str]) -> None:
    """Strip what is not part of the computation, set `metadata`, write deterministic bytes and check the
    file."""
    strip_annotations(model)
    del model.metadata_props[:]
    for key in sorted(metadata):
        model.metadata_props.add(key=key, value=metadata[key])
    if sum(len(tensor.raw_data) for tensor in model.graph.initializer) > EXTERNAL_DATA_BYTES:
        location = path.name + ".data"
        (path.parent / location).unlink(missing_ok=True)  # onnx appends
        onnx.save_model(model, path, save_as_external_data=True, location=location, size_threshold=1024)
    else:
        path.write_bytes(model.SerializeToString(deterministic=True))
    onnx.checker.check_model(path, full_check=True)


def strip_annotations(model: onnx.ModelProto) -> None:
    """Remove documentation, provenance and inferred shapes from the model, in place."""
    model.doc_string = ""
    _strip_graph(model.graph)
    for function in model.functions:
        function.doc_string = ""
        del function.metadata_props[:]
        for node in function.node:
            _strip_node(node)


def _strip_graph(graph: onnx.GraphProto) -> None:
    graph.doc_string = ""
    graph.name = "trunkline"
    del graph.metadata_props[:]
    del graph.value_info[:]
    for value in (*graph.input, *graph.output):
        value.doc_string = ""
        del value.metadata_props[:]
    for tensor in graph.initializer:
        tensor.doc_string = ""
        del tensor.metadata_props[:]
    for node in graph.node:
        _strip_node(node)


def _strip_node(node: onnx.NodeProto) -> None:
    node.doc_string = ""
    del node.metadata_props[:]
    for attribute in node.attribute:
        if attribute.HasField("g"):
            _strip_graph(attribute.g)
        for graph in attribute.graphs:
            _strip_graph(graph)


@contextmanager
def quiet_exporter() -> Iterator[None]:
    """The exporter reports missing optional packages and its own deprecations; neither concerns the user. Nor
    do the stack traces it would note with every node, in a third of its time."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    traceless = fx.config.do_not_emit_stack_traces
    logger.setLevel(logging.ERROR)
    fx.config.do_not_emit_stack_traces = True
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
        fx.config.do_not_emit_stack_traces = traceless
