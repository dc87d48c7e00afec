"""Serve a version from the model registry: find it, fetch it once, hand the verified folder to the server.

A server that was started on an alias follows it (`flows.following`); one that was started on a version stays.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from flows import files, paths, registry
from flows.errors import ConfigError, DataError
from flows.following import Follower, Target, following
from flows.params import Params, Serve
from flows.registry import Version
from flows.serving.package import ModelPackage
from flows.serving.traffic import TrafficRecorder, is_recorded
from flows.serving.vision.model import Release
from flows.serving.vision.service import VisionService
from flows.text.sources import source_name


def serve_registered(
    params: Params, model: str, alias: str, version: str, overrides: Mapping[str, Any]
) -> None:
    """Run the vision server on `model` (default: the one of params.yaml's data set) until it is told to stop.

    Raises:
        ConfigError: an override is out of range.
        DataError: no such model, alias or version, or its files are not those that were registered.
        ResourceError: the port is taken or a provider is missing.
    """
    from flows.serving.listening import listening_socket
    from flows.serving.vision.server import serve

    settings = override(params.serve, overrides)
    with listening_socket(settings.host, settings.port, "serve"):
        pass  # an occupied port is reported before anything is fetched
    found = find(params, model or params.registered_model(dataset_name(params)), alias, version)

    def follow(service: VisionService) -> AbstractContextManager[None]:
        follower = Follower(service, settings, look, fetch_target, target_of(found))
        return following(follower, settings.poll_s)

    def look() -> Target | None:
        present = registry.alias(params, found.name, alias)
        return target_of(present) if present else None

    def fetch_target(target: Target) -> Release:
        return release(params, registry.version_of(params, found.name, target.version))

    first = release(params, found)
    recorder = (
        TrafficRecorder(paths.home(), params.monitor, open_served) if is_recorded(params.monitor) else None
    )
    try:
        serve(
            first.folder,
            settings,
            version=first.version,
            git_commit=first.git_commit,
            max_pixels=params.ingest.max_pixels,
            name=first.name,
            digest=first.digest,
            companion=None if version else follow,
            on_batch=recorder.on_batch if recorder else None,
            on_request=recorder.on_request if recorder else None,
        )
    finally:
        if recorder is not None:
            recorder.close()


def open_served(name: str, version: str) -> ModelPackage:
    """The package of a version that was fetched, without reading its weights again.

    Raises:
        DataError: it is not there.
    """
    folders = sorted(served_folder(name).glob(f"{version}-*"), key=lambda folder: folder.stat().st_mtime)
    if not folders:
        raise DataError(f"{served_folder(name)} has no version {version}")
    return ModelPackage.open(folders[-1], variants=())


def target_of(version: Version) -> Target:
    return Target(version.version, version.tags.get("onnx.digest", ""))


def release(params: Params, version: Version) -> Release:
    """`version` as a folder on this machine, fetched if it is not there or no longer what was registered."""
    digest = version.tags.get("onnx.digest")
    if (folder := folder_of(version)).exists():
        try:
            ModelPackage.open(folder, digest=digest)
        except DataError:  # a copy that was damaged here must not be in the way for ever
            shutil.rmtree(folder)
    fetch(params, version)
    os.utime(folder)
    prune(served_folder(version.name), params.serve.keep_versions)
    return Release(folder, version.version, version.tags.get("git.commit", "unknown"), version.name, digest)


def prune(folder: Path, keep: int) -> None:
    """Of the fetched versions in `folder` leave the `keep` last used; any other is fetched again when needed.

    A server that still has one of the others open is not disturbed: its files stay readable to it.
    """
    fetched = [entry for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith(".")]
    for old in sorted(fetched, key=lambda entry: entry.stat().st_mtime, reverse=True)[keep:]:
        shutil.rmtree(old, ignore_errors=True)


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


def language_model_name(params: Params) -> str:
    """Name of the registered model of this workspace's text."""
    manifest = paths.TEXT / "manifest.json"
    if manifest.is_file():
        return params.registered_language_model(str(files.read_json(manifest)["name"]))
    settings = params.ingest_text
    return params.registered_language_model(source_name(settings.dataset, Path(settings.source)))


def default_model(params: Params) -> str:
    """Name of the registered model that `objective` is about."""
    if params.objective == "causal_lm":
        return language_model_name(params)
    return params.registered_model(dataset_name(params))


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
    folder = folder_of(version)
    if not folder.exists():
        with files.replace_folder(folder) as temporary:
            registry.download_version(params, version, temporary)
    return folder


def folder_of(version: Version) -> Path:
    digest = version.tags.get("onnx.digest", "")[:12]
    return served_folder(version.name) / f"{version.version}-{digest}"


def served_folder(name: str) -> Path:
    return paths.home() / ".trunkline" / "served" / name
