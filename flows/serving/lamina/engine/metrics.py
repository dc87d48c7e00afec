"""What the engine counts, for Prometheus. The HTTP process appends this text to its own (spec section 17)."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

SECONDS = (0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
PARTS = {
    "qx": "qx", "post_qx": "post_qx", "kvx": "kvx", "qx_kvx": "post_qx_kvx", "post_qx_kvx": "post_qx_kvx",
    "post": "post", "attention": "attn",
}  # fmt: skip


class EngineMetrics:
    """All series of one engine process."""

    def __init__(self) -> None:
        registry = CollectorRegistry()
        self.registry = registry
        self.layer_seconds = Histogram(
            "trunkline_layer_time_seconds",
            "Mean time of a layer in one iteration, by what it went into; attn is the wait for attention.",
            ["part"], buckets=SECONDS, registry=registry,
        )  # fmt: skip
        self.iteration_seconds = Histogram(
            "trunkline_iteration_seconds", "One iteration.", buckets=SECONDS, registry=registry
        )
        self.iteration_rows = Histogram(
            "trunkline_iteration_rows", "Rows of one iteration.", buckets=ROWS, registry=registry
        )
        self.overlap_saved = Counter(
            "trunkline_overlap_saved_seconds",
            "Time that sending Q early has saved, by what calibration measured for as many rows.",
            registry=registry,
        )
        self.link_bytes = Counter(
            "trunkline_link_bytes", "Between engine and attention worker.", ["worker", "dir"],
            registry=registry,
        )  # fmt: skip
        self.recoveries = Counter(
            "trunkline_recoveries",
            "By what brought the keys and values back: resend, recompute, parity, rebuild, journal.",
            ["policy"], registry=registry,
        )  # fmt: skip
        self.recovery_seconds = Histogram(
            "trunkline_recovery_seconds", "From the loss until the next iteration could begin.",
            buckets=(0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0), registry=registry,
        )  # fmt: skip
        self.replayed = Counter(
            "trunkline_tokens_replayed", "Rows computed again after a loss.", registry=registry
        )
        self.preemptions = Counter(
            "trunkline_preemptions", "Requests put back because pages ran out.", registry=registry
        )
        self.pages = Gauge("trunkline_kv_pages", "Pages of keys and values.", ["state"], registry=registry)
        self.micro_batches = Gauge(
            "trunkline_micro_batches", "Of the last iteration: 1 sequential, 2 pipelined.", registry=registry
        )
        for policy in ("resend", "recompute", "parity", "rebuild", "journal"):
            self.recoveries.labels(policy)

    def layers(self, seconds: dict[str, float], layers: int) -> None:
        """Times of one run, by kind of program."""
        for kind, total in seconds.items():
            self.layer_seconds.labels(PARTS[kind]).observe(total / layers)

    def render(self) -> str:
        return generate_latest(self.registry).decode()
