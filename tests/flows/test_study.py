"""The study flow on a clone of one-line stages: the grid, its table, missing cells alone after a kill,
mistakes; and what a cell costs, counted by hand."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny_clone
import torch
import yaml

from flows import params, study, sweep, workspace
from flows.errors import ConfigError, TrunklineError
from flows.studies import costs
from flows.studies.cells import Cell, read_cells
from flows.sweeps import study_cells, study_grid
from flows.sweeps.study_grid import prepare_study

ROOT = Path(__file__).resolve().parents[2]

STAGES = r"""
stages:
  ingest:
    cmd: sh flows/stage.sh ingest
    deps: [flows/stage.sh, constraints.txt]
    params: [ingest]
    outs: [artifacts/data, artifacts/receipts/ingest.json]
  scale:
    cmd: sh flows/stage.sh scale
    deps: [flows/stage.sh, artifacts/data]
    params: [scale]
    outs: [artifacts/subsets, artifacts/receipts/scale.json]
    metrics: [artifacts/metrics/scale.json: {cache: false}]
  pretrain:
    cmd: sh flows/stage.sh pretrain
    deps: [flows/stage.sh, artifacts/subsets]
    params: [seed, model, pretrain]
    outs: [artifacts/pretrain, artifacts/receipts/pretrain.json]
    metrics: [artifacts/metrics/pretrain.json: {cache: false}]
  evaluate:
    matrix:
      cell: [pretrained]
    cmd: sh flows/stage.sh evaluate-${item.cell}
    deps: [flows/stage.sh, artifacts/pretrain]
    params: [finetune]
    outs: ["artifacts/evaluate/${item.cell}", "artifacts/receipts/evaluate-${item.cell}.json"]
    metrics: ["artifacts/metrics/evaluate-${item.cell}.json": {cache: false}]
  study:
    cmd: sh flows/stage.sh study
    deps: [flows/stage.sh, "${study.cells}"]
    params: [study.analysis]
    outs: [artifacts/study, artifacts/receipts/study.json]
vars: [params.yaml]
"""

# results depend on params; faults on demand stand in <stage>.sh of the clone
SCRIPT = r"""
set -e
value() { grep -E "^ *$1:" params.yaml | head -1 | sed 's/.*: *//; s/ *#.*//'; }
model=$(value backbone); subset=$(value subset); steps=$(value steps); warmup=$(value warmup_steps)
echo "$1 $model $subset $steps $warmup" >> "$TRUNKLINE_HOME/all"
loss=0.$(( 99 - steps )); subsets='{"images_010": 12, "images_020": 24, "images_050": 60, "images_100": 120}'
if test -f "$TRUNKLINE_HOME/$1.sh"; then . "$TRUNKLINE_HOME/$1.sh"; fi
mkdir -p artifacts/receipts artifacts/metrics
case $1 in
  ingest) folder=artifacts/data ;;
  scale) folder=artifacts/subsets; echo "$subsets" > artifacts/metrics/scale.json ;;
  pretrain) folder=artifacts/pretrain
    echo "{\"val_loss\": $loss, \"train_loss\": 0.4, \"train_loss_eval\": 0.3}" > artifacts/metrics/$1.json ;;
  evaluate-*) folder=artifacts/evaluate/pretrained; echo '{"top1": 0.5}' > artifacts/metrics/$1.json ;;
  study) folder=artifacts/study ;;
esac
mkdir -p $folder
echo "$model $subset $steps" > $folder/result.txt
if test "$1" = study; then cp cells.csv $folder/seen.csv; echo page > $folder/study.html; fi
echo "{\"run_id\": \"run-$1\", \"duration_s\": 7.5, \"device_hours\": 0.002, \"peak_memory_bytes\": 1000}" \
  > artifacts/receipts/$1.json
