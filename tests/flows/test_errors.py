"""Which exceptions of other libraries are explained in one line, and which keep their stack trace."""

from __future__ import annotations

import errno
import itertools

import pytest

from flows.errors import DataError, Interrupted, PeerLost, ResourceError, TrunklineError, explain


def raised(*errors: BaseException) -> BaseException:
    """The last error, raised while the one before was handled, and so on."""
    for earlier, later in itertools.pairwise(errors):
        later.__context__ = earlier
    return errors[-1]


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device", "/scratch/x"),
        OSError(errno.EDQUOT, "Disk quota exceeded"),
        ValueError("Error while serializing: I/O error: No space left on device (os error 28)"),
        Exception("(sqlite3.OperationalError) database or disk is full"),
        raised(OSError(errno.ENOSPC, "No space left on device"), RuntimeError("unexpected pos 64 vs 0")),
    ],
)
def test_a_full_disk_is_recognised_behind_any_library(error: BaseException) -> None:
    explained = explain(error)
    assert isinstance(explained, ResourceError)
    assert explained.exit_code == 74
    assert "the same command again" in str(explained)
    assert "\n" not in str(explained)


def test_a_vanished_process_is_an_interruption() -> None:
    explained = explain(
        RuntimeError("[../gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:1")
    )
    assert isinstance(explained, PeerLost)
    assert explained.exit_code == Interrupted.exit_code


def test_what_fails_while_a_mistake_is_handled_does_not_hide_it() -> None:
    mistake = DataError("no labels")
    assert explain(raised(mistake, KeyError("run"))) is mistake


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
        KeyError("x"),
        OSError(errno.ENOENT, "No such file or directory", "x"),
        raised(PermissionError(errno.EACCES, "Permission denied"), KeyError("x")),
        ConnectionResetError(errno.ECONNRESET, "Connection reset by peer"),
    ],
)
def test_a_bug_keeps_its_trace(error: BaseException) -> None:
    assert explain(error) is None


def test_every_error_has_the_exit_code_of_its_kind() -> None:
    codes = {kind.__name__: kind.exit_code for kind in TrunklineError.__subclasses__()}
    expected = {
        "GateFailed": 10,
        "ConfigError": 11,
        "DataError": 11,
        "Diverged": 12,
        "ResourceError": 74,
        "Interrupted": 75,
    }
    assert expected.items() <= codes.items()
