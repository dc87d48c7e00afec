"""Show a finished point in `dvc exp show`, so that `dvc exp apply`, `diff`, `branch` and `push` know it.

A DVC experiment is a git commit on top of the clone's, under `refs/exps/<commit>/<name>`. It is built in an
index of its own: params.yaml, dvc.lock and metrics of the point's workspace and the code that ran there. The
clone's files, index and branches are not touched, nothing is computed or copied; the outputs are in the cache
that all workspaces share.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import tempfile
from collections.abc import Mapping
from io import StringIO
from pathlib import Path
from typing import Any

import yaml

from flows import params, paths
from flows.errors import TrunklineError
from flows.params import flatten
from flows.workspace import CODE

NAMESPACE = "refs/exps"
AUTHOR = {
    "GIT_AUTHOR_NAME": "Trunkline",
    "GIT_AUTHOR_EMAIL": "trunkline@localhost",
    "GIT_COMMITTER_NAME": "Trunkline",
    "GIT_COMMITTER_EMAIL": "trunkline@localhost",
}


class NotRecorded(TrunklineError):
    """The clone is no git repository with a commit, or git refused."""


def baseline(home: Path) -> str:
    """The commit that experiments belong to.

    Raises:
        NotRecorded: `home` has none.
    """
    top = _git(home, "rev-parse", "--show-toplevel")
    if Path(top).resolve() != home.resolve():
        raise NotRecorded(f"{home} is not the root of a git repository")
    return _git(home, "rev-parse", "--verify", "HEAD")


def record(home: Path, root: Path, name: str, values: Mapping[str, Any]) -> str:
    """Make, or replace, experiment `name` from workspace `root`, whose params are `values`; its commit.

    Raises:
        NotRecorded: see `baseline`.
    """
    parent = baseline(home)
    with tempfile.TemporaryDirectory() as folder:
        index = {"GIT_INDEX_FILE": f"{folder}/index"}
        _git(home, "read-tree", parent, environment=index)
        _git(
            home,
            "rm",
            "-r",
            "-q",
            "--cached",
            "--ignore-unmatch",
            "--",
            paths.METRICS.as_posix(),
            environment=index,
        )
        staged = {"params.yaml": _commented(home, values), "dvc.lock": _whole_lock(home, root)}
        for path in sorted((root / paths.METRICS).glob("*.json")):
            staged[(paths.METRICS / path.name).as_posix()] = path.read_bytes()
        for entry, data in staged.items():
            digest = _git(home, "hash-object", "-w", "--stdin", input=data)
            _git(home, "update-index", "--add", "--cacheinfo", f"100644,{digest},{entry}", environment=index)
        # the code as it ran, also when it is not committed
        code = [entry for entry in CODE if (root / entry).exists()]
        elsewhere = {"GIT_DIR": _git(home, "rev-parse", "--absolute-git-dir"), "GIT_WORK_TREE": str(root)}
        _git(root, "add", "--update", "--", *code, environment={**index, **elsewhere})
        tree = _git(home, "write-tree", environment=index)
        commit = _git(
            home, "commit-tree", tree, "-p", parent, "-m", f"trunkline sweep: {name}", environment=AUTHOR
        )
    _git(home, "update-ref", f"{NAMESPACE}/{parent[:2]}/{parent[2:]}/{name}", commit)
    return commit


def _whole_lock(home: Path, root: Path) -> bytes:
    """The point's dvc.lock, and of stages that it did not need what the clone has in its cache, because
    `dvc exp apply` fails at outputs without a hash. `dvc status` tells that these are out of date."""
    lock = yaml.safe_load((root / "dvc.lock").read_text())
    with contextlib.suppress(OSError, yaml.YAMLError, KeyError, TypeError):
        for stage, entry in yaml.safe_load((home / "dvc.lock").read_text())["stages"].items():
            if stage not in lock["stages"] and all(is_cached(home, out) for out in entry.get("outs", ())):
                lock["stages"][stage] = entry
    return yaml.safe_dump(lock, sort_keys=False).encode()


def is_cached(home: Path, out: Mapping[str, Any]) -> bool:
    """Whether DVC's cache has an output as dvc.lock describes it; metrics are never there."""
    digest = str(out.get("md5", ""))
    if paths.METRICS in Path(out["path"]).parents:
        return True
    return (home / ".dvc" / "cache" / "files" / "md5" / digest[:2] / digest[2:]).is_file()


def _commented(home: Path, values: Mapping[str, Any]) -> bytes:
    """The clone's params.yaml with the values of a point: comments stay, as after `dvc exp run -S`."""
    from ruamel.yaml import YAML

    form = YAML()
    form.preserve_quotes = True
    form.width = 200
    text = form.load((home / "params.yaml").read_text())
    before = flatten(params.read(home / "params.yaml"))
    for key, value in flatten(values).items():
        if before.get(key) != value:
            section = text
            *parents, leaf = key.split(".")
            for parent in parents:
                section = section[parent]
            section[leaf] = value
    out = StringIO()
    form.dump(text, out)
    return out.getvalue().encode()


def _git(
    home: Path, *arguments: str, input: bytes | None = None, environment: Mapping[str, str] | None = None
) -> str:
    try:
        answer = subprocess.run(
            ["git", *arguments],
            cwd=home,
            input=input,
            capture_output=True,
            env={**os.environ, **(environment or {})},
        )
    except FileNotFoundError:
        raise NotRecorded("git is not installed") from None
    if answer.returncode:
        words = answer.stderr.decode(errors="replace").strip().splitlines()
        raise NotRecorded(f"git {arguments[0]}: {words[0] if words else answer.returncode}")
    return answer.stdout.decode().strip()
