"""dvc.yaml tells the truth: every stage lists the code it imports, every path and module exists."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from flows import dvc_stage, results
from flows.pipeline import ENDS

ROOT = Path(__file__).resolve().parents[1]
STAGES: dict[str, Any] = {
    name: entry.get("do", entry)
    for name, entry in yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"].items()
}


def module_file(name: str) -> Path | None:
    path = ROOT / Path(*name.split("."))
    for candidate in (path.with_suffix(".py"), path / "__init__.py"):
        if candidate.is_file():
            return candidate
    return None


def imported(file: Path) -> Iterator[Path]:
    """Files of this repository that `file` imports, also inside functions."""
    for node in ast.walk(ast.parse(file.read_text())):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        for name in names:
            if name.split(".")[0] in ("flows", "models") and (found := module_file(name)):
                yield found


def all_imports(start: list[Path]) -> set[Path]:
    seen: set[Path] = set()
    waiting = list(start)
    while waiting:
        file = waiting.pop()
        if file not in seen:
            seen.add(file)
            waiting += imported(file)
    return seen


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_depends_on_every_module_it_imports(stage: str) -> None:
    listed = [ROOT / dependency for dependency in STAGES[stage]["deps"]]
    start = [ROOT / "flows" / "stages" / f"{stage}.py"]
    if "flows.launch" in STAGES[stage]["cmd"]:
        start.append(ROOT / "flows" / "launch.py")
    missing = {
        str(file.relative_to(ROOT))
        for file in all_imports(start)
        if not any(file == entry or entry in file.parents for entry in listed) and not is_bare_package(file)
    }
    assert missing == set()


def is_bare_package(file: Path) -> bool:
    """`__init__.py` that holds a docstring at most."""
    body = ast.parse(file.read_text()).body
    return file.name == "__init__.py" and all(isinstance(node, ast.Expr) for node in body)


@pytest.mark.parametrize("stage", STAGES)
def test_code_dependencies_exist_and_receipts_are_written(stage: str) -> None:
    entry = STAGES[stage]
    for dependency in entry["deps"]:
        if dependency.startswith(("flows", "models")):
            assert (ROOT / dependency).exists(), dependency
    assert any(str(out).startswith("artifacts/receipts/") for out in entry["outs"])
    assert not any("receipts" in dependency for dependency in entry["deps"]), (
        "a receipt changes with every execution"
    )


def test_the_graph_has_every_stage_after_what_it_needs() -> None:
    order = dvc_stage.read_graph(ROOT)
    names = [info.name for info in order]
    assert {info.family for info in order} == set(STAGES)
    assert len(names) == len(set(names))
    for position, info in enumerate(order):
        assert set(info.needs) <= set(names[:position]), info
    needs = {info.name: info.needs for info in order}
    assert "pretrain" in needs["finetune@pretrained"]
    assert "pretrain" not in needs["finetune@scratch"], "the control must not depend on pretraining"


def test_each_objective_runs_the_stages_of_its_track_and_no_other() -> None:
    graph = dvc_stage.read_graph(ROOT)
    tracks = {name: dvc_stage.leading_to(graph, ends) for name, ends in ENDS.items()}
    families = {name: {info.family for info in track} for name, track in tracks.items()}
    assert families == {name: set(stages) for name, stages in results.STAGES.items()}
    assert families["image"].isdisjoint(families["causal_lm"])
    assert set(STAGES) - families["image"] - families["causal_lm"] == {"study"}
    assert [info.name for info in tracks["image"]].count("finetune@scratch") == 1, "the control is part of it"
    assert [info.name for info in tracks["causal_lm"]] == list(results.STAGES["causal_lm"])
