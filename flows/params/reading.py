"""From files and `--set key=value` to checked params; a mistake is one line that names its key."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from flows.errors import ConfigError
from flows.params.root import Params


def load(path: Path | None = None) -> Params:
    """Read and check `path` (default: params.yaml of the current directory).

    Raises:
        ConfigError: one line that names the key, the value and what is legal.
    """
    path = path or Path("params.yaml")
    return check(read(path), str(path))


def read(path: Path) -> dict[str, Any]:
    """The raw mapping in a YAML file."""
    try:
        value = yaml.safe_load(path.read_text())
    except FileNotFoundError:
        raise ConfigError(f"{path} does not exist") from None
    except IsADirectoryError:
        raise ConfigError(f"{path} is a folder, not a file") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise ConfigError(f"{path} must hold sections of keys, found a {type(value).__name__}")
    return value


def check(values: Mapping[str, Any], origin: str) -> Params:
    try:
        return Params.model_validate(values)
    except ValidationError as error:
        raise ConfigError(f"{origin}: {first_problem(error)}") from None


def first_problem(error: ValidationError) -> str:
    # a mistyped key is both unknown and missing; the first is what the user wrote
    problems = sorted(error.errors(), key=lambda problem: problem["type"] != "extra_forbidden")
    first = problems[0]
    key = ".".join(str(part) for part in first["loc"] if not isinstance(part, str) or "[" not in part)
    kind = first["type"]
    if kind == "extra_forbidden":
        text = f"unknown key `{key}`"
    elif kind == "missing":
        text = f"missing key `{key}`"
    else:
        message = first["msg"].removeprefix("Value error, ")
        shown = first["input"] if not isinstance(first["input"], dict) else None
        text = f"`{key}`: {message}" if key else message
        if shown is not None and kind != "value_error":
            text += f" (found {shown!r})"
    more = len(problems) - 1
    return text + (f" (and {more} more problem{'s' if more > 1 else ''})" if more else "")


def overlay(
    base: Mapping[str, Any], change: Mapping[str, Any], origin: str, prefix: str = ""
) -> dict[str, Any]:
    """`base` with the leaves of `change` replaced; a key that `base` does not have is an error."""
    merged = dict(base)
    for key, value in change.items():
        name = f"{prefix}{key}"
        if key not in merged:
            raise ConfigError(f"{origin}: unknown key `{name}`")
        if isinstance(merged[key], dict):
            if not isinstance(value, dict):
                raise ConfigError(f"{origin}: `{name}` is a section of keys, found {value!r}")
            merged[key] = overlay(merged[key], value, origin, f"{name}.")
        else:
            merged[key] = value
    return merged


def parse_setting(text: str) -> dict[str, Any]:
    """`"finetune.training.lr=1e-3"` as a nested mapping; the value is read as YAML.

    Raises:
        ConfigError: no `=` or an empty key.
    """
    key, separator, value = text.partition("=")
    if not separator or not key.strip():
        raise ConfigError(f"a setting has the form key=value, got {text!r}")
    try:
        parsed: Any = yaml.safe_load(value)
    except yaml.YAMLError:
        raise ConfigError(f"the value in {text!r} is not valid YAML") from None
    if isinstance(parsed, str):
        with contextlib.suppress(ValueError):
            parsed = float(parsed)  # YAML 1.1 reads 1e-3 as text
    return nest(key.strip(), parsed)


def nest(key: str, value: Any) -> dict[str, Any]:
    """`"a.b", 1` as `{"a": {"b": 1}}`."""
    section, *rest = key.split(".")
    for part in reversed(rest):
        value = {part: value}
    return {section: value}


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """`{"a": {"b": 1}}` as `{"a.b": 1}`."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat
