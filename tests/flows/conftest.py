"""What tests of several parts share."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import fake_workspace
import pytest
from serving_workspace import Exported, export_workspace

from flows import params, tracking
from flows.params import Params

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def finished_workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace in which every stage has run. Do not change it: copy it first."""
    return fake_workspace.build(tmp_path_factory.mktemp("finished"))


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """A real export of a classifier of real digits. Do not change it: copy it first."""
    return export_workspace(tmp_path_factory.mktemp("exported"))


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An MLflow database without runs: making one takes seconds, copying it none."""
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    folder = tmp_path_factory.mktemp("store")
    SqlAlchemyStore(f"sqlite:///{folder}/mlflow.db", str(folder / "unused")).engine.dispose()
    return folder / "mlflow.db"


@pytest.fixture(scope="session")
def prefect_server() -> Iterator[None]:
    """A Prefect server of the tests' own."""
    from prefect.testing.utilities import prefect_test_harness

    with prefect_test_harness(server_startup_timeout=120):
        yield


@pytest.fixture
def home(in_folder: Path, empty_store: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current directory as a clone with params.yaml and an empty tracking store."""
    shutil.copy(empty_store, in_folder / "mlflow.db")
    shutil.copy(ROOT / "params.yaml", in_folder / "params.yaml")
    for name in ("RANK", "TRUNKLINE_TRACKING", "DVC_EXP_NAME"):
        monkeypatch.delenv(name, raising=False)
    tracking.git_commit.cache_clear()
    tracking.git_is_dirty.cache_clear()
    return in_folder


@pytest.fixture
def home_params(home: Path) -> Params:
    """The shipped params, whose tracking store is the one in `home`."""
    return params.load(home / "params.yaml")


@pytest.fixture(scope="session")
def wait_until() -> Callable[[Callable[[], bool]], None]:
    """Wait for a condition, with a bound that is generous on a busy machine."""

    def wait(condition: Callable[[], bool], bound_s: float = 60.0) -> None:
        until = time.monotonic() + bound_s
        while not condition():
            assert time.monotonic() < until, "the condition did not come true"
            time.sleep(0.01)

    return wait
