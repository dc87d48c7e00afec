"""The one module that knows MLflow. Rank 0 logs; every other process gets a run that does nothing."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flows.params import Params


@dataclass
class Run:
    """Where a stage logs. This base class ignores everything: it serves other ranks and unit tests."""

    run_id: str = ""

    def log_metrics(self, metrics: Mapping[str, float], step: int = 0) -> None: ...

    def log_params(self, values: Mapping[str, Any]) -> None: ...

    def log_artifact(self, path: Path, folder: str | None = None) -> None: ...

    def set_tags(self, tags: Mapping[str, str]) -> None: ...


@contextmanager
def stage_run(stage: str, cell: str | None, params: Params) -> Iterator[Run]:
    yield Run()


def git_commit() -> str:
    """Commit of the working tree, or "unknown" outside a git checkout."""
    answer = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True)
    return answer.stdout.strip() or "unknown"
