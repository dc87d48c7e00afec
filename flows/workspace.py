"""Which params a command means, and where it runs.

Without overrides that is the clone itself. With a recipe, a data set or `--set`, the params are merged,
checked and put into a workspace of their own, `.trunkline/workspaces/<name>/`: a copy of the code and
dvc.yaml with its own params.yaml, dvc.lock and artifacts/, sharing the clone's DVC cache. So params.yaml
never changes silently, results of two recipes stand side by side, and every run is a plain `dvc repro` in its
folder.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from flows import files, params, paths, recipes
from flows.data.sources import DIGITS_SOURCE, resolve
from flows.errors import ConfigError, DataError, ResourceError
from flows.params import Params
from flows.text.sources import source_name

CODE = ("flows", "models", "dvc.yaml", "constraints.txt", "recipes")
NAME_LETTERS = 40  # of the recipe or data set in a workspace's name
LOCK_CHECK_S = 0.2


@dataclass(frozen=True)
class Workspace:
    root: Path
    params: Params
    settings: tuple[str, ...]
    """The overrides as flat `key=value`, usable with `dvc exp run -S`."""


def prepare(
    dataset: str = "", recipe: str = "", settings: Sequence[str] = (), smoke: bool = False
) -> Workspace:
    """Merge params.yaml, the data set's recipe, `recipe`, `settings`, in this order; make the folder.

    Args:
        smoke: shrink the recipe before the settings are laid over it, see `flows.recipes.shrink`.

    Raises:
        ConfigError: an unknown recipe or key, an impossible value.
        DataError: the data set cannot be found or fetched.
    """
    home = paths.home()
    base = params.read(home / "params.yaml")
    values = merge(dataset, recipe, settings, smoke)
    checked = params.check(values, "params.yaml with overrides" if values != base else "params.yaml")
    if values == base:
        return Workspace(home, checked, ())
    hint = recipe or dataset or (checked.ingest.dataset if smoke else "")
    place = locate(values, checked, f"smoke-{Path(hint).stem}" if smoke else hint)
    populate(place.root, values)
    return place


def require_writable() -> None:
    """Find a read-only or full disk before a server starts, which would wait for its database for minutes.

    Raises:
        OSError: `flows.errors.explain` has a sentence for it.
    """
    folder = paths.home() / ".trunkline"
    folder.mkdir(exist_ok=True)
    with tempfile.TemporaryFile(dir=folder) as file:
        file.write(b"x")
        file.flush()


def merge(
    dataset: str = "", recipe: str = "", settings: Sequence[str] = (), smoke: bool = False
) -> dict[str, Any]:
    """The clone's params.yaml with the data set's recipe, `recipe` and `settings` laid over it, unchecked.

    Raises:
        ConfigError, DataError: as `prepare`.
    """
    home = paths.home()
    base = params.read(home / "params.yaml")
    values, chosen = base, {}
    text: dict[str, str] = {}
    if dataset and _objective(base, recipe, settings, home) == "causal_lm":
        text, dataset = _resolve_text(dataset), ""
    if dataset:
        kind, source = resolve(dataset, home)
        if (home / "recipes" / f"{kind}.yaml").is_file():
            values = recipes.apply(values, kind, home)
        chosen = {"dataset": kind, "source": source}
    if recipe:
        values = recipes.apply(values, recipe, home)
        kind = values["ingest"]["dataset"]
        if not (chosen or smoke or kind in (base["ingest"]["dataset"], "folder")):
            # the recipe names a data set, but where it lies on this machine is not a recipe's business
            chosen = {"source": resolve(kind, home)[1]}
    if smoke:
        values = recipes.shrink(values, home)
        chosen = chosen or {"dataset": "digits", "source": DIGITS_SOURCE}
    values = params.overlay(values, {"ingest": chosen, "ingest_text": text}, "data set")
    for setting in settings:
        values = params.overlay(values, params.parse_setting(setting), f"--set {setting}")
    before, now = base["ingest"], values["ingest"]
    if now["dataset"] == "folder" != before["dataset"] and now["source"] == before["source"]:
        raise ConfigError(
            f"recipe `{recipe}` trains on a folder of images: name it with DATASET=path/to/folder "
            "(--dataset), or try the recipe on bundled images with SMOKE=1 (--smoke)"
        )
    return values


def _objective(base: dict[str, Any], recipe: str, settings: Sequence[str], home: Path) -> Any:
    """What the run will make; the last word has `settings`."""
    found = (recipes.apply(base, recipe, home) if recipe else base).get("objective")
    for setting in settings:
        found = params.parse_setting(setting).get("objective", found)
    return found


def _resolve_text(dataset: str) -> dict[str, str]:
    """The values of ingest_text.dataset and ingest_text.source for a folder of texts or one text.

    Raises:
        DataError: there is no such thing.
    """
    source = Path(dataset).expanduser()
    if not source.exists():
        raise DataError(
            f"DATASET={dataset} does not exist; with objective causal_lm it is a folder of .txt and .md "
            "files, or one such file"
        )
    return {"dataset": "files", "source": os.path.abspath(source)}


def locate(values: dict[str, Any], checked: Params, hint: str) -> Workspace:
    """Where `values` run, also when they are the clone's own; `populate` makes the folder."""
    base = params.flatten(params.read(paths.home() / "params.yaml"))
    changed = {key: value for key, value in params.flatten(values).items() if base.get(key) != value}
    # what a study asks for does not change the runs it asks
    changed = {key: value for key, value in changed.items() if not key.startswith("study.")}
    settings = tuple(f"{key}={json.dumps(value)}" for key, value in changed.items())
    return Workspace(paths.workspaces() / _name(changed, hint, checked), checked, settings)


