"""Points in `dvc exp show` and back in the clone; the stages under DVC's own queue."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import tiny_clone

from flows import dvc_stage, params, paths, workspace
from flows.sweeps import experiments


@pytest.fixture
def clone(in_folder: Path) -> Path:
    tiny_clone.build(in_folder)
    tiny_clone.commit(in_folder)
    return in_folder


def run(clone: Path, *command: str) -> str:
    answer = subprocess.run(command, cwd=clone, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert answer.returncode == 0, answer.stdout + answer.stderr
    return answer.stdout


def dvc(clone: Path, *arguments: str) -> str:
    return run(clone, sys.executable, "-m", "dvc", *arguments)


def git(clone: Path, *arguments: str) -> str:
    return run(clone, "git", *arguments).strip()


def shown(clone: Path) -> dict[str, Any]:
    """Experiments of the newest commit, by name."""
    baselines = json.loads(dvc(clone, "exp", "show", "--json"))
    found = [entry["revs"][0] for base in baselines for entry in base.get("experiments") or []]
    return {revision["name"]: revision["data"] for revision in found}


def finish_point(clone: Path, *settings: str) -> workspace.Workspace:
    place = workspace.prepare("", "", settings)
    dvc_stage.reproduce(place.root, ["parity"], {}, lambda line: None)
    return place


def values(place: workspace.Workspace) -> dict[str, Any]:
    return params.read(place.root / "params.yaml")


def test_a_point_is_shown_and_applied(clone: Path) -> None:
    dvc(clone, "repro", "-q")
    git(clone, "add", "dvc.lock", "artifacts/metrics")
    git(clone, "commit", "-q", "-m", "results")
    ran = tiny_clone.executed(clone)
    place = finish_point(clone, "pretrain.mask_ratio=0.25", "seed=3")
    (clone / "params.yaml").write_text((clone / "params.yaml").read_text() + "# a note of mine\n")
    untouched = (
        git(clone, "status", "--porcelain"),
        git(clone, "rev-parse", "HEAD"),
        git(clone, "branch", "-a"),
    )
    commit = experiments.record(clone, place.root, "mine-1", values(place))
    assert experiments.record(clone, place.root, "mine-1", values(place)), "a second time replaces it"
    after = (git(clone, "status", "--porcelain"), git(clone, "rev-parse", "HEAD"), git(clone, "branch", "-a"))
    assert after == untouched, "files, index and branches of the clone stay as they are"
    assert git(clone, "rev-parse", f"{commit}^") == git(clone, "rev-parse", "HEAD")

    data = shown(clone)["mine-1"]
    assert data["metrics"]["artifacts/metrics/parity.json"]["data"] == {"top1": 0.5}
    assert data["params"]["params.yaml"]["data"]["pretrain"]["mask_ratio"] == 0.25
    assert "pretrain" not in (place.root / "dvc.lock").read_text(), "what the point did not need"

    git(clone, "checkout", "-q", "params.yaml")
    dvc(clone, "exp", "apply", "mine-1")
    text = (clone / "params.yaml").read_text()
    assert params.load(clone / "params.yaml") == place.params
    assert "fraction of squares hidden" in text, "comments stay"
    assert (clone / "artifacts/parity/result.txt").read_text() == "parity\n"
    assert "didn't change" in dvc(clone, "repro", "parity")
    assert tiny_clone.executed(clone) == ran, "everything came from the cache"
    assert "pretrain" in dvc(clone, "status"), "what the point did not need is out of date, and told so"


def test_uncommitted_code_is_part_of_the_experiment(clone: Path) -> None:
    (clone / "models/net.py").write_text("NET = 2\n")
    place = finish_point(clone, "seed=3")
    commit = experiments.record(clone, place.root, "mine-1", values(place))
    assert git(clone, "show", f"{commit}:models/net.py") == "NET = 2"
    assert git(clone, "show", "HEAD:models/net.py") == "NET = 1"


def test_without_git_or_commit_the_reason_is_named(in_folder: Path) -> None:
    tiny_clone.build(in_folder)
    place = finish_point(in_folder, "seed=3")
    with pytest.raises(experiments.NotRecorded, match="not a git repository"):
        experiments.record(in_folder, place.root, "mine-1", values(place))
    git(in_folder, "init", "-q")
    with pytest.raises(experiments.NotRecorded, match="Needed a single revision"):
        experiments.record(in_folder, place.root, "mine-1", values(place))


def test_a_folder_inside_another_repository_is_not_recorded_there(in_folder: Path) -> None:
    git(in_folder, "init", "-q")
    inner = in_folder / "inner"
    tiny_clone.build(inner)
    with pytest.raises(experiments.NotRecorded, match="not the root"):
        experiments.baseline(inner)


@pytest.mark.parametrize("inner", [".dvc/tmp/exps/standalone/tmpx1", ".dvc/tmp/exps/tmpx1/flows"])
def test_the_clone_is_found_from_dvcs_temporary_folders(
    inner: str, clone: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (clone / inner).mkdir(parents=True)
    monkeypatch.delenv("TRUNKLINE_HOME")
    monkeypatch.chdir(clone / inner)
    assert paths.home() == clone


def test_dvcs_queue_runs_the_stages(clone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    for name, ratio in (("low", 0.25), ("high", 0.75)):
        dvc(clone, "exp", "run", "--queue", "-n", name, "-S", f"pretrain.mask_ratio={ratio}")
    before = {process.pid for process in psutil.process_iter()}
    dvc(clone, "queue", "start", "-j", "2")
    try:
        deadline = time.monotonic() + 120
        while {"low", "high"} - set(shown(clone)):
            assert time.monotonic() < deadline, dvc(clone, "queue", "status")
            time.sleep(0.5)
    finally:
        for process in psutil.process_iter():  # idle workers would stay for some seconds
            with contextlib.suppress(psutil.Error):
                if process.pid not in before and process.cwd().startswith(str(clone)):
                    process.kill()
    ratios = {
        name: data["params"]["params.yaml"]["data"]["pretrain"]["mask_ratio"]
        for name, data in shown(clone).items()
    }
    assert ratios == {"low": 0.25, "high": 0.75}
    assert git(clone, "status", "--porcelain", "-uno") == "", "the clone's own files are not touched"
