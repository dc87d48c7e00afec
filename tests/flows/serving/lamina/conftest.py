"""A tiny llama2c model, imported and exported once for all tests of Lamina."""

from __future__ import annotations

import fcntl
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import tiny_llama2c

from flows.language import import_llama2c
from flows.serving.lamina.slices.bundle import Bundle, read_bundle
from flows.serving.lamina.slices.export import export_bundle


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    with tiny_llama2c.one_thread():
        yield


@pytest.fixture(scope="session")
def imported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _made_once(tmp_path_factory) / "hf"


@pytest.fixture(scope="session")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """Do not change its files: copy them first."""
    return read_bundle(_made_once(tmp_path_factory) / "bundle")


def _made_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export takes seconds: the processes of one run of the tests share it."""
    own = tmp_path_factory.getbasetemp()
    shared = own.parent if "PYTEST_XDIST_WORKER" in os.environ else own
    folder = shared / "llama2c"
    with open(shared / "llama2c.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.exists():
            made = Path(tempfile.mkdtemp(dir=shared))
            import_llama2c(*tiny_llama2c.write(made), made / "hf")
            with tiny_llama2c.one_thread():
                export_bundle(made / "hf", made / "bundle")
            made.rename(folder)
    return folder
