"""What the simulator is told: a model, devices, a network, a policy; YAML files, checked strictly (spec 10).

Units are in the names: `tflops` 10^12 FLOP/s, `gb` 10^9 bytes. Prices are the user's: a device without a
dated price is refused, and nothing in this package knows one. A mistake is one `ConfigError` that names the
file and the key.
"""

from __future__ import annotations

import datetime
import math
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from flows.errors import ConfigError
from flows.params.reading import first_problem

BUNDLED = Path(__file__).parent / "bundled"
MAX_FILE_BYTES = 4 << 20
GB = 1e9

Positive = Annotated[float, Field(gt=0.0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0.0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(gt=0.0, le=1.0)]
Count = Annotated[int, Field(ge=1, le=1 << 40)]
Partition = Literal["head", "request", "sequence"]


class Input(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Model(Input):
    """The shapes that decide what an iteration moves and computes (spec 1)."""

    name: str
    source: str = ""
    parameters: Count
    layers: Annotated[int, Field(ge=1, le=10_000)]
    hidden_size: Count
    heads: Annotated[int, Field(ge=1, le=100_000)]
    kv_heads: Annotated[int, Field(ge=1, le=100_000)]
    head_size: Count
    bytes_per_element: Annotated[float, Field(gt=0.0, le=8.0)]
    vocab_size: Count
    max_context: Count
    windows: int | list[int] = 0
    """Tokens a query sees, itself included; 0: all. One number, or one per layer."""

    @field_validator("windows")
    @classmethod
    def _windows_are_tokens(cls, value: int | list[int]) -> int | list[int]:
        if any(window < 0 for window in ([value] if isinstance(value, int) else value)):
            raise ValueError("a window has 0 (all) or more tokens")
        return value

    @model_validator(mode="after")
    def _fits_together(self) -> Model:
        if self.heads % self.kv_heads:
            raise ValueError(f"{self.heads} `heads` do not divide over {self.kv_heads} `kv_heads`")
        if isinstance(self.windows, list) and len(self.windows) != self.layers:
            raise ValueError(f"`windows` has {len(self.windows)} entries for {self.layers} `layers`")
        return self

    @property
    def weight_bytes(self) -> float:
        return self.bytes_per_element * self.parameters

    @property
    def kv_bytes_per_token(self) -> float:
        """Of all layers: 2 L KV hd e, which is 2 L d e / G where H hd = d."""
        return 2.0 * self.layers * self.kv_heads * self.head_size * self.bytes_per_element

    @property
    def window_shares(self) -> list[tuple[float, float]]:
        """(window in tokens, share of the layers that have it); infinity where a layer sees all."""
        windows = self.windows if isinstance(self.windows, list) else [self.windows] * self.layers
        return [
            (float(window) if window else math.inf, windows.count(window) / len(windows))
            for window in sorted(set(windows))
        ]


class Device(Input):
    tflops: Positive
    memory_gb: Positive
    memory_gb_s: Positive
    price_per_hour: NonNegative
    price_date: datetime.date
    price_source: str = ""
    mfu: Fraction  # share of tflops that matrix products reach
    mbu_w: Fraction  # share of memory_gb_s at which weights are read
    mbu_a: Fraction  # share of memory_gb_s at which keys and values are read
    usable_fraction: Fraction = 0.9  # of memory_gb
    reserved_gb: NonNegative = 0.0  # of what is usable: activations, graphs, libraries
    collective_us: NonNegative = 20.0  # one all-reduce among several of them

    @property
    def flops(self) -> float:
        return self.tflops * 1e12

    @property
    def bandwidth(self) -> float:
        return self.memory_gb_s * GB

    @property
    def room_bytes(self) -> float:
        """What weights or keys and values may take of one device."""
        return max(0.0, (self.memory_gb * self.usable_fraction - self.reserved_gb) * GB)

    def scaled(self, factor: float) -> Device:
        """With every efficiency times `factor`, none above 1."""
        changed = {name: min(1.0, getattr(self, name) * factor) for name in ("mfu", "mbu_w", "mbu_a")}
        return self.model_copy(update=changed)


class Hardware(Input):
    devices: Annotated[dict[str, Device], Field(min_length=1, max_length=32)]


class Network(Input):
    """The link between model and memory devices."""

    name: str = ""
    source: str = ""
    one_way_us: NonNegative
    gb_s: Positive
    model_devices_per_nic: Annotated[int, Field(ge=1, le=64)] = 1
    attention_devices_per_nic: Annotated[int, Field(ge=1, le=64)] = 1

    def bandwidth(self, model_devices: int, attention_devices: int) -> float:
        """Bytes/s between both sides: the side with fewer NICs sets it (spec 10, min(a, b))."""
        nics = min(
            -(-model_devices // self.model_devices_per_nic),
            -(-attention_devices // self.attention_devices_per_nic),
        )
        return self.gb_s * GB * nics

    @property
    def round_trip_s(self) -> float:
        return 2e-6 * self.one_way_us


class Search(Input):
    """What the planner tries."""

    model_devices: Annotated[list[Annotated[int, Field(ge=1, le=1024)]], Field(min_length=1)]
    attention_devices: Annotated[list[Annotated[int, Field(ge=1, le=1024)]], Field(min_length=1)]
    homogeneous_devices: Annotated[list[Annotated[int, Field(ge=1, le=1024)]], Field(min_length=1)]
    micro_batches: Annotated[list[Annotated[int, Field(ge=1, le=8)]], Field(min_length=1)]
    partitions: Annotated[list[Partition], Field(min_length=1)]
    batch_shares: Annotated[list[Fraction], Field(min_length=1)]  # of what memory allows
    max_price_per_hour: NonNegative  # of a whole set-up; 0: any
    requests: Annotated[int, Field(ge=50)]  # of the trace, from its start, in each simulation


class Policy(Input):
    """How a set-up is run."""

    overlap: bool  # Q leaves before K and V are there (spec 4)
    page_tokens: Annotated[int, Field(ge=1, le=4096)]
    reserve: Literal["full", "watermark"]
    watermark: Annotated[float, Field(ge=0.0, lt=1.0)]  # of the pages kept free at admission
    redundancy: Literal["none", "parity", "replica"]
    prefill: Literal["elsewhere", "chunked"]  # elsewhere: as the paper, decode only
    max_rows: Count  # of one iteration, with chunked prefill
    max_requests: Annotated[int, Field(ge=0)]  # at once; 0: as memory allows
    max_queued_requests: Annotated[int, Field(ge=0)]  # 0: no limit
    queue_deadline_s: NonNegative  # 0: none
    enforce_max_context: bool
    step_overhead_ms: NonNegative
    homogeneous_step_overhead_ms: NonNegative
    collectives_per_layer: Annotated[int, Field(ge=0, le=64)]
    bandwidth_slowdown: Positive  # the alpha of spec 2
    tbt_slo_ms: NonNegative  # 0: none
    ttft_slo_ms: NonNegative  # 0: none
    arrival_scale: Positive  # 2: requests come twice as fast
    search: Search


Checked = TypeVar("Checked", bound=Input)


def read_model(name_or_file: str) -> Model:
    """A bundled model by its name, or a file.

    Raises:
        ConfigError: as all of `read_…` here: no such file, not YAML, an unknown, missing or impossible key.
    """
    return _read(_find(name_or_file, "model"), Model)


def read_hardware(path: Path) -> Hardware:
    return _read(path, Hardware)


def read_network(name_or_file: str) -> Network:
    return _read(_find(name_or_file, "network"), Network)


def read_policy(path: Path | None) -> Policy:
    """The bundled policy, with the keys of `path` in place of its own."""
    values = _load(BUNDLED / "policy.yaml")
    if path is None:
        return _check(values, Policy, "policy.yaml")
    for key, value in _load(path).items():
        if key == "search" and isinstance(value, dict):
            values["search"] = {**values["search"], **value}
        else:
            values[key] = value
    return _check(values, Policy, str(path))


def bundled(kind: str) -> list[str]:
    """Names of the bundled models or networks."""
    return sorted(path.name.removesuffix(f".{kind}.yaml") for path in BUNDLED.glob(f"*.{kind}.yaml"))


def _find(name_or_file: str, kind: str) -> Path:
    if name_or_file.lower() in bundled(kind):
        return BUNDLED / f"{name_or_file.lower()}.{kind}.yaml"
    path = Path(name_or_file)
    if not path.exists():
        raise ConfigError(
            f"{name_or_file} is neither a file nor a {kind} that is known: {', '.join(bundled(kind))}"
        )
    return path


def _read(path: Path, kind: type[Checked]) -> Checked:
    return _check(_load(path), kind, str(path))


def _check(values: dict[str, Any], kind: type[Checked], origin: str) -> Checked:
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise ConfigError(f"{origin}: {first_problem(error)}") from None


class _Loader(yaml.SafeLoader):
    """SafeLoader that refuses a key given twice."""


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen: set[Any] = set()
    for key_node, _ in node.value:
        key = loader.construct_object(key_node)
        if not isinstance(key, str):
            raise ConfigError(f"key {key!r} is not text")
        if key in seen:
            raise ConfigError(f"key `{key}` is there twice")
        seen.add(key)
    return loader.construct_mapping(node, deep=True)


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)


def _load(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise ConfigError(f"{path} is larger than any such file ({MAX_FILE_BYTES >> 20} MiB)")
        value = yaml.load(path.read_text(), _Loader)
    except (FileNotFoundError, NotADirectoryError):
        raise ConfigError(f"{path} does not exist") from None
    except PermissionError:
        raise ConfigError(f"{path} may not be read") from None
    except IsADirectoryError:
        raise ConfigError(f"{path} is a folder, not a file") from None
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError, ValueError) as error:
        raise ConfigError(f"{path} is not valid YAML: {' '.join(str(error).split())[:300]}") from None
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    if not isinstance(value, dict) or not value:
        raise ConfigError(
            f"{path} must hold keys and values, found {'nothing' if not value else type(value).__name__}"
        )
    return value
