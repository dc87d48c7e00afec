"""Messages of a chat to one prompt, by the template that the model brings along.

Templates are Jinja, as Hugging Face publishes them: `chat_template.jinja`, or the key `chat_template` of
tokenizer_config.json. They are run in Jinja's sandbox, with the names that templates expect there
(`raise_exception`, `strftime_now`, `tojson` without HTML escapes). A model without one gets the contents of
the messages, one a line.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from flows.errors import DataError

FILE = "chat_template.jinja"


class ChatError(Exception):
    """The template does not take these messages; the text is its own, for the client."""


class _Generation(Extension):
    """`{% generation %}` marks what a model is trained on; to a prompt it adds nothing."""

    tags = {"generation"}  # noqa: RUF012 (declared so by jinja2)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return list(parser.parse_statements(("name:endgeneration",), drop_needle=True))


class ChatTemplate:
    """Renders messages. `is_plain`: the model brought no template."""

    def __init__(self, source: str | None, names: Mapping[str, str]) -> None:
        """
        Args:
            names: of special tokens, such as `bos_token`.

        Raises:
            DataError: not a template.
        """
        self.is_plain = source is None
        self._names = dict(names)
        try:
            self._template = _environment().from_string(source) if source is not None else None
        except jinja2.TemplateError as error:
            raise DataError(
                f"the chat template of the model cannot be read: {error}; correct {FILE}"
            ) from None

    def render(self, messages: Sequence[Mapping[str, str]]) -> str:
        """The prompt, up to where the answer begins.

        Raises:
            ChatError: see there.
        """
        if self._template is None:
            return "\n".join(message["content"] for message in messages)
        try:
            return self._template.render(
                **self._names, messages=[dict(message) for message in messages], add_generation_prompt=True
            )
        except jinja2.TemplateError as error:
            raise ChatError(str(error)) from None
        except (TypeError, ValueError, KeyError, ArithmeticError, RecursionError, OverflowError) as error:
            raise ChatError(f"it fails with {type(error).__name__}: {error}") from None


def read_chat_template(folder: Path, config: Mapping[str, Any]) -> ChatTemplate:
    """The template of a bundle.

    Args:
        config: content of tokenizer_config.json.

    Raises:
        DataError: it is none, or cannot be read.
    """
    names = {
        key: text for key, value in config.items() if key.endswith("_token") and (text := _token_text(value))
    }
    return ChatTemplate(_source(folder, config), names)


def _source(folder: Path, config: Mapping[str, Any]) -> str | None:
    path = folder / FILE
    if path.is_file():
        try:
            return path.read_text(encoding="utf-8")
        except (OSError, UnicodeError) as error:
            raise DataError(f"{path} cannot be read: {error}") from None
    found = config.get("chat_template")
    if isinstance(found, list):  # several by name
        named = {entry.get("name"): entry.get("template") for entry in found if isinstance(entry, dict)}
        found = named.get("default")
    if found is not None and not isinstance(found, str):
        raise DataError(f"chat_template in {folder / 'tokenizer_config.json'} is not a text")
    return found


def _token_text(value: Any) -> str | None:
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else None


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _Generation]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = lambda text: datetime.datetime.now().strftime(text)
    return environment


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)


def _to_json(value: Any, indent: int | None = None, **options: Any) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent, **options)
