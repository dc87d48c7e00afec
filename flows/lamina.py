"""The body of `trunkline serve language`: this process answers HTTP and looks after all the others.

In the order in which mistakes are cheapest to find: settings, port, bundle, how the model divides over the
workers; then the attention workers, then the engine. Whatever happens, no process, port or file is left.
"""

from __future__ import annotations

import json
import os
import platform
import shlex
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import psutil

from flows import environment, files, params, paths
from flows.errors import ConfigError, ResourceError
from flows.params import Lamina, Params
from flows.serving.lamina.api.gateway import read_api_key
from flows.serving.lamina.api.hooks import Hooks, Running
from flows.serving.lamina.cluster.child import say_on_stderr
from flows.serving.lamina.cluster.cluster_file import ClusterFile, read_cluster_file
from flows.serving.lamina.cluster.fleet import Fleet, LocalFleet, NoFleet
from flows.serving.lamina.cluster.run_folder import RunFolder, run_folder
from flows.serving.lamina.cluster.supervisor import Supervisor
from flows.serving.lamina.slices.bundle import MANIFEST, Bundle, read_bundle
from flows.serving.listening import listening_socket, server_url
from flows.supervisor import fetch

if TYPE_CHECKING:
    from flows.serving.lamina.api.server import Server
    from flows.serving.lamina.attention.partition import Partition

ENVIRONMENT = "LAMINA__"
POLL_S = 0.1
PROMPT = "Once upon a time"
NOT_FOLLOWED = (
    "with --cluster the alias is not followed: two models at once would need room for both on its hosts; "
    "restart the command to serve a new version"
)


@dataclass(frozen=True)
class Registered:
    """A model of the registry, to be served instead of a folder."""

    model: str
    alias: str
    version: str  # empty: the alias counts, and is followed


@dataclass(frozen=True)
class Chosen:
    """What is served first."""

    bundle: Bundle
    name: str
    version: str | None
    digest: str


@dataclass(frozen=True)
class Deployment:
    """A bundle and the processes that serve it."""

    bundle: Bundle
    folder: RunFolder
    supervisor: Supervisor

    @property
    def hooks(self) -> Hooks:
        supervisor = self.supervisor
        return Hooks(
            on_worker_lost=supervisor.worker_lost,
            on_silent=supervisor.engine_silent,
            on_draining=supervisor.draining,
            on_drained=supervisor.drained,
            is_replacing=supervisor.is_replacing,
        )


def serve_language(
    source: Path | Registered, changes: Sequence[str], flags: Mapping[str, Any], cluster: Path | None = None
) -> None:
    """Serve a bundle until SIGINT or SIGTERM; then let answers end within `lamina.http.drain_timeout_s`.

    Args:
        changes: `key=value` for params.yaml.
        flags: keys of section `lamina` with dots, and their values; they count most.
        cluster: file that says on which hosts attention workers run; default: on this one.

    Raises:
        ConfigError, DataError: a setting or the bundle is of no use; nothing was started.
        ResourceError: the port is taken, or a process cannot be kept running.
    """
    hosts = read_cluster_file(cluster) if cluster else None
    checked = read_settings(changes, flags)
    if hosts is not None:
        checked = read_settings(changes, {**flags, **settings_of(hosts, flags, checked.lamina)})
    settings = checked.lamina
    read_api_key(settings.http.api_key_file)  # for its errors; it is read again when requests can come
    if hosts is None:
        check_memory(settings)
    environment.interrupt_on_sigterm()
    with (
        suppress(KeyboardInterrupt),  # told to stop before there was anything to finish
        listening_socket(settings.http.host, settings.http.port, "lamina.http") as listener,
    ):
        chosen = choose(checked, source)
        check_division(settings, chosen.bundle)
        run(chosen, source, checked, hosts, listener)


def read_settings(changes: Sequence[str], flags: Mapping[str, Any]) -> Params:
    """params.yaml, changed by `LAMINA__SECTION__KEY` in the environment, by `--set`, by flags.

    Raises:
        ConfigError: an unknown key or an impossible value, and where it comes from.
    """
    path = paths.workspace() / "params.yaml"
    values = params.read(path)
    origins = [str(path)]
    overlays = [
        *((name, f"{name.replace('__', '.').lower()}={value}") for name, value in sorted(os.environ.items())
          if name.startswith(ENVIRONMENT)),
        *((f"--set {change}", change) for change in changes),
        *((f"lamina.{key}", f"lamina.{key}={json.dumps(value)}") for key, value in flags.items()),
    ]  # fmt: skip
    for origin, change in overlays:
        values = params.overlay(values, params.parse_setting(change), origin)
        origins.append(origin)
    return params.check(values, " with ".join(origins))


def choose(checked: Params, source: Path | Registered) -> Chosen:
    """
    Raises:
        DataError: no such version, or its files are of no use.
    """
    if isinstance(source, Path):
        bundle = read_bundle(source)
        return Chosen(bundle, bundle.manifest.name, None, digest_of(bundle))
    from flows.language_registry import fetch_bundle

    found = fetch_bundle(checked, source.model, source.alias, source.version)
    return Chosen(read_bundle(found.folder), found.name, found.version, found.digest)


