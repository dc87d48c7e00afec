"""Golden prompts: beginnings of texts in the registered folder, with the tokens that PyTorch went on with.

    golden/golden.json    name, prompt and continuation of each, as token ids

They are made by the decoder itself at registration, not by the bundle: whoever opens the folder later runs
the bundle, and has to get the same tokens one by one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from flows import files
from flows.errors import DataError
from flows.serving.golden import FOLDER, INDEX
from flows.serving.lamina.slices.runner import Slices, greedy
from flows.text.corpus import TokenSplit
from flows.text.tokenizer import END_ID
from models.language import Decoder

PROMPT_TOKENS = 16


@dataclass(frozen=True)
class GoldenPrompt:
    name: str  # the document's
    prompt: tuple[int, ...]
    continuation: tuple[int, ...]  # greedy; ends with an end token or as long as was asked for


class _Entry(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    name: str
    prompt: list[int] = Field(min_length=1)
    continuation: list[int] = Field(min_length=1)


class _Index(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    format: int = Field(ge=1, le=1)
    prompts: list[_Entry] = Field(min_length=1)


def make_golden(decoder: Decoder, split: TokenSplit, count: int, tokens: int) -> list[GoldenPrompt]:
    """Continue the beginnings of `count` documents, evenly spaced over the split."""
    room = decoder.config.max_position_embeddings
    made = []
    chosen = np.linspace(0, len(split) - 1, min(count, len(split))).round().astype(int)
    for index in dict.fromkeys(chosen.tolist()):
        prompt = split.document(index)[: min(PROMPT_TOKENS, room - 1)]
        wanted = min(tokens, room - len(prompt))
        with torch.inference_mode():
            text = decoder.generate(torch.from_numpy(prompt)[None], wanted, END_ID)[0]
        answer = tuple(text[len(prompt) :].tolist())
        made.append(GoldenPrompt(split.names[index], tuple(prompt.tolist()), answer))
    return made


def write_golden(folder: Path, prompts: Sequence[GoldenPrompt]) -> None:
    """Requests and answers replace `folder`/golden."""
    content = [{key: _plain(value) for key, value in asdict(prompt).items()} for prompt in prompts]
    with files.replace_folder(folder / FOLDER) as target:
        files.write_json(target / INDEX, {"format": 1, "prompts": content})


def _plain(value: object) -> object:
    return list(value) if isinstance(value, tuple) else value


def read_golden(folder: Path) -> list[GoldenPrompt]:
    """
    Raises:
        DataError: there are none, or they cannot be read.
    """
    path = folder / FOLDER / INDEX
    try:
        found = _Index.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        raise DataError(f"{path} is missing; download the model again") from None
    except ValidationError as error:
        first = error.errors()[0]
        raise DataError(f"{path} is not usable: {first['msg']}; download the model again") from None
    return [GoldenPrompt(e.name, tuple(e.prompt), tuple(e.continuation)) for e in found.prompts]


def ask_golden(slices: Slices, prompts: Sequence[GoldenPrompt]) -> list[str]:
    """One sentence for each prompt that the bundle continues otherwise. Prompts with equally long answers run
    together, as a server would run them."""
    different = []
    for length in sorted({len(prompt.continuation) for prompt in prompts}):
        together = [prompt for prompt in prompts if len(prompt.continuation) == length]
        answers = greedy(slices, [prompt.prompt for prompt in together], length)
        for prompt, answer in zip(together, answers, strict=True):
            if answer.tokens != prompt.continuation:
                pairs = zip(answer.tokens, prompt.continuation, strict=False)
                place = next((n for n, (a, b) in enumerate(pairs) if a != b), len(answer.tokens))
                different.append(f"{prompt.name}: token {place} of the continuation is not the recorded one")
    return different
