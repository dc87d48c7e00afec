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


RETRYABLE_EXIT_CODES = frozenset({-9, 137, 75})
"""Killed or interrupted from outside: the same command again can help. All else fails the same way again."""


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
