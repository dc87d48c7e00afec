"""Fetch a registered language model: found by alias or version, downloaded once, verified, kept on this
machine as vision's versions are (flows.serve)."""

from __future__ import annotations

import os
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flows import golden_prompts, serve
from flows.errors import DataError, GateFailed
from flows.language_champion import open_registered
from flows.language_registration import is_language_model
from flows.params import Params
from flows.registry import CHAMPION, Version
from flows.serving.lamina.slices.bundle import read_bundle
from flows.serving.lamina.slices.runner import open_slices


@dataclass(frozen=True)
class Fetched:
    """A registered bundle on this machine, its files those that were registered."""

    folder: Path
    name: str
    version: str
    digest: str


def fetch_bundle(params: Params, model: str = "", alias: str = CHAMPION, version: str = "") -> Fetched:
    """A registered bundle, downloaded if it is not here, verified.

    Args:
        model: registered model; empty: the one of the text of params.yaml.
        alias: which version, unless `version` names its number.

    Raises:
        DataError: no such model, alias or version, one that is no language model, or damaged files.
    """
    found = serve.find(params, model or serve.language_model_name(params), alias, version)
    return fetch_version(params, found)


def fetch_version(params: Params, version: Version) -> Fetched:
    """
    Raises:
        DataError: not a language model, or its files are not those that were registered.
    """
    what = f"version {version.version} of {version.name}"
    if not is_language_model(version):
        raise DataError(f"{what} is no language model; serve it with: trunkline serve vision")
    digest = version.tags.get("onnx.digest")
    if not digest:
        raise DataError(f"{what} has no tag onnx.digest; register it again with `make run`")
    folder = serve.folder_of(version)
    if folder.exists():
        try:
            open_registered(folder, digest)
        except DataError:  # a copy that was damaged here must not be in the way for ever
            shutil.rmtree(folder)
    if not folder.exists():
        serve.fetch(params, version)
        open_registered(folder, digest)
    os.utime(folder)
    serve.prune(serve.served_folder(version.name), params.serve.keep_versions)
    return Fetched(folder, version.name, version.version, digest)


def ask_registered(params: Params, version: Version) -> dict[str, Any]:
    """Fetch `version` as a server does, and have it continue its golden prompts.

    Raises:
        GateFailed: it says something else than was recorded.
    """
    began = time.monotonic()
    folder = fetch_version(params, version).folder
    prompts = golden_prompts.read_golden(folder)
    if different := golden_prompts.ask_golden(open_slices(read_bundle(folder)), prompts):
        raise GateFailed(f"golden prompts: {len(different)} of {len(prompts)} differ: {different[0]}")
    tokens = sum(len(prompt.continuation) for prompt in prompts)
    return {"prompts": len(prompts), "tokens": tokens, "seconds": time.monotonic() - began}
