"""What the server counts, for Prometheus: `GET /metrics`.

Every application has a registry of its own: several in one process (tests) do not add up.
"""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    generate_latest,
)
from prometheus_client.process_collector import ProcessCollector

SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0)
IMAGES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
CONTENT_TYPE = CONTENT_TYPE_LATEST


class Metrics:
    """All series of one application."""

    def __init__(self) -> None:
        registry = CollectorRegistry()
        self.registry = registry
        ProcessCollector(registry=registry)
        self.requests = Counter(
            "trunkline_requests", "Requests answered.", ["route", "status"], registry=registry
        )
        self.request_seconds = Histogram(
            "trunkline_request_seconds",
            "Time from the request's first byte to the answer's last.",
            ["route"],
            buckets=SECONDS,
            registry=registry,
        )
        self.queue_seconds = Histogram(
            "trunkline_queue_seconds",
            "Time a request waited for its first batch.",
            buckets=SECONDS,
            registry=registry,
        )
        self.batch_seconds = Histogram(
            "trunkline_batch_seconds",
            "Time the network ran for one batch.",
            buckets=SECONDS,
            registry=registry,
        )
        self.batch_images = Histogram(
            "trunkline_batch_images", "Images in one batch.", buckets=IMAGES, registry=registry
        )
        self.rejected = Counter(
            "trunkline_rejected",
            "Requests turned away: queue_full, too_many_requests, stopping.",
            ["reason"],
            registry=registry,
        )
        self.expired = Counter("trunkline_expired", "Requests past their deadline.", registry=registry)
        self.cancelled = Counter(
            "trunkline_cancelled", "Requests whose client went away while they waited.", registry=registry
        )
        self.switches = Counter(
            "trunkline_switches",
            "New versions that were tried: switched, failed.",
            ["result"],
            registry=registry,
        )
        self.registry_errors = Counter(
            "trunkline_registry_errors", "Looks at the model registry that failed.", registry=registry
        )
        self.last_switch = Gauge(
            "trunkline_last_switch_timestamp_seconds",
            "When the served version was loaded, Unix time.",
            registry=registry,
        )
        self.model_info = Gauge(
            "trunkline_model_info",
            "1 for the model that is being served.",
            ["name", "version", "digest", "variant", "provider"],
            registry=registry,
        )
        # present from the start, so that a rate of them is 0 and not missing
        for reason in ("queue_full", "too_many_requests", "stopping"):
            self.rejected.labels(reason)
        for result in ("switched", "failed"):
            self.switches.labels(result)

    def watch(self, name: str, text: str, value: Callable[[], float]) -> None:
        """A gauge that asks `value` whenever it is read."""
        Gauge(f"trunkline_{name}", text, registry=self.registry).set_function(value)

    def serve_model(
        self, name: str, version: str, digest: str, variant: str, provider: str, when: float
    ) -> None:
        self.model_info.clear()
        self.model_info.labels(name, version, digest, variant, provider).set(1)
        self.last_switch.set(when)

    def render(self) -> bytes:
        return generate_latest(self.registry)
