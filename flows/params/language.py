"""Section `lamina` of params.yaml: language models served with attention elsewhere (docs/lamina.md)."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from flows.params.fields import Count, NonNegative, Positive, Section


class LaminaModel(Section):
    max_context: Count
    split: Literal["auto"] | bool
    threads: Count


class LaminaCluster(Section):
    attention_workers: Annotated[int, Field(ge=0, le=64)]
    spares: Annotated[int, Field(ge=0, le=64)]
    worker_threads: Positive
    partition: Literal["head", "request", "sequence"]
    weights: Literal["equal", "auto"] | Annotated[list[Annotated[float, Field(gt=0.0)]], Field(min_length=1)]
    layer_timeout_ms: Count
    heartbeat_ms: Annotated[int, Field(ge=20)]
    silent_heartbeats: Annotated[int, Field(ge=3)]
    replacement_timeout_s: NonNegative


class LaminaKv(Section):
    mb_per_worker: Positive
    reserve: Literal["full", "watermark"]
    redundancy: Literal["none", "parity"]


class LaminaSched(Section):
    max_rows: Annotated[int, Field(ge=1, le=4096)]
    max_requests: Annotated[int, Field(ge=1, le=4096)]
    micro_batches: Literal["auto", 1, 2]
    tbt_slo_ms: NonNegative
    ageing_s: Annotated[float, Field(gt=0.0)]


class LaminaAdmit(Section):
    max_queued_requests: Count
    max_queued_tokens: Positive
    queue_deadline_ms: Positive
    total_deadline_ms: Positive


class LaminaRecover(Section):
    max_recoveries: Count
    journal: bool
    journal_mb: Positive


class LaminaHttp(Section):
    host: str
    port: Annotated[int, Field(ge=0, le=65535)]
    api_key_file: str
    max_body_kb: Positive
    max_stop_strings: Positive
    max_streams: Positive
    slow_reader_kb: Positive
    drain_timeout_s: NonNegative
    stall_s: Annotated[float, Field(gt=0.0)]


class LaminaMetrics(Section):
    vllm_alias: bool


class LaminaExact(Section):
    require_batch_invariant: bool


class Lamina(Section):
    model: LaminaModel
    cluster: LaminaCluster
    kv: LaminaKv
    sched: LaminaSched
    admit: LaminaAdmit
    recover: LaminaRecover
    http: LaminaHttp
    metrics: LaminaMetrics
    exact: LaminaExact

    @property
    def processes(self) -> int:
        """Attention workers to start: those that compute, the one with parity, spares."""
        cluster = self.cluster
        parity = self.kv.redundancy == "parity"
        return cluster.attention_workers + cluster.spares + parity if cluster.attention_workers else 0

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.kv.redundancy == "parity" and (
            self.cluster.partition != "head" or not self.cluster.attention_workers
        ):
            raise ValueError("kv.redundancy parity needs attention workers with cluster.partition head")
        return self
