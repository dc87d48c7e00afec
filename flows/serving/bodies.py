"""Request bodies of strangers, read within limits, and the refusal of a request."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

from starlette.requests import Request

BODY_TIMEOUT_S = 30.0  # a client that sends slower than this holds memory for nothing
DISCARDED_LIMITS = 4  # multiples of the limit that are read of an oversized body before the connection is cut
CLOSE = {"Connection": "close"}
"""With an answer that is sent before the body was read: the rest would be taken for the next request."""


class RequestError(Exception):
    """Why a request is not answered as asked: `status`, `headers` and `{"error": message}`."""

    def __init__(self, status: int, message: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.headers = dict(headers or {})


async def read_body(request: Request, limit: int) -> bytes:
    """The whole body, at most `limit` bytes.

    A larger one is not kept, but read on and thrown away for a while: an answer that is sent while the client
    still sends is lost, because closing a connection with unread data resets it. Clients that asked first
    (`Expect: 100-continue`, as curl does) are refused before they send anything.

    Raises:
        RequestError: 413 too large (announced or found while reading), 408 too slow, 400 a wrong
            Content-Length, 415 a compressed body.
    """
    if (encoding := request.headers.get("content-encoding", "identity")).lower() != "identity":
        # decompressing strangers' bytes would need limits of its own, and images are compressed already
        raise RequestError(
            415, f"Content-Encoding {encoding[:40]!r} is not supported; send the body as it is", CLOSE
        )
    announced = request.headers.get("content-length", "0")
    if not (announced.isascii() and announced.isdigit()):
        raise RequestError(400, "Content-Length is not a number")
    too_large = RequestError(413, f"the body is larger than the limit of {limit} bytes", CLOSE)
    if int(announced) > limit and "expect" in request.headers:
        raise too_large
    body = bytearray()
    received = 0
    try:
        async with asyncio.timeout(BODY_TIMEOUT_S):
            async for chunk in request.stream():
                received += len(chunk)
                if received <= limit:
                    body += chunk
                elif received > DISCARDED_LIMITS * limit:
                    break
                else:
                    body.clear()
    except TimeoutError:
        if received <= limit:
            raise RequestError(408, f"the body did not arrive within {BODY_TIMEOUT_S:g} s", CLOSE) from None
    if max(received, int(announced)) > limit:
        raise too_large
    return bytes(body)
