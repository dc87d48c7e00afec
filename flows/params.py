"""Typed view of params.yaml: every knob once, with its meaning, unit and legal range.

There are no defaults here: the file is the only source. `load()` checks all sections before anything runs and
names the offending key. Overlays (recipes, `--set key=value`) are merged before the check and add no keys.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from flows.errors import ConfigError

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
OpenFraction = Annotated[float, Field(gt=0.0, lt=1.0)]
HalfOpenFraction = Annotated[float, Field(ge=0.0, lt=1.0)]
Count = Annotated[int, Field(ge=0)]
Positive = Annotated[int, Field(ge=1)]
Percentage = Annotated[int, Field(ge=1, le=100)]
NonNegative = Annotated[float, Field(ge=0.0)]
CropScale = Annotated[  # strict=False: YAML has lists, not tuples
    tuple[Annotated[float, Field(gt=0.0, le=1.0)], Annotated[float, Field(gt=0.0, le=1.0)]],
    Field(strict=False),
]
FractionPair = Annotated[tuple[Fraction, Fraction], Field(strict=False)]
PositivePair = Annotated[
    tuple[Annotated[float, Field(gt=0.0)], Annotated[float, Field(gt=0.0)]], Field(strict=False)
]
Providers = Literal["auto"] | Annotated[list[str], Field(min_length=1)]


class Section(BaseModel):
    # strict, so that "8" or true is not silently a number
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class Ingest(Section):
    dataset: Literal["digits", "cifar10", "folder"]
    source: str
    val_fraction: OpenFraction
    test_fraction: HalfOpenFraction
    max_bad_fraction: Fraction
    max_pixels: Positive
    shard_mb: Positive
    split_seed: Count

    @model_validator(mode="after")
    def _splits_leave_training_images(self) -> Self:
        if self.val_fraction + self.test_fraction >= 1.0:
            raise ValueError(
                "val_fraction + test_fraction must be below 1, so that images remain for training"
            )
        return self


class Scale(Section):
    percentages: Annotated[list[Percentage], Field(min_length=1)]
    subset_seed: Count

    @model_validator(mode="after")
    def _ascending(self) -> Self:
        if self.percentages != sorted(set(self.percentages)):
            raise ValueError(f"percentages must ascend without repetition, got {self.percentages}")
        return self


class Model(Section):
    backbone: str
    image_size: Positive
    patch_size: Positive
    window_size: Positive | None

    @model_validator(mode="after")
    def _patches_fit(self) -> Self:
        if self.image_size % self.patch_size:
            raise ValueError(f"patch_size {self.patch_size} must divide image_size {self.image_size}")
        return self


class Loader(Section):
    workers: Count
    cache_mb: Count


class Training(Section):
    """What the training loop and DeepSpeed need; the same for every task."""

    steps: Positive
    batch_size: Positive
    accumulation: Positive
    processes: Literal["auto"] | Positive
    threads: Count
    zero_stage: Annotated[int, Field(ge=0, le=3)]
    zero_offload: Literal["none", "optimizer", "parameters"]
    precision: Literal["fp32", "bf16", "auto"]
    activation_checkpointing: bool | Count
    attention_chunk: Count
    optimizer: Literal["adamw", "sgd"]
    lr: Annotated[float, Field(gt=0.0)]
    warmup_lr: NonNegative
    min_lr: NonNegative
    warmup_steps: Count
    schedule: Literal["cosine", "step"]
    step_at: Fraction
    step_factor: Annotated[float, Field(gt=0.0, le=1.0)]
    weight_decay: NonNegative
    betas: Annotated[tuple[HalfOpenFraction, HalfOpenFraction], Field(strict=False)]
    clip_grad: NonNegative
    log_every: Positive
    validate_every: Positive
    checkpoint_every: Positive

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.warmup_steps >= self.steps:
            raise ValueError(f"warmup_steps {self.warmup_steps} must be below steps {self.steps}")
        if self.min_lr > self.lr or self.warmup_lr > self.lr:
            raise ValueError(f"min_lr and warmup_lr must not exceed lr {self.lr}")
        if self.optimizer == "sgd" and self.zero_stage > 0:
            raise ValueError(f"optimizer sgd needs zero_stage 0, found {self.zero_stage}")
        if self.zero_offload == "optimizer" and self.zero_stage == 0:
            raise ValueError("zero_offload optimizer needs sharded states: set zero_stage to 1, 2 or 3")
        if self.zero_offload == "parameters" and self.zero_stage != 3:
            raise ValueError(
                f"zero_offload parameters needs zero_stage 3, which shards them; it is {self.zero_stage}"
            )
        divisor = self.accumulation * (1 if self.processes == "auto" else self.processes)
        if self.batch_size % divisor:
            raise ValueError(
                f"batch_size {self.batch_size} must be divisible by processes x accumulation = {divisor}"
            )
        return self


class Distributed(Section):
    """How long processes on several machines wait for one another; no influence on the result."""

    rendezvous_timeout_s: Annotated[int, Field(ge=10)]
    peer_timeout_s: Annotated[int, Field(ge=5)]
    collective_timeout_s: Annotated[int, Field(ge=60)]


class SimMIMPretext(Section):
    """What the paper ablates, beside the mask's unit and ratio."""

    mask_kind: Literal["random", "block", "square"]
    head: Literal["linear", "mlp", "inverse_swin"]
    inverse_swin: str
    target_size: Count
    loss: Literal["l1", "l2", "smooth_l1"]
    loss_region: Literal["masked", "all"]
    final_norm: bool

    @model_validator(mode="after")
    def _inverse_swin_is_named(self) -> Self:
        if self.head == "inverse_swin" and not self.inverse_swin:
            raise ValueError(
                "head inverse_swin needs the name of a Swin V2 in inverse_swin, e.g. swin_v2_tiny"
            )
        return self


