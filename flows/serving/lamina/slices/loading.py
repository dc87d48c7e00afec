"""A Hugging Face folder → a decoder in float32, or a refusal that names what is not supported.

Only classes of the installed transformers are used: code in the folder is never run, and nothing is fetched.
The configuration is judged before the weights are read.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from flows import files
from flows.errors import ConfigError, DataError
from flows.serving.lamina.slices import marker

CONFIG = "config.json"
MAX_CONFIG_BYTES = 16 * 2**20
WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "pytorch_model*.bin", "pytorch_model*.bin.index.json")
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "merges.txt", "tokenizer.model", "chat_template.jinja", "generation_config.json",
)  # fmt: skip
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "num_moe_experts")
LAYER_TYPES = {"full_attention", "sliding_attention"}
MOVING_ROPE = {"dynamic", "longrope"}
"""Rotary embeddings that change with the length of the text: a row of its own cannot know it."""


@dataclass(frozen=True)
class Decoder:
    """A loaded model and what its configuration says."""

    model: Any  # transformers.PreTrainedModel
    config: Any  # transformers.PreTrainedConfig
    source_sha256: str

    @property
    def layers(self) -> int:
        return int(self.config.num_hidden_layers)

    @property
    def max_context(self) -> int:
        return int(self.config.max_position_embeddings)

    @property
    def position_scheme(self) -> str:
        """How positions enter: rope:<type>, or learned."""
        kinds = _rope_types(self.config)
        return f"rope:{'+'.join(sorted(kinds))}" if kinds else "learned"


def load_decoder(folder: Path) -> Decoder:
    """
    Raises:
        ConfigError: transformers is not installed.
        DataError: no such folder, a damaged one, or a model that Lamina does not serve.
    """
    described = _read_config(folder)
    try:
        from transformers import AutoConfig, AutoModelForCausalLM
    except ImportError:
        raise ConfigError("this needs transformers; install it: pip install -e '.[language]'") from None
    refuse_unsupported(described, folder)
    marker.install()
    with _quiet():
        try:
            config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
            refuse_unsupported(config.to_dict(), folder)
            if type(config) not in AutoModelForCausalLM._model_mapping:
                raise DataError(f"{folder}: {config.model_type} is not a decoder that transformers knows")
            if not getattr(config, "num_attention_heads", 0):
                raise DataError(f"{folder}: {config.model_type} has no attention, so Lamina cannot serve it")
            digest = hash_weights(folder)
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                folder,
                config=config,
                dtype=torch.float32,
                attn_implementation=marker.ATTENTION,
                local_files_only=True,
                trust_remote_code=False,
                output_loading_info=True,
            )
        except DataError:
            raise
        except KeyError as error:
            if error.args == (marker.ATTENTION,):
                raise DataError(
                    f"{folder}: {config.model_type} computes attention itself, not through transformers' "
                    "attention interface, so Lamina cannot cut it there"
                ) from None
            raise DataError(
                f"{folder} is not a model that transformers can load: {error} is missing"
            ) from None
        except Exception as error:  # of transformers, safetensors, huggingface_hub: no common base class
            reason = " ".join(str(error).split())[:300]
            raise DataError(f"{folder} is not a model that transformers can load: {reason}") from None
    model, report = loaded
    if missing := sorted(report["missing_keys"]):
        raise DataError(f"{folder} has no weights for {', '.join(missing[:5])}; they would be random")
    return Decoder(model.eval(), model.config, digest)


def refuse_unsupported(config: dict[str, Any], folder: Path) -> None:
    """
    Raises:
        DataError: the configuration asks for something that Lamina does not serve; named.
    """

    def refuse(what: str) -> None:
        raise DataError(
            f"{folder}: {config.get('model_type') or 'this model'} {what}, which Lamina does not serve"
        )

    if config.get("is_encoder_decoder"):
        refuse("has an encoder beside its decoder")
    for key in EXPERTS:
        if (config.get(key) or 0) > 1:
            refuse(f"is a mixture of experts (`{key}`: {config[key]})")
    if any(isinstance(config.get(key), dict) for key in ("text_config", "vision_config", "audio_config")):
        refuse("is more than a language model (it has configurations of several parts)")
    if config.get("quantization_config"):
        refuse("is quantised; give the unquantised weights")
    if unknown := sorted(set(config.get("layer_types") or ()) - LAYER_TYPES):
        refuse(f"has layers of type {', '.join(unknown)}")
    if config.get("num_kv_shared_layers"):
        refuse("shares K and V between layers")
    if config.get("alibi"):
        refuse("encodes positions as attention biases (ALiBi)")
    if config.get("is_decoder") is False and config.get("add_cross_attention"):
        refuse("attends to another model")
    if moving := sorted(_rope_types(config) & MOVING_ROPE):
        refuse(f"has rotary embeddings that depend on the length of the text (`rope_type`: {moving[0]})")


def _rope_types(config: Any) -> set[str]:
    """The types of rotary embedding, of all layer types; empty without any."""
    values = config if isinstance(config, dict) else config.to_dict()
    found: set[str] = set()
    for key in ("rope_parameters", "rope_scaling"):
        described = values.get(key)
        for entry in [described, *(described.values() if isinstance(described, dict) else ())]:
            if isinstance(entry, dict) and (kind := entry.get("rope_type") or entry.get("type")):
                found.add(str(kind))
    return found or ({"default"} if values.get("rope_theta") else set())


def hash_weights(folder: Path) -> str:
    """sha256 over names and contents of all weight files: which checkpoint this is."""
    found = sorted({path for pattern in WEIGHTS for path in folder.glob(pattern) if path.is_file()})
    if not found:
        raise DataError(f"{folder} has no weights (model.safetensors, or its shards)")
    digest = hashlib.sha256()
    for path in found:
        digest.update(f"{path.name}\0{files.sha256_file(path)}\n".encode())
    return digest.hexdigest()


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    if not path.is_file():
        raise DataError(f"{path} does not exist; give a folder as Hugging Face publishes models")
    if path.stat().st_size > MAX_CONFIG_BYTES:
        raise DataError(f"{path} is too large for a configuration")
    try:
        value = files.read_json(path)
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise DataError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(value, dict) or not value.get("model_type"):
        raise DataError(f"{path} names no `model_type`")
    return value


@contextmanager
def _quiet() -> Iterator[None]:
    """Its progress bars and remarks on other uses are not for who exports; what matters is raised above."""
    from transformers.utils import logging as untyped

    transformers_logging: Any = untyped
    level = transformers_logging.get_verbosity()
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity(logging.CRITICAL)
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()
