"""What a sweep has to compute: the stages up to its metrics, which of them points share, what is done.

Two executions of a stage are the same when their *signatures* are equal: command, watched params, contents of
code and source, signatures of the stages they need. DVC decides likewise, from file hashes; the signature is
known before anything has run, so that stages in common are computed once although points start together, and
finished points are passed over without asking DVC.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from flows import files, paths
from flows.dvc_stage import StageInfo
from flows.errors import ConfigError
from flows.params import flatten
from flows.sweeps.points import NAME_DIGITS, SweepFile

HASHED_BYTES, HASHED_FILES = 64_000_000, 1000  # above, size and time stand for the contents
RECORD = "sweep-point.json"  # in a point's workspace
VARIABLE = re.compile(r"\$\{([\w.]+)\}")


@dataclass(frozen=True)
class Graph:
    """The stages that lead to the sweep's metrics, in DVC's order."""

    stages: tuple[StageInfo, ...]
    targets: tuple[str, ...]
    definitions: Mapping[str, Any]
    """The text of dvc.yaml per stage family, before its variables are filled in."""

    def ancestors(self, name: str) -> set[str]:
        """`name` and all it needs."""
        needs = {info.name: info.needs for info in self.stages}
        found, waiting = set(), [name]
        while waiting:
            current = waiting.pop()
            if current not in found:
                found.add(current)
                waiting += needs[current]
        return found

    def watches(self, key: str) -> bool:
        """Whether any stage depends on the param `key`."""
        for info in self.stages:
            named = (*info.sections, *VARIABLE.findall(json.dumps(self.definitions[info.family])))
            if any(f"{key}.".startswith(f"{name}.") for name in named):
                return True
        return False


def read_plan(sweep: SweepFile, graph: Sequence[StageInfo], home: Path, origin: str) -> Graph:
    """
    Raises:
        ConfigError: a metric that no stage writes, a key on which no stage depends.
    """
    writers = {out: info.name for info in graph for out in info.outs}
    targets: list[str] = []
    for metric in (sweep.metric, *sweep.also):
        file, _, _ = metric.partition(".")
        writer = writers.get(f"{paths.METRICS.as_posix()}/{file}.json")
        if writer is None:
            folder = f"{paths.METRICS.as_posix()}/"
            known = sorted(Path(out).stem for out in writers if out.startswith(folder))
            raise ConfigError(f"{origin}: no stage writes the metrics `{file}`; there are {', '.join(known)}")
        if writer not in targets:
            targets.append(writer)
    definitions = yaml.safe_load((home / "dvc.yaml").read_text())["stages"]
    whole = Graph(tuple(graph), tuple(targets), definitions)
    needed = set().union(*(whole.ancestors(target) for target in targets))
    plan = Graph(tuple(info for info in graph if info.name in needed), tuple(targets), definitions)
    for key in sweep.keys:
        if not plan.watches(key):
            raise ConfigError(
                f"{origin}: `{key}` has no effect: no stage up to {', '.join(targets)} depends on it"
            )
    return plan


# ------------------------------------------------------------------------------------------ signatures


def sign_stages(graph: Graph, values: Mapping[str, Any], home: Path) -> dict[str, str]:
    """Stage to signature, for a point with these params."""
    flat = flatten(values)
    signatures: dict[str, str] = {}
    for info in graph.stages:
        definition = graph.definitions[info.family]
        text = json.dumps(definition, sort_keys=True)
        filled = {key: flat[key] for key in VARIABLE.findall(text) if key in flat}
        watched = {
            key: value
            for key, value in flat.items()
            if any(f"{key}.".startswith(f"{name}.") for name in info.sections)
        }
        known = {
            "name": info.name,
            "definition": text,
            "variables": filled,
            "params": watched,
            "files": _digest_inputs(definition.get("do", definition).get("deps", ()), filled, home),
            "needs": {name: signatures[name] for name in info.needs},
        }
        signatures[info.name] = hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()
    return signatures


def _digest_inputs(deps: Sequence[str], filled: Mapping[str, Any], home: Path) -> dict[str, str]:
    """Contents of what no stage makes: code and raw images."""
    digests = {}
    for template in deps:
        path = VARIABLE.sub(lambda found: str(filled.get(found[1], found[0])), template)
        if "${" not in path and not path.startswith("artifacts/"):
            digests[path] = _digest(home / path)
    return digests


@functools.lru_cache(maxsize=256)
def _digest(path: Path) -> str:
    """Once per process: nobody edits code while a sweep is planned."""
    sha = hashlib.sha256()
    found = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    for file in found:
        if "__pycache__" in file.parts:
            continue
        state = file.stat()
        sha.update(f"{os.path.relpath(file, path)}\0{state.st_size}\0".encode(errors="surrogateescape"))
        if len(found) <= HASHED_FILES and state.st_size <= HASHED_BYTES:
            sha.update(files.sha256_file(file).encode())
        else:
            sha.update(str(state.st_mtime_ns).encode())
    return sha.hexdigest()


# ------------------------------------------------------------------------------------------ records


def write_record(root: Path, signatures: Mapping[str, str], outcome: Mapping[str, Any]) -> None:
    """What a point came to, beside its results; the proof that it need not run again."""
    files.write_json(
        root / RECORD, {"signatures": dict(signatures), "lock": _lock_digest(root, signatures), **outcome}
    )


def read_record(root: Path, signatures: Mapping[str, str]) -> dict[str, Any] | None:
    """The outcome recorded for exactly these signatures, if its results are still those in dvc.lock."""
    try:
        record = files.read_json(root / RECORD)
    except (OSError, ValueError):
        return None
    if not isinstance(record, dict) or record.get("signatures") != dict(signatures):
        return None
    if record.get("status") == "done" and record.get("lock") != _lock_digest(root, signatures):
        return None
    return record


def _lock_digest(root: Path, stages: Mapping[str, str]) -> str:
    """Of the entries of `stages` in dvc.lock; other stages may come and go."""
    try:
        locked = yaml.safe_load((root / "dvc.lock").read_text())["stages"]
    except (OSError, yaml.YAMLError, KeyError, TypeError):
        return ""
    chosen = {name: locked.get(name) for name in stages}
    return hashlib.sha256(json.dumps(chosen, sort_keys=True).encode()).hexdigest()


# ------------------------------------------------------------------------------------------ shared stages


@dataclass(frozen=True)
class Shared:
    """A stage that several points need alike; it runs in the workspace of the first of them."""

    name: str
    stage: str
    points: tuple[str, ...]
    needs: tuple[str, ...]
    """Names of shared stages that come before."""


def find_shared(
    graph: Graph, points: Mapping[str, Mapping[str, str]], computed: frozenset[str] = frozenset()
) -> list[Shared]:
    """Stages to compute once before the points that share them, in order.

    Of stages shared by the same points only the last is listed: DVC runs what it needs.

    Args:
        points: name to signatures, of the points that are to run.
        computed: signatures whose results are in DVC's cache already.
    """
    groups: dict[str, tuple[str, tuple[str, ...]]] = {}
    for info in graph.stages:
        owners: dict[str, list[str]] = {}
        for name, signatures in points.items():
            owners.setdefault(signatures[info.name], []).append(name)
        for signature, sharers in owners.items():
            if len(sharers) > 1 and signature not in computed:
                groups[signature] = (info.name, tuple(sharers))
    kept = {
        signature: (stage, names)
        for signature, (stage, names) in groups.items()
        if not any(
            other != stage and stage in graph.ancestors(other) and names == others
            for other, others in groups.values()
        )
    }
    shared = []
    for signature, (stage, names) in kept.items():
        of_first = points[names[0]]
        before = {_computed_by(graph, kept, groups, of_first[need], need) for need in graph.ancestors(stage)}
        needs = tuple(sorted(found[:NAME_DIGITS] for found in before - {"", signature}))
        shared.append(Shared(signature[:NAME_DIGITS], stage, names, needs))
    return shared


def _computed_by(
    graph: Graph,
    kept: Mapping[str, tuple[str, tuple[str, ...]]],
    groups: Mapping[str, tuple[str, tuple[str, ...]]],
    signature: str,
    stage: str,
) -> str:
    """The first of the kept signatures in whose course `signature` is computed; empty if it is not shared."""
    if signature in kept or signature not in groups:
        return signature if signature in kept else ""
    names = groups[signature][1]
    return next(
        found
        for found, (other, others) in kept.items()
        if others == names and stage in graph.ancestors(other)
    )
