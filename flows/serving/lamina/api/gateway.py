"""Around every request: its id, the client's key, its answer when it fails, its metrics.

Prompts and answers are never logged.
"""

from __future__ import annotations

import hashlib
import hmac
import itertools
import logging
import re
import uuid
from dataclasses import dataclass
from pathlib import Path

import orjson
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from flows.errors import ConfigError
from flows.serving.bodies import RequestError
from flows.serving.lamina.api.errors import ApiError, error_body
from flows.serving.lamina.api.service import Service
from flows.serving.lamina.api.streaming import SlowReader

EXCHANGE = "trunkline.exchange"
"""Key of the `Exchange` in the ASGI scope."""
GONE = 499  # in metrics only: nobody was there to be answered
REQUEST_ID = re.compile(r"[!-~]{1,128}")
CLOSE = (b"connection", b"close")
GUARDED = "/v1/"  # health and metrics need no key
_PREFIX, _numbers = uuid.uuid4().hex[:20], itertools.count(1)

log = logging.getLogger("trunkline.serving")


@dataclass
class Exchange:
    id: str
    route: str = "other"
    status: int = 0


class ApiKey:
    """What clients present as `Authorization: Bearer …`, compared in constant time."""

    def __init__(self, key: str) -> None:
        self._digest = _digest(key.encode())

    def fits(self, scope: Scope) -> bool:
        for name, value in scope["headers"]:
            if name == b"authorization":
                scheme, _, presented = value.partition(b" ")
                return scheme.lower() == b"bearer" and hmac.compare_digest(
                    _digest(presented.strip()), self._digest
                )
        return False


def read_api_key(path: str) -> ApiKey | None:
    """None if no file is named.

    Raises:
        ConfigError: it cannot be read, or holds no key.
    """
    if not path:
        return None
    try:
        key = Path(path).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not a text"
        raise ConfigError(f"lamina.http.api_key_file {path!r} cannot be read: {reason}") from None
    if not re.fullmatch(r"[!-~]+", key):
        raise ConfigError(f"lamina.http.api_key_file {path!r} has to hold one key, without spaces")
    return ApiKey(key)


class Gateway:
    """ASGI middleware; the only one."""

    def __init__(self, app: ASGIApp, service: Service, key: ApiKey | None) -> None:
        self.app = app
        self.service = service
        self.key = key

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        exchange = Exchange(_request_id(scope))
        scope[EXCHANGE] = exchange

        async def answer(message: Message) -> None:
            if message["type"] == "http.response.start":
                exchange.status = message["status"]
                headers = [*message.get("headers", ()), (b"x-request-id", exchange.id.encode())]
                if self.service.draining and CLOSE not in headers:
                    headers.append(CLOSE)
                message = {**message, "headers": headers}
            await send(message)

        try:
            if self.key is not None and scope["path"].startswith(GUARDED) and not self.key.fits(scope):
                raise ApiError(401, "the API key is missing or wrong", code="invalid_api_key")
            await self.app(scope, receive, answer)
        except RequestError as error:
            await _send_error(answer, error)
        except ClientDisconnect:
            exchange.status = GONE
        except SlowReader:
            exchange.status = GONE
            self.service.metrics.slow_readers.inc()
            log.warning("request %s: nobody reads the stream, it is given up", exchange.id)
        except Exception as error:
            log.error(
                "%s %s failed (request %s)", scope["method"], scope["path"], exchange.id, exc_info=error
            )
            if exchange.status:  # half an answer has been sent
                raise
            await _send_error(answer, ApiError(500, "internal error; the server's log has the details"))
        finally:
            self.service.metrics.requests.labels(exchange.route, str(exchange.status)).inc()


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()  # equal lengths: the comparison then says nothing about the key's


def _request_id(scope: Scope) -> str:
    """The client's `X-Request-Id` if it is fit for a log line, else a new one."""
    for name, value in scope["headers"]:
        if name == b"x-request-id":
            text = value.decode("latin-1")
            if REQUEST_ID.fullmatch(text):
                return str(text)
    return f"{_PREFIX}{next(_numbers):012x}"


async def _send_error(send: Send, error: RequestError) -> None:
    value = error.body() if isinstance(error, ApiError) else error_body(error.status, error.message)
    body = orjson.dumps(value)
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    headers += [(name.lower().encode(), text.encode()) for name, text in error.headers.items()]
    if error.status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
