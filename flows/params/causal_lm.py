"""Sections of params.yaml that decide the language track: text, decoder, pretraining, judgement, bundle."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from flows.params.fields import (
    Count,
    Fraction,
    NonNegative,
    OpenFraction,
    Positive,
    Section,
)
from flows.params.learning import Training

BUNDLED_SOURCE = "constraints.txt"
"""What DVC watches when the text comes with Python."""


class IngestText(Section):
    dataset: Literal["pydoc_topics", "files"]
    source: Annotated[str, Field(min_length=1)]
    val_fraction: OpenFraction
    test_fraction: OpenFraction
    max_bad_fraction: Fraction
    max_document_mb: Annotated[int, Field(ge=1, le=1024)]
    split_seed: Count
    vocab_size: Annotated[int, Field(ge=260, le=1 << 20)]

    @model_validator(mode="after")
    def _splits_leave_training_text(self) -> Self:
        if self.val_fraction + self.test_fraction >= 1.0:
            raise ValueError(
                "val_fraction + test_fraction must be below 1, so that text remains for training"
            )
        return self

    @model_validator(mode="after")
    def _files_are_named(self) -> Self:
        if self.dataset == "files" and self.source == BUNDLED_SOURCE:
            raise ValueError("dataset files needs a source: the folder or file of texts to read")
        return self


class Decoder(Section):
    """Sizes of the decoder, and what can be switched off to see what it is worth."""

    hidden_size: Positive
    intermediate_size: Positive
    layers: Positive
    heads: Positive
    kv_heads: Positive
    head_size: Positive
    max_context: Annotated[int, Field(ge=8)]
    rope: bool
    rope_theta: Annotated[float, Field(gt=0.0)]
    tie_embeddings: bool

    @model_validator(mode="after")
    def _heads_fit(self) -> Self:
        if self.heads % self.kv_heads:
            raise ValueError(f"kv_heads {self.kv_heads} must divide heads {self.heads}")
        if self.head_size % 2:
            raise ValueError(f"head_size {self.head_size} must be even: rotary embeddings turn pairs")
        return self


class LanguagePretrain(Section):
    context: Annotated[int, Field(ge=8)]
    separate_documents: bool
    training: Training

    @model_validator(mode="after")
    def _no_windows(self) -> Self:
        if self.training.attention_chunk:
            raise ValueError("training.attention_chunk is about windows of images; a decoder needs 0")
        return self


class LanguageEvaluate(Section):
    split: Literal["test", "val"]
    batch_size: Positive
    prompt_tokens: Positive
    sample_tokens: Positive


class LanguageExport(Section):
    opset: Annotated[int, Field(ge=18, le=23)]
    max_logit_error: NonNegative


class LanguagePromotion(Section):
    """Limits of the gates for language models; the other settings are those of `promotion`."""

    max_bits_per_byte: Annotated[float, Field(gt=0.0)]
    min_gain: Annotated[float, Field(ge=-8.0, le=8.0)]
    gain_rule: Literal["point", "lower"]
    golden_prompts: Positive
    golden_tokens: Positive
    max_token_ms: Annotated[float, Field(gt=0.0)]
    timed_tokens: Annotated[int, Field(ge=2)]
    kill_test: bool
    max_memory_mb: Annotated[float, Field(gt=0.0)]
    max_size_mb: Annotated[float, Field(gt=0.0)]
