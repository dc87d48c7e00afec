"""What clients' requests took, for Prometheus: `GET /metrics` (spec 17).

Native names begin with `trunkline_`. The same series again under the names that vLLM uses, for dashboards
that know those: `VllmAlias`. The engine's own series are appended as it says them. A request id is never a
label.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    generate_latest,
)
from prometheus_client.process_collector import ProcessCollector

from flows.serving.lamina.api.engine_link import Call, Event
from flows.serving.lamina.api.series import VllmAlias, without_families
from flows.serving.lamina.requests import Finished, Heartbeat, Rejected, TokenEvent
from flows.serving.lamina.rows import PAGE_TOKENS

CONTENT_TYPE = CONTENT_TYPE_LATEST
# vLLM's buckets: first token from 1 ms to 2560 s, whole requests from 0.3 s to 7680 s
FIRST_TOKEN_S = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0,
    80.0, 160.0, 640.0, 2560.0,
)  # fmt: skip
BETWEEN_TOKENS_S = (
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5,
    10.0, 20.0, 40.0, 80.0,
)  # fmt: skip
REQUEST_S = (
    0.01, 0.05, 0.1, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0,
    240.0, 480.0, 960.0, 1920.0, 7680.0,
)  # fmt: skip
TOKENS = tuple(float(factor * 10**power) for power in range(6) for factor in (1, 2, 5))
REASONS = ("stop", "length", "cancelled", "error")
STATES = ("loading", "ready", "recovering", "draining")


class Metrics:
    """All series of one application; a registry of its own."""

    def __init__(self, model_name: str, vllm_alias: bool) -> None:
        registry = CollectorRegistry()
        self.registry = registry
        ProcessCollector(registry=registry)

        def counter(name: str, text: str, labels: Sequence[str] = ()) -> Counter:
            return Counter(f"trunkline_{name}", text, labels, registry=registry)

        def gauge(name: str, text: str, labels: Sequence[str] = ()) -> Gauge:
            return Gauge(f"trunkline_{name}", text, labels, registry=registry)

        def histogram(name: str, text: str, buckets: Sequence[float]) -> Histogram:
            return Histogram(f"trunkline_{name}", text, buckets=buckets, registry=registry)

        self.requests = counter("http_requests", "HTTP requests answered.", ["route", "status"])
        self.rejected = counter("rejected", "Requests not admitted, by reason.", ["reason"])
        self.cancelled = counter("cancelled", "Requests that their client gave up or deleted.")
        self.slow_readers = counter("slow_readers", "Streams given up because nobody read them.")
        self.expired = counter("deadline_expired", "Requests past a deadline: queue, running.", ["stage"])
        self.success = counter(
            "request_success", "Requests that came to an end, by finish reason.", ["finished_reason"]
        )
        self.prompt_tokens = counter("prompt_tokens", "Prompt tokens of requests that were computed.")
        self.generation_tokens = counter("generation_tokens", "Tokens generated for clients.")
        self.preemptions = counter("preemptions", "Requests put back because pages ran out.")

        self.first_token = histogram("time_to_first_token_seconds", "Arrival to first token.", FIRST_TOKEN_S)
        self.between_tokens = histogram(
            "inter_token_latency_seconds", "Time between two tokens.", BETWEEN_TOKENS_S
        )
        self.request_s = histogram("e2e_request_latency_seconds", "Arrival to last token.", REQUEST_S)
        self.queue_s = histogram("request_queue_time_seconds", "Until the first row was computed.", REQUEST_S)
        self.prefill_s = histogram("request_prefill_time_seconds", "First row to first token.", REQUEST_S)
        self.decode_s = histogram("request_decode_time_seconds", "First token to the end.", REQUEST_S)
        self.inference_s = histogram("request_inference_time_seconds", "First row to the end.", REQUEST_S)
        self.request_prompt = histogram("request_prompt_tokens", "Prompt tokens of a request.", TOKENS)
        self.request_generation = histogram("request_generation_tokens", "Tokens of an answer.", TOKENS)
        self.request_max_tokens = histogram("request_params_max_tokens", "max_tokens asked for.", TOKENS)
        self.request_recoveries = histogram(
            "request_recoveries", "Times that a request was recovered.", (0, 1, 2, 3, 5)
        )

        self.running = gauge("requests_running", "Requests that the engine computes.")
        self.waiting = gauge("requests_waiting", "Requests in the engine's queue.")
        self.waiting_tokens = gauge("waiting_tokens", "Prompt tokens in the engine's queue.")
        self.kv_usage = gauge("kv_usage_ratio", "Share of the pages in use, 0 to 1.")
        self.engine_up = gauge("engine_up", "1 while the engine is heard.")
        self.engine_state = gauge("engine_state", "1 for the state of the engine.", ["state"])
        self.worker_up = gauge("worker_up", "1 while the process is there.", ["role", "worker"])
        self.epoch = gauge("epoch", "Counts changes of the set of attention workers.")
        self.batch_invariant = gauge(
            "batch_invariant", "1 if the self-check found no bit depend on the batch."
        )
        self.since_progress = gauge(
            "since_progress_seconds", "Since a row was computed while something runs."
        )
        self.cache_config = gauge(
            "cache_config_info", "1; sizes of the KV cache.", ["block_size", "num_gpu_blocks"]
        )

        self.switches = counter("switches", "New versions that were tried: switched, failed.", ["result"])
        self.registry_errors = counter("registry_errors", "Looks at the model registry that failed.")
        self.last_switch = gauge(
            "last_switch_timestamp_seconds", "When the served version was taken up, Unix time."
        )
        self.model_info = gauge(
            "model_info", "1 for the model that is being served.", ["name", "version", "digest"]
        )

        for result in ("switched", "failed"):
            self.switches.labels(result)
        for reason in ("queue_full", "no_capacity", "draining", "engine_unavailable", "too_many_streams"):
            self.rejected.labels(
                reason
            )  # present from the start, so that a rate of them is 0 and not missing
        for reason in REASONS:
            self.success.labels(reason)
        for stage in ("queue", "running"):
            self.expired.labels(stage)
        self._token_times: dict[str, float] = {}
        self._preemptions_seen = 0
        self._alias = VllmAlias(registry, model_name) if vllm_alias else None

    def render(self, engine_text: str = "") -> bytes:
        """Everything, then what the engine says under names that are not ours."""
        text = generate_latest(self.registry)
        if self._alias is not None:
            text += generate_latest(self._alias)
        return (
            text + without_families(engine_text, {metric.name for metric in self.registry.collect()}).encode()
        )

    # ---- observed by the link ----

    def observe(self, call: Call, event: Event) -> None:
        now = time.monotonic()
        match event:
            case TokenEvent():
                self.generation_tokens.inc()
                if event.index == 0:
                    self.first_token.observe(now - call.started)
                else:
                    self.between_tokens.observe(now - self._token_times.get(call.id, now))
                self._token_times[call.id] = now
            case Rejected():
                self._token_times.pop(call.id, None)
                self.rejected.labels(event.code).inc()
            case Finished():
                self._token_times.pop(call.id, None)
                self._observe_end(call, event, now)

    def _observe_end(self, call: Call, end: Finished, now: float) -> None:
        self.success.labels(end.reason).inc()
        if end.reason == "cancelled":
            self.cancelled.inc()
        if end.code in ("deadline_exceeded", "queue_deadline_exceeded"):
            self.expired.labels("running" if end.prefill_s or call.next_index else "queue").inc()
        self.request_s.observe(now - call.started)
        self.queue_s.observe(end.queue_s)
        self.request_max_tokens.observe(call.submit.max_tokens)
        self.request_prompt.observe(len(call.submit.prompt))
        self.request_generation.observe(call.next_index)
        self.request_recoveries.observe(end.recoveries)
        if call.next_index:  # what never ran has no such times
            self.prompt_tokens.inc(len(call.submit.prompt))
            self.prefill_s.observe(end.prefill_s)
            self.decode_s.observe(end.decode_s)
            self.inference_s.observe(end.prefill_s + end.decode_s)

    def serve_model(self, name: str, version: str, digest: str, when: float) -> None:
        self.model_info.clear()
        self.model_info.labels(name, version, digest).set(1)
        self.last_switch.set(when)

    def new_engine(self) -> None:
        """Heartbeats from now on are of another engine, which counts from 0."""
        self._preemptions_seen = 0
        self.worker_up.clear()

    def beat(self, heartbeat: Heartbeat) -> None:
        self.running.set(heartbeat.running)
        self.waiting.set(heartbeat.waiting)
        self.waiting_tokens.set(heartbeat.waiting_tokens)
        self.kv_usage.set(heartbeat.pages_used / heartbeat.pages if heartbeat.pages else 0.0)
        self.epoch.set(heartbeat.epoch)
        self.batch_invariant.set(heartbeat.batch_invariant)
        self.since_progress.set(heartbeat.since_progress_s)
        for number, up in enumerate(heartbeat.workers_up):
            self.worker_up.labels("attention", str(number)).set(up)
        for state in STATES:
            self.engine_state.labels(state).set(state == heartbeat.state)
        # a smaller number is that of an engine that was started again
        seen = self._preemptions_seen if heartbeat.preemptions >= self._preemptions_seen else 0
        self.preemptions.inc(heartbeat.preemptions - seen)
        self._preemptions_seen = heartbeat.preemptions
        self.cache_config.clear()
        self.cache_config.labels(str(PAGE_TOKENS), str(heartbeat.pages)).set(1)
