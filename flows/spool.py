"""Records on their way to a tracking store: on disk first, sent in the background, in order, until delivered.

One folder per run, `.trunkline/spool/<id>/`: meta.json (which store, which run), log.jsonl (one record a
line, only appended), delivered (number of the last record the store has), files/ (copies of what was logged),
lock (held by the process that owns or delivers it). A step of training only appends a line: it never waits
for the store. What an absent store or a killed process leaves is delivered by the next process that reaches
the store, or by `trunkline sync`. A record may be sent twice (the answer was lost, the process died before it
noted the delivery), so delivering has to be idempotent; it is never sent before those ahead of it.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from flows import files

Record = dict[str, Any]
INTERVAL_S = 5.0
LONGEST_PAUSE_S = 30.0
LAST_CALL_S = 2.0
BATCH = 1000
UNSAVED = 10_000  # records kept in memory when the disk is full


class Refused(Exception):
    """The store will never take this record."""


class Spool:
    """The folder of one run, whose lock this object holds."""

    def __init__(self, folder: Path, lock: int) -> None:
        self.folder, self._lock = folder, lock
        self.meta: Record = files.read_json(folder / "meta.json")
        self.trouble = ""
        """Why records could not be written, if so."""
        self.refused = 0
        self._log = open(folder / "log.jsonl", "ab", buffering=0)  # noqa: SIM115  # closed with the spool
        self._size = self._log.tell()
        self._guard = threading.Lock()
        self._unsaved: list[Record] = []
        self.delivered = self._read_delivered()
        # where in the log the first record that is not delivered may begin
        self._offset = 0
        self.last = max([self.delivered, *(record["n"] for record in self._saved(0))])

    @classmethod
    def create(cls, root: Path, meta: Record) -> Spool:
        """
        Raises:
            OSError: the disk is full, or nothing can be written.
        """
        folder = root / f"{time.strftime('%Y%m%d-%H%M%S')}-{uuid.uuid4().hex[:12]}"
        folder.mkdir(parents=True)
        lock = _lock(folder)
        assert lock is not None
        try:
            files.write_json(folder / "meta.json", meta)
            return cls(folder, lock)
        except OSError:
            os.close(lock)
            shutil.rmtree(folder, ignore_errors=True)
            raise

    @property
    def name(self) -> str:
        return self.folder.name

    def set_meta(self, **values: Any) -> None:
        self.meta.update(values)
        with self._survive_a_full_disk():
            files.write_json(self.folder / "meta.json", self.meta)

    def append(self, record: Record) -> None:
        """Never raises for a full disk: the record then waits in memory, and `trouble` says so."""
        with self._guard:
            self.last += 1
            record["n"] = self.last
            saved = False
            with self._survive_a_full_disk():
                line = json.dumps(record).encode() + b"\n"
                try:
                    written = self._log.write(line)
                    saved = written == len(line)
                finally:
                    if saved:
                        self._size += len(line)
                    else:  # half a line would swallow the next one
                        os.truncate(self._log.fileno(), self._size)
                if not saved:
                    raise OSError(28, "No space left on device")
            if not saved:
                self._unsaved = [*self._unsaved, record][-UNSAVED:]

    def keep_file(self, source: Path) -> Path:
        """A copy that lasts until it is delivered; `source` itself if there is no room for one."""
        target = self.folder / "files" / uuid.uuid4().hex[:8] / source.name
        with self._survive_a_full_disk():
            try:
                if source.is_dir():
                    shutil.copytree(source, target)
                else:
                    target.parent.mkdir(parents=True, exist_ok=True)
                    shutil.copyfile(source, target)
                return target
            except OSError:
                shutil.rmtree(target.parent, ignore_errors=True)
                raise
        return source.absolute()

    def pending(self) -> list[Record]:
        """The next records to deliver, in order."""
        with self._guard:
            found = [*self._saved(BATCH), *self._unsaved]
        return sorted((r for r in found if r["n"] > self.delivered), key=lambda r: int(r["n"]))[:BATCH]

    def advance(self, record: Record) -> None:
        """The store has all up to `record`."""
        with self._guard:
            self.delivered = int(record["n"])
            self._unsaved = [other for other in self._unsaved if other["n"] > self.delivered]
        kept = Path(record.get("path", ""))
        if self.folder in kept.parents:
            shutil.rmtree(kept.parent, ignore_errors=True)
        with self._survive_a_full_disk():  # at worst it is delivered again
            files.write_text(self.folder / "delivered", f"{self.delivered}\n")

    def is_empty(self) -> bool:
        return bool(self.delivered >= self.last)

    def ends(self) -> bool:
        """Whether its owner said how the run ended, delivered or not."""
        with open(self.folder / "log.jsonl", "rb") as log:
            return any(b'"op": "end"' in line and line.endswith(b"\n") for line in log)

    def synchronize(self) -> None:
        with self._survive_a_full_disk():
            os.fsync(self._log.fileno())

    def close(self) -> None:
        if not self._log.closed:  # a descriptor that is closed twice may be another file's by then
            self._log.close()
            os.close(self._lock)

    def remove(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        self.close()

    def _saved(self, limit: int) -> list[Record]:
        """Up to `limit` records of the log that are not delivered (0: all). Half a last line is none."""
        found: list[Record] = []
        with open(self.folder / "log.jsonl", "rb") as log:
            log.seek(self._offset)
            for line in log:
                if not line.endswith(b"\n"):
                    break
                with contextlib.suppress(ValueError):
                    record = json.loads(line)
                    if record["n"] > self.delivered:
                        found.append(record)
                    elif not found:
                        self._offset += len(line)
                if limit and len(found) >= limit:
                    break
        return found

    def _read_delivered(self) -> int:
        with contextlib.suppress(FileNotFoundError, ValueError):
            return int((self.folder / "delivered").read_text())
        return 0

    @contextlib.contextmanager
    def _survive_a_full_disk(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if not self.trouble:
                self.trouble = error.strerror or str(error)
                say(
                    f"what is logged cannot be kept on disk ({self.trouble}: {self.folder}); "
                    "it goes on in memory and is lost if the tracking store stays away"
                )


def _lock(folder: Path) -> int | None:
    """The open lock file, or None if a living process holds it."""
    handle = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        return None
    return handle


def leftovers(root: Path) -> Iterator[Spool]:
    """Spools whose process is gone, oldest first, each locked. Close or remove them."""
    for folder in sorted(root.glob("*")) if root.is_dir() else []:
        if not (folder / "meta.json").is_file():
            continue
        with contextlib.suppress(OSError, ValueError):
            handle = _lock(folder)
            if handle is None:
                continue
            if not (folder / "meta.json").is_file():  # delivered by another process in between
                os.close(handle)
                continue
            yield Spool(folder, handle)


def deliver_all(spool: Spool, deliver: Callable[[Spool, list[Record]], None]) -> None:
    """Send what is pending, neighbours of one kind of metrics together; a refused record is set aside.

    Raises:
        Exception: whatever `deliver` raises, except Refused; what went before is delivered.
    """
    while records := spool.pending():
        for group in _groups(records):
            try:
                deliver(spool, group)
            except Refused as error:
                if not spool.refused:
                    refused = spool.folder.parent / "refused.jsonl"
                    say(f"the tracking store refuses a record: {error}; it goes to {refused}")
                spool.refused += len(group)
                with contextlib.suppress(OSError), open(spool.folder.parent / "refused.jsonl", "a") as log:
                    log.writelines(json.dumps({"reason": str(error), **record}) + "\n" for record in group)
            spool.advance(group[-1])


def _groups(records: list[Record]) -> Iterator[list[Record]]:
    group: list[Record] = []
    for record in records:
        if group and not (record["op"] == group[0]["op"] == "metrics"):
            yield group
            group = []
        group.append(record)
    if group:
        yield group


class Sender:
    """A thread that delivers a spool while its owner works."""

    def __init__(
        self,
        spool: Spool,
        deliver: Callable[[Spool, list[Record]], None],
        when_idle: Callable[[], None] = lambda: None,
        is_away: bool = False,
    ) -> None:
        """
        Args:
            is_away: the store was found absent already, and that has been said.
            deliver: sends one group of records; raises Refused, or anything else if it may succeed later.
            when_idle: called once, when everything so far has been delivered.
        """
        self.spool, self._deliver, self._when_idle = spool, deliver, when_idle
        self._changed = threading.Condition()
        self._wanted = self._stop = False
        self.away_since = time.monotonic() if is_away else None
        self._thread = threading.Thread(target=self._run, daemon=True, name="tracking")
        self._thread.start()

    def put(self, record: Record) -> None:
        self.spool.append(record)

    def flush(self, patience_s: float) -> bool:
        """Wait until all is delivered; False if the store has not answered for `patience_s`."""
        started = time.monotonic()
        with self._changed:
            while not self.spool.is_empty():
                if self.away_since is not None:
                    waited_s = time.monotonic() - max(started, self.away_since)
                    if waited_s > patience_s:
                        return False
                self._wanted = True
                self._changed.notify_all()
                self._changed.wait(0.05)
        return True

    def stop(self) -> None:
        """End the thread and give the spool up: removed if the store has all of it. It stays locked while a
        call that is on its way does not return, at most until this process ends."""
        with self._changed:
            self._stop = True
            self._changed.notify_all()
        self._thread.join(LAST_CALL_S)
        if self._thread.is_alive():
            return
        if self.spool.is_empty():
            self.spool.remove()
        else:
            self.spool.synchronize()
            self.spool.close()

    def _run(self) -> None:
        pause_s, idle_done = INTERVAL_S, False
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._wanted or self._stop, pause_s)
                self._wanted = False
                if self._stop:
                    return
            self.spool.synchronize()
            try:
                deliver_all(self.spool, self._deliver)
            except Exception as error:
                now = time.monotonic()
                if self.away_since is None:
                    self.away_since, pause_s = now, 1.0
                    say(
                        f"the tracking store does not answer ({_first_words(error)}); "
                        "what is logged is kept and sent later"
                    )
                pause_s = min(2 * pause_s, LONGEST_PAUSE_S)
                self._rest(1.0)
                continue
            if self.away_since is not None:
                say("the tracking store is back; it has everything")
            self.away_since, pause_s = None, INTERVAL_S
            if not idle_done and not self._wanted:
                idle_done = True
                with contextlib.suppress(Exception):
                    self._when_idle()

    def _rest(self, seconds: float) -> None:
        """Even a flush asks an absent store only this often."""
        with self._changed:
            self._changed.wait_for(lambda: self._stop, seconds)


def _first_words(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) < 160 else text[:157] + "…"


def say(text: str) -> None:
    """A warning among the lines of a progress bar."""
    start = "\r\033[K" if sys.stderr.isatty() else ""
    print(f"{start}warning: {text}", file=sys.stderr, flush=True)
