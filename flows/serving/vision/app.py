"""The web application of the vision server: Open Inference Protocol v2, image classification, health.

    GET  /v2, /v2/health/live, /v2/health/ready
    GET  /v2/models/{name}[/versions/{version}][/ready]
    POST /v2/models/{name}[/versions/{version}]/infer      tensors that are already preprocessed
    POST /v1/classify                                      an image file
    GET  /healthz                                          which model exactly is being served

Bodies are read on the event loop within limits; parsing, decoding and inference run in worker threads that
share the one session. Every error is `{"error": "one sentence"}`.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import anyio
import numpy as np
from anyio import to_thread
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from numpy.typing import NDArray
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from flows.serving.package import ModelPackage
from flows.serving.session import LOGITS, Session
from flows.serving.vision import protocol
from flows.serving.vision.protocol import RequestError
from flows.serving.vision.uploads import extract_image, prepare_image, read_body

TOP_K = 5
MAX_IN_FLIGHT = 32  # requests with a body that are held at once; more get 503
T = TypeVar("T")


@dataclass(frozen=True)
class ServedModel:
    """Which model of the registry the package is."""

    name: str
    version: str
    variant: str  # fp32 | int8
    git_commit: str  # of the run that trained it


@dataclass(frozen=True)
class Limits:
    """Bounds on one request."""

    max_upload_bytes: int
    max_batch: int
    max_pixels: int


class VisionService:
    """The loaded model and what the routes do with it. `ready` turns false when the server is told to
    stop."""

    def __init__(self, package: ModelPackage, session: Session, limits: Limits, info: ServedModel) -> None:
        self.manifest = package.manifest
        self.image, self.logits = self.manifest.inputs[0], package.output(LOGITS)
        self.digest = package.variant(info.variant).digest
        self.session = session
        self.limits = limits
        self.max_batch = min(limits.max_batch, self.manifest.max_batch)
        self.info = info
        self.ready = True
        self._in_flight = 0
        # more threads than cores only adds memory: each holds a decoded image or a parsed tensor
        self._workers = anyio.CapacityLimiter(max(2, session.threads))

    @asynccontextmanager
    async def admitted(self) -> AsyncIterator[None]:
        """A place among the requests that may hold memory.

        Raises:
            RequestError: 503 when all are taken.
        """
        if self._in_flight >= MAX_IN_FLIGHT:
            raise RequestError(503, f"{MAX_IN_FLIGHT} requests are being answered; try again shortly")
        self._in_flight += 1
        try:
            yield
        finally:
            self._in_flight -= 1

    async def work(self, function: Callable[[], T]) -> T:
        """Run `function` in a worker thread."""
        return await to_thread.run_sync(function, limiter=self._workers)

    def infer(self, body: bytes, header_length: str | None) -> tuple[bytes, dict[str, str]]:
        """Body and headers that answer one inference request."""
        request = protocol.parse_request(
            body, header_length, image=self.image, logits=self.logits, max_batch=self.max_batch
        )
        logits = self.session.run(request.images)
        return protocol.format_response(request, logits, self.logits, self.info.name, self.info.version)

    def classify(self, data: bytes) -> dict[str, Any]:
        """The most probable classes of one encoded image."""
        image = prepare_image(data, self.manifest.preprocessing, self.limits.max_pixels)
        probabilities = softmax(self.session.run(image[np.newaxis])[0])
        best = np.argsort(-probabilities, kind="stable")[:TOP_K]
        top = [
            {
                "label": self.manifest.labels[index],
                "index": int(index),
                "confidence": float(probabilities[index]),
            }
            for index in best
        ]
        return {**top[0], "top": top, "model": self.identity()}

    def identity(self) -> dict[str, str]:
        return {
            "name": self.info.name,
            "version": self.info.version,
            "digest": self.digest,
            "variant": self.info.variant,
        }

    def health(self) -> dict[str, Any]:
        return {
            "status": "ok" if self.ready else "stopping",
            "model": self.info.name,
            "version": self.info.version,
            "variant": self.info.variant,
            "digest": self.digest,
            "digests": {name: variant.digest for name, variant in self.manifest.variants.items()},
            "data_digest": self.manifest.data_digest,
            "git_commit": self.info.git_commit,
            "providers": list(self.session.providers),
            "threads": self.session.threads,
        }

    def metadata(self) -> dict[str, Any]:
        """Model metadata of the protocol."""

        def tensors(specs: Any) -> list[dict[str, Any]]:
            return [
                {"name": spec.name, "datatype": spec.datatype, "shape": list(spec.shape)} for spec in specs
            ]

        return {
            "name": self.info.name,
            "versions": [self.info.version],
            "platform": protocol.ONNX_PLATFORM,
            "inputs": tensors(self.manifest.inputs),
            "outputs": tensors([self.logits]),
        }

    def check_name(self, name: str, version: str | None) -> None:
        """
        Raises:
            RequestError: 404, another model or version than the served one.
        """
        if name != self.info.name:
            raise RequestError(404, f"unknown model {name[:80]!r}; this server has {self.info.name!r}")
        if version is not None and version != self.info.version:
            raise RequestError(
                404, f"unknown version {version[:80]!r} of {name!r}; this server has {self.info.version!r}"
            )


def softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    """(classes,) to probabilities."""
    exponentials = np.exp(logits.astype(np.float64) - logits.max())
    return np.asarray(exponentials / exponentials.sum())


def create_app(package: ModelPackage, session: Session, limits: Limits, info: ServedModel) -> FastAPI:
    """The ASGI application around one loaded model; `app.state.service` is its VisionService."""
    # no interactive pages: they would load scripts from elsewhere
    app = FastAPI(title=protocol.SERVER_NAME, version=info.version, docs_url=None, redoc_url=None)
    service = VisionService(package, session, limits, info)
    app.state.service = service
    _add_error_handlers(app)
    _add_protocol_routes(app, service)

    @app.post("/v1/classify")
    async def classify(request: Request) -> dict[str, Any]:
        async with service.admitted():
            data = await extract_image(request, await read_body(request, limits.max_upload_bytes))
            return await service.work(lambda: service.classify(data))

    @app.get("/healthz")
    async def healthz() -> dict[str, Any]:
        return service.health()

    return app


def _add_protocol_routes(app: FastAPI, service: VisionService) -> None:
    model, version_of_model = "/v2/models/{name}", "/v2/models/{name}/versions/{version}"

    @app.get("/v2")
    async def server_metadata() -> dict[str, Any]:
        return {"name": protocol.SERVER_NAME, "version": "2", "extensions": protocol.EXTENSIONS}

    @app.get("/v2/health/live")
    async def live() -> dict[str, bool]:
        return {"live": True}

    @app.get("/v2/health/ready")
    async def ready() -> JSONResponse:
        return JSONResponse({"ready": service.ready}, status_code=200 if service.ready else 503)

    @app.get(version_of_model)
    @app.get(model)
    async def model_metadata(name: str, version: str | None = None) -> dict[str, Any]:
        service.check_name(name, version)
        return service.metadata()

    @app.get(version_of_model + "/ready")
    @app.get(model + "/ready")
    async def model_ready(name: str, version: str | None = None) -> JSONResponse:
        service.check_name(name, version)
        return JSONResponse({"name": name, "ready": service.ready}, status_code=200 if service.ready else 503)

    @app.post(version_of_model + "/infer")
    @app.post(model + "/infer")
    async def infer(request: Request, name: str, version: str | None = None) -> Response:
        service.check_name(name, version)
        async with service.admitted():
            body = await read_body(request, service.limits.max_upload_bytes)
            header_length = request.headers.get(protocol.HEADER_LENGTH)
            content, headers = await service.work(lambda: service.infer(body, header_length))
        return Response(content, headers=headers)


def _add_error_handlers(app: FastAPI) -> None:
    def answer(status: int, message: str) -> JSONResponse:
        # an unread body would be taken for the next request on this connection
        headers = {"Connection": "close"} if status in (408, 413, 503) else {}
        return JSONResponse({"error": message}, status_code=status, headers=headers)

    @app.exception_handler(RequestError)
    async def request_error(request: Request, error: RequestError) -> JSONResponse:
        return answer(error.status, error.message)

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> JSONResponse:
        return answer(error.status_code, str(error.detail))

    @app.exception_handler(ClientDisconnect)
    async def disconnected(request: Request, error: ClientDisconnect) -> JSONResponse:
        return answer(400, "the client closed the connection before the body was complete")

    @app.exception_handler(Exception)
    async def bug(request: Request, error: Exception) -> JSONResponse:
        logging.getLogger("trunkline.serving").error(
            "%s %s failed", request.method, request.url.path, exc_info=error
        )
        return answer(500, "internal error; the server's log has the details")
