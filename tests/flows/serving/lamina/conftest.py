"""A tiny llama2c model, imported and exported once for all tests of Lamina in a process."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import tiny_llama2c

from flows.language import import_llama2c
from flows.serving.lamina.slices.bundle import Bundle
from flows.serving.lamina.slices.export import export_bundle


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    with tiny_llama2c.one_thread():
        yield


@pytest.fixture(scope="session")
def imported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama2c")
    import_llama2c(*tiny_llama2c.write(folder), folder / "hf")
    return folder / "hf"


@pytest.fixture(scope="session")
def bundle(imported: Path) -> Bundle:
    """Do not change its files: copy them first."""
    with tiny_llama2c.one_thread():
        return export_bundle(imported, imported.parent / "bundle")
