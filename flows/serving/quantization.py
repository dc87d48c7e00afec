"""The int8 variant: static quantisation in QDQ form, calibrated on real images.

Four decisions, each measured with trained Swin V2 classifiers on a CPU that has AVX2 but no VNNI:

- *Static* ranges. Dynamic quantisation is as fast and a little more accurate, but it takes the range of an
  activation from the whole batch, so the answer for an image would depend on its neighbours in the batch.
- Only products of activations with constant weights (Linear layers) are quantised. The two products inside
  attention have no weights to shrink; LayerNorm, GELU and softmax lose accuracy without gaining speed; the
  network of the position biases does not depend on the image, so the runtime computes it once, exactly.
- The products' results stay in float. Quantising them as well clips what lies beyond the calibrated range:
  6 times the largest error, and slower.
- Weights use 7 of their 8 bits. AVX2's 8-bit multiply-add saturates at 16 bits with all 8, which made the
  mean error 10 times larger; with 7 every CPU computes the same.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray
from onnxruntime.quantization import (
    CalibrationDataReader,
    CalibrationMethod,
    QuantFormat,
    QuantType,
    quantize_static,
)

from flows.errors import DataError

CALIBRATION_BATCH = 16
QUANTIZED_OPERATORS = ["MatMul", "Gemm"]


class _Batches(CalibrationDataReader):  # type: ignore[misc]  # untyped
    """Calibration images in order, a batch at a time."""

    def __init__(self, input_name: str, images: NDArray[np.float32]) -> None:
        self._feeds = iter(
            {input_name: images[start : start + CALIBRATION_BATCH]}
            for start in range(0, len(images), CALIBRATION_BATCH)
        )

    def get_next(self) -> dict[str, NDArray[np.float32]] | None:
        return next(self._feeds, None)


def quantize(source: Path, images: NDArray[np.float32]) -> onnx.ModelProto:
    """The int8 version of the fp32 model at `source`.

    Args:
        images: preprocessed training images (n, 3, S, S) that set the ranges of the activations.

    Raises:
        DataError: no images, or a model without anything to quantise.
    """
    if not len(images):
        raise DataError("int8 calibration needs at least one image; set export.int8_calibration_images")
    graph = onnx.load(source, load_external_data=False).graph
    chosen = choose_products(graph)
    if not chosen:
        raise DataError(f"{source} has no product with constant weights, so there is nothing to quantise")
    with tempfile.TemporaryDirectory(dir=source.parent) as folder, _quiet():
        target = Path(folder) / "int8.onnx"
        quantize_static(
            source,
            target,
            _Batches(graph.input[0].name, images),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            reduce_range=True,
            op_types_to_quantize=QUANTIZED_OPERATORS,
            nodes_to_quantize=chosen,
            calibrate_method=CalibrationMethod.MinMax,
            extra_options={"OpTypesToExcludeOutputQuantization": QUANTIZED_OPERATORS},
        )
        quantized = onnx.load(target)
    quantized.producer_name, quantized.producer_version = "trunkline", ""
    return quantized


def choose_products(graph: onnx.GraphProto) -> list[str]:
    """Names of the nodes that multiply something computed from the images with constant weights."""
    weights = {tensor.name for tensor in graph.initializer}
    variable = {value.name for value in graph.input} - weights
    chosen = []
    for node in graph.node:  # in topological order
        if not variable.intersection(node.input):
            continue
        variable.update(node.output)
        if node.op_type in QUANTIZED_OPERATORS and node.input[1] in weights:
            chosen.append(node.name)
    return chosen


@contextmanager
def _quiet() -> Iterator[None]:
    """The quantiser advises on the root logger to run an optional optimiser first; its graphs are not
    portable."""
    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.ERROR)
    try:
        yield
    finally:
        root.setLevel(level)