def digest_of(bundle: Bundle) -> str:
    """What the registry calls it by: the sha256 of its manifest, which lists every other file."""
    return files.sha256_file(bundle.folder / MANIFEST)


def check_division(settings: Lamina, bundle: Bundle) -> None:
    """
    Raises:
        ConfigError: the model's heads do not divide over the attention workers as the settings say, or not
            one block of keys and values has room.
    """
    from flows.serving.lamina.attention.partition import HeadPartition, RequestPartition, share_heads
    from flows.serving.lamina.engine.memory import pages_that_fit

    cluster, workers = settings.cluster, settings.cluster.attention_workers
    manifest = bundle.manifest
    if not workers and workers_beside(settings):
        raise ConfigError("there are no attention workers that spares or a parity worker could stand by")
    if workers:
        check_weights(cluster.weights, workers)
    if cluster.partition == "head":
        weights = cluster.weights if workers and isinstance(cluster.weights, list) else [1.0] * (workers or 1)
        share_heads(manifest.kv_heads, weights)
        partition: Partition = HeadPartition(manifest.kv_heads, weights)
    else:
        partition = RequestPartition(manifest.kv_heads, workers or 1)
    try:
        pages_that_fit(partition, manifest.layers, manifest.head_size, settings.kv.mb_per_worker << 20)
    except ResourceError as error:
        raise ConfigError(f"lamina.kv.mb_per_worker: {error}") from None


def check_memory(settings: Lamina) -> None:
    """
    Raises:
        ConfigError: the attention workers are given more than this machine has.
    """
    processes, each = settings.processes or 1, settings.kv.mb_per_worker
    total = psutil.virtual_memory().total >> 20
    if processes * each > total:
        raise ConfigError(
            f"lamina.kv.mb_per_worker {each} for {processes} process{'es' if processes > 1 else ''} is "
            f"more than the {total} MB that this machine has"
        )


def check_weights(weights: str | list[float], workers: int) -> None:
    """
    Raises:
        ConfigError: a list of another length.
    """
    if isinstance(weights, list) and len(weights) != workers:
        raise ConfigError(
            f"lamina.cluster.weights has {len(weights)} entries for {workers} attention workers"
        )


def check_room(settings: Lamina, bundle: Bundle) -> None:
    """
    Raises:
        ResourceError: a worker has not even room for one block of keys and values of this model.
    """
    from flows.serving.lamina.attention.partition import HeadPartition
    from flows.serving.lamina.engine.memory import pages_that_fit

    cluster, manifest = settings.cluster, bundle.manifest
    divided = cluster.partition == "head" and cluster.attention_workers
    weights = cluster.weights if isinstance(cluster.weights, list) else [1.0] * cluster.attention_workers
    partition = HeadPartition(manifest.kv_heads, weights if divided else [1.0])
    pages_that_fit(partition, manifest.layers, manifest.head_size, settings.kv.mb_per_worker << 20)


def settings_of(hosts: ClusterFile, flags: Mapping[str, Any], settings: Lamina) -> dict[str, Any]:
    """What a cluster file says of section `lamina`: how many workers, and how much each can take.

    Raises:
        ConfigError: a flag says otherwise.
    """
    if "cluster.attention_workers" in flags:
        raise ConfigError("--attention-workers and --cluster exclude each other: the file names the workers")
    others = workers_beside(settings)
    workers = len(hosts.each) - others
    if workers < 1:
        raise ConfigError(
            f"of the {len(hosts.each)} workers of the cluster file {others} are spares or keep parity; "
            "nobody is left to attend"
        )
    found: dict[str, Any] = {
        "cluster.attention_workers": workers,
        "kv.mb_per_worker": min(group.kv_mb for group in hosts.each),
    }
    if hosts.weights:
        found["cluster.weights"] = hosts.weights[:workers]
    return found


def workers_beside(settings: Lamina) -> int:
    """Attention workers that are started beside those that the model is divided over."""
    return settings.cluster.spares + (settings.kv.redundancy == "parity")


def make_fleet(settings: Lamina, folder: RunFolder, hosts: ClusterFile | None) -> Fleet:
    if hosts is not None:
        from flows.serving.lamina.cluster.ray_fleet import RayFleet

        return RayFleet(hosts, folder.token, folder.path, say_on_stderr)
    if not settings.processes:
        return NoFleet()
    return LocalFleet(
        settings.processes,
        folder.token_file,
        say_on_stderr,
        max_bytes=settings.kv.mb_per_worker * 2**20,
        threads=settings.cluster.worker_threads,
    )


