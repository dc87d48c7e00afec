"""All of params.yaml, and what its sections must agree on."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import model_validator

from flows.params.causal_lm import (
    Decoder,
    IngestText,
    LanguageEvaluate,
    LanguageExport,
    LanguagePretrain,
    LanguagePromotion,
)
from flows.params.fields import (
    Count,
    Section,
)
from flows.params.language import Lamina
from flows.params.learning import (
    Distributed,
    Evaluate,
    Finetune,
    Ingest,
    Loader,
    Model,
    NearestNeighbours,
    Pretrain,
    Scale,
)
from flows.params.operation import (
    Export,
    Monitor,
    Parity,
    Pipeline,
    Placement,
    Promotion,
    Registry,
    Rollout,
    Serve,
    Services,
    Study,
    Sweep,
    Tracking,
)


class Params(Section):
    seed: Count
    objective: Literal["image", "causal_lm"]
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
    ingest_text: IngestText
    decoder: Decoder
    language_pretrain: LanguagePretrain
    language_evaluate: LanguageEvaluate
    language_export: LanguageExport
    language_promotion: LanguagePromotion
    registry: Registry
    promotion: Promotion
    serve: Serve
    lamina: Lamina
    placement: Placement
    rollout: Rollout
    monitor: Monitor
    tracking: Tracking
    services: Services
    pipeline: Pipeline
    sweep: Sweep
    study: Study

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
        if self.language_pretrain.context > self.decoder.max_context:
            raise ValueError(
                f"language_pretrain.context {self.language_pretrain.context} must not exceed "
                f"decoder.max_context {self.decoder.max_context}"
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

    def registered_language_model(self, dataset: str) -> str:
        """The same for a language model that was trained on the text `dataset`."""
        return self.registry.language_model_name.replace("{dataset}", dataset)
