"""Requests that nobody would write: generated from the OpenAPI document, and images with wrong bytes.

Nothing here may be answered with a 5xx, and after all of it the server still answers as before.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, Phase, given, settings
from PIL import Image
from served_digits import LIMITS, loaded
from serving_workspace import Exported

from flows.serving.session import Session
from flows.serving.vision.app import create_app

schemathesis = pytest.importorskip("schemathesis", reason="schemathesis is not installed")
from schemathesis.checks import load_all_checks  # noqa: E402
from schemathesis.generation import GenerationMode  # noqa: E402
from schemathesis.specs.openapi import checks as openapi_checks  # noqa: E402

CASES = 12  # per operation
MUTANTS = 40  # per format
load_all_checks()


@pytest.fixture(scope="module")
def client(exported: Exported, session: Session) -> Iterator[TestClient]:
    with TestClient(create_app(loaded(exported, session), LIMITS)) as client:
        yield client


@pytest.fixture(scope="module")
def document(exported: Exported, session: Session) -> object:
    app = create_app(loaded(exported, session), LIMITS)

    async def without_lifespan(scope: Any, receive: Any, send: Any) -> None:
        """schemathesis starts and stops the application with each case, which would close the service."""
        if scope["type"] == "lifespan":
            for step in ("startup", "shutdown"):
                await receive()
                await send({"type": f"lifespan.{step}.complete"})
        else:
            await app(scope, receive, send)

    return schemathesis.openapi.from_asgi("/openapi.json", without_lifespan)


@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE])
def test_the_server_keeps_what_its_document_promises(document: Any, mode: GenerationMode) -> None:
    """By hand, not by schemathesis' pytest plugin, which does not know this pytest."""
    operations = [result.ok() for result in document.get_all_operations()]
    assert len(operations) >= 17
    for operation in operations:
        if mode == GenerationMode.NEGATIVE and not (operation.body or len(list(operation.iter_parameters()))):
            continue  # nothing that could be wrong

        @settings(
            max_examples=CASES,
            deadline=None,
            derandomize=True,
            database=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(case=operation.as_strategy(generation_mode=mode))
        def check(case: Any) -> None:
            # A tensor's number of values is the product of its shape, and bytes are an image or not: a body
            # can follow the document and still be refused. And HEAD is answered wherever GET is.
            case.call_and_validate(
                excluded_checks=[openapi_checks.positive_data_acceptance, openapi_checks.unsupported_method]
            )

        check()


def encoded(kind: str) -> bytes:
    generator = np.random.default_rng(1)
    image = Image.fromarray(generator.integers(0, 256, (24, 20, 3), dtype=np.uint8))
    buffer = io.BytesIO()
    options = {"save_all": True, "append_images": [image.rotate(90)]} if kind == "GIF" else {}
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def mutate(data: bytes, generator: np.random.Generator) -> bytes:
    """Flip, cut, repeat or overwrite; half of the time near the header, where lengths and sizes are."""
    changed = bytearray(data)
    for _ in range(int(generator.integers(1, 6))):
        near = bool(generator.integers(2))
        position = int(generator.integers(min(len(changed), 64) if near else len(changed)))
        kind = int(generator.integers(4))
        if kind == 0:
            changed[position] ^= 1 << int(generator.integers(8))
        elif kind == 1:
            changed[position : position + 4] = generator.bytes(4)
        elif kind == 2 and len(changed) > 8:
            del changed[position : position + int(generator.integers(1, 200))]
        else:
            changed[position:position] = changed[position : position + int(generator.integers(1, 200))]
        if not changed:
            return b""
    return bytes(changed)


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's remarks
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "BMP", "TIFF", "PPM", "WEBP"])
def test_images_with_wrong_bytes_are_answered_or_refused(
    client: TestClient, exported: Exported, kind: str
) -> None:
    before = client.post("/v1/classify", content=exported.encoded[0]).json()
    generator, data = np.random.default_rng(2), encoded(kind)
    assert client.post("/v1/classify", content=data).status_code == 200
    statuses = set()
    for number in range(MUTANTS):
        mutant = mutate(data, generator)
        answer = client.post("/v1/classify", content=mutant)
        assert answer.status_code in (200, 400, 413, 415, 422), (number, answer.text)
        statuses.add(answer.status_code)
    assert statuses - {200}, "mutations that never break anything test nothing"
    assert client.post("/v1/classify", content=exported.encoded[0]).json() == before
    service = client.app.state.service  # type: ignore[attr-defined]
    assert (service.in_flight, service.batcher.queued_images) == (0, 0)