@contextmanager
def deployed(bundle: Bundle, settings: Lamina, hosts: ClusterFile | None) -> Iterator[Deployment]:
    """The processes of a bundle: attention workers listen and the engine was started; all end with the block.

    Raises:
        ConfigError, ResourceError: a worker cannot be started; nothing is left of the others.
    """
    with run_folder() as folder:
        supervisor = Supervisor(
            make_fleet(settings, folder, hosts),
            folder,
            settings=settings.model_dump(mode="json"),
            bundle=str(bundle.folder.resolve()),
            calibration=str(calibration_file(bundle)),
        )
        try:
            supervisor.start()
            yield Deployment(bundle, folder, supervisor)
        finally:
            supervisor.stop()


def run(
    chosen: Chosen,
    source: Path | Registered,
    checked: Params,
    hosts: ClusterFile | None,
    listener: socket.socket,
) -> None:
    """Start all processes, answer, end all processes."""
    from flows.serving.lamina.api.server import serve

    settings, fleets = checked.lamina, list[Fleet]()

    def announce() -> None:
        print(describe(server_url(listener), chosen.name, chosen.bundle, settings, fleets[0]), flush=True)

    @contextmanager
    def another(bundle: Bundle) -> Iterator[Deployment]:
        check_division(settings, bundle)
        check_room(settings, bundle)
        with deployed(bundle, settings, None) as deployment:
            yield deployment

    with (
        hangup() as told_to_hang_up,
        ready_watch(server_url(listener), announce),
        ExitStack() as processes,
    ):
        deployment = processes.enter_context(deployed(chosen.bundle, settings, hosts))
        supervisor = deployment.supervisor
        fleets.append(supervisor.fleet)

        def on_started(running: Running) -> None:
            told_to_hang_up(running.drain)
            supervisor.watch(running.fail, running.tell)

        def follow(server: Server) -> AbstractContextManager[None]:
            from flows.language_following import Candidate, following_alias

            first = Candidate(server.service.current, supervisor, processes.close)
            assert isinstance(source, Registered)
            return following_alias(checked, source.alias, server, another, first)

        follows = isinstance(source, Registered) and not source.version
        if follows and hosts is not None:
            say_on_stderr(NOT_FOLLOWED)
        serve(
            chosen.bundle,
            settings,
            deployment.folder.socket,
            listener=listener,
            name=chosen.name,
            version=chosen.version,
            digest=chosen.digest,
            hooks=replace(deployment.hooks, on_started=on_started),
            companion=follow if follows and hosts is None else None,
        )


def calibration_file(bundle: Bundle) -> Path:
    """What was measured of this model on this machine, kept for the next start."""
    folder = paths.home() / ".trunkline" / "lamina"
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"calibration-{bundle.manifest.source_sha256[:12]}-{platform.node()}.json"


def describe(url: str, name: str, bundle: Bundle, settings: Lamina, fleet: Fleet) -> str:
    """What is printed when requests can come."""
    cluster = settings.cluster
    if cluster.attention_workers:
        where = ", ".join(fleet.labels)
        workers = (
            f"{cluster.attention_workers} attention worker{'s' if cluster.attention_workers > 1 else ''}"
            f"{', one for parity' if settings.kv.redundancy == 'parity' else ''}"
            f"{f', {cluster.spares} spare' if cluster.spares else ''}, partition {cluster.partition}, "
            f"{settings.kv.mb_per_worker} MB of keys and values each: {where}"
        )
    else:
        workers = "attention in the engine's process"
    body = json.dumps({"model": name, "prompt": PROMPT, "max_tokens": 50, "stream": True})
    key = " -H 'Authorization: Bearer KEY'" if settings.http.api_key_file else ""
    return (
        f"ready: {name} ({bundle.folder}) at {url}\n"
        f"  {workers}\n"
        f"  curl -N {url}/v1/completions{key} -H 'Content-Type: application/json' -d {shlex.quote(body)}"
    )


@contextmanager
def ready_watch(url: str, announce: Callable[[], None]) -> Iterator[None]:
    """Call `announce` once /readyz says yes, if it does before the end."""
    ended = threading.Event()

    def watch() -> None:
        while not ended.is_set():
            with suppress(OSError):
                fetch(f"{url}/readyz")
                announce()
                return
            time.sleep(POLL_S)

    threading.Thread(target=watch, daemon=True).start()
    try:
        yield
    finally:
        ended.set()


@contextmanager
def hangup() -> Iterator[Callable[[Callable[[], None]], None]]:
    """A terminal that is closed ends the service as SIGTERM does, unless it is to be ignored (nohup)."""
    drain: list[Callable[[], None]] = []

    def on_hangup(number: int, frame: FrameType | None) -> None:
        if not drain:
            raise KeyboardInterrupt
        drain[0]()

    previous = signal.getsignal(signal.SIGHUP)
    if previous is not signal.SIG_IGN:
        signal.signal(signal.SIGHUP, on_hangup)
    try:
        yield drain.append
    finally:
        if previous is not signal.SIG_IGN:
            signal.signal(signal.SIGHUP, previous or signal.SIG_DFL)
