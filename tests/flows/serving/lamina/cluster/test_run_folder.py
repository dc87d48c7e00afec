"""What a service leaves in the file system: nothing; and what it finds of dead ones."""

import os
import signal
import socket
import stat
import subprocess
import sys
import time

import pytest

from flows.errors import ResourceError
from flows.serving.lamina.cluster.run_folder import (
    MARK,
    default_base,
    end_leftovers,
    remove_stale,
    run_folder,
    write_private,
)


def mode(path):
    return stat.S_IMODE(path.stat().st_mode)


def test_it_is_private_and_gone_at_the_end(tmp_path):
    def fail():
        with run_folder(tmp_path) as folder:
            assert (mode(folder.path), mode(folder.token_file)) == (0o700, 0o600)
            assert len(folder.token) == 64
            assert folder.token_file.read_text() == folder.token
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert list(tmp_path.iterdir()) == []


def test_tokens_differ(tmp_path):
    with run_folder(tmp_path) as one, run_folder(tmp_path) as other:
        assert one.token != other.token


def test_private_files_are_replaced_whole_and_never_readable_by_others(tmp_path):
    previous = os.umask(0)
    try:
        for text in (b"one", b"two"):
            write_private(tmp_path / "file", text)
            assert mode(tmp_path / "file") == 0o600
    finally:
        os.umask(previous)
    assert (tmp_path / "file").read_bytes() == b"two"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_socket_fits_below_a_long_folder_for_temporary_files(tmp_path, monkeypatch):
    long = tmp_path / ("x" * 100)
    long.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(long))
    with run_folder(default_base()) as folder, socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(folder.socket))


def test_the_folders_of_dead_services_go_and_those_of_living_ones_stay(tmp_path):
    dead = tmp_path / "lamina-dead"
    dead.mkdir()
    (dead / MARK).touch()
    (dead / "token").write_text("x")
    other = tmp_path / "lamina-link"
    other.symlink_to(dead)
    with run_folder(tmp_path) as living:
        assert not dead.exists()
        assert other.is_symlink()  # whatever that is, it is not ours
        assert remove_stale(tmp_path) == []
        with run_folder(tmp_path):
            assert living.token_file.exists()


def test_what_a_dead_service_left_running_is_ended(tmp_path):
    dead = tmp_path / "lamina-dead"
    dead.mkdir()
    (dead / MARK).touch()
    words = ["flows.serving.lamina.attention.worker", "--token-file"]
    command = [sys.executable, "-S", "-c", "import time; time.sleep(60)"]
    stranger = subprocess.Popen([*command, *words, str(tmp_path / "lamina-deadly" / "token")])
    left = subprocess.Popen([*command, *words, str(dead / "token")])
    try:
        left.send_signal(signal.SIGSTOP)  # it does not see that its parent is gone
        time.sleep(0.1)
        assert remove_stale(tmp_path) == [dead]
        left.wait(10)
        end_leftovers(dead)
        assert stranger.poll() is None
    finally:
        for process in (left, stranger):
            process.kill()
            process.wait()


def test_no_place_for_it_is_said(tmp_path):
    with (
        pytest.raises(ResourceError, match=r"cannot make a folder for the run in .*gone.* set TMPDIR"),
        run_folder(tmp_path / "gone"),
    ):
        pass


def test_a_folder_of_somebody_else_is_left_alone_whatever_its_name(tmp_path):
    notes = tmp_path / "lamina-notes"
    notes.mkdir()
    (notes / "thesis.txt").write_text("years of work")
    assert remove_stale(tmp_path) == []
    assert (notes / "thesis.txt").exists()
