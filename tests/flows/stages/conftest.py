"""What the tests of the training stages share."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import training_workspace


@pytest.fixture(scope="session")
def ingested(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace ready for training. Do not change it: copy it first."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("ingested")
        patch.chdir(folder)
        return training_workspace.build(folder)


@pytest.fixture
def enter(ingested: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Path]]:
    """`enter(change, name="ws")`: a new copy with changed params as current directory, to run stages in this
    process."""
    handlers = {signum: signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)}

    def make(change: dict[str, Any] | None = None, name: str = "workspace") -> Path:
        folder = training_workspace.copy(ingested, tmp_path / name, change)
        for variable, value in training_workspace.environment(folder).items():
            monkeypatch.setenv(variable, value)
        monkeypatch.chdir(folder)
        return folder

    yield make
    for signum, handler in handlers.items():
        signal.signal(signum, handler)
