"""Attention workers on several hosts: Ray says where, this class says what.

Every worker's process is held by an actor on its host (`hosted_worker`), in one placement group, so that room
for all is found before any is started. A worker that ends is started again by its actor, on the same port. A
host or an actor that is lost is replaced: Ray finds room for the bundle, on the same host if that is there,
else elsewhere; the worker then has another address. Tensors and tokens of texts never pass through Ray.
"""

from __future__ import annotations

import os
import signal
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flows.errors import ConfigError, ResourceError, TrunklineError
from flows.serving.lamina.cluster.child import Say
from flows.serving.lamina.cluster.cluster_file import ClusterFile, WorkerGroup
from flows.serving.lamina.cluster.fleet import Address
from flows.serving.lamina.cluster.hosted_worker import HostedWorker, Placed, Status
from flows.serving.lamina.cluster.keeper import STABLE_S, pause_after

POLL_S = 0.2
FRESH_S = 3.0
"""A worker of which nothing was heard for so long does not count as ready."""
LOOPBACK = "127.0.0.1"
NO_ADDRESS: Address = ("", 0)


@dataclass
class _Member:
    """One worker: its actor, what that said last, what was asked of it."""

    index: int
    group: WorkerGroup
    actor: Any = None
    asked: Any = None
    status: Status | None = None
    asked_at: float = 0.0
    heard: float = 0.0
    address: Address = NO_ADDRESS
    created: float = 0.0
    early: int = 0
    not_before: float = 0.0

    @property
    def name(self) -> str:
        return f"attention worker {self.index}"


