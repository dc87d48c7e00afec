"""A clone whose stages are one-line shell commands: everything that orchestration does, in seconds."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Any

import yaml

from flows import params
from flows.params import Params

ROOT = Path(__file__).resolve().parents[2]

STAGES = r"""
stages:
  ingest:
    cmd: sh flows/stage.sh ingest
    deps: [flows/stage.sh, constraints.txt]
    params: [ingest]
    outs: [artifacts/data, artifacts/receipts/ingest.json]
    metrics: [artifacts/metrics/ingest.json: {cache: false}]
  pretrain:
    cmd: sh flows/stage.sh pretrain
    deps: [flows/stage.sh, artifacts/data]
    params: [seed, pretrain.mask_ratio]
    outs: [artifacts/pretrain, artifacts/receipts/pretrain.json]
    metrics: [artifacts/metrics/pretrain.json: {cache: false}]
  finetune:
    matrix:
      cell: [scratch]
    cmd: sh flows/stage.sh finetune-${item.cell}
    deps: [flows/stage.sh, artifacts/data]
    outs: ["artifacts/finetune/${item.cell}", "artifacts/receipts/finetune-${item.cell}.json"]
  parity:
    cmd: sh flows/stage.sh parity
    deps: [flows/stage.sh, artifacts/finetune/scratch]
    outs: [artifacts/parity, artifacts/receipts/parity.json]
    metrics: [artifacts/metrics/parity.json: {cache: false}]
"""

# what a stage does besides writing its files stands in <stage>.sh in the workspace's root, outside DVC's view
SCRIPT = r"""
set -e
mkdir -p artifacts/receipts artifacts/metrics
echo "$1" >> executed
echo "$1 of run $TRUNKLINE_PARENT_RUN"
if test -f "$1.sh"; then . "./$1.sh"; fi
case $1 in
  ingest) folder=artifacts/data ;;
  finetune-*) folder=artifacts/finetune/${1#finetune-} ;;
  *) folder=artifacts/$1 ;;
esac
mkdir -p $folder
echo "$1" > $folder/result.txt
test $1 != ingest || cp constraints.txt $folder/manifest.json
echo '{"top1": 0.5}' > artifacts/metrics/$1.json
echo "{\"stage\": \"$1\", \"run_id\": \"run-$1\"}" > artifacts/receipts/$1.json
"""


def build(root: Path, *, classes: str = '["a", "b"]') -> Path:
    """Files of a clone that DVC accepts without git. `constraints.txt`, its input, is the data's manifest."""
    for folder in (".dvc", "flows/inner", "models"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    (root / ".dvc/config").write_text("[core]\n    no_scm = true\n    analytics = false\n")
    (root / "dvc.yaml").write_text(STAGES)
    (root / "flows/stage.sh").write_text(SCRIPT)
    (root / "flows/inner/one.py").write_text("ONE = 1\n")
    (root / "models/net.py").write_text("NET = 1\n")
    (root / "constraints.txt").write_text(f'{{"name": "digits", "digest": "d", "classes": {classes}}}\n')
    shutil.copy(ROOT / "params.yaml", root / "params.yaml")
    shutil.copytree(ROOT / "recipes", root / "recipes", dirs_exist_ok=True)
    return root


def executed(root: Path) -> list[str]:
    """Stages that have run in `root`, in order."""
    path = root / "executed"
    return path.read_text().split() if path.is_file() else []


IGNORED = (
    ".dvc/cache\n.dvc/tmp\n.trunkline\n.prefect\nmlflow.db*\nexecuted\n/artifacts/*\n!/artifacts/metrics/\n"
)


def commit(root: Path) -> None:
    """Make the clone a git repository with one commit, which DVC's experiments need."""
    (root / ".dvc/config").write_text("[core]\n    analytics = false\n")
    (root / ".gitignore").write_text(IGNORED)
    for command in (
        ["init", "-q", "-b", "main"],
        ["config", "user.name", "A Tester"],
        ["config", "user.email", "tester@localhost"],
        ["add", "-A"],
        ["commit", "-q", "-m", "start"],
    ):
        subprocess.run(["git", *command], cwd=root, check=True)


def change_params(folder: Path, changes: dict[str, Any]) -> Params:
    """Set dotted keys in `folder`/params.yaml."""
    values = params.read(folder / "params.yaml")
    for key, value in changes.items():
        values = params.overlay(values, params.parse_setting(f"{key}={value}"), "test")
    (folder / "params.yaml").write_text(yaml.safe_dump(values))
    return params.load(folder / "params.yaml")
