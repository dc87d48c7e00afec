"""What every process inherits: defaults only, nothing calls home."""

from __future__ import annotations

import os
import subprocess
import sys
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


def test_onnxruntime_opens_no_telemetry_session(tmp_path: Path) -> None:
    """With telemetry it writes the file .ses while it is imported."""
    code = "from flows import environment; environment.prepare(); import onnxruntime"
    inherited = {name: value for name, value in os.environ.items() if name not in environment.QUIET}
    subprocess.run([sys.executable, "-c", code], check=True, env={**inherited, "TMPDIR": str(tmp_path)})
    assert list(tmp_path.iterdir()) == []