class RayFleet:
    """
    Args:
        scratch: for the files of a Ray that lives as long as the service (`address: local`).
    """

    def __init__(self, cluster: ClusterFile, token: str, scratch: Path, say: Say) -> None:
        self._ray = _import_ray()
        self._cluster, self._token, self._scratch, self._say = cluster, token, scratch, say
        self._members = [_Member(index, group) for index, group in enumerate(cluster.each)]
        self._room: Any = None

    # --- what every fleet does

    def start(self) -> None:
        deadline = time.monotonic() + self._cluster.start_timeout_s
        self._connect()
        try:
            self._reserve()
            while not all(member.status and member.status.ready for member in self._members):
                self.look(starting=True)
                if time.monotonic() > deadline:
                    raise ResourceError(
                        f"attention workers did not start within {self._cluster.start_timeout_s:g} s "
                        "(start_timeout_s)"
                    )
                time.sleep(POLL_S / 4)
        except BaseException:
            self.stop(1.0)
            raise

    @property
    def addresses(self) -> list[Address]:
        return [member.address for member in self._members]

    @property
    def labels(self) -> list[str]:
        return [
            f"{member.address[0]}:{member.address[1]} (pid {member.status.pid if member.status else 'none'})"
            for member in self._members
        ]

    def look(self, starting: bool = False) -> None:
        """
        Raises:
            ConfigError, ResourceError: while `starting`: why a worker cannot be started.
        """
        now = time.monotonic()
        for member in self._members:
            if member.actor is None:
                if now >= member.not_before:
                    self._place(member)
            elif member.asked is None:
                if now >= member.asked_at + POLL_S:
                    member.asked, member.asked_at = member.actor.status.remote(), now
            elif self._ray.wait([member.asked], timeout=0)[0]:
                self._hear(member, starting)

    def replace(self, address: Address, why: str) -> None:
        for member in self._members:
            if member.address == address and member.actor is not None and member.status is not None:
                member.actor.replace.remote(why)
                member.status = None

    def pid_at(self, address: Address) -> int:
        horizon = time.monotonic() - FRESH_S
        for member in self._members:
            status = member.status
            if member.address == address and status is not None and status.ready and member.heard > horizon:
                return status.pid
        return 0

    def stop(self, patience_s: float) -> None:
        if not self._ray.is_initialized():
            return
        asked = [member.actor.stop.remote(patience_s) for member in self._members if member.actor is not None]
        with suppress(Exception):  # a host that is gone has nothing to end
            self._ray.wait(asked, num_returns=len(asked), timeout=patience_s + 1.0)
        for member in self._members:
            if member.actor is not None:
                self._ray.kill(member.actor)
                member.actor = None
        if self._room is not None:
            from ray.util import remove_placement_group

            with suppress(Exception):
                remove_placement_group(self._room)
        self._ray.shutdown()

    # --- Ray

    def _connect(self) -> None:
        handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
        options: dict[str, Any] = {}
        if self._cluster.address == "local":
            options = {
                "include_dashboard": False,
                "_temp_dir": str(self._scratch / "ray"),
                "_node_ip_address": LOOPBACK,
            }
        try:
            self._ray.init(
                address=self._cluster.address, log_to_driver=False, logging_level="ERROR", **options
            )
        except Exception as error:
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise ResourceError(
                f"cannot join the Ray cluster at {self._cluster.address} ({reason}); "
                "start one with `ray start --head`, or check `address`"
            ) from None
        finally:
            for number, handler in handlers.items():
                if handler is not None:  # Ray takes SIGTERM for itself
                    signal.signal(number, handler)

    def _reserve(self) -> None:
        from ray.util.placement_group import placement_group

        bundles = [member.group.bundle() for member in self._members]
        self._room = placement_group(bundles, strategy=self._cluster.strategy.upper())
        if not self._room.wait(self._cluster.start_timeout_s):
            raise ResourceError(
                f"the Ray cluster at {self._cluster.address} has no room for the attention workers, each on "
                f"its own: {bundles} ({self._cluster.strategy}); free now: {self._ray.available_resources()}"
            )

    def _place(self, member: _Member) -> None:
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        group = member.group
        placed = Placed(
            member.name,
            self._cluster.bind,
            self._cluster.ports,
            group.kv_mb * 2**20,
            group.threads,
            group.device,
            None if member.address == NO_ADDRESS else member.address,
        )
        asked = group.bundle()
        resources = {name: amount for name, amount in asked.items() if name in group.resources}
        actor = self._ray.remote(_Actor).options(
            num_cpus=group.cpus,
            num_gpus=group.gpus,
            memory=asked.get("memory"),
            resources=resources,
            max_restarts=0,
            max_concurrency=4,  # to answer while it ends its process
            scheduling_strategy=PlacementGroupSchedulingStrategy(self._room, member.index),
        )
        member.actor = actor.remote(placed, self._token)
        member.created, member.asked = time.monotonic(), None

    def _hear(self, member: _Member, starting: bool) -> None:
        asked, member.asked = member.asked, None
        try:
            status: Status = self._ray.get(asked)
        except self._ray.exceptions.ActorUnavailableError:
            return  # its host cannot be reached now; Ray says when it gives the host up
        except Exception as error:
            self._lose(member, error, starting)
            return
        member.heard = time.monotonic()
        for line in status.said:
            self._say(f"{status.address[0]}: {line}")
        if starting and status.early and not status.ready:
            kind = ConfigError if status.code == ConfigError.exit_code else ResourceError
            raise kind(f"{status.address[0]}: {status.ending}")
        if status.address != member.address and member.address != NO_ADDRESS and status.ready:
            old, new = member.address, status.address
            self._say(f"{member.name} has moved from {old[0]}:{old[1]} to {new[0]}:{new[1]}")
        if status.ready:
            member.address = status.address
        member.status = status

    def _lose(self, member: _Member, error: Exception, starting: bool) -> None:
        """The actor is gone with its host, or could not begin."""
        cause = getattr(error, "cause", None)
        if starting:
            if isinstance(cause, TrunklineError):
                raise type(cause)(f"{member.name}: {cause}")
            raise ResourceError(f"{member.name} cannot be started: {first_line(error)}")
        with suppress(Exception):
            self._ray.kill(member.actor)
        member.actor, member.status = None, None
        lived_s = time.monotonic() - member.created
        member.early = member.early + 1 if lived_s < STABLE_S else 1
        member.not_before = time.monotonic() + pause_after(member.early)
        self._say(f"{member.name} is lost with its actor ({first_line(error)}); it is placed again")


class _Actor(HostedWorker):
    """A worker on the host where Ray runs this."""

    def __init__(self, placed: Placed, token: str) -> None:
        import ray

        super().__init__(placed, token, ray.util.get_node_ip_address())


def first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


def _import_ray() -> Any:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
    except ImportError:
        raise ConfigError(
            "--cluster needs Ray, which is not installed: pip install 'trunkline[cluster]'"
        ) from None
    return ray
