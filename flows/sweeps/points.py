"""The sweep file: what it may say, and the points it asks for.

The same file gives the same points on every machine: a random value is a hash of (seed, key, number of the
draw), not the next value of a generator. So more samples, or one more key, leave earlier draws as they were.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, ValidationError, model_validator

from flows import params, workspace
from flows.errors import ConfigError
from flows.params import Count, Params, Section, flatten

DIGITS = 4  # significant digits of a random number
NAME_DIGITS = 8  # hexadecimal, of a point's name
PLAIN_NAME = r"^[A-Za-z0-9][A-Za-z0-9_-]{0,39}$"

Setting = Any  # a scalar or list as YAML gives it
Range = Annotated[tuple[float, float], Field(strict=False)]
Metric = Annotated[str, Field(pattern=r"^[\w-]+\.[\w.-]+$")]
IntRange = Annotated[tuple[int, int], Field(strict=False)]


class Distribution(Section):
    """Exactly one of the four."""

    uniform: Range | None = None
    log_uniform: Range | None = None
    int: IntRange | None = None
    choice: Annotated[list[Any], Field(min_length=1)] | None = None

    @model_validator(mode="after")
    def _one_and_in_order(self) -> Self:
        kinds = [name for name in type(self).model_fields if getattr(self, name) is not None]
        if len(kinds) != 1:
            raise ValueError("give one of uniform, log_uniform, int, choice")
        for bounds in (self.uniform, self.log_uniform, self.int):
            if bounds is not None and not bounds[0] < bounds[1]:
                raise ValueError(f"the first bound must be below the second, got {list(bounds)}")
        if self.log_uniform is not None and self.log_uniform[0] <= 0:
            raise ValueError(f"log_uniform needs bounds above 0, got {list(self.log_uniform)}")
        return self

    @property
    def ends(self) -> list[Setting]:
        """Values that must be legal for all draws to be."""
        return list(self.choice or self.uniform or self.log_uniform or self.int or ())

    def draw(self, seed: Count, key: str, number: Count) -> Setting:
        digest = hashlib.sha256(f"{seed}/{key}/{number}".encode()).digest()
        unit = Decimal(int.from_bytes(digest[:8], "big")) / 2**64  # in [0, 1)
        if self.choice is not None:
            return self.choice[math.floor(unit * len(self.choice))]
        if self.int is not None:
            low, high = self.int
            return low + math.floor(unit * (high - low + 1))
        # Decimal and not float: logarithms of the C library differ in the last bit between machines
        if self.log_uniform is not None:
            first, last = (Decimal(repr(bound)) for bound in self.log_uniform)
            return _rounded(first * (last / first) ** unit, first, last)
        assert self.uniform is not None
        first, last = (Decimal(repr(bound)) for bound in self.uniform)
        return _rounded(first + unit * (last - first), first, last)


def _rounded(value: Decimal, low: Decimal, high: Decimal) -> float:
    return float(min(max(Decimal(f"{value:.{DIGITS - 1}e}"), low), high))


class SweepFile(Section):
    """A sweep as its author wrote it."""

    name: Annotated[str, Field(pattern=PLAIN_NAME)]
    dataset: str = ""
    recipe: str = ""
    settings: dict[str, Any] = Field(default_factory=dict)
    metric: Metric
    direction: Literal["maximize", "minimize"] = "maximize"
    also: list[Metric] = Field(default_factory=list)
    grid: dict[str, Annotated[list[Any], Field(min_length=1)]] = Field(default_factory=dict)
    random: dict[str, Distribution] = Field(default_factory=dict)
    samples: Count = 0
    seed: Count = 0

    @model_validator(mode="after")
    def _has_points(self) -> Self:
        if not self.grid and not self.random:
            raise ValueError("`grid` and `random` are both empty: no key to vary")
        if bool(self.random) != bool(self.samples):
            raise ValueError("`random` and `samples` (at least 1) belong together")
        for key in self.random:
            if key in self.grid:
                raise ValueError(f"`{key}` is in both `grid` and `random`")
        for key in (*self.grid, *self.random):
            if key in self.settings:
                raise ValueError(f"`{key}` is both varied and fixed in `settings`")
        return self

    @property
    def keys(self) -> list[str]:
        """The axes, in the order of the file."""
        return [*self.random, *self.grid]

    @property
    def digest(self) -> str:
        """Of everything but the number of samples: a longer sweep continues the shorter one."""
        said = self.model_dump(mode="json", exclude={"samples", "name"})
        return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()[:NAME_DIGITS]

    def is_log(self, key: str) -> bool:
        return key in self.random and self.random[key].log_uniform is not None


@dataclass(frozen=True)
class Point:
    """One setting of all axes."""

    name: str
    settings: Mapping[str, Setting]
    values: Mapping[str, Any]
    """All params."""
    params: Params | None
    """None if they contradict one another."""
    problem: str
    root: Path
    """Its workspace."""


@dataclass(frozen=True)
class Points:
    points: list[Point]
    repeated: int
    """Draws that were equal to an earlier one, and left out."""


# ------------------------------------------------------------------------------------------ reading


def read_file(path: Path) -> SweepFile:
    """
    Raises:
        ConfigError: one line that names the key.
    """
    said = params.read(path)
    for part in ("grid", "random"):
        if isinstance(said.get(part), dict):
            _refuse_sections(path, part, said[part])
    said.setdefault("name", path.stem)
    try:
        sweep = SweepFile.model_validate(said)
    except ValidationError as error:
        raise ConfigError(f"{path}: {params.first_problem(error)}") from None
    # YAML 1.1 reads 1e-3 as text
    grid = {key: [_number(value) for value in values] for key, values in sweep.grid.items()}
    settings = {key: _number(value) for key, value in sweep.settings.items()}
    return sweep.model_copy(update={"grid": grid, "settings": settings})


def _refuse_sections(path: Path, part: str, said: Mapping[Any, Any]) -> None:
    for key, value in said.items():
        if part == "grid" and not isinstance(value, list):
            raise ConfigError(f"{path}: `grid.{key}`: a list of values is needed, found {value!r}")
        if part == "grid" and not value:
            raise ConfigError(f"{path}: `grid.{key}` is empty: give at least one value")
        if part == "random" and not isinstance(value, dict):
            raise ConfigError(
                f"{path}: `random.{key}`: give a distribution such as {{uniform: [0, 1]}}, found {value!r}"
            )


def _number(value: Any) -> Any:
    if isinstance(value, str):
        with suppress(ValueError):
            return float(value)
    return value


# ------------------------------------------------------------------------------------------ points


def list_points(sweep: SweepFile, origin: str, limit: int) -> Points:
    """Every point of `sweep`, in a fixed order; grid points of the first draw first.

    Raises:
        ConfigError: an unknown key, a value that params reject by itself, too many or only impossible points.
    """
    fixed = [f"{key}={json.dumps(value)}" for key, value in sweep.settings.items()]
    base = workspace.merge(sweep.dataset, sweep.recipe, fixed)
    params.check(base, f"{origin}: params.yaml with dataset, recipe and settings")
    _check_axes(sweep, base, origin)
    count = math.prod(len(values) for values in sweep.grid.values()) * max(1, sweep.samples)
    if count > limit:
        sizes = [f"`{key}` {len(values)}" for key, values in sweep.grid.items()]
        sizes += [f"`samples` {sweep.samples}"] if sweep.samples else []
        raise ConfigError(
            f"{origin}: {' x '.join(sizes)} = {count} points, more than `sweep.max_points` {limit} "
            "in params.yaml"
        )
    points: dict[str, Point] = {}
    seen: set[str] = set()
    for settings in _combinations(sweep):
        point = _point(sweep, settings, base)
        # 1 and 1.0 make the same params
        identity = point.params.model_dump_json() if point.params else point.name
        if identity not in seen:
            seen.add(identity)
            points[point.name] = point
    rejected = [point for point in points.values() if point.problem]
    if len(rejected) == len(points):
        raise ConfigError(f"{origin}: no point is possible: {rejected[0].problem}")
    return Points(list(points.values()), count - len(points))


def _combinations(sweep: SweepFile) -> Iterator[dict[str, Setting]]:
    for number in range(max(1, sweep.samples)):
        drawn = {key: rule.draw(sweep.seed, key, number) for key, rule in sweep.random.items()}
        for chosen in itertools.product(*sweep.grid.values()):
            yield {**drawn, **dict(zip(sweep.grid, chosen, strict=True))}


def _point(sweep: SweepFile, settings: dict[str, Setting], base: Mapping[str, Any]) -> Point:
    values = dict(base)
    for key, value in settings.items():
        values = params.overlay(values, _nested(key, value), sweep.name)
    checked, problem = _check(values)
    # the workspace that `trunkline run` with the same overrides has
    root = workspace.locate(values, checked, sweep.recipe or sweep.dataset).root if checked else Path()
    return Point(point_name(settings), settings, values, checked, problem, root)


def point_name(settings: Mapping[str, Setting]) -> str:
    text = json.dumps(dict(settings), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:NAME_DIGITS]


def _check(values: Mapping[str, Any]) -> tuple[Params | None, str]:
    try:
        return Params.model_validate(values), ""
    except ValidationError as error:
        return None, params.first_problem(error)


def _nested(key: str, value: Any) -> dict[str, Any]:
    for part in reversed(key.split(".")):
        value = {part: value}
    assert isinstance(value, dict)
    return value


def _check_axes(sweep: SweepFile, base: Mapping[str, Any], origin: str) -> None:
    """What is wrong with one key by itself is a mistake in the file; what only contradicts other keys makes
    a point impossible, which is a result."""
    flat = flatten(base)
    for key in sweep.keys:
        if key not in flat:
            section = any(name.startswith(f"{key}.") for name in flat)
            raise ConfigError(
                f"{origin}: `{key}` is a section of keys" if section else f"{origin}: unknown key `{key}`"
            )
        values = sweep.grid.get(key) or sweep.random[key].ends
        for number, value in enumerate(values):
            if key in sweep.grid and value in values[:number]:
                raise ConfigError(f"{origin}: `{key}` has the value {value!r} twice")
            try:
                Params.model_validate(params.overlay(base, _nested(key, value), origin))
            except ValidationError as error:
                for problem in error.errors():
                    named = [part for part in problem["loc"] if isinstance(part, str)]
                    if ".".join(named[: key.count(".") + 1]) == key:
                        raise ConfigError(f"{origin}: `{key}`: {problem['msg']} (found {value!r})") from None
