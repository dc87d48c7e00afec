"""What a sweep shows: tables, groups over seeds, the picture and the page."""

from __future__ import annotations

import csv
import io
import json
import math
import re
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from rich.console import Console

from flows import params, plots
from flows.dvc_stage import StageInfo
from flows.sweeps import page, results, summary
from flows.sweeps.coordinates import coordinates
from flows.sweeps.plan import Graph, find_shared
from flows.sweeps.planned import PlannedSweep
from flows.sweeps.points import SweepFile
from flows.sweeps.results import Row

ROOT = Path(__file__).resolve().parents[2]
LR = "finetune.training.lr"


def sweep_file(direction: str = "maximize", **axes: list[Any]) -> SweepFile:
    grid = {key.replace("__", "."): values for key, values in axes.items()}
    return SweepFile.model_validate(
        {"name": "mine", "metric": "evaluate.top1", "direction": direction, "grid": grid}
    )


def done(name: str, value: float, **settings: Any) -> Row:
    named = {key.replace("__", "."): item for key, item in settings.items()}
    return Row(name, named, "done", "", value, {"evaluate.top1": value}, 10.0, 0.01, f"run-{name}")


def failed(name: str, reason: str = "the loss <is> not finite", **settings: Any) -> Row:
    return Row(name, {key.replace("__", "."): item for key, item in settings.items()}, "failed", reason)


def planned(sweep: SweepFile) -> PlannedSweep:
    return PlannedSweep(
        "mine.yaml", sweep, params.load(ROOT / "params.yaml").sweep, [], 0, Graph((), (), {}), {}
    )


SEEDS = sweep_file(finetune__training__lr=[0.1, 0.01], seed=[0, 1, 2])
ROWS = [
    done("a", 0.90, finetune__training__lr=0.1, seed=0),
    done("b", 0.94, finetune__training__lr=0.1, seed=1),
    failed("c", finetune__training__lr=0.1, seed=2),
    done("d", 0.91, finetune__training__lr=0.01, seed=0),
    done("e", 0.95, finetune__training__lr=0.01, seed=1),
    done("f", 0.93, finetune__training__lr=0.01, seed=2),
]


def test_best_first_in_both_directions() -> None:
    assert [row.name for row in results.rank(ROWS, SEEDS)] == ["e", "b", "f", "d", "a", "c"]
    low = SEEDS.model_copy(update={"direction": "minimize"})
    assert [row.name for row in results.rank(ROWS, low)] == ["a", "d", "f", "b", "e", "c"]


def test_groups_over_seeds() -> None:
    best, other = results.group_by_seed(ROWS, SEEDS)
    assert (dict(best.settings), best.values, best.failed) == ({LR: 0.01}, (0.91, 0.95, 0.93), 0)
    assert best.mean == pytest.approx(0.93)
    assert best.deviation == pytest.approx(0.02)  # of the sample: n - 1
    assert (other.values, other.failed) == ((0.90, 0.94), 1)
    assert results.group_by_seed(ROWS, sweep_file(finetune__training__lr=[0.1, 0.01])) == []
    single = results.group_by_seed(ROWS[:1], SEEDS)[0]
    assert math.isnan(single.deviation)


def test_tables_hold_everything(tmp_path: Path) -> None:
    results.write_csv(tmp_path / "r.csv", ROWS, SEEDS)
    table = list(csv.DictReader(io.StringIO((tmp_path / "r.csv").read_text())))
    assert [row["point"] for row in table] == ["e", "b", "f", "d", "a", "c"]
    assert (table[0][LR], table[0]["evaluate.top1"], table[0]["mlflow_run"]) == ("0.01", "0.95", "run-e")
    assert (table[5]["status"], table[5]["evaluate.top1"]) == ("failed", "")
    results.write_json(tmp_path / "results.json", ROWS, SEEDS, {"git": "abc"})
    assert summary.read_results(tmp_path) == (SEEDS, results.rank(ROWS, SEEDS))
    assert json.loads((tmp_path / "results.json").read_text())["groups"][0]["values"] == [0.91, 0.95, 0.93]


def test_the_terminal_shows_best_points_and_spread(tmp_path: Path) -> None:
    results.write_json(tmp_path / "results.json", ROWS, SEEDS, {})
    console = Console(file=io.StringIO(), width=100)
    counts = {"done": 5, "failed": 1, "impossible": 0, "stopped": 0, "waiting": 0}
    summary.print_results(
        {"folder": str(tmp_path), "counts": counts, "known": [], "executed": [], "seconds": 3.0}, console
    )
    text = console.file.getvalue()  # type: ignore[attr-defined]
    lines = text.splitlines()
    assert lines[1].split() == ["e", "0.01", "1", "0.9500"]
    assert "failed: the loss <is> not finite" in text
    assert any(re.search(r"0\.01\s+0\.9300 ± 0\.0200\s+3$", line) for line in lines)
    assert f"trunkline run --set {LR}=0.01 --set seed=1" in text


# ---- coordinates ----


def heights(sweep: SweepFile, rows: Sequence[Row]) -> dict[str, tuple[float, ...]]:
    return {
        line.label: (*line.heights, *([line.end] if line.end is not None else []))
        for line in coordinates(rows, sweep).lines
    }


