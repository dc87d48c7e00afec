"""The folder of one running service: token, sockets, journal. Private, and gone when the service is.

The path is short, because a Unix socket's may have 107 bytes. The folder's owner holds a lock on it for as
long as it lives, so a folder without a lock is that of a dead service: whoever starts next removes it, with
the processes that were left of it (a stopped one does not notice that its parent is gone).
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

from flows.errors import ResourceError

PREFIX = "lamina-"
UNFINISHED = ".lamina-"
MARK = ".trunkline-run"  # no folder without it is ever removed, whatever its name
MAX_SOCKET_PATH = 100  # bytes, with some room: Linux takes 107, others 103
MODULES = "flows.serving.lamina."
TOKEN_BYTES = 32
END_PATIENCE_S = 5.0


@dataclass(frozen=True)
class RunFolder:
    path: Path
    token: str
    """What the processes of this run show one another."""

    @property
    def token_file(self) -> Path:
        return self.path / "token"

    @property
    def socket(self) -> Path:
        return self.path / "engine.sock"

    @property
    def journal(self) -> Path:
        return self.path / "journal"

    @property
    def engine_config(self) -> Path:
        return self.path / "engine.json"


@contextmanager
def run_folder(base: Path | None = None, token: str = "") -> Iterator[RunFolder]:
    """A new folder (mode 0700) with a token (mode 0600); removed at the end, as are those of the dead.

    Args:
        base: where; default: the folder for temporary files, or /tmp if its path is too long for a socket.
        token: of a run that began on another host; default: a new one.

    Raises:
        ResourceError: the folder cannot be made.
    """
    base = base or default_base()
    remove_stale(base)
    path, lock = _claim(base)
    try:
        folder = RunFolder(path, token or secrets.token_hex(TOKEN_BYTES))
        write_private(folder.token_file, folder.token.encode())
        yield folder
    finally:
        shutil.rmtree(path, ignore_errors=True)
        os.close(lock)


def default_base() -> Path:
    base = Path(tempfile.gettempdir())
    longest = len(os.fsencode(base / f"{PREFIX}xxxxxxxx" / "engine.sock"))
    return base if longest <= MAX_SOCKET_PATH else Path("/tmp")


def write_private(path: Path, data: bytes) -> None:
    """Whole or not at all, and readable by this user only, from its first byte on."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(data)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def remove_stale(base: Path) -> list[Path]:
    """Remove the folders of services of this user that are dead, and end what is left of their processes."""
    removed = []
    for path in base.glob(f"{PREFIX}*"):
        lock = _lock_of(path) if (path / MARK).is_file() else None
        if lock is None:
            continue
        try:
            end_leftovers(path)
            shutil.rmtree(path, ignore_errors=True)
            removed.append(path)
        finally:
            os.close(lock)
    return removed


def end_leftovers(path: Path) -> None:
    """End the processes of Lamina that were started for this folder."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            command = process.cmdline()
            ours = any(word.startswith(MODULES) for word in command)
            if ours and any(word.startswith(f"{path}/") for word in command) and process.pid != os.getpid():
                process.kill()
                found.append(process)
    psutil.wait_procs(found, timeout=END_PATIENCE_S)


def _claim(base: Path) -> tuple[Path, int]:
    """A folder that is locked before it has the name by which others look for it."""
    try:
        hidden = Path(tempfile.mkdtemp(prefix=UNFINISHED, dir=base))
    except OSError as error:
        raise ResourceError(
            f"cannot make a folder for the run in {base} ({error.strerror}); "
            "free some space there, or set TMPDIR to another place"
        ) from None
    lock = os.open(hidden, os.O_RDONLY | os.O_DIRECTORY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    (hidden / MARK).touch()
    path = hidden.with_name(PREFIX + hidden.name.removeprefix(UNFINISHED))
    os.rename(hidden, path)
    return path, lock


def _lock_of(path: Path) -> int | None:
    """The lock of a folder of this user, or None if somebody has it (or it is something else)."""
    try:
        lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError:
        return None
    try:
        if os.fstat(lock).st_uid == os.getuid():
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return lock
    except OSError:
        pass
    os.close(lock)
    return None
