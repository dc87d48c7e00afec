"""A process that must not outlive the one that started it reads its stdin: the end of it is the parent's."""

from __future__ import annotations

import os
import threading
from contextlib import suppress

STDIN = 0
ORPHANED = 75


def exit_with_stdin() -> None:
    """From now on this process ends at once when its stdin does, whatever it is doing.

    The kernel closes a dead parent's end of the pipe, also after SIGKILL. Nobody is left to be told, so
    nothing is put in order first: all that has to survive is on disk already.
    """
    threading.Thread(target=_wait_for_the_end, name="lifeline", daemon=True).start()


def _wait_for_the_end() -> None:
    with suppress(OSError):  # no stdin at all is the end of it, too
        while os.read(STDIN, 4096):
            pass
    os._exit(ORPHANED)