def test_lines_cross_the_axes_where_their_values_are() -> None:
    sweep = SweepFile.model_validate(
        {
            "name": "x",
            "metric": "e.top1",
            "random": {LR: {"log_uniform": [1e-4, 1e-2]}, "finetune.mixup": {"uniform": [0, 1]}},
            "samples": 9,
        }
    )
    rows = [done(str(i), 0.5 + i / 16, **{LR: 10 ** (-4 + i / 4), "finetune.mixup": i / 8}) for i in range(9)]
    found = heights(sweep, rows)
    assert found["0"] == pytest.approx((0, 0, 0))
    assert found["4"] == pytest.approx((0.5, 0.5, 0.5)), "logarithmic where it was drawn so"
    assert found["8"] == pytest.approx((1, 1, 1))
    drawn = coordinates(rows, sweep)
    assert drawn.lines[-1].label == "8", "the best is on top"
    assert drawn.axes[0].label == "lr (log)"
    low = sweep.model_copy(update={"direction": "minimize"})
    assert heights(low, rows)["0"][2] == 1, "the best is at the top also when less is better"
    for axis in (*drawn.axes, drawn.metric):
        places = [at for at, _ in axis.ticks]
        assert places == sorted(places)
        assert places[0] == 0
        assert places[-1] == 1
        assert all(b - a > 0.04 for a, b in pairwise(places)), "labels do not overprint"


def test_categories_failures_and_single_values_have_their_places() -> None:
    sweep = sweep_file(finetune__flip=[True, False], finetune__crop_scale=[[0.5, 1.0], [0.6, 1.0]], seed=[7])
    rows = [
        done("a", 0.5, finetune__flip=True, finetune__crop_scale=[0.5, 1.0], seed=7),
        failed("b", finetune__flip=False, finetune__crop_scale=[0.6, 1.0], seed=7),
        Row("c", {"finetune.flip": False, "finetune.crop_scale": [0.5, 1.0], "seed": 7}),
    ]
    drawn = coordinates(rows, sweep)
    assert [line.label for line in drawn.lines] == ["b", "a"], "what has not ended is not drawn"
    assert [line.end for line in drawn.lines] == [None, 0.5]
    assert [text for _, text in drawn.axes[0].ticks] == ["false", "true"]
    assert [text for _, text in drawn.axes[1].ticks] == ["[0.5, 1.0]", "[0.6, 1.0]"]
    assert all(0 <= at <= 1 for line in drawn.lines for at in line.heights)


@pytest.mark.parametrize("rows", [ROWS, ROWS[2:3], ROWS[:1]], ids=["mixed", "failed only", "single"])
def test_pictures_and_pages_of_any_outcome(rows: list[Row]) -> None:
    picture = plots.parallel_coordinates(coordinates(rows, SEEDS))
    assert Image.open(io.BytesIO(picture)).size[0] > 800
    assert picture == plots.parallel_coordinates(coordinates(rows, SEEDS))
    text = page.render_page(planned(SEEDS), rows)
    data = json.loads(
        re.findall(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)[0]
    )
    assert [line["name"] for line in data["lines"]] == [
        row.name for row in reversed(results.rank(rows, SEEDS))
    ]
    assert len(data["axes"]) == 3


def test_the_page_makes_no_request_and_trusts_no_text() -> None:
    evil = failed("x", "</script><img src=http://evil/>", finetune__training__lr=0.1, seed=0)
    text = page.render_page(planned(SEEDS), [*ROWS, evil])
    assert "default-src 'none'" in text
    assert not re.findall(r"""<[^>]*(?:src|href)\s*=""", text), "what looks like a tag in a reason is text"
    assert text.count("</script>") == 3


# ---- shared stages ----


def graph(**needs: str) -> Graph:
    stages = tuple(StageInfo(name, tuple(said.split()), ()) for name, said in needs.items())
    return Graph(stages, (stages[-1].name,), {})


def test_what_points_share_is_computed_once_in_order() -> None:
    chain = graph(data="", split="data", train="data split", test="train")
    one = {"data": "d", "split": "s", "train": "t1", "test": "e1"}
    two = {"data": "d", "split": "s", "train": "t1", "test": "e2"}
    three = {"data": "d", "split": "s", "train": "t2", "test": "e3"}
    shared = find_shared(chain, {"one": one, "two": two, "three": three})
    assert [(item.stage, item.points, item.needs) for item in shared] == [
        ("split", ("one", "two", "three"), ()),
        ("train", ("one", "two"), ("s",)),
    ]
    assert find_shared(chain, {"one": one}) == []
    known = find_shared(chain, {"one": one, "two": two, "three": three}, frozenset({"d", "s"}))
    assert [item.stage for item in known] == ["train"]


def test_two_shared_branches_do_not_compute_their_root_twice() -> None:
    forked = graph(data="", left="data", right="data", end="left right")
    points = {name: {"data": "d", "left": "l", "right": "r", "end": name} for name in ("x", "y")}
    shared = find_shared(forked, points)
    assert [(item.stage, item.needs) for item in shared] == [("left", ()), ("right", ("l",))]