class MoBYViews(Section):
    """What happens to the two views; pairs are of the first and second view, or a range."""

    crop_scale: CropScale
    flip: Fraction
    jitter: Fraction
    brightness: NonNegative
    contrast: NonNegative
    saturation: NonNegative
    hue: Annotated[float, Field(ge=0.0, le=0.5)]
    grey: Fraction
    blur: FractionPair
    blur_sigma: PositivePair
    solarize: FractionPair
    solarize_threshold: Fraction


class MoBYPretext(Section):
    queue_size: Positive
    temperature: Annotated[float, Field(gt=0.0)]
    momentum: Fraction
    hidden_dim: Positive
    key_dim: Positive
    drop_path: HalfOpenFraction
    source_size: Positive
    views: MoBYViews


class Pretrain(Section):
    subset: Percentage
    pretext: Literal["simmim", "moby", "none"]
    mask_unit: Positive
    mask_ratio: OpenFraction
    normalize_target: Count
    simmim: SimMIMPretext
    crop_scale: CropScale
    flip: bool
    drop_path: HalfOpenFraction
    picture_images: Positive
    initialize_from: str
    continue_from: str
    moby: MoBYPretext
    training: Training

    @model_validator(mode="after")
    def _odd_window(self) -> Self:
        if self.normalize_target and self.normalize_target % 2 == 0:
            raise ValueError(f"normalize_target must be 0 or odd, got {self.normalize_target}")
        return self

    @model_validator(mode="after")
    def _moby_fits(self) -> Self:
        if self.pretext != "moby":
            return self
        if self.moby.queue_size % self.training.batch_size:
            raise ValueError(
                f"moby.queue_size {self.moby.queue_size} must be a multiple of training.batch_size "
                f"{self.training.batch_size}: whole batches enter and leave a queue"
            )
        if self.training.zero_stage == 3:
            raise ValueError(
                "pretext moby needs training.zero_stage 0 to 2: the target network is not trained, and "
                "following parameters that are scattered over processes is not implemented"
            )
        return self


class LinearProbe(Section):
    lr_factors: Annotated[list[Annotated[float, Field(gt=0.0)]], Field(min_length=1)]
    feature: Count


class RandomAugment(Section):
    operations: Count
    magnitude: Annotated[float, Field(ge=0.0, le=10.0)]
    magnitude_std: NonNegative
    probability: Fraction


class Finetune(Section):
    subset: Percentage
    task: Literal["classify", "linear_probe"]
    linear_probe: LinearProbe
    layer_decay: Annotated[float, Field(gt=0.0, le=1.0)]
    mixup: NonNegative
    cutmix: NonNegative
    label_smoothing: HalfOpenFraction
    image_size: Count
    window_size: Count
    test_resize: Count
    crop_scale: CropScale
    interpolation: Literal["bilinear", "bicubic"]
    rand_augment: RandomAugment
    color_jitter: NonNegative
    random_erasing: Fraction
    flip: bool
    drop_path: HalfOpenFraction
    training: Training

    @model_validator(mode="after")
    def _probe_fits(self) -> Self:
        if self.task == "linear_probe" and self.training.zero_stage == 3:
            raise ValueError("task linear_probe needs training.zero_stage 0 to 2: the backbone is frozen")
        return self


class NearestNeighbours(Section):
    """The probe without training; used by pretrain (validation split) and evaluate."""

    images: Count
    k: Positive
    temperature: Annotated[float, Field(gt=0.0)]


class Evaluate(Section):
    split: Literal["test", "val"]
    batch_size: Positive
    calibration_bins: Positive


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


class Sweep(Section):
    parallel: Positive
    max_points: Positive
    gpus_per_point: Count
    keep_files: bool
    record_experiments: bool


