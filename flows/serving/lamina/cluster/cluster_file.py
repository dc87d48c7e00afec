"""The file that `--cluster` names: on which hosts attention workers run, and what each of them gets.

    address: 10.0.0.1:6379      # of a running Ray cluster; local: one on this machine, gone with the service
    strategy: spread            # pack | spread | strict_spread: over hosts, as Ray understands it
    ports: [21000, 21099]       # on the workers' hosts; default: any free one
    bind: node                  # node: the address that Ray knows the host by; or an interface, or an address
    start_timeout_s: 120
    workers:
      - count: 2                # alike
        device: cpu             # cpu | cuda
        threads: 8              # requests computed at the same time
        kv_mb: 65536            # for keys and values
        weight: 2.0             # share of the heads; for all groups or for none
        cpus: 8                 # what Ray reserves
        gpus: 0
        memory_mb: 70000
        resources: {big_host: 1}    # labels of yours, by which Ray finds the hosts

Which hosts there are is Ray's knowledge, not this file's.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, ValidationError, model_validator

from flows.errors import ConfigError
from flows.params import Section, first_problem, read

Port = Annotated[int, Field(ge=1, le=65535)]
Amount = Annotated[float, Field(ge=0.0)]


class WorkerGroup(Section):
    """Workers that are alike."""

    count: Annotated[int, Field(ge=1, le=64)] = 1
    device: Literal["cpu", "cuda"] = "cpu"
    threads: Annotated[int, Field(ge=1)] = 1
    kv_mb: Annotated[int, Field(ge=1)]
    weight: Annotated[float, Field(gt=0.0)] | None = None
    cpus: Amount = 1.0
    gpus: Amount = 0.0
    memory_mb: Annotated[int, Field(ge=0)] = 0
    resources: dict[str, Annotated[float, Field(gt=0.0)]] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _a_gpu_for_cuda(self) -> Self:
        if self.device == "cuda" and not self.gpus:
            raise ValueError("device cuda needs gpus: 1 (or a part of one), or Ray gives it none to see")
        return self

    def bundle(self) -> dict[str, float]:
        """What Ray reserves for one worker, in Ray's words."""
        asked = {
            "CPU": self.cpus,
            "GPU": self.gpus,
            "memory": float(self.memory_mb * 2**20),
            **self.resources,
        }
        return {name: amount for name, amount in asked.items() if amount}


class ClusterFile(Section):
    address: Annotated[str, Field(pattern=r"^(local|\[?[\w.:-]+\]?:\d+)$")]
    strategy: Literal["pack", "spread", "strict_spread"] = "spread"
    ports: Annotated[tuple[Port, Port], Field(strict=False)] | None = None
    bind: Annotated[str, Field(min_length=1)] = "node"
    start_timeout_s: Annotated[float, Field(gt=0.0)] = 120.0
    workers: Annotated[list[WorkerGroup], Field(min_length=1)]

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.ports and self.ports[0] > self.ports[1]:
            raise ValueError(f"ports go from low to high, got {list(self.ports)}")
        if len({group.weight is None for group in self.workers}) > 1:
            raise ValueError("give weight for all groups of workers or for none")
        for group in self.workers:
            if not group.bundle():
                raise ValueError(
                    "a group of workers has to reserve something: cpus, gpus, memory_mb or resources"
                )
        return self

    @property
    def each(self) -> list[WorkerGroup]:
        """One entry per worker."""
        return [group for group in self.workers for _ in range(group.count)]

    @property
    def weights(self) -> list[float] | None:
        """Of all workers, or None if the file names none."""
        weights = [group.weight for group in self.each if group.weight is not None]
        return weights or None


def read_cluster_file(path: Path) -> ClusterFile:
    """
    Raises:
        ConfigError: one line that names file, key, value and what is legal.
    """
    try:
        return ClusterFile.model_validate(read(path))
    except ValidationError as error:
        raise ConfigError(f"{path}: {first_problem(error)}") from None
