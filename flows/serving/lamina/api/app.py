"""The web application of Lamina: OpenAI's protocol, Open Inference Protocol, health, metrics.

    POST   /v1/completions, /v1/chat/completions
    GET    /v1/models, /v1/models/{id}
    DELETE /v1/requests/{id}                 id of an answer, or X-Request-Id of the request
    GET    /v2, /v2/health/live, /v2/health/ready, /v2/models/{name}[/ready]
    GET    /livez, /readyz, /health, /version, /metrics
    GET    /healthz                          which model exactly is served, and whether it follows an alias

Errors of /v1 are `{"error": {message, type, param, code}}`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import asdict
from importlib.metadata import version as package_version
from typing import Any

import orjson
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route
from starlette.types import Receive, Scope, Send

from flows.serving.bodies import read_body
from flows.serving.lamina.api import protocol
from flows.serving.lamina.api.errors import ApiError
from flows.serving.lamina.api.gateway import EXCHANGE, ApiKey, Exchange, Gateway
from flows.serving.lamina.api.metrics import CONTENT_TYPE
from flows.serving.lamina.api.service import Asked, Generation, Service
from flows.serving.lamina.api.streaming import Presence, presence, send_stream

SERVER_NAME = "trunkline-lamina"
TIMEOUT_HEADER = "X-Request-Timeout-Ms"
INLINE_BYTES = 65_536  # JSON up to this size is parsed on the event loop: handing it over costs more
Endpoint = Callable[[Request], Awaitable[Response]]


def create_app(service: Service, key: ApiKey | None = None) -> Starlette:
    """The ASGI application; whoever runs it keeps `service.link` running."""
    return Starlette(
        routes=_routes(service),
        middleware=[Middleware(Gateway, service=service, key=key)],
        exception_handlers={HTTPException: _unknown},
    )


def _routes(service: Service) -> list[BaseRoute]:
    return [
        Route(
            "/v1/completions",
            Generate(service, "/v1/completions", protocol.parse_completion),
            methods=["POST"],
        ),
        Route(
            "/v1/chat/completions",
            Generate(service, "/v1/chat/completions", protocol.parse_chat),
            methods=["POST"],
        ),
        _route("/v1/models", _models(service)),
        _route("/v1/models/{name:path}", _model(service)),
        _route("/v1/requests/{id}", _delete(service), "DELETE"),
        _route("/livez", _say(lambda: {"live": True})),
        _route("/readyz", _verdict("ready", service.why_not_ready)),
        _route("/health", _verdict("healthy", service.why_not_healthy)),
        _route("/version", _say(lambda: _versions(service))),
        _route("/healthz", _say(lambda: _served(service))),
        _route("/metrics", _metrics(service)),
        _route("/v2", _say(lambda: {"name": SERVER_NAME, "version": _own_version(), "extensions": []})),
        _route("/v2/health/live", _say(lambda: {"live": True})),
        _route("/v2/health/ready", _verdict("ready", service.why_not_ready)),
        _route("/v2/models/{name}", _model_metadata(service)),
        _route("/v2/models/{name}/ready", _model_ready(service)),
    ]


def _route(path: str, endpoint: Endpoint, method: str = "GET") -> Route:
    async def labelled(request: Request) -> Response:
        request.scope[EXCHANGE].route = path
        return await endpoint(request)

    return Route(path, labelled, methods=[method])


async def _unknown(request: Request, error: Exception) -> Response:
    """An unknown path, or a method that it does not have, in the form of all errors."""
    assert isinstance(error, HTTPException)
    refusal = ApiError(error.status_code, f"{request.method} {request.url.path[:200]}: {error.detail}")
    answer = _json(refusal.body(), error.status_code)
    answer.headers.update(error.headers or {})
    return answer


def _json(value: Any, status: int = 200) -> Response:
    return Response(orjson.dumps(value), status, media_type="application/json")


# ---- generating ----


class Generate:
    """One of the two routes that ask the engine; an ASGI application, as it sends while it works."""

    def __init__(self, service: Service, route: str, parse: Callable[[bytes, int], Asked]) -> None:
        self._service = service
        self._route = route
        self._parse = parse

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        exchange: Exchange = scope[EXCHANGE]
        exchange.route = self._route
        request = Request(scope, receive)
        with self._service.admitted():
            timeout_ms = _timeout_ms(request)
            asked = await self._read(request)
            async with presence(receive) as there:
                generation = await there.await_while_there(
                    self._service.start(asked, exchange.id, timeout_ms)
                )
                try:
                    await self._answer(generation, asked, there, scope, receive, send)
                finally:
                    generation.close()

    async def _read(self, request: Request) -> Asked:
        http = self._service.settings.http
        content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        body = await read_body(request, http.max_body_kb * 1024)
        if content_type != "application/json":
            raise ApiError(
                415, f"Content-Type has to be application/json, not {content_type[:80] or 'missing'}"
            )
        if len(body) <= INLINE_BYTES:
            return self._parse(body, http.max_stop_strings)
        return await asyncio.to_thread(self._parse, body, http.max_stop_strings)

    async def _answer(
        self,
        generation: Generation,
        asked: Asked,
        there: Presence,
        scope: Scope,
        receive: Receive,
        send: Send,
    ) -> None:
        await there.await_while_there(generation.wait_for_first())
        if asked.stream:
            limit = self._service.settings.http.slow_reader_kb * 1024
            await send_stream(generation, there, send, limit=limit, include_usage=asked.include_usage)
            return
        whole = await there.await_while_there(generation.collect())
        if generation.error is not None:
            raise generation.error
        assert generation.finish_reason is not None
        body = {**generation.format.whole(whole, generation.finish_reason), "usage": generation.usage()}
        await _json(body)(scope, receive, send)


def _timeout_ms(request: Request) -> int | None:
    text = request.headers.get(TIMEOUT_HEADER)
    if text is None:
        return None
    if not (text.isascii() and text.isdigit() and 1 <= len(text) <= 9 and int(text) > 0):
        raise ApiError(400, f"{TIMEOUT_HEADER} has to be a positive number of milliseconds")
    return int(text)


# ---- questions ----


def _describe_model(service: Service) -> dict[str, Any]:
    model = service.current
    return {
        "id": model.name,
        "object": "model",
        "created": model.created,
        "owned_by": "trunkline",
        "max_model_len": service.max_context,
        "version": model.version,
        "digest": model.digest,
    }


def _models(service: Service) -> Endpoint:
    return _say(lambda: {"object": "list", "data": [_describe_model(service)]})


def _model(service: Service) -> Endpoint:
    async def model(request: Request) -> Response:
        _check_name(service, request)
        return _json(_describe_model(service))

    return model


def _check_name(service: Service, request: Request) -> None:
    name = request.path_params["name"]
    if name != service.name:
        raise ApiError(
            404,
            f"the model {name[:80]!r} does not exist, this server has {service.name!r}",
            param="model",
            code="model_not_found",
        )


def _delete(service: Service) -> Endpoint:
    async def delete(request: Request) -> Response:
        asked = request.path_params["id"]
        if not service.delete(asked):
            raise ApiError(404, f"no request {asked[:128]!r} is open", code="request_not_found")
        return _json({"id": asked, "object": "request", "deleted": True})

    return delete


def _model_metadata(service: Service) -> Endpoint:
    async def model_metadata(request: Request) -> Response:
        _check_name(service, request)
        versions = [service.current.version] if service.current.version else []
        return _json(
            {
                "name": service.name,
                "versions": versions,
                "platform": "trunkline_lamina",
                "inputs": [],  # there is no /infer: texts go through /v1
                "outputs": [],
            }
        )

    return model_metadata


def _model_ready(service: Service) -> Endpoint:
    async def model_ready(request: Request) -> Response:
        _check_name(service, request)
        reasons = service.why_not_ready()
        return _json({"name": service.name, "ready": not reasons}, 503 if reasons else 200)

    return model_ready


def _verdict(word: str, why_not: Callable[[], list[str]]) -> Endpoint:
    async def verdict(request: Request) -> Response:
        reasons = why_not()
        return _json({word: not reasons, "reasons": reasons}, 503 if reasons else 200)

    return verdict


def _metrics(service: Service) -> Endpoint:
    async def metrics(request: Request) -> Response:
        engine_text = await service.link.metrics_text()
        service.metrics.engine_up.set(service.link.is_alive)
        return Response(service.metrics.render(engine_text), headers={"Content-Type": CONTENT_TYPE})

    return metrics


def _versions(service: Service) -> dict[str, Any]:
    return {
        "version": _own_version(),
        "model": service.name,
        "model_version": service.current.version,
        "model_digest": service.current.digest,
        "source_sha256": service.current.manifest.source_sha256,
    }


def _served(service: Service) -> dict[str, Any]:
    """As vision's /healthz, so that `trunkline rollout` reads both alike."""
    model = service.current
    reasons = service.why_not_ready()
    return {
        "status": "stopping" if service.draining else "not ready" if reasons else "ok",
        "reasons": reasons,
        "name": model.name,
        "version": model.version or "",
        "digests": {"bundle": model.digest},
        "rollout": asdict(service.rollout),
    }


def _own_version() -> str:
    return package_version("trunkline")


def _say(describe: Callable[[], dict[str, Any]]) -> Endpoint:
    async def say(request: Request) -> Response:
        return _json(describe())

    return say
