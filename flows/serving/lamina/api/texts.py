"""The texts of a bundle: prompts to tokens, tokens to text.

Reads tokenizer.json with the library `tokenizers`; no code of a model is run. What the manifest says ends an
answer is hidden from texts, as are all special tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from flows import files
from flows.errors import DataError
from flows.serving.lamina.api.chat_template import read_chat_template
from flows.serving.lamina.api.detokenize import Detokenizer, Vocabulary
from flows.serving.lamina.slices.bundle import Bundle

TOKENIZER = "tokenizer.json"


class Texts:
    """Both directions. Its methods may be called from any thread."""

    def __init__(self, folder: Path, eos_token_ids: Sequence[int] = ()) -> None:
        """
        Raises:
            DataError: no tokenizer.json, or one that cannot be used.
        """
        path = folder / TOKENIZER
        if not path.is_file():
            raise DataError(
                f"{path} does not exist: the model was exported without a tokenizer that can be read; save "
                "it with save_pretrained of a fast tokenizer beside the model and export again"
            )
        try:
            self._tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises nothing narrower
            raise DataError(f"{path} is not a tokenizer: {error}") from None
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        added = self._tokenizer.get_added_tokens_decoder()
        special = {number for number, token in added.items() if token.special}
        self.vocabulary = Vocabulary(
            self._tokenizer, _read_object(path).get("decoder"), frozenset(special | set(eos_token_ids))
        )
        self.chat_template = read_chat_template(folder, _read_object(folder / "tokenizer_config.json"))

    @classmethod
    def of(cls, bundle: Bundle) -> Texts:
        return cls(bundle.folder, bundle.manifest.eos_token_ids)

    def encode_prompt(self, text: str) -> list[int]:
        """A text to be continued; with the begin token, if the tokenizer puts one."""
        return list(self._tokenizer.encode(text).ids)

    def encode_chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """A chat up to where the answer begins; templates write their special tokens themselves.

        Raises:
            ChatError: the model's template refuses these messages.
        """
        text = self.chat_template.render(messages)
        return list(self._tokenizer.encode(text, add_special_tokens=self.chat_template.is_plain).ids)

    def detokenizer(self, before: Sequence[int] = ()) -> Detokenizer:
        """
        Args:
            before: tokens of the text that is continued; none for an answer in a chat, which begins anew.
        """
        return self.vocabulary.detokenizer(before)


def _read_object(path: Path) -> Mapping[str, Any]:
    if not path.is_file():
        return {}
    try:
        value = files.read_json(path)
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path} cannot be read: {error}") from None
    if not isinstance(value, dict):
        raise DataError(f"{path} does not hold an object")
    return value
