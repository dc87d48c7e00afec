"""The OpenAPI document of the routes, written by hand: FastAPI cannot know the protocol's bodies.

It names the model in use and its exact tensor shapes, so it changes with them.
"""

from __future__ import annotations

from typing import Any

from flows.serving.package import TensorSpec
from flows.serving.vision import protocol
from flows.serving.vision.model import LoadedModel
from flows.serving.vision.service import TIMEOUT_HEADER, Limits

Json = dict[str, Any]

ERRORS = {
    "400": "not a valid request",
    "404": "another model, version or path",
    "408": "the body came too slowly",
    "413": "the body is larger than the server accepts",
    "415": "another content type or encoding",
    "422": "cannot be used: an image that cannot be decoded, or values that overflow the network",
    "429": "no room now; `Retry-After` says when",
    "500": "a bug",
    "503": "the server is stopping",
    "504": "the deadline passed",
}


def document(model: LoadedModel, limits: Limits) -> Json:
    """OpenAPI 3.1."""
    named = "/v2/models/{name}"
    name = _path_parameter("name", model.info.name)
    version = _path_parameter("version", model.info.version)
    paths: Json = {
        "/healthz": _get(
            "Which model exactly is being served, and the state of a rollout", {"type": "object"}
        ),
        "/metrics": {
            "get": {
                "summary": "Prometheus metrics",
                "responses": {
                    "200": {
                        "description": "text exposition format",
                        "content": {"text/plain": {"schema": {"type": "string"}}},
                    }
                },
            }
        },
        "/openapi.json": _get("This document", {"type": "object"}),
        "/v1/classify": {"post": _classify(model, limits)},
        "/v2": _get("Server metadata", _object(name={"type": "string"}, version={"type": "string"})),
        "/v2/health/live": _get("Is the process alive?", _object(live={"type": "boolean"})),
        "/v2/health/ready": _get("Does it take work?", _object(ready={"type": "boolean"}), "503"),
        "/v2/models/stats": _get("Statistics of all models", _object(model_stats={"type": "array"})),
    }
    for path, parameters in ((named, [name]), (named + "/versions/{version}", [name, version])):
        model_routes: Json = {
            path: _get("Model metadata", _object(name={"type": "string"}), "404"),
            path + "/ready": _get(
                "Does the model take work?", _object(ready={"type": "boolean"}), "404", "503"
            ),
            path + "/config": _get("Model configuration", _object(name={"type": "string"}), "404"),
            path + "/stats": _get("Model statistics", _object(model_stats={"type": "array"}), "404"),
            path + "/infer": {"post": _infer(model, limits)},
        }
        for route in model_routes.values():
            route["parameters"] = parameters
        paths |= model_routes
    return {
        "openapi": "3.1.0",
        "info": {"title": protocol.SERVER_NAME, "version": model.info.version},
        "paths": paths,
        "components": {"schemas": {"Error": _object(error={"type": "string"})}},
    }


# ---- the two routes that do work ----


def _infer(model: LoadedModel, limits: Limits) -> Json:
    output = {
        "type": "object",
        "required": ["name"],
        "additionalProperties": False,
        "properties": {
            "name": {"const": model.logits.name},
            "parameters": _closed(binary_data={"type": "boolean"}),
        },
    }
    schema = {
        "type": "object",
        "required": ["inputs"],
        "additionalProperties": False,
        "properties": {
            "id": {"type": "string"},
            "parameters": _closed(
                binary_data_output={"type": "boolean"}, timeout={"type": "integer", "minimum": 0}
            ),
            "inputs": {
                "type": "array",
                "minItems": 1,
                "maxItems": 1,
                "items": _input(model.image, limits.max_request_images),
            },
            "outputs": {"type": "array", "maxItems": 1, "items": output},
        },
    }
    answer = _object(
        model_name={"type": "string"},
        model_version={"type": "string"},
        outputs={"type": "array", "minItems": 1, "maxItems": 1, "items": {"type": "object"}},
    )
    return {
        "summary": "Run the network on preprocessed images",
        "description": "Open Inference Protocol v2, with the binary tensor extension.",
        "parameters": [_timeout(limits), _header_length()],
        "requestBody": {"required": True, "content": {"application/json": {"schema": schema}}},
        "responses": {
            "200": {
                "description": "logits; binary ones if the request asked so",
                "headers": _answer_headers(),
                "content": {
                    "application/json": {"schema": answer},
                    "application/octet-stream": {"schema": {"type": "string", "format": "binary"}},
                },
            },
            **_errors("400", "404", "408", "413", "415", "422", "429", "500", "503", "504"),
        },
    }


