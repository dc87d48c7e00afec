"""The web application of the vision server: Open Inference Protocol v2, image classification, health.

    GET  /v2, /v2/health/live, /v2/health/ready
    GET  /v2/models/{name}[/versions/{version}][/ready|/config|/stats]
    POST /v2/models/{name}[/versions/{version}]/infer      tensors that are already preprocessed
    POST /v1/classify                                      an image file
    GET  /healthz                                          which model exactly is being served
    GET  /metrics, /openapi.json

Bodies are read on the event loop within limits; large ones are parsed, and images decoded, in worker threads;
the batcher's thread runs the network. Every error is `{"error": "one sentence"}`.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import numpy as np
import orjson
from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from flows.serving.bodies import read_body
from flows.serving.vision import descriptions, protocol
from flows.serving.vision.access_log import AccessLog
from flows.serving.vision.gateway import EXCHANGE, Gateway
from flows.serving.vision.metrics import CONTENT_TYPE
from flows.serving.vision.model import LoadedModel, softmax
from flows.serving.vision.observing import OnBatch, OnRequest
from flows.serving.vision.openapi import document
from flows.serving.vision.service import Exchange, Limits, VisionService
from flows.serving.vision.uploads import extract_image, prepare_image

TOP_K = 5
INLINE_BYTES = 65_536  # JSON up to this size is parsed on the event loop: handing it over costs more
Endpoint = Callable[[Request], Awaitable[Response]]


def create_app(
    model: LoadedModel,
    limits: Limits,
    *,
    access_log: AccessLog | None = None,
    on_batch: OnBatch | None = None,
    on_request: OnRequest | None = None,
) -> FastAPI:
    """The ASGI application around one loaded model; `app.state.service` is its VisionService.

    Args:
        access_log: default: none.
        on_batch: sees every batch that was served, off the hot path; see `observing`.
        on_request: told of every answered inference request; see `observing`.
    """
    service = VisionService(model, limits, access_log=access_log, on_batch=on_batch, on_request=on_request)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        service.close()

    # plain routes: the bodies are the protocol's own, so that validation by annotations has nothing to add
    app = FastAPI(
        openapi_url=None,
        docs_url=None,
        redoc_url=None,
        routes=_routes(service),
        middleware=[Middleware(Gateway, service=service)],
        exception_handlers={HTTPException: _unknown},
        lifespan=lifespan,
    )
    app.state.service = service
    return app


def _routes(service: VisionService) -> list[BaseRoute]:
    named = "/v2/models/{name}"
    both = (named + "/versions/{version}", named)
    return [  # the busy ones first
        *(_route(path + "/infer", _infer(service), "POST") for path in both),
        _route("/v1/classify", _classify(service), "POST"),
        _route("/v2/health/live", _say(lambda: {"live": True})),
        _route("/v2/health/ready", _ready(service)),
        _route("/healthz", _say(service.health)),
        _route("/metrics", _metrics(service)),
        _route("/openapi.json", _say(lambda: document(service.model, service.limits))),
        _route("/v2", _say(descriptions.server)),
        _route("/v2/models/stats", _say(lambda: descriptions.statistics(service.model))),
        *(_route(path + "/ready", _model_ready(service)) for path in both),
        *(_route(path + "/stats", _about_model(service, descriptions.statistics)) for path in both),
        *(_route(path + "/config", _about_model(service, descriptions.configuration)) for path in both),
        *(_route(path, _about_model(service, descriptions.metadata)) for path in both),
    ]


def _route(path: str, endpoint: Endpoint, method: str = "GET") -> Route:
    async def labelled(request: Request) -> Response:
        request.scope[EXCHANGE].route = path
        return await endpoint(request)

    return Route(path, labelled, methods=[method])


async def _unknown(request: Request, error: Exception) -> Response:
    """An unknown path, or a method that it does not have, in the form of all errors."""
    assert isinstance(error, HTTPException)
    answer = _json({"error": error.detail}, error.status_code)
    answer.headers.update(error.headers or {})
    return answer


def _json(value: Any, status: int = 200) -> Response:
    return Response(orjson.dumps(value), status, media_type="application/json")


# ---- work ----


def _infer(service: VisionService) -> Endpoint:
    async def infer(request: Request) -> Response:
        exchange: Exchange = request.scope[EXCHANGE]
        model = exchange.model = _named(service, request)
        limits = service.limits
        service.set_deadline(request, exchange)
        with service.admitted(exchange):
            body = await read_body(request, limits.max_upload_bytes)
            header_length = request.headers.get(protocol.HEADER_LENGTH)

            def parse() -> protocol.InferenceRequest:
                return protocol.parse_request(
                    body,
                    header_length,
                    image=model.image,
                    logits=model.logits,
                    max_images=limits.max_request_images,
                )

            small = header_length is not None or len(body) <= INLINE_BYTES
            asked = parse() if small else await service.work(parse)
            if asked.timeout_s is not None:
                exchange.deadline = min(exchange.deadline, exchange.started + asked.timeout_s)
            logits = await service.compute(request, exchange, asked.images)
            content, headers = protocol.format_response(
                asked, logits, model.logits, model.info.name, model.info.version
            )
        return Response(content, headers=headers)

    return infer


def _classify(service: VisionService) -> Endpoint:
    async def classify(request: Request) -> Response:
        exchange: Exchange = request.scope[EXCHANGE]
        model = exchange.model = service.model
        limits = service.limits
        service.set_deadline(request, exchange)
        with service.admitted(exchange):
            data = await extract_image(request, await read_body(request, limits.max_upload_bytes))
            image = await service.work(
                lambda: prepare_image(data, model.manifest.preprocessing, limits.max_pixels)
            )
            logits = await service.compute(request, exchange, image[np.newaxis])
        return _json(classification(logits[0], model))

    return classify


def classification(logits: np.ndarray[Any, Any], model: LoadedModel) -> dict[str, Any]:
    """The answer of /v1/classify for one image's logits."""
    probabilities = softmax(logits)
    best = np.argsort(-probabilities, kind="stable")[:TOP_K]
    top = [
        {
            "label": model.manifest.labels[index],
            "index": int(index),
            "confidence": float(probabilities[index]),
        }
        for index in best
    ]
    return {**top[0], "top": top, "model": model.identity()}


# ---- questions ----


def _named(service: VisionService, request: Request) -> LoadedModel:
    return service.check_name(request.path_params["name"], request.path_params.get("version"))


def _say(describe: Callable[[], dict[str, Any]]) -> Endpoint:
    async def say(request: Request) -> Response:
        return _json(describe())

    return say


def _about_model(service: VisionService, describe: Callable[[LoadedModel], dict[str, Any]]) -> Endpoint:
    async def about_model(request: Request) -> Response:
        return _json(describe(_named(service, request)))

    return about_model


def _ready(service: VisionService) -> Endpoint:
    async def ready(request: Request) -> Response:
        return _json({"ready": service.ready}, 200 if service.ready else 503)

    return ready


def _model_ready(service: VisionService) -> Endpoint:
    async def model_ready(request: Request) -> Response:
        name = _named(service, request).info.name
        return _json({"name": name, "ready": service.ready}, 200 if service.ready else 503)

    return model_ready


def _metrics(service: VisionService) -> Endpoint:
    async def metrics(request: Request) -> Response:
        return Response(service.metrics.render(), headers={"Content-Type": CONTENT_TYPE})

    return metrics
