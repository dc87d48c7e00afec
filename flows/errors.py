"""Errors a user can act on, each with the exit code that orchestration understands.

A `TrunklineError` is shown as one line, without a stack trace; anything else is a bug and keeps its trace.
Exit codes: 0 done, 10 a gate failed, 11 bad configuration or input, 12 training diverged, 74 the disk or
another resource failed, 75 interrupted and resumable.
"""

from __future__ import annotations

import errno


class TrunklineError(Exception):
    """A mistake or condition outside the code; the message says what, where and what to do."""

    exit_code = 1


class GateFailed(TrunklineError):
    """A result is outside the limits in params.yaml."""

    exit_code = 10


class ConfigError(TrunklineError):
    """params.yaml, a recipe or a command-line value is wrong."""

    exit_code = 11


class DataError(TrunklineError):
    """Input data is missing, damaged or contradictory."""

    exit_code = 11


class Diverged(TrunklineError):
    """The loss is no longer finite."""

    exit_code = 12


class ResourceError(TrunklineError):
    """Disk full, port in use, file not writable."""

    exit_code = 74


class Interrupted(TrunklineError):
    """Stopped by a signal after a checkpoint; the same command continues."""

    exit_code = 75


class PeerLost(Interrupted):
    """Another of several training processes ended or cannot be reached, which broke off this one. If it ran
    on this machine, its message says why and this one is not shown."""


RETRYABLE_EXIT_CODES = frozenset({137, 75})
"""Killed or interrupted from outside: the same command again can help. All else fails the same way again."""


_FULL = (errno.ENOSPC, errno.EDQUOT)
_FULL_IN_WORDS = ("No space left on device", "database or disk is full")
_LOST_CONNECTION = (  # gloo's words, nccl's, torch's store's
    "Connection closed by peer",
    "Connection reset by peer",
    "Connection refused",
    "Connection timed out",
    "Broken pipe",
    "No route to host",
    "Network is unreachable",
    "Timed out waiting",
    "NCCL error: remote process exited",
    "client socket has failed to connect",
    "client socket has timed out",
)


def explain(error: BaseException) -> TrunklineError | None:
    """What a user can act on behind an exception of another library; None for a bug, which keeps its stack
    trace.

    Libraries hide a full disk behind errors of their own (safetensors, SQLite, DeepSpeed) and report a
    process that vanished as a broken connection; and what fails while a `TrunklineError` is dealt with must
    not hide that one.
    """
    if isinstance(error, OSError) and (explained := explain_os_error(error)):
        return explained
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, TrunklineError):
            return cause
        text = str(cause)
        if isinstance(cause, OSError) and cause.errno in _FULL:
            return explain_os_error(cause)
        if any(words in text for words in _FULL_IN_WORDS):
            return explain_os_error(OSError(errno.ENOSPC, text))
        if isinstance(cause, RuntimeError) and any(words in text for words in _LOST_CONNECTION):
            return PeerLost(
                "a training process on another machine ended or cannot be reached; start the same command on "
                "all machines again, it continues from the last checkpoint"
            )
        cause = cause.__cause__ or cause.__context__
    return None


def explain_os_error(error: OSError) -> ResourceError | None:
    """One clear sentence for the operating-system errors that users meet; None for all others."""
    where = f": {error.filename}" if error.filename else ""
    reasons = {
        errno.ENOSPC: (
            "the disk is full; free some space and run the same command again, nothing finished is lost"
        ),
        errno.EDQUOT: "the disk quota is used up; free some space and run the same command again",
        errno.EACCES: "permission denied",
        errno.EROFS: "the file system is read-only",
        errno.EADDRINUSE: "the port is already in use; choose another one or stop the program that holds it",
    }
    if error.errno not in reasons:
        return None
    return ResourceError(reasons[error.errno] + where)