def _input(spec: TensorSpec, max_images: int) -> Json:
    """The number of values must be the product of the shape, which JSON schema cannot say."""
    _, *fixed = spec.shape
    return {
        "type": "object",
        "required": ["name", "shape", "datatype", "data"],
        "additionalProperties": False,
        "properties": {
            "name": {"const": spec.name},
            "datatype": {"const": spec.datatype},
            "shape": {
                "type": "array",
                "prefixItems": [
                    {"type": "integer", "minimum": 1, "maximum": max_images},
                    *({"const": size} for size in fixed),
                ],
                "minItems": len(spec.shape),
                "maxItems": len(spec.shape),
            },
            "data": {"type": "array", "minItems": 1, "description": "flat in row-major order, or nested"},
            "parameters": _closed(),
        },
    }


def _classify(model: LoadedModel, limits: Limits) -> Json:
    image = {"type": "string", "format": "binary"}
    form = {"type": "object", "required": ["file"], "properties": {"file": image}}
    entry: Json = {
        "label": {"enum": list(model.manifest.labels)},
        "index": {"type": "integer", "minimum": 0, "maximum": len(model.manifest.labels) - 1},
        "confidence": {"type": "number", "minimum": 0, "maximum": 1},
    }
    answer = _object(
        **entry,
        top={"type": "array", "minItems": 1, "items": _object(**entry)},
        model=_object(**{key: {"type": "string"} for key in ("name", "version", "digest", "variant")}),
    )
    return {
        "summary": "The most probable classes of an image file",
        "description": "PNG, JPEG, WebP, GIF (first frame), BMP, TIFF, PPM, AVIF or JPEG 2000.",
        "parameters": [_timeout(limits)],
        "requestBody": {
            "required": True,
            "content": {
                "multipart/form-data": {"schema": form},
                "image/*": {"schema": image},
                "application/octet-stream": {"schema": image},
            },
        },
        "responses": {
            "200": {
                "description": "the best class, and the best five",
                "headers": _answer_headers(),
                "content": {"application/json": {"schema": answer}},
            },
            **_errors("400", "408", "413", "415", "422", "429", "500", "503", "504"),
        },
    }


# ---- parts ----


def _object(**properties: Json) -> Json:
    return {"type": "object", "required": list(properties), "properties": properties}


def _closed(**properties: Json) -> Json:
    return {"type": "object", "additionalProperties": False, "properties": properties}


def _get(summary: str, schema: Json, *errors: str) -> Json:
    answer = {"description": "the answer", "content": {"application/json": {"schema": schema}}}
    responses: Json = {"200": answer}
    for status in errors:
        responses |= {"503": {**answer, "description": "not ready"}} if status == "503" else _errors(status)
    return {"get": {"summary": summary, "responses": responses}}


def _errors(*statuses: str) -> Json:
    error = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
    return {status: {"description": ERRORS[status], "content": error} for status in statuses}


def _path_parameter(name: str, value: str) -> Json:
    return {"name": name, "in": "path", "required": True, "schema": {"type": "string", "enum": [value]}}


def _timeout(limits: Limits) -> Json:
    text = (
        f"deadline in milliseconds, from the request's first byte; default {limits.timeout_s * 1e3:g}, "
        f"at most {limits.max_timeout_s * 1e3:g}"
    )
    schema = {"type": "number", "exclusiveMinimum": 0}
    return {"name": TIMEOUT_HEADER, "in": "header", "required": False, "description": text, "schema": schema}


def _header_length() -> Json:
    text = "with binary tensors: bytes of the JSON header that comes before them"
    schema = {"type": "integer", "minimum": 0}
    name = protocol.HEADER_LENGTH
    return {"name": name, "in": "header", "required": False, "description": text, "schema": schema}


def _answer_headers() -> Json:
    text = {"schema": {"type": "string"}}
    return {"X-Request-Id": text, "X-Model-Version": text}
