"""Request traces as they are published: Azure's CSV and Mooncake's JSON lines, plain or gzipped (spec 9).

A trace has no text, only when a request came, how long its prompt was and how long its answer. Anything else
than the two formats is refused with the number of the line.
"""

from __future__ import annotations

import datetime
import gzip
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flows.errors import DataError

AZURE = ["TIMESTAMP", "ContextTokens", "GeneratedTokens"]
MOONCAKE = ("timestamp", "input_length", "output_length")
MAX_REQUESTS = 5_000_000
MAX_TOKENS = 100_000_000
MAX_LINE = 1 << 20
FORMATS = f"known are Azure's CSV ({','.join(AZURE)}) and Mooncake's JSON lines ({', '.join(MOONCAKE)})"


@dataclass(frozen=True)
class Trace:
    """Requests in order of arrival; all arrays have one entry per request."""

    name: str
    arrival_s: NDArray[np.float64]  # from 0
    prompt: NDArray[np.int64]
    output: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.prompt)

    @property
    def span_s(self) -> float:
        return float(self.arrival_s[-1]) if len(self) else 0.0

    @property
    def mean_prompt(self) -> float:
        return float(self.prompt.mean())

    @property
    def mean_output(self) -> float:
        return float(self.output.mean())

    @property
    def live_context(self) -> float:
        """Context of a token that is generated, over all of them."""
        return float(np.sum(self.output * (self.prompt + (self.output - 1) / 2)) / np.sum(self.output))

    def first(self, requests: int) -> Trace:
        return Trace(self.name, self.arrival_s[:requests], self.prompt[:requests], self.output[:requests])

    def faster(self, scale: float) -> Trace:
        """The same requests, arriving `scale` times as fast."""
        return Trace(self.name, self.arrival_s / scale, self.prompt, self.output)

    def rescaled(self, name: str, mean_prompt: float, mean_output: float) -> Trace:
        """A stand-in for a trace of which only the means are known: lengths in proportion."""
        prompt, output = (
            np.maximum(1, np.rint(lengths * (mean / lengths.mean()))).astype(np.int64)
            for lengths, mean in ((self.prompt, mean_prompt), (self.output, mean_output))
        )
        return Trace(name, self.arrival_s, prompt, output)


def read_trace(path: Path) -> Trace:
    """
    Raises:
        DataError: no such file, a damaged archive, another format, or a line that is no request.
    """
    lines = _lines(path)
    number, first = next(lines, (0, ""))
    if not number:
        raise DataError(f"{path} is empty")
    if first.startswith("{"):
        requests = _mooncake(path, _chain(number, first, lines))
    elif [cell.strip() for cell in first.lstrip("\ufeff").split(",")] == AZURE:
        requests = _azure(path, lines)
    else:
        raise DataError(f"{path}, line 1: {first[:60]!r} begins no trace; {FORMATS}")
    found = list(requests)
    if not found:
        raise DataError(f"{path} has no requests")
    arrival, prompt, output = (np.array(column) for column in zip(*found, strict=True))
    order = np.argsort(arrival, kind="stable")
    name = path.name.removesuffix(".gz").rsplit(".", 1)[0]
    return Trace(name, (arrival - arrival.min())[order], prompt[order], output[order])


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    try:
        with open(path, "rb") as file:
            packed = file.read(2) == b"\x1f\x8b"
        opened = gzip.open(path, "rb") if packed else open(path, "rb")  # noqa: SIM115 - closed below
        with opened as stream:
            number = 0
            while line := stream.readline(MAX_LINE + 1):
                number += 1
                if len(line) > MAX_LINE:
                    raise DataError(f"{path}, line {number} is longer than {MAX_LINE} bytes; {FORMATS}")
                if number > MAX_REQUESTS:
                    raise DataError(f"{path} has more than {MAX_REQUESTS:,} lines")
                yield number, line.decode("utf-8").strip()
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError, PermissionError):
        raise DataError(f"{path} does not exist or is no file that can be read") from None
    except UnicodeDecodeError:
        raise DataError(f"{path}, line {number} is not text; {FORMATS}") from None
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{path} is a damaged archive after line {number} ({error}); get it again") from None


def _chain(number: int, first: str, rest: Iterator[tuple[int, str]]) -> Iterator[tuple[int, str]]:
    yield number, first
    yield from rest


def _azure(path: Path, lines: Iterator[tuple[int, str]]) -> Iterator[tuple[float, int, int]]:
    for number, line in lines:
        if not line:
            continue
        cells = line.split(",")
        try:
            stamp, prompt, output = cells
            # seven digits of a second; datetime reads six
            whole, _, digits = stamp.partition(".")
            moment = datetime.datetime.fromisoformat(whole.strip())
            if moment.tzinfo is not None or (digits and not digits.isdecimal()):
                raise ValueError(stamp)
            second = (moment - datetime.datetime(2000, 1, 1)).total_seconds() + float(f"0.{digits or 0}")
            yield second, _tokens(int(prompt)), _tokens(int(output))
        except ValueError:
            raise DataError(
                f"{path}, line {number}: {line[:60]!r} is no request; expected {','.join(AZURE)} like "
                "2023-11-16 18:15:46.6805900,374,44"
            ) from None


def _mooncake(path: Path, lines: Iterator[tuple[int, str]]) -> Iterator[tuple[float, int, int]]:
    for number, line in lines:
        if not line:
            continue
        try:
            value: Any = json.loads(line)
            stamp, prompt, output = (value[key] for key in MOONCAKE)
            if any(type(length) is not int for length in (prompt, output)) or type(stamp) not in (int, float):
                raise ValueError(line)
            if not 0 <= stamp < 1e15:
                raise ValueError(stamp)
            yield stamp / 1e3, _tokens(prompt), _tokens(output)
        except (ValueError, KeyError, TypeError, RecursionError):
            raise DataError(
                f"{path}, line {number}: {line[:60]!r} is no request; expected an object with "
                f"{', '.join(MOONCAKE)} (ms, tokens, tokens)"
            ) from None


def _tokens(count: int) -> int:
    if not 0 < count <= MAX_TOKENS:
        raise ValueError(count)
    return count
