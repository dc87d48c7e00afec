"""The journal: what was promised, on disk before anybody is told (spec sections 11 and 14).

One JSON line per record: `submit` (the whole request), `tokens` (one iteration's choices), `finished`,
`start` (an engine has begun), `epoch`. A record counts when its line is whole; what a killed engine
left of one is cut off. Lines go to the operating system before a token is sent, so an engine that is killed
loses nothing; they are not forced to the platter, so a power cut may. The file has mode 0600.

When it has grown to its limit it is written anew without the requests that ended a while ago.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson

from flows.errors import DataError, ResourceError
from flows.serving.lamina.engine.sampling import Choice
from flows.serving.lamina.requests import Finished, Submit

KEPT_ENDED = 256
"""Requests that have ended and may still be asked for by who lost the connection."""


class JournalFull(ResourceError):
    """A record could not be written; the journal is as it was before."""


@dataclass
class Remembered:
    """One request as the journal has it."""

    submit: Submit
    choices: list[Choice] = field(default_factory=list)
    finished: Finished | None = None
    restarts: int = 0  # engines that began after it was submitted


class Journal:
    """Append-only file of what was promised; `requests` is what it said when it was opened."""

    def __init__(self, path: Path | None, limit_bytes: int = 64 << 20) -> None:
        self.path, self._limit = path, limit_bytes
        self.epoch = 0
        self.requests: dict[str, Remembered] = {}
        self._file: int | None = None
        self._size = 0
        if path is None:
            return
        try:
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
            data = path.read_bytes()
        except OSError as error:
            raise ResourceError(f"cannot open the journal {path} ({error.strerror})") from None
        whole = data.rfind(b"\n") + 1
        for line in data[:whole].splitlines():
            self._replay(line)
        os.ftruncate(self._file, whole)
        self._size = whole

    def begin(self) -> None:
        """An engine starts."""
        self._write({"t": "start"})

    def entered(self, epoch: int) -> None:
        """Workers are about to be told this epoch."""
        self.epoch = epoch
        self._write({"t": "epoch", "epoch": epoch})

    def submitted(self, submit: Submit) -> None:
        """
        Raises:
            JournalFull: nothing was promised.
        """
        self._write({"t": "submit", "submit": submit.model_dump()})

    def chose(self, choices: Sequence[tuple[str, int, Choice]]) -> None:
        """The tokens of one iteration: request, index of the token, choice.

        Raises:
            JournalFull: they must not be sent.
        """
        if choices:
            self._write({"t": "tokens", "tokens": [[who, index, *choice] for who, index, choice in choices]})

    def finished(self, finished: Iterable[Finished]) -> None:
        for message in finished:
            self._write({"t": "finished", "finished": message.model_dump()})

    def compact(self, kept: Iterable[Remembered]) -> bool:
        """Write the file anew with `kept` alone, if it has reached its limit."""
        if self._file is None or self._size < self._limit:
            return False
        assert self.path is not None
        lines = [orjson.dumps({"t": "epoch", "epoch": self.epoch})]
        for request in kept:
            lines.append(orjson.dumps({"t": "submit", "submit": request.submit.model_dump()}))
            tokens = [[request.submit.id, index, *choice] for index, choice in enumerate(request.choices)]
            lines.append(orjson.dumps({"t": "tokens", "tokens": tokens}))
            if request.finished is not None:
                lines.append(orjson.dumps({"t": "finished", "finished": request.finished.model_dump()}))
        data = b"".join(line + b"\n" for line in lines)
        temporary = self.path.with_name(self.path.name + ".new")
        new = -1
        try:
            new = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND | os.O_CLOEXEC, 0o600)
            with os.fdopen(os.dup(new), "wb") as stream:
                stream.write(data)
                stream.flush()
                os.fsync(new)
            os.replace(temporary, self.path)
        except OSError:  # the old one still holds, and needs the room that half a new one takes
            if new >= 0:
                os.close(new)
            temporary.unlink(missing_ok=True)
            self._limit = self._size * 2
            return False
        os.close(self._file)
        self._file, self._size = new, len(data)
        # what is kept alone may fill it: then the next time is when it has doubled
        self._limit = max(self._limit, 2 * self._size)
        return True

    def close(self) -> None:
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def _write(self, record: dict[str, Any]) -> None:
        if self._file is None:
            return
        data = orjson.dumps(record) + b"\n"
        try:
            written = 0
            while written < len(data):  # a disk that is nearly full takes a part
                written += os.write(self._file, data[written:])
            self._size += len(data)
        except OSError as error:
            os.ftruncate(self._file, self._size)
            raise JournalFull(f"the journal {self.path} cannot be written ({error.strerror})") from None

    def _replay(self, line: bytes) -> None:
        try:
            record = orjson.loads(line)
            kind = record["t"]
            if kind == "epoch":
                self.epoch = max(self.epoch, int(record["epoch"]))
            elif kind == "start":
                for request in self.requests.values():
                    request.restarts += 1
            elif kind == "submit":
                submit = Submit.model_validate(record["submit"])
                self.requests[submit.id] = Remembered(submit)
            elif kind == "tokens":
                for who, index, token, logprob, alternatives in record["tokens"]:
                    choices = self.requests[who].choices
                    if index == len(choices):  # a token that was chosen twice is the same token
                        choices.append(Choice(token, logprob, tuple((int(t), p) for t, p in alternatives)))
            else:
                finished = Finished.model_validate(record["finished"])
                if finished.id in self.requests:
                    self._end(finished)
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"the journal {self.path} is damaged ({type(error).__name__}: {str(error)[:200]}); move it "
                "away to start without it"
            ) from None

    def _end(self, finished: Finished) -> None:
        self.requests[finished.id].finished = finished
        ended = [name for name, request in self.requests.items() if request.finished]
        for name in ended[:-KEPT_ENDED]:
            del self.requests[name]
