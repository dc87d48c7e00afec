"""Around every request: its id, its answer when it fails, its line in the access log, its metrics."""

from __future__ import annotations

import itertools
import logging
import re
import time
import uuid
from datetime import UTC, datetime

import orjson
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from flows.serving.bodies import RequestError
from flows.serving.vision.service import Exchange, VisionService

EXCHANGE = "trunkline.exchange"
"""Key of the `Exchange` in the ASGI scope."""
CLOSE = (b"connection", b"close")
INFERENCE = ("/infer", "/v1/classify")  # ends of the routes that ask the network
GONE = 499  # in logs and metrics only: nobody was there to be answered
REQUEST_ID = re.compile(r"[!-~]{1,128}")
_PREFIX, _numbers = uuid.uuid4().hex[:20], itertools.count(1)
"""Ids of this process: unlike others', and made without asking the system for random bytes each time."""


class Gateway:
    """ASGI middleware; the only one."""

    def __init__(self, app: ASGIApp, service: VisionService) -> None:
        self.app = app
        self.service = service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        exchange = Exchange(_request_id(scope), time.monotonic())
        scope[EXCHANGE] = exchange

        async def answer(message: Message) -> None:
            if message["type"] == "http.response.start":
                exchange.status = message["status"]
                headers = [*message.get("headers", ()), *self._headers(exchange)]
                if self.service.draining and CLOSE not in headers:
                    headers.append(CLOSE)
                message = {**message, "headers": headers}
            elif message["type"] == "http.response.body":
                exchange.sent_bytes += len(message.get("body", b""))
            await send(message)

        try:
            await self.app(scope, receive, answer)
        except RequestError as error:
            await _send_error(answer, error.status, error.message, error.headers)
        except ClientDisconnect:
            exchange.status = GONE
            await _send_error(send, 400, "the client closed the connection before it was answered", {})
        except Exception as error:
            logging.getLogger("trunkline.serving").error(
                "%s %s failed (request %s)", scope["method"], scope["path"], exchange.id, exc_info=error
            )
            if exchange.status:  # half an answer has been sent
                raise
            await _send_error(answer, 500, "internal error; the server's log has the details", {})
        finally:
            self._record(scope, exchange)

    def _headers(self, exchange: Exchange) -> list[tuple[bytes, bytes]]:
        headers = [(b"x-request-id", exchange.id.encode())]
        if exchange.model is not None:
            headers.append((b"x-model-version", exchange.model.info.version.encode()))
        return headers

    def _record(self, scope: Scope, exchange: Exchange) -> None:
        total_s = time.monotonic() - exchange.started
        metrics = self.service.metrics
        metrics.requests.labels(exchange.route, str(exchange.status)).inc()
        metrics.request_seconds.labels(exchange.route).observe(total_s)
        if self.service.on_request is not None and exchange.route.endswith(INFERENCE):
            served = exchange.model or self.service.model
            self.service.on_request(served.info, exchange.status, total_s)
        if not self.service.access_log.is_on:
            return
        model = exchange.model
        client = scope.get("client")
        self.service.access_log.write(
            {
                "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
                "request_id": exchange.id,
                "client": client[0] if client else None,
                "method": scope["method"],
                "route": exchange.route,
                "status": exchange.status,
                "bytes": exchange.sent_bytes,
                "total_ms": round(total_s * 1e3, 3),
                "queue_ms": round(exchange.queue_s * 1e3, 3),
                "compute_ms": round(exchange.compute_s * 1e3, 3),
                "batch_size": exchange.batch_size,
                "model_version": model.info.version if model else None,
                "digest": model.digest[:12] if model else None,
            }
        )


def _request_id(scope: Scope) -> str:
    """The client's `X-Request-Id` if it is fit for a log line, else a new one."""
    for name, value in scope["headers"]:
        if name == b"x-request-id":
            text = value.decode("latin-1")
            if REQUEST_ID.fullmatch(text):
                return str(text)
    return f"{_PREFIX}{next(_numbers):012x}"


async def _send_error(send: Send, status: int, message: str, headers: dict[str, str]) -> None:
    body = orjson.dumps({"error": message})
    raw = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    raw += [(name.lower().encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": status, "headers": raw})
    await send({"type": "http.response.body", "body": body})
