"""A session on the exported classifier, and copies of its workspace for tests that change files."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from serving_workspace import Exported

from flows.serving.session import Session, open_session


@pytest.fixture(scope="session")
def session(exported: Exported) -> Session:
    return open_session(exported.package.path("fp32"), ["CPUExecutionProvider"], threads=1)


@pytest.fixture
def workspace(exported: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the exported workspace to change; also the current directory."""
    folder = tmp_path / "workspace"
    shutil.copytree(exported.root, folder)
    monkeypatch.chdir(folder)
    return folder
