"""`trunkline import` and `trunkline export`: the bodies of the commands for language models.

What is imported becomes a folder as Hugging Face publishes models, readable by transformers without any code
of ours; what is exported becomes a bundle for Lamina. Both are whole or absent.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from flows import files
from flows.errors import ConfigError, DataError
from models.language import DecoderConfig
from models.language.llama2c import (
    BEGIN,
    END,
    SPACE,
    UNKNOWN,
    Llama2cError,
    Vocabulary,
    read_checkpoint,
    read_tokenizer,
)

MAX_TOKENIZER_BYTES = 64 * 2**20


def import_llama2c(checkpoint: Path, tokenizer: Path, target: Path, *, force: bool = False) -> list[str]:
    """Turn a llama2.c model and its tokenizer into a Hugging Face folder; returns the lines to print.

    Raises:
        ConfigError: `target` exists.
        DataError: a file is missing, damaged, or belongs to another model; nothing was written.
    """
    _check_target(target, force)
    try:
        config, weights = read_checkpoint(_read(checkpoint))
    except Llama2cError as error:
        raise DataError(f"{checkpoint} {error}") from None
    if tokenizer.is_file() and tokenizer.stat().st_size > MAX_TOKENIZER_BYTES:
        raise DataError(f"{tokenizer} is too large for a tokenizer")
    try:
        vocabulary = read_tokenizer(_read(tokenizer), config.vocab_size)
    except Llama2cError as error:
        raise DataError(f"{tokenizer} {error}") from None
    with files.replace_folder(target) as folder:
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        (folder / "model.safetensors").chmod(0o644)
        ends = {"bos_token_id": BEGIN, "eos_token_id": END}
        files.write_json(folder / "config.json", {**config.to_dict(), **ends, "dtype": "float32"})
        # A text of llama2.c ends where the next one begins.
        files.write_json(
            folder / "generation_config.json",
            {"bos_token_id": BEGIN, "eos_token_id": [BEGIN, END], "do_sample": False},
        )
        files.write_json(folder / "tokenizer.json", describe_tokenizer(vocabulary))
        files.write_json(folder / "tokenizer_config.json", _tokenizer_config(config))
    parameters = sum(tensor.numel() for tensor in weights.values())
    return [
        f"{checkpoint}: {config.num_hidden_layers} layers of {config.hidden_size}, "
        f"{config.num_attention_heads} query and {config.num_key_value_heads} kv heads, "
        f"{parameters:,} parameters",
        f"{target}: written; transformers, and trunkline export language, read it as it is",
    ]


def _check_target(target: Path, force: bool) -> None:
    if not target.exists():
        return
    if not target.is_dir() or not force:
        raise ConfigError(f"{target} exists; give another place, or --force to replace it")
    if any(target.iterdir()) and not (target / "config.json").is_file():
        raise ConfigError(f"{target} holds something else than a model; give another place")


def _read(path: Path) -> bytes:
    if not path.is_file():
        raise DataError(f"{path} does not exist or is not a file")
    return path.read_bytes()


def _tokenizer_config(config: DecoderConfig) -> dict[str, Any]:
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "model_max_length": config.max_position_embeddings,
        "clean_up_tokenization_spaces": False,
        "add_bos_token": True,
    }


def describe_tokenizer(vocabulary: Vocabulary) -> dict[str, Any]:
    """The content of a tokenizer.json: byte-pair encoding that starts at characters, falls back to bytes, and
    puts a space before the text and the begin token before that."""
    special = [
        {"id": number, "content": vocabulary.tokens[number], "single_word": False, "lstrip": False,
         "rstrip": False, "normalized": False, "special": True}
        for number in (UNKNOWN, BEGIN, END)
    ]  # fmt: skip
    begin = {"SpecialToken": {"id": "<s>", "type_id": 0}}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": special,
        "normalizer": {
            "type": "Sequence",
            "normalizers": [
                {"type": "Prepend", "prepend": SPACE},
                {"type": "Replace", "pattern": {"String": " "}, "content": SPACE},
            ],
        },
        "pre_tokenizer": None,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [begin, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [
                begin,
                {"Sequence": {"id": "A", "type_id": 0}},
                {"SpecialToken": {"id": "<s>", "type_id": 1}},
                {"Sequence": {"id": "B", "type_id": 1}},
            ],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [BEGIN], "tokens": ["<s>"]}},
        },
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": 1, "stop": 0},
            ],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": "<unk>",
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": {token: number for number, token in enumerate(vocabulary.tokens)},
            "merges": [list(pair) for pair in vocabulary.merges()],
        },
    }


def export_language(source: Path, target: Path, *, opset: int, tolerance: float, force: bool) -> None:
    """Slice a decoder and print what is done; see `slices.export`."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a name that is no folder must not be looked up elsewhere
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    from flows.serving.lamina.slices.export import export_bundle

    bundle = export_bundle(
        source,
        target,
        opset=opset,
        tolerance=tolerance,
        force=force,
        say=lambda line: print(line, flush=True),
    )
    manifest = bundle.manifest
    kept = max(step.context_bytes_per_row for step in manifest.steps)
    naive = max(step.naive_bytes_per_row for step in manifest.steps)
    print(
        f"{target}: {len(manifest.steps)} steps from {len(manifest.graphs)} graphs; a row keeps "
        f"{kept:g} bytes while attention runs ({naive:g} without computing anything again)"
    )