class Params(Section):
    seed: Count
    ingest: Ingest
    scale: Scale
    model: Model
    loader: Loader
    distributed: Distributed
    pretrain: Pretrain
    finetune: Finetune
    knn: NearestNeighbours
    evaluate: Evaluate
    export: Export
    parity: Parity
    registry: Registry
    promotion: Promotion
    serve: Serve
    placement: Placement
    rollout: Rollout
    monitor: Monitor
    tracking: Tracking
    services: Services
    pipeline: Pipeline
    sweep: Sweep

    @model_validator(mode="after")
    def _sections_agree(self) -> Self:
        if self.pretrain.mask_unit % self.model.patch_size:
            raise ValueError(
                f"pretrain.mask_unit {self.pretrain.mask_unit} must be a multiple of model.patch_size "
                f"{self.model.patch_size}"
            )
        if self.model.image_size % self.pretrain.mask_unit:
            raise ValueError(
                f"pretrain.mask_unit {self.pretrain.mask_unit} must divide "
                f"model.image_size {self.model.image_size}"
            )
        if self.finetune.image_size % self.model.patch_size:
            raise ValueError(
                f"model.patch_size {self.model.patch_size} must divide finetune.image_size "
                f"{self.finetune.image_size}"
            )
        if 0 < self.finetune.test_resize < (size := self.finetune_model().image_size):
            raise ValueError(
                f"finetune.test_resize {self.finetune.test_resize} must be 0 or at least {size}, the image "
                "size of finetuning"
            )
        for name, subset in (("pretrain", self.pretrain.subset), ("finetune", self.finetune.subset)):
            if subset not in self.scale.percentages:
                raise ValueError(
                    f"{name}.subset {subset} is not among scale.percentages {self.scale.percentages}"
                )
        return self

    def finetune_model(self) -> Model:
        """The network of finetuning, evaluation and export: `model` at the sizes that `finetune` names."""
        changes = {"image_size": self.finetune.image_size, "window_size": self.finetune.window_size}
        given = {name: value for name, value in changes.items() if value}
        return Model.model_validate({**self.model.model_dump(), **given})

    def registered_model(self, dataset: str) -> str:
        """Name in the model registry for what was trained on `dataset`."""
        return self.registry.model_name.replace("{dataset}", dataset)


def load(path: Path | None = None) -> Params:
    """Read and check `path` (default: params.yaml of the current directory).

    Raises:
        ConfigError: one line that names the key, the value and what is legal.
    """
    path = path or Path("params.yaml")
    return check(read(path), str(path))


def read(path: Path) -> dict[str, Any]:
    """The raw mapping in a YAML file."""
    try:
        value = yaml.safe_load(path.read_text())
    except FileNotFoundError:
        raise ConfigError(f"{path} does not exist") from None
    except IsADirectoryError:
        raise ConfigError(f"{path} is a folder, not a file") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise ConfigError(f"{path} must hold sections of keys, found a {type(value).__name__}")
    return value


def check(values: Mapping[str, Any], origin: str) -> Params:
    try:
        return Params.model_validate(values)
    except ValidationError as error:
        raise ConfigError(f"{origin}: {first_problem(error)}") from None


def first_problem(error: ValidationError) -> str:
    # a mistyped key is both unknown and missing; the first is what the user wrote
    problems = sorted(error.errors(), key=lambda problem: problem["type"] != "extra_forbidden")
    first = problems[0]
    key = ".".join(str(part) for part in first["loc"] if not isinstance(part, str) or "[" not in part)
    kind = first["type"]
    if kind == "extra_forbidden":
        text = f"unknown key `{key}`"
    elif kind == "missing":
        text = f"missing key `{key}`"
    else:
        message = first["msg"].removeprefix("Value error, ")
        shown = first["input"] if not isinstance(first["input"], dict) else None
        text = f"`{key}`: {message}" if key else message
        if shown is not None and kind != "value_error":
            text += f" (found {shown!r})"
    more = len(problems) - 1
    return text + (f" (and {more} more problem{'s' if more > 1 else ''})" if more else "")


def overlay(
    base: Mapping[str, Any], change: Mapping[str, Any], origin: str, prefix: str = ""
) -> dict[str, Any]:
    """`base` with the leaves of `change` replaced; a key that `base` does not have is an error."""
    merged = dict(base)
    for key, value in change.items():
        name = f"{prefix}{key}"
        if key not in merged:
            raise ConfigError(f"{origin}: unknown key `{name}`")
        if isinstance(merged[key], dict):
            if not isinstance(value, dict):
                raise ConfigError(f"{origin}: `{name}` is a section of keys, found {value!r}")
            merged[key] = overlay(merged[key], value, origin, f"{name}.")
        else:
            merged[key] = value
    return merged


def parse_setting(text: str) -> dict[str, Any]:
    """`"finetune.training.lr=1e-3"` as a nested mapping; the value is read as YAML.

    Raises:
        ConfigError: no `=` or an empty key.
    """
    key, separator, value = text.partition("=")
    if not separator or not key.strip():
        raise ConfigError(f"a setting has the form key=value, got {text!r}")
    try:
        parsed: Any = yaml.safe_load(value)
    except yaml.YAMLError:
        raise ConfigError(f"the value in {text!r} is not valid YAML") from None
    if isinstance(parsed, str):
        with contextlib.suppress(ValueError):
            parsed = float(parsed)  # YAML 1.1 reads 1e-3 as text
    return nest(key.strip(), parsed)


def nest(key: str, value: Any) -> dict[str, Any]:
    """`"a.b", 1` as `{"a": {"b": 1}}`."""
    section, *rest = key.split(".")
    for part in reversed(rest):
        value = {part: value}
    return {section: value}


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """`{"a": {"b": 1}}` as `{"a.b": 1}`."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat
