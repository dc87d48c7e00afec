"""Keep one process running: start it, notice that it ended, start it again, later each time it dies young."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import monotonic

from flows.serving.lamina.cluster.child import Child, Say, describe_exit, end_children

STABLE_S = 10.0
FIRST_PAUSE_S = 0.5
LONGEST_PAUSE_S = 10.0
START_PATIENCE_S = 60.0


@dataclass(frozen=True)
class Ending:
    """How a process ended."""

    code: int
    words: str  # its own last ones, or of whoever ended it
    reason: str  # name, code and words in one sentence
    early: int  # times in a row that it ended within STABLE_S of its start, this one included

    @property
    def announcement(self) -> str:
        pause = pause_after(self.early)
        when = f" in {pause:g} s, because that was {self.early} times in a row" if pause else ""
        return f"{self.reason}; it is started again{when}"


def pause_after(early: int) -> float:
    """Seconds until the next start, after so many early endings in a row: none, then 0.5 doubling to 10."""
    return 0.0 if early <= 1 else min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2.0 ** (early - 2))


class Keeper:
    """One process. `look` has to be called every now and then, always on the same thread.

    Args:
        is_ready: whether the process can be used; one that does not come so far within START_PATIENCE_S is
            ended.
        prepare: called before every start.
    """

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        say: Say,
        *,
        is_ready: Callable[[Child], bool],
        prepare: Callable[[], None] = lambda: None,
    ) -> None:
        self.name = name
        self.child: Child | None = None
        self.ready = False
        self.starts = 0
        self._command, self._say, self._is_ready, self._prepare = command, say, is_ready, prepare
        self._early = 0
        self._not_before = 0.0
        self._why = ""

    def look(self) -> Ending | None:
        """Start, check, or take note of an end, which is returned."""
        if self.child is None:
            if monotonic() >= self._not_before:
                return self._start()
            return None
        code = self.child.poll()
        if code is not None:
            return self._note_end(code, self.child.age_s, self._why or self.child.last_words)
        if not self.ready:
            self.ready = self._is_ready(self.child)
            if not self.ready and self.child.age_s > START_PATIENCE_S:
                self.kill(f"it was not ready {START_PATIENCE_S:g} s after its start")
            if self.ready and self.starts > 1:
                self._say(f"{self.name} is back (pid {self.child.pid})")
        return None

    def kill(self, why: str) -> None:
        """SIGKILL, which ends a stopped process, too; the next `look` sees its end."""
        if self.child is not None:
            self._why = why
            self.child.kill()
            self.child.wait(5.0)

    def stop(self, patience_s: float) -> None:
        if self.child is not None:
            end_children([self.child], patience_s)
            self.child = None

    def _start(self) -> Ending | None:
        self.ready, self._why = False, ""
        self.starts += 1
        try:
            self._prepare()
            self.child = Child(self.name, self._command, self._say)
        except OSError as error:  # no memory, no file handles, a full disk: may pass
            return self._note_end(74, 0.0, f"cannot be started: {error.strerror}")
        return None

    def _note_end(self, code: int, lived_s: float, words: str) -> Ending:
        self._early = self._early + 1 if lived_s < STABLE_S else 1
        self._not_before = monotonic() + pause_after(self._early)
        if self.child is not None:
            self.child.close()
        self.child, self.ready = None, False
        reason = f"{self.name} {describe_exit(code)}" + (f": {words}" if words else "")
        return Ending(code, words, reason, self._early)


__all__ = ["Ending", "Keeper", "pause_after"]
