"""Shared fixtures. Tests run in the clone's root, write only below tmp_path and use loopback only."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from flows import environment, params

ROOT = Path(__file__).resolve().parents[1]

environment.prepare()


@pytest.fixture(scope="session")
def root() -> Path:
    """Root of the clone."""
    return ROOT


@pytest.fixture
def raw_params() -> dict[str, Any]:
    """params.yaml as a mapping that a test may change."""
    return params.read(ROOT / "params.yaml")


@pytest.fixture(scope="module", autouse=True)
def no_inherited_store() -> Iterator[None]:
    """Every module begins and ends without a chosen store: `tracking.client` puts its own in the environment,
    where MLflow looks for it, and a worker runs many modules in one process."""
    with pytest.MonkeyPatch.context() as patched:
        for name in ("MLFLOW_TRACKING_URI", "TRUNKLINE_HOME", "TRUNKLINE_PARENT_RUN"):
            patched.setenv(name, "")  # first set, so that whatever a test leaves is undone
            patched.delenv(name)
        yield


@pytest.fixture(scope="module", autouse=True)
def denormal_numbers() -> Iterator[None]:
    """Training in a test's process flushes them to zero, which Hypothesis refuses to work with."""
    yield
    if "torch" in sys.modules:
        sys.modules["torch"].set_flush_denormal(False)


@pytest.fixture
def in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty current directory that is its own home: no store, scratch or cache of the clone is touched."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TRUNKLINE_HOME", str(tmp_path))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "")  # set, so that what a test's code puts there is undone
    monkeypatch.delenv("TRUNKLINE_PARENT_RUN", raising=False)
    yield tmp_path
    os.chdir(ROOT)
