"""The sweep file: every mistake is one line that names the key; the points follow from the file alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny_clone
import yaml

from flows.errors import ConfigError
from flows.sweeps import planned
from flows.sweeps.points import Point, Points, list_points, point_name, read_file

ROOT = Path(__file__).resolve().parents[2]
LR, MIXUP = "finetune.training.lr", "finetune.mixup"
WARMUP, BATCH = "finetune.training.warmup_steps", "finetune.training.batch_size"
RANDOM = {
    LR: {"log_uniform": [1.0e-4, 1.0e-2]},
    MIXUP: {"uniform": [0.1, 0.4]},
    WARMUP: {"int": [5, 30]},
    BATCH: {"choice": [32, 64, 128]},
}


@pytest.fixture
def clone(in_folder: Path) -> Path:
    return tiny_clone.build(in_folder)


def points(folder: Path, limit: int = 50, **said: Any) -> Points:
    path = folder / "mine.yaml"
    path.write_text(yaml.safe_dump({"metric": "parity.top1", **said}, sort_keys=False))
    return list_points(read_file(path), "mine.yaml", limit)


def settings(found: Points) -> list[dict[str, Any]]:
    return [dict(point.settings) for point in found.points]


# ---- points ----


def test_random_points_are_those_of_an_independent_computation(clone: Path) -> None:
    """`printf '7/KEY/NUMBER' | sha256sum`, first 16 digits over 2^64, scaled by `bc -l` with 40 decimals."""
    found = settings(points(clone, random=RANDOM, samples=3, seed=7))
    assert found == [
        {LR: 0.004808, MIXUP: 0.1396, WARMUP: 24, BATCH: 32},
        {LR: 0.0001782, MIXUP: 0.2546, WARMUP: 14, BATCH: 64},
        {LR: 0.003614, MIXUP: 0.2065, WARMUP: 22, BATCH: 128},
    ]


def test_more_samples_and_more_keys_keep_earlier_draws(clone: Path) -> None:
    few = settings(points(clone, random=RANDOM, samples=3, seed=7))
    assert settings(points(clone, random=RANDOM, samples=9, seed=7))[:3] == few
    less = {key: RANDOM[key] for key in (WARMUP, LR)}
    assert settings(points(clone, random=less, samples=3, seed=7)) == [
        {key: point[key] for key in less} for point in few
    ]
    assert settings(points(clone, random=RANDOM, samples=3, seed=8)) != few


def test_draws_stay_within_their_bounds_and_reach_both_ends(clone: Path) -> None:
    narrow = {LR: {"uniform": [0.0012345, 0.0012355]}, WARMUP: {"int": [5, 6]}}
    found = settings(points(clone, random=narrow, samples=40))
    assert {point[WARMUP] for point in found} == {5, 6}
    assert all(0.0012345 <= point[LR] <= 0.0012355 for point in found)


def test_a_point_is_named_by_its_settings(clone: Path) -> None:
    """`printf '{"finetune.training.lr": 0.001, "seed": 1}' | sha256sum`."""
    assert point_name({"seed": 1, LR: 0.001}) == point_name({LR: 0.001, "seed": 1}) == "77624974"
    found = points(clone, grid={LR: [0.001, 0.002], "seed": [1]})
    assert found.points[0].name == "77624974"


def test_grid_and_random_are_crossed(clone: Path) -> None:
    found = settings(
        points(clone, grid={"seed": [0, 1], MIXUP: [0, 0.2]}, random={LR: RANDOM[LR]}, samples=2)
    )
    assert len(found) == 8
    assert [point["seed"] for point in found[:4]] == [0, 0, 1, 1]
    assert len({point[LR] for point in found[:4]}) == 1


def test_equal_draws_are_one_point(clone: Path) -> None:
    found = points(clone, random={BATCH: {"choice": [32, 64]}}, samples=20)
    assert sorted(point[BATCH] for point in settings(found)) == [32, 64]
    assert found.repeated == 18


def test_params_of_a_point_are_complete_and_in_the_workspace_of_the_same_run(clone: Path) -> None:
    from flows import workspace

    point = points(clone, grid={LR: ["1e-3"]}, settings={"seed": 5}).points[0]
    assert point.params is not None
    assert (point.params.seed, point.params.finetune.training.lr) == (5, 0.001)
    assert workspace.prepare(settings=["seed=5", f"{LR}=1e-3"]).root == point.root


def test_what_only_contradicts_other_keys_is_an_impossible_point(clone: Path) -> None:
    found: list[Point] = points(
        clone, grid={"pretrain.mask_unit": [4, 16], "model.image_size": [8, 32]}
    ).points
    problems = [bool(point.problem) for point in found]
    assert problems == [False, False, True, False], "squares of 16 pixels in images of 8"
    assert "mask_unit" in found[2].problem


# ---- mistakes ----


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ({}, ["`grid` and `random` are both empty"]),
        ({"grid": {}}, ["both empty"]),
        ({"grid": {LR: []}}, [f"grid.{LR}", "empty"]),
        ({"grid": {LR: 0.1}}, [f"grid.{LR}", "list", "0.1"]),
        ({"grid": {"finetune.lr": [1]}}, ["unknown key `finetune.lr`"]),
        ({"grid": {"finetune": [1]}}, ["`finetune` is a section"]),
        ({"grid": {LR: [0.1, 0]}}, [LR, "greater than 0"]),
        ({"grid": {"finetune.training.steps": [300, 0.5]}}, ["finetune.training.steps", "0.5"]),
        ({"grid": {LR: [0.1, 0.2, 0.1]}}, [LR, "0.1 twice"]),
        ({"grid": {"seed": list(range(51))}}, ["`seed` 51", "`sweep.max_points` 50"]),
        (
            {"grid": {"seed": [*range(10)], MIXUP: [0, 1]}, "random": {LR: RANDOM[LR]}, "samples": 3},
            ["= 60 points"],
        ),
        ({"random": {LR: RANDOM[LR]}}, ["samples"]),
        ({"grid": {"seed": [1]}, "samples": 3}, ["samples"]),
        ({"random": {LR: {"log_uniform": [0, 1]}}, "samples": 1}, [LR, "above 0"]),
        ({"random": {LR: {"uniform": [1, 0.5]}}, "samples": 1}, [LR, "below"]),
        ({"random": {LR: {"uniform": [0, 1], "choice": [1]}}, "samples": 1}, [LR, "one of"]),
        ({"random": {LR: {"gauss": [0, 1]}}, "samples": 1}, [LR, "gauss"]),
        ({"random": {LR: [0, 1]}, "samples": 1}, [f"random.{LR}", "distribution"]),
        ({"random": {MIXUP: {"uniform": [-1, 1]}}, "samples": 1}, [MIXUP, "greater than or equal to 0"]),
        ({"random": {LR: {"uniform": [".nan", 1]}}, "samples": 1}, [LR]),
        ({"grid": {LR: [1]}, "random": {LR: RANDOM[LR]}, "samples": 1}, [LR, "both"]),
        ({"grid": {"seed": [1]}, "settings": {"seed": 2}}, ["seed", "settings"]),
        ({"grid": {"seed": [1]}, "settings": {"nosuch": 2}}, ["nosuch"]),
        ({"grid": {"seed": [1]}, "recipe": "nosuch"}, ["nosuch"]),
        ({"grid": {"seed": [1]}, "metrik": "x"}, ["unknown key `metrik`"]),
        ({"grid": {"seed": [1]}, "metric": "top1"}, ["metric"]),
        ({"grid": {"seed": [1]}, "direction": "up"}, ["direction", "up"]),
        ({"grid": {"seed": [1]}, "name": "../x"}, ["name", "../x"]),
        ({"grid": {"pretrain.mask_unit": [3, 5]}}, ["no point is possible", "mask_unit"]),
    ],
)
def test_a_mistake_is_one_line(said: dict[str, Any], words: list[str], clone: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        points(clone, **said)
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize("text", ["- 1\n", "grid: [1\n", "\x00", "grid: 3\n", ""])
def test_a_damaged_file_is_one_line(text: str, clone: Path) -> None:
    path = clone / "mine.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        read_file(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ({"metric": "evaluate.top1"}, ["`evaluate`", "ingest, parity, pretrain"]),
        ({"metric": "parity.top1", "grid": {"serve.port": [1, 2]}}, ["`serve.port` has no effect", "parity"]),
        ({"metric": "parity.top1", "also": ["nosuch.x"]}, ["`nosuch`"]),
    ],
)
def test_the_graph_is_asked_before_anything_runs(said: dict[str, Any], words: list[str], clone: Path) -> None:
    (clone / "mine.yaml").write_text(yaml.safe_dump({"grid": {"ingest.split_seed": [1, 2]}, **said}))
    with pytest.raises(ConfigError) as caught:
        planned.prepare("mine.yaml")
    for word in words:
        assert word in str(caught.value)
    assert not (clone / ".trunkline").exists()


def test_an_absent_file_is_answered_with_those_there_are(clone: Path) -> None:
    with pytest.raises(ConfigError, match="no sweep file `nosuch`"):
        planned.prepare("nosuch")


@pytest.mark.parametrize("path", sorted((ROOT / "recipes/sweeps").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_shipped_sweep_can_be_planned(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the real graph and params."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("TRUNKLINE_HOME", str(ROOT))
    found = planned.prepare(path.stem)
    assert found.points
    assert not any(point.problem for point in found.points)
    assert "evaluate@pretrained" in found.graph.targets
    assert not any(info.name.startswith(("export", "parity")) for info in found.graph.stages)
