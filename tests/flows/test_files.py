"""A reader never sees half a file."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from flows import files
from flows.errors import explain_os_error


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    files.write_json(path, {"x": 1})

    def fail() -> None:
        with files.replace_file(path) as temporary:
            temporary.write_text("half")
            raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match="space"):
        fail()
    assert files.read_json(path) == {"x": 1}
    assert [item.name for item in tmp_path.iterdir()] == ["a.json"]


def test_a_failed_folder_leaves_the_old_folder(tmp_path: Path) -> None:
    path = tmp_path / "folder"
    with files.replace_folder(path) as temporary:
        (temporary / "old").write_text("1")

    def fail() -> None:
        with files.replace_folder(path) as temporary:
            (temporary / "new").write_text("2")
            raise RuntimeError("killed")

    with pytest.raises(RuntimeError):
        fail()
    assert [item.name for item in path.iterdir()] == ["old"]
    assert [item.name for item in tmp_path.iterdir()] == ["folder"]


def test_json_refuses_nan(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON"):
        files.write_json(tmp_path / "a.json", {"x": float("nan")})
    assert not (tmp_path / "a.json").exists()


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EACCES, errno.EADDRINUSE])
def test_operating_system_errors_become_one_sentence(code: int) -> None:
    explained = explain_os_error(OSError(code, "x", "/some/file"))
    assert explained is not None
    assert "\n" not in str(explained)
    assert explain_os_error(OSError(errno.EBADF, "x")) is None
