"""Sections of params.yaml that decide what becomes of a network, and how the pipeline itself runs."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from flows.params.fields import (
    Count,
    Fraction,
    HalfOpenFraction,
    NonNegative,
    OpenFraction,
    Percentage,
    Positive,
    Providers,
    Section,
)


class Export(Section):
    opset: Annotated[int, Field(ge=18, le=25)]
    int8_calibration_images: Positive
    dynamic_batch_max: Annotated[int, Field(ge=2)]
    reference_images: Positive
    embedding_dims: Annotated[int, Field(ge=1, le=256)]


class Parity(Section):
    samples: Positive
    batch_sizes: Annotated[list[Positive], Field(min_length=1)]
    fp32_max_abs_error: NonNegative
    fp32_min_agreement: Fraction
    int8_max_mean_error: NonNegative
    int8_min_agreement: Fraction
    int8_max_accuracy_drop: Fraction
    latency_batch_sizes: Annotated[list[Positive], Field(min_length=1)]
    latency_runs: Positive
    providers: Providers


class Registry(Section):
    model_name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.{}-]+$")]
    language_model_name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.{}-]+$")]


class Promotion(Section):
    """The gates between challenger and champion."""

    require_clean_tree: bool
    min_top1: Fraction
    min_class_recall: Fraction
    max_class_drop: Fraction
    min_gain: Annotated[float, Field(ge=-1.0, le=1.0)]
    gain_rule: Literal["point", "lower"]
    resamples: Annotated[int, Field(ge=100)]
    confidence: OpenFraction
    golden_requests: Positive
    latency_batch_sizes: Annotated[list[Positive], Field(min_length=1)]
    latency_runs: Positive
    max_p95_ms: list[Annotated[float, Field(gt=0.0)]]
    max_memory_mb: Annotated[float, Field(gt=0.0)]
    max_size_mb: Annotated[float, Field(gt=0.0)]
    require_approval: bool
    approval_timeout_s: Positive

    @model_validator(mode="after")
    def _a_limit_per_batch_size(self) -> Self:
        sizes = self.latency_batch_sizes
        if sizes != sorted(set(sizes)):
            raise ValueError(f"latency_batch_sizes must ascend without repetition, got {sizes}")
        if len(self.max_p95_ms) != len(sizes):
            raise ValueError(
                f"max_p95_ms has {len(self.max_p95_ms)} limits for {len(sizes)} latency_batch_sizes; "
                "give one for each"
            )
        return self


class Serve(Section):
    host: str
    port: Annotated[int, Field(ge=0, le=65535)]
    variant: Literal["fp32", "int8", "auto"]
    providers: Providers
    threads: Count
    max_upload_mb: Positive
    max_request_images: Positive
    max_batch: Positive
    max_wait_ms: NonNegative
    queue_images: Positive
    max_requests: Positive
    timeout_ms: Positive
    max_timeout_ms: Positive
    drain_s: NonNegative
    access_log: Annotated[str, Field(min_length=1)]
    access_log_mb: Positive
    access_log_files: Count
    golden_tolerance: Fraction
    golden_int8_agreement: Fraction
    poll_s: Annotated[float, Field(gt=0.0)]
    retry_s: Annotated[float, Field(gt=0.0)]
    keep_versions: Annotated[int, Field(ge=2)]

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.max_request_images > self.queue_images:
            raise ValueError(
                f"max_request_images {self.max_request_images} must not exceed queue_images "
                f"{self.queue_images}"
            )
        if self.timeout_ms > self.max_timeout_ms:
            raise ValueError(
                f"timeout_ms {self.timeout_ms} must not exceed max_timeout_ms {self.max_timeout_ms}"
            )
        return self


class Placement(Section):
    max_latency_ms: Annotated[float, Field(gt=0.0)]
    max_memory_mb: Annotated[float, Field(gt=0.0)]
    max_wait_ms: NonNegative


class Rollout(Section):
    servers: list[Annotated[str, Field(pattern=r"^https?://[^/\s]+/?$")]]
    language_servers: list[Annotated[str, Field(pattern=r"^https?://[^/\s]+/?$")]]
    wait_s: NonNegative
    poll_s: Annotated[float, Field(gt=0.0)]
    request_s: Annotated[float, Field(gt=0.0)]
    rollback_on_failure: bool


class Monitor(Section):
    record: bool
    sample_fraction: Annotated[float, Field(gt=0.0, le=1.0)]
    max_images_per_s: Annotated[float, Field(gt=0.0)]
    file_mb: Positive
    max_mb: Positive
    keep_days: Positive
    hours: Annotated[float, Field(gt=0.0)]
    min_images: Annotated[int, Field(ge=2)]
    min_requests: Positive
    alpha: OpenFraction
    min_effect: Fraction
    families: Annotated[
        list[Literal["embedding", "pixels", "predictions", "confidence"]], Field(min_length=1)
    ]
    max_p95_ms: Annotated[float, Field(gt=0.0)]
    max_error_fraction: Fraction
    cooldown_hours: NonNegative

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.max_mb < 2 * self.file_mb:
            raise ValueError(f"max_mb {self.max_mb} must be at least twice file_mb {self.file_mb}")
        if len(set(self.families)) != len(self.families):
            raise ValueError(f"families must not repeat, got {self.families}")
        return self


class Tracking(Section):
    uri: Annotated[str, Field(min_length=1)]
    artifacts: Annotated[str, Field(min_length=1)]
    experiment: Annotated[str, Field(min_length=1)]
    timeout_s: Positive
    patience_s: NonNegative


class Services(Section):
    """The servers and the worker of `trunkline up`."""

    host: Annotated[str, Field(min_length=1)]
    prefect_port: Annotated[int, Field(ge=1, le=65535)]
    mlflow_port: Annotated[int, Field(ge=1, le=65535)]
    work_pool: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]+$")]
    parallel_runs: Positive
    start_patience_s: Annotated[float, Field(gt=0.0)]
    stop_patience_s: Annotated[float, Field(gt=0.0)]
    log_mb: Positive

    @model_validator(mode="after")
    def _ports_differ(self) -> Self:
        if self.prefect_port == self.mlflow_port:
            raise ValueError(f"prefect_port and mlflow_port must differ, both are {self.mlflow_port}")
        return self


class Pipeline(Section):
    control: bool
    parallel_stages: Positive
    retries: Count
    smoke_images: Positive


class StudyAnalysis(Section):
    """What the stage `study` makes of a table of cells."""

    budget: NonNegative
    images: Count
    draws: Annotated[int, Field(ge=20, le=100_000)]
    law_draws: Annotated[int, Field(ge=20, le=100_000)]
    seed: Count


class Study(Section):
    """The grid of a data-scaling study, and how its table is analysed."""

    models: Annotated[list[str], Field(min_length=1)]
    percentages: Annotated[list[Percentage], Field(min_length=1)]
    steps: Annotated[list[Positive], Field(min_length=1)]
    seeds: Annotated[list[Count], Field(min_length=1)]
    leave_out: list[Annotated[tuple[str, Percentage], Field(strict=False)]]
    warmup_fraction: HalfOpenFraction
    metric: Annotated[str, Field(pattern=r"^([\w-]+\.[\w.-]+)?$")]
    extra_losses: bool
    corpus: str
    cells: Annotated[str, Field(min_length=1)]
    analysis: StudyAnalysis

    @model_validator(mode="after")
    def _nothing_twice(self) -> Self:
        for name in ("models", "percentages", "steps", "seeds"):
            values = getattr(self, name)
            if len(set(values)) != len(values):
                raise ValueError(f"{name} must not repeat, got {values}")
        return self

    @model_validator(mode="after")
    def _leaves_out_what_is_there(self) -> Self:
        for model, percentage in self.leave_out:
            if model not in self.models or percentage not in self.percentages:
                raise ValueError(f"leave_out names [{model}, {percentage}], which is not in the grid")
        return self


class Sweep(Section):
    parallel: Positive
    max_points: Positive
    gpus_per_point: Count
    keep_files: bool
    record_experiments: bool
