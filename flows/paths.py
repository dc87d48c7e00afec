"""Where things lie. Two roots:

- the *workspace*: the current directory, which holds dvc.yaml, params.yaml and artifacts/. Stages use only
  this one.
- the *home*: the clone itself, which holds what all workspaces share: MLflow's database, scratch checkpoints,
  downloads. A workspace made for a recipe (`.trunkline/workspaces/…`) and DVC's temporary experiment
  folders (`.dvc/tmp/exps/…`) lie inside the home.
"""

from __future__ import annotations

import os
from pathlib import Path

from flows.errors import ConfigError

DATA = Path("artifacts/data")
SUBSETS = Path("artifacts/subsets")
PRETRAIN = Path("artifacts/pretrain")
FINETUNE = Path("artifacts/finetune")
EVALUATE = Path("artifacts/evaluate")
EXPORT = Path("artifacts/export")
PARITY = Path("artifacts/parity")
TEXT = Path("artifacts/text")
LANGUAGE_PRETRAIN = Path("artifacts/language_pretrain")
LANGUAGE_EVALUATE = Path("artifacts/language_evaluate")
LANGUAGE_EXPORT = Path("artifacts/language_export")
METRICS = Path("artifacts/metrics")
RECEIPTS = Path("artifacts/receipts")
STUDY = Path("artifacts/study")
REPORT = Path("artifacts/report.html")

_INNER = (".trunkline/workspaces/", ".dvc/tmp/exps/")


def workspace() -> Path:
    """The current directory, checked to be a Trunkline workspace.

    Raises:
        ConfigError: if it has no params.yaml.
    """
    here = Path.cwd()
    if not (here / "params.yaml").is_file():
        raise ConfigError(f"{here} has no params.yaml; run the command in the root of the repository")
    return here


def home() -> Path:
    """The clone that owns this workspace; `TRUNKLINE_HOME` overrides."""
    if value := os.environ.get("TRUNKLINE_HOME"):
        return Path(value).resolve()
    here = Path.cwd().resolve()
    text = here.as_posix() + "/"
    for inner in _INNER:
        if inner in text:
            return Path(text.split(inner)[0])
    return here


def scratch() -> Path:
    """Folder of in-flight checkpoints, outside DVC's outputs (`PIPELINE_SCRATCH` overrides)."""
    value = os.environ.get("PIPELINE_SCRATCH")
    return Path(value).resolve() if value else home() / ".trunkline" / "scratch"


def downloads() -> Path:
    return home() / ".trunkline" / "downloads"


def workspaces() -> Path:
    return home() / ".trunkline" / "workspaces"
