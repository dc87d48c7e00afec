"""Open Inference Protocol v2, the REST half: request bodies to arrays, arrays to response bodies.

The specification is that of KServe and Triton, with its binary tensor extension: after a JSON header of
`Inference-Header-Content-Length` bytes follow the raw little-endian tensors. What a request asks for and this
server does not do (an unknown parameter, a classification output) is refused by name; it is never silently
ignored.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np
import orjson
from numpy.typing import NDArray

from flows.serving.bodies import RequestError
from flows.serving.package import TensorSpec

SERVER_NAME = "trunkline-vision"
EXTENSIONS = ["binary_tensor_data", "statistics", "model_configuration"]
HEADER_LENGTH = "Inference-Header-Content-Length"
ONNX_PLATFORM = "onnxruntime_onnx"


@dataclass(frozen=True)
class InferenceRequest:
    """One checked request."""

    id: str | None
    images: NDArray[np.float32]  # (n, 3, S, S)
    binary_output: bool
    timeout_s: float | None  # what the client is ready to wait


def parse_request(
    body: bytes, header_length: str | None, *, image: TensorSpec, logits: TensorSpec, max_images: int
) -> InferenceRequest:
    """Check a body of `POST …/infer` against the model's only input and output.

    Args:
        header_length: value of the `Inference-Header-Content-Length` header, if it was sent.

    Raises:
        RequestError: 400 with the first thing that is wrong.
    """
    header, binary = _split(body, header_length)
    request = _load(header)
    _known_keys(request, {"id", "parameters", "inputs", "outputs"}, "the request")
    identifier = request.get("id")
    if identifier is not None and not isinstance(identifier, str):
        _refuse("id must be a string")
    parameters = _parameters(request, {"binary_data_output", "timeout"}, "the request")
    default_binary = _flag(parameters, "binary_data_output", False)

    inputs = request.get("inputs")
    if not isinstance(inputs, list) or len(inputs) != 1 or not isinstance(inputs[0], dict):
        _refuse(f"inputs must be a list with one tensor, named {image.name!r}")
    images = _parse_tensor(inputs[0], binary, image, max_images)
    return InferenceRequest(
        identifier,
        images,
        _wants_binary(request.get("outputs"), logits, default_binary),
        _timeout_s(parameters),
    )


def format_response(
    request: InferenceRequest, logits: NDArray[np.float32], spec: TensorSpec, name: str, version: str
) -> tuple[bytes, dict[str, str]]:
    """Body and headers of the answer, JSON or JSON followed by raw bytes as the request asked.

    Raises:
        RequestError: 422, the network overflowed: JSON cannot say so, and nobody can use it.
    """
    if not is_finite(logits):
        raise RequestError(422, "the network's answer to these values is not finite")
    output: dict[str, Any] = {"name": spec.name, "datatype": spec.datatype, "shape": list(logits.shape)}
    answer: dict[str, Any] = {"model_name": name, "model_version": version, "outputs": [output]}
    if request.id is not None:
        answer["id"] = request.id
    if not request.binary_output:
        output["data"] = np.ascontiguousarray(logits).ravel()
        return orjson.dumps(answer, option=orjson.OPT_SERIALIZE_NUMPY), {"Content-Type": "application/json"}
    raw = logits.astype("<f4").tobytes()
    output["parameters"] = {"binary_data_size": len(raw)}
    header = orjson.dumps(answer)
    return header + raw, {"Content-Type": "application/octet-stream", HEADER_LENGTH: str(len(header))}


def is_finite(values: NDArray[np.float32]) -> bool:
    """Whether all are: one pass without a mask. Sums of float32 cannot overflow in float64."""
    return math.isfinite(values.sum(dtype=np.float64))


# ---- parts of a request ----


def _refuse(message: str) -> NoReturn:
    raise RequestError(400, message)


def _split(body: bytes, header_length: str | None) -> tuple[bytes, bytes | None]:
    if header_length is None:
        return body, None
    if not (header_length.isascii() and header_length.isdigit()) or int(header_length) > len(body):
        _refuse(f"{HEADER_LENGTH} must be a number up to the body's size, got {header_length[:40]!r}")
    length = int(header_length)
    return body[:length], body[length:]


def _load(header: bytes) -> dict[str, Any]:
    try:
        request = orjson.loads(header)
    except orjson.JSONDecodeError:
        request = _load_slowly(header)
    if not isinstance(request, dict):
        _refuse("the body must be a JSON object")
    return request


def _load_slowly(header: bytes) -> Any:
    """What the fast parser refuses: to say why, and to take integers of any length as JSON does."""

    def refuse_constant(text: str) -> NoReturn:
        _refuse(f"{text} is not a finite number")

    try:
        return json.loads(header, parse_constant=refuse_constant)
    except (ValueError, RecursionError):
        _refuse("the body is not valid JSON")


def _known_keys(value: Mapping[str, Any], known: set[str], where: str) -> None:
    if unknown := sorted(set(value) - known):
        _refuse(f"{where} has the unknown key {unknown[0]!r}; known are {', '.join(sorted(known))}")


def _parameters(owner: Mapping[str, Any], known: set[str], where: str) -> dict[str, Any]:
    parameters = owner.get("parameters", {})
    if not isinstance(parameters, dict):
        _refuse(f"parameters of {where} must be an object")
    if unknown := sorted(set(parameters) - known):
        _refuse(f"parameter {unknown[0]!r} of {where} is not supported; known are {', '.join(sorted(known))}")
    return parameters


def _flag(parameters: Mapping[str, Any], name: str, default: bool) -> bool:
    value = parameters.get(name, default)
    if not isinstance(value, bool):
        _refuse(f"parameter {name!r} must be true or false")
    return value


def _timeout_s(parameters: Mapping[str, Any]) -> float | None:
    """Parameter `timeout` of Triton's clients: microseconds, 0 for none."""
    value = parameters.get("timeout", 0)
    if type(value) is not int or value < 0:
        _refuse("parameter 'timeout' must be a number of microseconds, 0 or more")
    return value / 1e6 if value else None


