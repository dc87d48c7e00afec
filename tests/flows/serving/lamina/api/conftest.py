"""A fake engine and a server before it, for each test of its own."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from fake_engine import FakeEngine, fake_engine
from served_texts import Running, running_server, wait_until, write_byte_level


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer of bytes, and a chat template."""
    return write_byte_level(tmp_path_factory.mktemp("byte_level"))


@pytest.fixture
def socket_path() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="lamina") as short:  # unix sockets have short names
        yield Path(short) / "engine.sock"


@pytest.fixture
def engine(socket_path: Path) -> Iterator[FakeEngine]:
    with fake_engine(socket_path) as running:
        yield running


@pytest.fixture
def server(folder: Path, engine: FakeEngine, socket_path: Path) -> Iterator[Running]:
    with running_server(folder, socket_path) as running:
        wait_until(lambda: not running.service.why_not_ready())
        yield running
