"""Sections of params.yaml that decide what is learnt: data, network, pretraining, finetuning, judgement."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from flows.params.fields import (
    Count,
    CropScale,
    Fraction,
    FractionPair,
    HalfOpenFraction,
    NonNegative,
    OpenFraction,
    Percentage,
    Positive,
    PositivePair,
    Section,
)


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

    mlp_norm: Literal["layer", "batch"]

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
