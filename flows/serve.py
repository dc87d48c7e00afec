"""Serve a version from the model registry: find it, fetch it once, hand the verified folder to the server."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flows import files, paths, registry
from flows.errors import ConfigError, DataError
from flows.params import Params, Serve
from flows.registry import Version


def serve_registered(
    params: Params, model: str, alias: str, version: str, overrides: Mapping[str, Any]
) -> None:
    """Run the vision server on `model` (default: the one of params.yaml's data set) until it is told to stop.

    Raises:
        ConfigError: an override is out of range.
        DataError: no such model, alias or version, or its files are not those that were registered.
        ResourceError: the port is taken or a provider is missing.
    """
    from flows.serving.vision.server import listening_socket, serve

    settings = override(params.serve, overrides)
    with listening_socket(settings.host, settings.port):
        pass  # an occupied port is reported before anything is fetched
    found = find(params, model or params.registered_model(dataset_name(params)), alias, version)
    folder = fetch(params, found)
    serve(
        folder,
        settings,
        version=found.version,
        git_commit=found.tags.get("git.commit", "unknown"),
        max_pixels=params.ingest.max_pixels,
        name=found.name,
        digest=found.tags.get("onnx.digest"),
    )


def override(settings: Serve, changes: Mapping[str, Any]) -> Serve:
    from pydantic import ValidationError

    try:
        return Serve.model_validate({**settings.model_dump(), **changes})
    except ValidationError as error:
        first = error.errors()[0]
        raise ConfigError(f"--{first['loc'][0]}: {first['msg']} (found {first['input']!r})") from None


def dataset_name(params: Params) -> str:
    """Name of the data set in this workspace, which decides the registered model's name."""
    manifest = paths.DATA / "manifest.json"
    return str(files.read_json(manifest)["name"]) if manifest.is_file() else params.ingest.dataset


def find(params: Params, name: str, alias: str, version: str) -> Version:
    """
    Raises:
        DataError: the registry has no such model, version or alias; the message lists what it has.
    """
    names = registry.model_names(params)
    known = registry.versions(params, name) if name in names else []
    if not known:
        listed = ", ".join(names) or "none yet; `make run` registers one"
        raise DataError(f"the registry has no model {name!r}; it has: {listed}")
    if version:
        chosen = next((entry for entry in known if entry.version == version), None)
        if chosen is None:
            raise DataError(
                f"{name} has no version {version!r}; it has {', '.join(entry.version for entry in known)}"
            )
        return chosen
    chosen = registry.alias(params, name, alias)
    if chosen is None:
        aliases = ", ".join(sorted({text for entry in known for text in entry.aliases})) or "none"
        raise DataError(f"{name} has no alias {alias!r}; its aliases: {aliases}")
    return chosen


def fetch(params: Params, version: Version) -> Path:
    """The folder of `version`, downloaded once; the server verifies its hashes at every start."""
    digest = version.tags.get("onnx.digest", "")[:12]
    folder = paths.home() / ".trunkline" / "served" / version.name / f"{version.version}-{digest}"
    if not folder.exists():
        with files.replace_folder(folder) as temporary:
            registry.download_version(params, version, temporary)
    return folder