def _parse_tensor(
    tensor: dict[str, Any], binary: bytes | None, spec: TensorSpec, max_images: int
) -> NDArray[np.float32]:
    _known_keys(tensor, {"name", "shape", "datatype", "parameters", "data"}, "the input tensor")
    if tensor.get("name") != spec.name:
        _refuse(f"the input tensor must be named {spec.name!r}, got {_show(tensor.get('name'))}")
    if tensor.get("datatype") != spec.datatype:
        _refuse(f"datatype of {spec.name!r} must be {spec.datatype}, got {_show(tensor.get('datatype'))}")
    shape = _check_shape(tensor.get("shape"), spec, max_images)
    parameters = _parameters(tensor, {"binary_data_size"}, f"tensor {spec.name!r}")
    if "binary_data_size" in parameters:
        if "data" in tensor:
            _refuse(f"tensor {spec.name!r} has both data and binary_data_size; give one")
        values = _from_bytes(parameters["binary_data_size"], binary, shape, spec.name)
    else:
        if binary:
            _refuse(f"bytes follow the JSON header, but tensor {spec.name!r} has no binary_data_size")
        values = _from_json(tensor.get("data"), shape, spec.name)
    if not is_finite(values):
        _refuse(f"tensor {spec.name!r} holds values that are not finite in {spec.datatype}")
    return values


def _check_shape(shape: Any, spec: TensorSpec, max_images: int) -> tuple[int, ...]:
    expected = ", ".join("n" if size == -1 else str(size) for size in spec.shape)
    if not isinstance(shape, list) or any(type(size) is not int for size in shape):
        _refuse(f"shape of {spec.name!r} must be a list of integers [{expected}]")
    if len(shape) != len(spec.shape) or tuple(shape[1:]) != spec.shape[1:]:
        _refuse(f"shape of {spec.name!r} must be [{expected}], got {_show(shape)}")
    if not 1 <= shape[0] <= max_images:
        _refuse(f"batch of {spec.name!r} must be from 1 to {max_images}, got {shape[0]}")
    return tuple(shape)


def _from_json(data: Any, shape: tuple[int, ...], name: str) -> NDArray[np.float32]:
    if not isinstance(data, list):
        _refuse(
            f"data of {name!r} must be a list of numbers, flat in row-major order or nested like its shape"
        )
    try:
        values = np.asarray(data)
    except ValueError:
        _refuse(f"data of {name!r} is nested unevenly")
    if values.dtype.kind not in "iuf" and values.size:
        _refuse(f"data of {name!r} must hold numbers only")
    if values.shape != shape and values.shape != (math.prod(shape),):
        found = f"{values.size} values" if values.ndim == 1 else f"nested shape {list(values.shape)}"
        _refuse(f"data of {name!r} has {found}, its shape {list(shape)} needs {math.prod(shape)}")
    with np.errstate(over="ignore"):  # too large for float32 becomes infinite and is refused with the others
        return values.astype(np.float32).reshape(shape)


def _from_bytes(size: Any, binary: bytes | None, shape: tuple[int, ...], name: str) -> NDArray[np.float32]:
    needed = 4 * math.prod(shape)
    if binary is None:
        _refuse(f"tensor {name!r} has binary_data_size, but the header {HEADER_LENGTH} is missing")
    if type(size) is not int or size != needed:
        _refuse(f"binary_data_size of {name!r} must be {needed} for shape {list(shape)}, got {_show(size)}")
    if len(binary) != needed:
        _refuse(f"{len(binary)} bytes follow the JSON header, tensor {name!r} needs {needed}")
    return np.frombuffer(binary, dtype="<f4").reshape(shape).astype(np.float32, copy=False)


def _wants_binary(outputs: Any, spec: TensorSpec, default: bool) -> bool:
    if outputs is None or outputs == []:
        return default
    if not isinstance(outputs, list) or len(outputs) != 1 or not isinstance(outputs[0], dict):
        _refuse(f"outputs must be a list with one entry, named {spec.name!r}")
    _known_keys(outputs[0], {"name", "parameters"}, "the requested output")
    if outputs[0].get("name") != spec.name:
        _refuse(f"the model has one output, {spec.name!r}; asked for {_show(outputs[0].get('name'))}")
    return _flag(_parameters(outputs[0], {"binary_data"}, f"output {spec.name!r}"), "binary_data", default)


def _show(value: Any) -> str:
    """A client's value for an error message, cut to a bounded length."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