"""
GRID = {
    "models": ["swin_v2_atto", "swin_v2_femto"],
    "percentages": [10, 100],
    "steps": [20, 40],
    "leave_out": [["swin_v2_atto", 100], ["swin_v2_femto", 10]],
}


@pytest.fixture
def clone(home: Path, prefect_server: None, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(sweep.run_stages, "retry_delay_seconds", [0, 0])
    monkeypatch.setattr(study.analyse, "retry_delay_seconds", [0, 0])
    return plain_clone(home)


def plain_clone(home: Path) -> Path:
    tiny_clone.build(home)
    (home / "dvc.yaml").write_text(STAGES)
    (home / "flows/stage.sh").write_text(SCRIPT)
    values = params.overlay(params.read(home / "params.yaml"), {"study": GRID}, "test")
    (home / "params.yaml").write_text(yaml.safe_dump(values, sort_keys=False))
    return home


def executed(clone: Path) -> list[str]:
    """Stage, model, subset, steps and warm-up of everything that has run anywhere."""
    path = clone / "all"
    return path.read_text().splitlines() if path.is_file() else []


def cells(summary: dict[str, Any]) -> dict[tuple[str, int, int], Cell]:
    table = read_cells(Path(summary["table"]))
    found = [*table.cells, *(left.cell for left in table.left_out)]
    return {(cell.model, int(cell.images), int(cell.iterations)): cell for cell in found}


def test_a_study_runs_each_cell_once_and_tells_them_all(clone: Path) -> None:
    """One cell diverges, one says NaN: both stand in the table without a loss, and the rest is analysed."""
    (clone / "pretrain.sh").write_text(
        'case "$model $subset $steps" in\n'
        '  "swin_v2_atto 10 20") echo "error: pretrain: the loss is not finite" >&2; exit 12 ;;\n'
        '  "swin_v2_atto 10 40") loss=NaN ;;\n'
        "esac\n"
    )
    first = study.study(table="mine.csv", parallel=3)
    ran = executed(clone)
    stages = Counter(line.split()[0] for line in ran)
    assert stages == {"ingest": 1, "scale": 1, "pretrain": 4, "evaluate-pretrained": 3, "study": 1}
    warmups = {(line.split()[3], line.split()[4]) for line in ran if line.startswith("pretrain")}
    assert warmups == {("20", "2"), ("40", "4")}, "a tenth of its own steps"

    found = cells(first)
    assert set(found) == {
        (model, images, steps)
        for model, images in (("swin_v2_atto", 12), ("swin_v2_femto", 120))
        for steps in (20, 40)
    }
    diverged, strange = found["swin_v2_atto", 12, 20], found["swin_v2_atto", 12, 40]
    assert (diverged.status, diverged.validation_loss) == ("failed", None)
    assert (strange.status, strange.validation_loss) == ("failed", None)
    good = found["swin_v2_femto", 120, 40]
    assert (good.status, good.validation_loss, good.finetuned_top1) == ("done", 0.59, 50.0)
    assert (good.data, good.train_loss, good.batch_size) == ("digits 100%", 0.3, 128)
    assert (good.images_seen, good.seconds, good.device_hours) == (40 * 128, 7.5, 0.002)
    assert good.peak_memory_bytes == 1000
    assert good.flops == 2 * found["swin_v2_femto", 120, 20].flops > 0  # type: ignore[operator]
    table = Path(first["table"])
    assert (clone / "mine.csv").read_bytes() == table.read_bytes()
    assert (table.parent / "artifacts/study/seen.csv").read_bytes() == table.read_bytes()
    assert first["page"].endswith("artifacts/study/study.html")
    assert first["counts"] == {"done": 2, "failed": 2, "impossible": 0, "stopped": 0, "waiting": 0}

    # again: nothing runs; a grid that grows: its new cells alone, in the same folder
    (clone / "pretrain.sh").unlink()
    assert study.study()["executed"] == []
    assert executed(clone) == ran
    left_out = "study.leave_out=[[swin_v2_atto,10],[swin_v2_atto,100],[swin_v2_femto,10]]"
    grown = study.study(settings=["study.steps=[20,40,60]", left_out])
    assert grown["table"] == first["table"]
    more = executed(clone)[len(ran) :]
    assert more[:2] == ["pretrain swin_v2_femto 100 60 6", "evaluate-pretrained swin_v2_femto 100 60 6"]
    assert [line.split()[0] for line in more[2:]] == ["study"]


def test_cells_are_the_workspaces_of_ordinary_runs(clone: Path) -> None:
    planned = prepare_study(settings=["study.warmup_fraction=0.25"])
    point = planned.points[1]
    settings = [f"{key}={value}" for key, value in point.settings.items()]
    assert point.settings[study_grid.WARMUP] == 10
    same = workspace.merge(settings=[*settings, "pretrain.extra_losses=true"])
    checked = params.check(same, "test")
    assert workspace.locate(same, checked, "").root == point.root
    dearest_first = list(planned.open_points({p.name: planned.known_row(p) for p in planned.points}))
    price = {p.name: costs.estimate(p.params).flops for p in planned.points if p.params}
    assert [price[name] for name in dearest_first] == sorted(price.values(), reverse=True)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["study.percentages=[10,30]", "study.leave_out=[]"], "`study.percentages`: 30 is not among scale"),
        (["study.models=[swin_v9]", "study.leave_out=[]"], "backbone 'swin_v9' is unknown"),
        (["pretrain.pretext=moby"], "`pretrain.pretext` is moby"),
        (["study.steps=[20,20]"], "steps must not repeat"),
        (["study.leave_out=[[swin_v2_pico,10]]"], "not in the grid"),
        (["study.metric=evaluate-nobody.top1"], "no stage writes the metrics `evaluate-nobody`"),
        (["model.backbone=swin_v2_pico"], "both varied and fixed"),
        (["sweep.max_points=3"], "more than `sweep.max_points`"),
        (["model.window_size=null", "study.seeds=[]"], "seeds"),
    ],
)
def test_a_mistake_is_one_line(settings: list[str], words: str, clone: Path) -> None:
    with pytest.raises(ConfigError) as error:
        prepare_study(settings=settings)
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_no_cell_with_a_result_is_an_error(clone: Path) -> None:
    (clone / "ingest.sh").write_text("exit 10\n")
    answer = study.study()
    assert (answer["table"], answer["analysis"]) == ("", "no cell is done")
    planned = prepare_study()
    rows = {point.name: planned.known_row(point) for point in planned.points}
    with pytest.raises(TrunklineError, match="4 of 4 cells failed"):
        study_cells.refuse_failures(answer["counts"], rows, strict=False)


# ---- killed ----

# the first cell that starts waits; dies with the flow as real stages do
SLOW = """
if test "$subset $steps" = "100 40" && ! test -e "$TRUNKLINE_HOME/go"; then
  while kill -0 $TRUNKLINE_FLOW_PID 2>/dev/null; do sleep 0.1; done
  exit 75
