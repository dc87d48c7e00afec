"""The digits, ingested once for all tests of this folder."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from flows import params
from flows.stage import Stage
from flows.stages import ingest

REPOSITORY = Path(__file__).parents[3]


@pytest.fixture(scope="session")
def digits_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """artifacts/data of the default params; read only."""
    workspace = tmp_path_factory.mktemp("digits")
    before = os.getcwd()
    os.chdir(workspace)
    try:
        ingest.run(params.load(REPOSITORY / "params.yaml"), Stage("ingest"))
    finally:
        os.chdir(before)
    return workspace / "artifacts" / "data"
