"""What every process inherits: defaults only, nothing calls home."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from flows import environment


def test_defaults_are_set(in_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*environment.QUIET, "PREFECT_HOME"):
        monkeypatch.setenv(name, "")  # recorded, so that what `prepare` sets is undone
        monkeypatch.delenv(name)
    environment.prepare()
    assert {name: os.environ[name] for name in environment.QUIET} == environment.QUIET
    assert os.environ["PREFECT_HOME"] == str(in_folder / ".prefect"), "state of the servers lies in the clone"


def test_what_is_set_already_stays(in_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREFECT_HOME", "/elsewhere")
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "false")
    environment.prepare()
    assert os.environ["PREFECT_HOME"] == "/elsewhere"
    assert os.environ["MLFLOW_DISABLE_TELEMETRY"] == "false"
