"""A trained decoder on disk, as Hugging Face publishes models, and how well it predicts a split of text.

config.json model.safetensors generation_config.json     transformers reads them without any code of ours
tokenizer.json tokenizer_config.json
training.json                                            what it was trained on, for the stages behind it
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from flows import files
from flows.errors import DataError
from flows.text import tokenizer as tokenizers
from flows.text.batches import eval_batches
from flows.text.corpus import TokenSplit
from models.language import Decoder, DecoderConfig
from models.pretext.causal_lm import CausalLM

CONFIG, WEIGHTS, GENERATION, TRAINING = (
    "config.json",
    "model.safetensors",
    "generation_config.json",
    "training.json",
)
OUTPUT = "lm_head.weight"


class TrainingRecord(BaseModel):
    """The content of training.json."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    data_digest: str
    context: int
    separate_documents: bool
    steps: int


def write_decoder(
    folder: Path,
    config: DecoderConfig,
    weights: Mapping[str, Tensor],
    tokenizer_folder: Path,
    record: TrainingRecord,
) -> None:
    """Fill the existing `folder`. A tied output matrix is left out, as transformers leaves it out."""
    kept = {name: value.contiguous().clone() for name, value in weights.items()}
    if config.tie_word_embeddings:
        kept.pop(OUTPUT, None)
    save_file(kept, folder / WEIGHTS, metadata={"format": "pt"})
    (folder / WEIGHTS).chmod(0o644)
    ends = {"bos_token_id": tokenizers.BEGIN_ID, "eos_token_id": tokenizers.END_ID}
    files.write_json(folder / CONFIG, {**config.to_dict(), **ends, "dtype": "float32"})
    files.write_json(folder / GENERATION, {**ends, "do_sample": False})
    shutil.copyfile(tokenizer_folder / tokenizers.FILE, folder / tokenizers.FILE)
    tokenizers.save_config(folder, config.max_position_embeddings)
    files.write_json(folder / TRAINING, record.model_dump(mode="json"))


def load_decoder(folder: Path) -> tuple[Decoder, TrainingRecord]:
    """
    Raises:
        DataError: a file is missing or damaged, or they do not belong together.
    """
    again = "run `dvc repro language_pretrain` again"
    try:
        config = DecoderConfig.from_dict(files.read_json(folder / CONFIG))
        record = TrainingRecord.model_validate_json((folder / TRAINING).read_bytes())
        weights = load_file(folder / WEIGHTS)
    except FileNotFoundError as error:
        raise DataError(f"{error.filename} does not exist; run `dvc repro language_pretrain` first") from None
    except (ValueError, KeyError, TypeError, ValidationError, SafetensorError) as error:
        raise DataError(f"{folder} is damaged: {' '.join(str(error).split())[:200]}; {again}") from None
    decoder = Decoder(config)
    if config.tie_word_embeddings:
        weights[OUTPUT] = weights.get("model.embed_tokens.weight", torch.empty(0))
    try:
        decoder.load_state_dict(weights)
    except RuntimeError as error:
        raise DataError(
            f"{folder}: weights and config.json do not fit: {str(error)[:200]}; {again}"
        ) from None
    return decoder.eval(), record


# ---- how well it predicts ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Judged:
    """Sums over the predicted tokens of each document of a split, (documents,) each."""

    nats: Tensor  # float64
    correct: Tensor  # int64
    tokens: Tensor  # int64

    @property
    def loss(self) -> float:
        return float(self.nats.sum() / self.tokens.sum())

    def __add__(self, other: Judged) -> Judged:
        return Judged(self.nats + other.nats, self.correct + other.correct, self.tokens + other.tokens)


def judge(
    model: Any,
    data: TokenSplit,
    context: int,
    batch_size: int,
    device: torch.device,
    rank: int = 0,
    world_size: int = 1,
) -> Judged:
    """This process's share of `data`; sums of all processes belong together.

    Args:
        model: a `CausalLM`, or the engine around it, in eval mode.
        context: tokens of a row; see `eval_batches`.
    """
    nats = torch.zeros(len(data), dtype=torch.float64)
    correct = torch.zeros(len(data), dtype=torch.int64)
    tokens = torch.zeros(len(data), dtype=torch.int64)
    for batch, weight in eval_batches(data, context, batch_size, rank, world_size):
        output = model(batch.tokens.to(device), batch.documents.to(device))
        if weight:
            owners = batch.documents[:, 0]
            nats.index_add_(0, owners, output.nats.double().sum(1).cpu())
            correct.index_add_(0, owners, output.correct.sum(1).cpu())
            tokens.index_add_(0, owners, output.predicted.sum(1).cpu())
    return Judged(nats, correct, tokens)


def judge_decoder(decoder: Decoder, data: TokenSplit, context: int, batch_size: int) -> Judged:
    """A whole decoder in this process, on the accelerator if there is one."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = CausalLM(decoder).to(device).eval()
    with torch.inference_mode():
        found = judge(model, data, context, batch_size, device)
    decoder.cpu()
    return found
