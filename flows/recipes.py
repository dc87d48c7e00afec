"""Recipes: overlays of params.yaml in recipes/, one file each, and the one list of what a smoke run shrinks.

A recipe is named by its path below recipes/ without the ending (`imagenet/simmim_swin_base_100ep`), by its
bare file name where that is unique, or by the path of a file anywhere. It may build on another one:

    base: imagenet/base/simmim

The base is laid under it, one level deep: a base has no base, so that a reader has two files to look at and
no order to work out.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flows import params
from flows.errors import ConfigError

FOLDER = Path("recipes")
BASE = "base"
SMOKE = FOLDER / "smoke.yaml"
SWEEPS = FOLDER / "sweeps"

Layer = tuple[str, dict[str, Any]]
"""An overlay and the name of the file it comes from."""


def known(home: Path) -> dict[str, Path]:
    """The recipes of a clone by name; bases that only serve others lie in folders called `base`."""
    found = {}
    for path in sorted((home / FOLDER).rglob("*.yaml")):
        relative = path.relative_to(home)
        if relative != SMOKE and SWEEPS not in relative.parents and BASE not in relative.parts:
            found[relative.relative_to(FOLDER).with_suffix("").as_posix()] = path
    return found


def find(name: str, home: Path) -> Path:
    """
    Raises:
        ConfigError: no such recipe, or several of that file name.
    """
    recipes = known(home)
    if name in recipes:
        return recipes[name]
    if (path := Path(name)).is_file():
        return path
    alike = [known_name for known_name in recipes if known_name.rpartition("/")[2] == name]
    if len(alike) == 1:
        return recipes[alike[0]]
    if alike:
        raise ConfigError(f"recipe `{name}` could be {' or '.join(alike)}: give the whole name")
    raise ConfigError(
        f"no recipe `{name}`; there are {', '.join(recipes) or 'none'}, or give a path to a YAML file"
    )


def layers(name: str, home: Path) -> list[Layer]:
    """The overlays of a recipe in the order in which they are laid over params.yaml: its base, itself.

    Raises:
        ConfigError: no such recipe or base, or a base that has a base itself.
    """
    path = find(name, home)
    own = params.read(path)
    if BASE not in own:
        return [(str(path), own)]
    base = own.pop(BASE)
    base_path = home / FOLDER / f"{base}.yaml"
    if not isinstance(base, str) or not base_path.is_file():
        raise ConfigError(
            f"{path}: `base` is {base!r}, but there is no {FOLDER}/{base}.yaml; name a file below {FOLDER}/ "
            "without its ending"
        )
    below = params.read(base_path)
    if BASE in below:
        raise ConfigError(
            f"{path}: its base {FOLDER}/{base}.yaml has a base itself (`{below[BASE]}`), but one level is "
            "the most"
        )
    return [(str(base_path), below), (str(path), own)]


def apply(values: Mapping[str, Any], name: str, home: Path) -> dict[str, Any]:
    """`values` with a recipe laid over them.

    Raises:
        ConfigError: as `layers`, or a key that params.yaml does not have.
    """
    merged = dict(values)
    for origin, change in layers(name, home):
        merged = params.overlay(merged, change, origin)
    return merged


# ---- smoke runs --------------------------------------------------------------------------------------------


def shrink(values: Mapping[str, Any], home: Path) -> dict[str, Any]:
    """`values` as recipes/smoke.yaml shrinks them: the same stages and switches, small sizes, a few steps.

    Raises:
        ConfigError: the file is not as it describes itself, or the backbone is of no family it knows.
    """
    origin = str(SMOKE)
    rules = params.read(home / SMOKE)
    if set(rules) != {"backbones", "set", "at_most"} or not all(isinstance(r, dict) for r in rules.values()):
        raise ConfigError(f"{origin} needs the sections backbones, set and at_most, and no other")
    flat = params.flatten(values)

    backbone = str(flat["model.backbone"])
    family = next((name for name in rules["backbones"] if backbone.startswith(f"{name}_")), None)
    if family is None:
        raise ConfigError(f"{origin}: no small backbone is known for `{backbone}`; add its family")
    change = {"model.backbone": rules["backbones"][family]}
    change.update(rules["set"])
    for key, limit in rules["at_most"].items():
        value = flat.get(key)
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise ConfigError(f"{origin}: `{key}` is not a number in params.yaml")
        change[key] = min(value, limit)

    merged = dict(values)
    for key, value in change.items():
        merged = params.overlay(merged, params.nest(key, value), origin)
    return merged
