"""What tests of several stages share."""

from __future__ import annotations

from pathlib import Path

import fake_workspace
import pytest


@pytest.fixture(scope="session")
def finished_workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace in which every stage has run. Do not change it: copy it first."""
    return fake_workspace.build(tmp_path_factory.mktemp("finished"))