fi
"""


@pytest.fixture
def start(clone: Path) -> Iterator[Callable[[], subprocess.Popen[bytes]]]:
    from prefect.settings import PREFECT_API_URL

    variables = {"PYTHONPATH": str(ROOT), "TRUNKLINE_HOME": str(clone)}
    variables["PREFECT_API_URL"] = str(PREFECT_API_URL.value())
    started: list[subprocess.Popen[bytes]] = []

    def run() -> subprocess.Popen[bytes]:
        command = [sys.executable, "-c", "from flows.study import study; study(parallel=2)"]
        started.append(subprocess.Popen(command, cwd=clone, env={**os.environ, **variables}))
        return started[-1]

    yield run
    for process in started:
        process.kill()
        process.wait()


def test_killed_in_the_middle_only_missing_cells_run(
    clone: Path, start: Callable[[], subprocess.Popen[bytes]]
) -> None:
    values = params.read(clone / "params.yaml")
    values["study"] |= {"models": ["swin_v2_femto"], "percentages": [100], "leave_out": []}
    (clone / "params.yaml").write_text(yaml.safe_dump(values, sort_keys=False))
    (clone / "pretrain.sh").write_text(SLOW)
    process = start()
    folder = prepare_study().folder

    def done() -> int:
        path = folder / study_grid.CELLS
        return len(read_cells(path).cells) if path.is_file() and ",done," in path.read_text() else 0

    deadline = time.monotonic() + 120
    while done() < 1:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.1)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = executed(clone)
    waiting = [left.cell for left in read_cells(folder / study_grid.CELLS).left_out]
    assert [(cell.status, cell.iterations) for cell in waiting] == [("waiting", 40)]

    (clone / "go").touch()
    answer = study.study()
    assert answer["counts"]["done"] == 2
    assert len(answer["known"]) == 1
    again = executed(clone)[len(before) :]
    assert again[:2] == ["pretrain swin_v2_femto 100 40 4", "evaluate-pretrained swin_v2_femto 100 40 4"]
    assert len(again) == 3, "and the analysis"


# ---- costs ----


def test_operations_are_those_counted_by_hand(home_params: params.Params) -> None:
    """Products of the forward pass, twice as many backward, less the gradients that nobody asks for."""
    values = home_params.model_dump()
    values["model"] |= {"backbone": "swin_v2_atto", "image_size": 32, "patch_size": 4, "window_size": 4}
    values["pretrain"]["mask_unit"] = 8
    values["pretrain"]["training"] |= {"steps": 30, "batch_size": 16, "warmup_steps": 3}
    cost = costs.estimate(params.Params.model_validate(values))

    def block(tokens: int, dim: int, heads: int, window: int = 16) -> int:
        attention = 2 * 2 * tokens * window * dim  # queries by keys, weights by values
        return 2 * tokens * dim * (3 + 1 + 4 + 4) * dim + attention

    patch = 2 * 64 * 48 * 16
    blocks = 2 * block(64, 16, 1) + 4 * block(16, 32, 2)
    merge, head = 2 * 16 * 64 * 32, 2 * 16 * 32 * 192
    # the network of the position bias, per block: 2 -> 512 -> heads, of 7 x 7 offsets
    bias = 2 * (2 * 49 * (2 * 512 + 512 * 1)) + 4 * (2 * 49 * (2 * 512 + 512 * 2))
    no_gradient = patch + (2 + 4) * 2 * 49 * 2 * 512  # of the image and of the offsets
    assert cost.flops_per_image == 3 * (patch + blocks + merge + head + bias) - no_gradient
    assert cost.images_seen == 480
    assert cost.flops == 480 * cost.flops_per_image

    saving = {"activation_checkpointing": True, "attention_chunk": 1, "steps": 60}
    values["pretrain"]["training"] |= saving
    assert costs.estimate(params.Params.model_validate(values)).flops == 2 * cost.flops
    assert torch.get_default_device().type == "cpu"
