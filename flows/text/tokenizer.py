"""Byte-level byte-pair encoding (GPT-2's kind): any text becomes tokens and comes back byte for byte.

Two tokens are marks, which no text can write: the one a document begins with and the one it ends with. A
document that holds their spelling is encoded as the letters it has.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from flows import files
from flows.errors import ConfigError, DataError

BEGIN, END = "<|begin|>", "<|end|>"
BEGIN_ID, END_ID = 0, 1
FILE, CONFIG = "tokenizer.json", "tokenizer_config.json"


def require_tokenizers() -> None:
    """
    Raises:
        ConfigError: the package is missing.
    """
    try:
        import tokenizers  # noqa: F401
    except ImportError:
        raise ConfigError("this needs tokenizers; install it: pip install -e '.[language]'") from None


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Any:
    """A `tokenizers.Tokenizer`: the same for the same texts in the same order."""
    require_tokenizers()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # sums over threads would come in another order each time
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer: Any = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[BEGIN, END],
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        ),
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BEGIN} $A", pair=f"{BEGIN} $A {BEGIN} $B", special_tokens=[(BEGIN, BEGIN_ID)]
    )
    return tokenizer


def save_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Both files as Hugging Face has them."""
    files.write_text(folder / FILE, tokenizer.to_str(pretty=True) + "\n")
    save_config(folder)


def save_config(folder: Path, max_tokens: int | None = None) -> None:
    """Write tokenizer_config.json; `max_tokens` is what the model takes, if that is known."""
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BEGIN,
        "eos_token": END,
        "clean_up_tokenization_spaces": False,
        "add_bos_token": True,
    }
    if max_tokens is not None:
        config["model_max_length"] = max_tokens
    files.write_json(folder / CONFIG, config)


def load_tokenizer(folder: Path) -> Any:
    """
    Raises:
        DataError: no tokenizer there, or a damaged one.
    """
    require_tokenizers()
    from tokenizers import Tokenizer

    path = folder / FILE
    try:
        tokenizer: Any = Tokenizer.from_str(path.read_text())
    except FileNotFoundError:
        raise DataError(f"{path} does not exist; run `dvc repro text` first") from None
    except Exception as error:  # tokenizers raises bare exceptions
        raise DataError(f"{path} is not a tokenizer: {str(error)[:200]}") from None
    return tokenizer


def encode_document(tokenizer: Any, text: str) -> list[int]:
    """Begin mark, tokens, end mark. `text` cannot write the marks."""
    tokenizer.encode_special_tokens = True
    return [BEGIN_ID, *tokenizer.encode(text, add_special_tokens=False).ids, END_ID]


def decode(tokenizer: Any, ids: Iterable[int]) -> str:
    """The text of tokens without the marks."""
    return str(tokenizer.decode(list(ids), skip_special_tokens=True))
