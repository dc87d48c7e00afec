"""The digits' classifier behind the web application, in this process."""

from __future__ import annotations

from typing import Any

from serving_workspace import Exported

from flows.serving.session import Session
from flows.serving.vision.model import LoadedModel, ServedModel
from flows.serving.vision.service import Limits

LIMITS = Limits(
    max_upload_bytes=200_000,
    max_request_images=8,
    max_pixels=40_000,
    queue_images=64,
    max_requests=32,
    timeout_s=60.0,
    max_timeout_s=120.0,
)


def loaded(exported: Exported, session: Session, **changes: Any) -> LoadedModel:
    """The exported model as version 3 of `digits`."""
    arguments: dict[str, Any] = {"max_batch": 8, "max_wait_ms": 2.0} | changes
    version = arguments.pop("version", "3")
    info = ServedModel("digits", version, "fp32", "c0ffee")
    return LoadedModel(exported.package, session, info, **arguments)