def _name(changed: dict[str, Any], hint: str, checked: Params) -> str:
    digest = hashlib.sha256(json.dumps(changed, sort_keys=True).encode()).hexdigest()[:8]
    stem = Path(hint).stem if hint else _data_name(checked)
    plain = re.sub(r"[^A-Za-z0-9_-]+", "-", stem)[:NAME_LETTERS].strip("-")
    return f"{plain or 'run'}-{digest}"


def _data_name(checked: Params) -> str:
    if checked.objective == "causal_lm":
        return source_name(checked.ingest_text.dataset, Path(checked.ingest_text.source))
    return checked.ingest.dataset


def populate(root: Path, values: dict[str, Any]) -> None:
    """Bring params and code of the workspace up to date; outputs and dvc.lock stay."""
    home = paths.home()
    root.mkdir(parents=True, exist_ok=True)
    for name in CODE:
        _mirror(home / name, root / name)
    _write_if_changed(root / "params.yaml", yaml.safe_dump(values, sort_keys=False).encode())
    # its own DVC root without git; the same cache, so that equal stages are computed once. The path is
    # relative, because DVC's config would cut one with `#`, commas or quotes in the clone's name
    cache = os.path.relpath(home / ".dvc" / "cache", root / ".dvc")
    _write_if_changed(
        root / ".dvc" / "config",
        f"[core]\n    no_scm = true\n    analytics = false\n[cache]\n    dir = {cache}\n".encode(),
    )
    _write_if_changed(root / ".dvcignore", b"__pycache__\n")


@contextmanager
def alone_in(root: Path, patience: Callable[[], bool] = lambda: False) -> Iterator[int]:
    """Keep other runs out of a workspace; different workspaces may run at once.

    Args:
        patience: asked while another run is active; True waits on.

    Yields:
        The lock's file descriptor: a child process that inherits it keeps others out as long as it lives.

    Raises:
        ResourceError: another run is active.
    """
    folder = paths.home() / ".trunkline" / "locks"
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / f"{root.name}.lock", "w") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if not patience():
                    raise ResourceError(f"another run is active in {root}; wait for it or stop it") from None
                time.sleep(LOCK_CHECK_S)
        yield file.fileno()


def _mirror(source: Path, target: Path) -> None:
    if not source.is_dir():
        _write_if_changed(target, source.read_bytes())
        return
    wanted = {
        path.relative_to(source)
        for path in source.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    for relative in wanted:
        _write_if_changed(target / relative, (source / relative).read_bytes())
    for path in sorted(target.rglob("*"), reverse=True):
        if path.is_file() and "__pycache__" not in path.parts and path.relative_to(target) not in wanted:
            path.unlink()
        elif path.is_dir() and not any(path.iterdir()):
            shutil.rmtree(path)


def _write_if_changed(path: Path, data: bytes) -> None:
    if not (path.is_file() and path.read_bytes() == data):
        files.write_bytes(path, data)
