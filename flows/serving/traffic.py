"""What a server remembers of its traffic: statistics of images and counts; never an image or a client.

    .trunkline/traffic/<model>/<version>-<digest12>/<begun>-<pid>-<token>.jsonl

Each process appends to a file of its own, whole lines at a time, so several servers never mix and a crash
costs at most the last line, which readers skip and count. Lines are JSON objects of three kinds:

    head      first line of every file: model, version, digest, variant, projection, the reference's hash
    image     one image: time, predicted class, and base64 of little-endian float32 numbers (see `_NUMBERS`)
    interval  some seconds: images seen and recorded, answers per status, latencies in buckets 5 % wide

Requests are counted, not listed: their lines do not grow with the traffic. Recording must never stop serving:
beyond `monitor.max_images_per_s` images are left out and counted, and a full disk costs records only.
"""

from __future__ import annotations

import base64
import json
import logging
import math
import os
import secrets
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from flows.errors import DataError
from flows.params import Monitor
from flows.serving.package import ModelPackage
from flows.serving.reference import read_reference
from flows.serving.session import FEATURES, LOGITS
from flows.serving.statistics import PIXEL_STATISTICS, Projection, Records, describe, is_finite

FORMAT = 1
SWITCH = "TRUNKLINE_TRAFFIC"
"""Environment variable; `off` keeps the requests of gates and tests from passing for traffic."""
INTERVAL_S = 10.0  # between two interval lines; also what a crash loses of the counts
BURST_S = 10.0  # so many seconds of `max_images_per_s` may be recorded at once
NEW_FILE_S = 24 * 3600.0  # also the files of an idle server grow old and go
IDLE_S = 3600.0  # a version that is no longer served gives its file back
BUCKET_RATIO = 1.05
_NUMBERS = ("pixels", "embedding", "confidence", "entropy")  # order in an image line
_log = logging.getLogger("trunkline.serving")


class Served(Protocol):
    """Which model answered."""

    @property
    def name(self) -> str: ...
    @property
    def version(self) -> str: ...
    @property
    def variant(self) -> str: ...


_Key = tuple[str, str, str]  # name, version, variant
FindPackage = Callable[[str, str], ModelPackage]
"""Name and version of a registered model → its verified folder; may raise DataError."""


@dataclass(frozen=True)
class TrafficHead:
    """Whose traffic it is; the first line of every file."""

    model: str
    version: str
    digest: str  # content digest of fp32, as in the registry
    variant: str
    reference: str | None  # sha256 of reference.safetensors; None: images are not recorded
    projection: Projection | None


def traffic_folder(home: Path, model: str, version: str, digest: str) -> Path:
    """Where the servers of one version write; as `.trunkline/served`, named by version and content."""
    return home / ".trunkline" / "traffic" / model / f"{version}-{digest[:12]}"


def is_recorded(settings: Monitor) -> bool:
    return settings.record and os.environ.get(SWITCH) != "off"


class TrafficRecorder:
    """The writer of one process, for every version that it serves. Safe from any thread; never raises.

    `on_batch` computes and writes, so it belongs off the hot path; `on_request` only counts.
    """

    def __init__(self, home: Path, settings: Monitor, find_package: FindPackage) -> None:
        self._home, self._settings, self._find_package = home, settings, find_package
        self._generator = np.random.default_rng()
        self._allowance = _Allowance(settings.max_images_per_s)
        self._counts: dict[_Key, _Counts] = {}
        self._logs: dict[_Key, _Log | None] = {}
        self._lock = threading.Lock()  # of counts, generator and allowance: held for moments
        self._opening = threading.Lock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work, name="traffic", daemon=True)
        self._thread.start()

    def on_batch(
        self, images: NDArray[np.float32], outputs: Mapping[str, NDArray[np.float32]], info: Served
    ) -> None:
        """Note a batch that was answered: images (n, 3, S, S) and the session's outputs by name."""
        key, now = (info.name, info.version, info.variant), time.time()
        log = self._log_of(key)
        rows = np.empty(0, dtype=np.int64)
        with self._lock:
            counts = self._counts.setdefault(key, _Counts(now))
            counts.images += len(images)
            if log is not None and log.matrix is not None and FEATURES in outputs:
                rows = np.flatnonzero(self._generator.random(len(images)) < self._settings.sample_fraction)
                granted = self._allowance.take(len(rows))
                counts.left_out += len(rows) - granted
                if granted < len(rows):
                    rows = np.sort(self._generator.choice(rows, granted, replace=False))
        if not len(rows):
            return
        assert log is not None
        assert log.matrix is not None
        try:
            with np.errstate(all="ignore"):  # what is not finite is counted below
                records = describe(images[rows], outputs[LOGITS][rows], outputs[FEATURES][rows], log.matrix)
        except Exception:  # whatever is wrong with a batch, serving and the next one go on
            _log.exception("a served batch could not be described")
            return
        lines = [line for row in range(len(records)) if (line := _image_line(now, records, row))]
        written = log.file.append(lines)
        with self._lock:
            counts.recorded += written
            counts.unusable += len(records) - len(lines)
            counts.left_out += len(lines) - written

    def on_request(self, info: Served, status: int, seconds: float) -> None:
        """Note one answered inference request."""
        key, now = (info.name, info.version, info.variant), time.time()
        with self._lock:
            counts = self._counts.setdefault(key, _Counts(now))
            counts.statuses[status] += 1
            counts.latencies[latency_bucket(1000.0 * seconds)] += 1

    def close(self) -> None:
        """Write what was counted and end the thread."""
        self._stop.set()
        self._thread.join(timeout=30)

    def _work(self) -> None:
        while not self._stop.wait(INTERVAL_S):
            self._write_counts()
        self._write_counts()
        for log in self._logs.values():
            if log is not None:
                log.file.close()

    def _write_counts(self) -> None:
        now = time.time()
        with self._lock:
            finished, self._counts = self._counts, {}
        for key, counts in finished.items():
            if (log := self._log_of(key)) is not None:
                log.file.append([counts.line(now)])
                log.used = now
        for log in list(self._logs.values()):
            if log is not None and now - log.used > IDLE_S:
                log.file.close()
                log.used = now

    def _log_of(self, key: _Key) -> _Log | None:
        """The log of one version; None, after one warning, when its package cannot be read."""
        with self._opening:
            if key not in self._logs:
                name, version, _ = key
                try:
                    package = self._find_package(name, version)
                    self._logs[key] = _Log.of_package(package, self._home, self._settings, key)
                except (DataError, OSError) as error:
                    _log.warning("traffic of %s version %s is not recorded: %s", name, version, error)
                    self._logs[key] = None
            return self._logs[key]


@dataclass
class _Log:
    """What recording one version needs."""

    file: _RotatingFile
    matrix: NDArray[np.float32] | None  # the projection; None where the package has no reference
    used: float  # time of the last interval line

    @classmethod
    def of_package(cls, package: ModelPackage, home: Path, settings: Monitor, key: _Key) -> _Log:
        name, version, variant = key
        known = package.manifest.reference
        projection = read_reference(package.folder / known.file).projection if known else None
        digest = package.variant("fp32").digest
        head = TrafficHead(name, version, digest, variant, known.sha256 if known else None, projection)
        file = _RotatingFile(traffic_folder(home, name, version, digest), head, settings)
        return cls(file, projection.matrix() if projection else None, time.time())


@dataclass
class _Counts:
    """What an interval line tells."""

    begun: float
    images: int = 0
    recorded: int = 0
    left_out: int = 0  # chosen, but beyond the allowance or not taken by the disk
    unusable: int = 0  # numbers that are not finite
    statuses: Counter[int] = field(default_factory=Counter)
    latencies: Counter[int] = field(default_factory=Counter)

    def line(self, now: float) -> str:
        return _json(
            {
                "kind": "interval",
                "from": round(self.begun, 3),
                "to": round(now, 3),
                "images": self.images,
                "recorded": self.recorded,
                "left_out": self.left_out,
                "unusable": self.unusable,
                "statuses": self.statuses,
                "latencies": self.latencies,
            }
        )


class _Allowance:
    """A bucket that fills with `rate` tokens per second, up to `BURST_S` seconds of it and at least one."""

    def __init__(self, rate: float) -> None:
        self._rate, self._size = rate, max(1.0, rate * BURST_S)
        self._tokens, self._filled = self._size, time.monotonic()

    def take(self, wanted: int) -> int:
        """As many of `wanted` as there are."""
        now = time.monotonic()
        self._tokens = min(self._size, self._tokens + self._rate * (now - self._filled))
        self._filled = now
        granted = min(wanted, int(self._tokens))
        self._tokens -= granted
        return granted


class _RotatingFile:
    """The file this process appends to, replaced when it is large or old; the oldest of the folder go."""

    def __init__(self, folder: Path, head: TrafficHead, settings: Monitor) -> None:
        self._folder, self._head = folder, head
        self._file_bytes, self._total_bytes = settings.file_mb * 1_000_000, settings.max_mb * 1_000_000
        self._keep_s = settings.keep_days * 24 * 3600.0
        self._lock = threading.Lock()
        self._handle: int | None = None
        self._path = folder
        self._opened = 0.0
        self._torn = False
        self._complained = False

    def append(self, lines: list[str]) -> int:
        """Write whole lines; returns how many, 0 when the disk does not take them."""
        with self._lock:
            return self._append(lines) if lines else 0

    def _append(self, lines: list[str]) -> int:
        try:
            if self._handle is None or self._is_due():
                self._begin()
            assert self._handle is not None
            # a line that a full disk cut off must not swallow the next one
            data = ("\n" if self._torn else "").encode() + "".join(f"{line}\n" for line in lines).encode()
            self._torn = True
            while data:
                data = data[os.write(self._handle, data) :]
            self._torn = False
        except OSError as error:
            if not self._complained:
                _log.warning("traffic is not recorded: %s", error)
            self._complained = True
            return 0
        self._complained = False
        return len(lines)

    def close(self) -> None:
        """The next line begins a new file."""
        with self._lock:
            self._close()

    def _close(self) -> None:
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None

    def _is_due(self) -> bool:
        assert self._handle is not None
        status = os.fstat(self._handle)
        # no link: another process's tidying, or a person, removed it
        return (
            status.st_size >= self._file_bytes
            or status.st_nlink == 0
            or not 0.0 <= time.time() - self._opened < NEW_FILE_S
        )

    def _begin(self) -> None:
        self._close()
        self._folder.mkdir(parents=True, exist_ok=True)
        self._opened = time.time()
        name = f"{int(1000 * self._opened):013d}-{os.getpid()}-{secrets.token_hex(4)}.jsonl"
        self._path = self._folder / name
        self._handle = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND, 0o644)
        self._torn = False
        self._tidy()
        head = _json({"kind": "head", "format": FORMAT, **asdict(self._head)})
        os.write(self._handle, f"{head}\n".encode())

    def _tidy(self) -> None:
        """Remove what is too old or too much, oldest first; several processes may do so at once."""
        total = self._file_bytes  # room for the one just begun
        for path in sorted(self._folder.glob("*.jsonl"), reverse=True):
            if path == self._path:
                continue
            try:
                status = path.stat()
                total += status.st_size
                if total > self._total_bytes or self._opened - status.st_mtime > self._keep_s:
                    path.unlink()
            except FileNotFoundError:
                continue


def _image_line(now: float, records: Records, row: int) -> str:
    """Empty when a number is not finite: the network or the input is broken there."""
    one = records[slice(row, row + 1)]
    if not is_finite(one):
        return ""
    numbers = np.concatenate([np.ravel(getattr(one, name)) for name in _NUMBERS]).astype("<f4")
    text = base64.b64encode(numbers.tobytes()).decode()
    return _json({"kind": "image", "t": round(now, 3), "class": int(one.predicted[0]), "numbers": text})


def _json(value: Mapping[str, Any]) -> str:
    return json.dumps(value, separators=(",", ":"))


def latency_bucket(milliseconds: float) -> int:
    """Index i of the bucket (ratio^(i-1), ratio^i] milliseconds."""
    return math.ceil(math.log(max(milliseconds, 1e-3), BUCKET_RATIO))


# ---- reading ----


@dataclass
class Window:
    """The traffic of one version between two times."""

    since: float  # seconds since 1970
    until: float
    variant: str = ""  # the one with the most records
    records: Records | None = None  # of `variant`, in the order of `times`
    times: NDArray[np.float64] = field(default_factory=lambda: np.empty(0))
    images: int = 0  # answered
    left_out: int = 0
    unusable: int = 0
    other_records: int = 0  # of another variant, or of a server with another reference
    damaged_lines: int = 0
    statuses: Counter[int] = field(default_factory=Counter)
    latencies: Counter[int] = field(default_factory=Counter)

    @property
    def requests(self) -> int:
        return sum(self.statuses.values())

    @property
    def errors(self) -> int:
        """Answers that were the server's fault; 429 and other refusals are not among them."""
        return sum(count for status, count in self.statuses.items() if status >= 500)

    def latency_ms(self, fraction: float) -> float:
        """The latency that `fraction` of the requests do not exceed, up to 5 % too large; NaN without any."""
        total, seen = sum(self.latencies.values()), 0
        for bucket, count in sorted(self.latencies.items()):
            seen += count
            if seen >= fraction * total:
                return float(BUCKET_RATIO**bucket)
        return math.nan


_Row = tuple[float, int, NDArray[np.float32]]  # time, class, numbers


def read_window(folder: Path, since: float, until: float, reference: str | None) -> Window:
    """What was recorded in `folder` in [since, until); an absent folder is an empty window.

    Interval lines count when they end inside the window. Images of one variant, the busiest, that were
    described for the reference with this hash can be compared with it; all others are only counted.
    """
    window = Window(since, until)
    by_variant: dict[str, list[_Row]] = {}
    for path in sorted(folder.glob("*.jsonl")):
        try:
            if path.stat().st_mtime < since:
                continue
            _read_file(path, window, by_variant, reference)
        except FileNotFoundError:
            continue  # removed meanwhile by a server
    if by_variant:
        window.variant = max(sorted(by_variant), key=lambda name: len(by_variant[name]))
        window.other_records += sum(len(rows) for rows in by_variant.values())
        rows = sorted(by_variant[window.variant], key=lambda row: row[0])
        window.other_records -= len(rows)
        window.times = np.asarray([row[0] for row in rows])
        window.records = _stack(rows)
    return window


def _read_file(path: Path, window: Window, by_variant: dict[str, list[_Row]], reference: str | None) -> None:
    head: dict[str, Any] | None = None
    for line in _lines(path, window):
        try:
            kind = line["kind"]
            if kind == "head":
                if line["format"] != FORMAT:
                    window.damaged_lines += 1
                    return  # of another version of Trunkline
                head = line
            elif kind == "interval" and window.since <= line["to"] < window.until:
                statuses = {int(status): int(count) for status, count in line["statuses"].items()}
                latencies = {int(bucket): int(count) for bucket, count in line["latencies"].items()}
                images, left_out, unusable = (int(line[key]) for key in ("images", "left_out", "unusable"))
                window.images += images
                window.left_out += left_out
                window.unusable += unusable
                window.statuses.update(statuses)
                window.latencies.update(latencies)
            elif kind == "image" and window.since <= line["t"] < window.until:
                if head is None or head["reference"] != reference:
                    window.other_records += 1
                    continue
                row = (float(line["t"]), int(line["class"]), _numbers(line["numbers"], head))
                by_variant.setdefault(head["variant"], []).append(row)
        except (KeyError, TypeError, ValueError, AttributeError):
            window.damaged_lines += 1


def _lines(path: Path, window: Window) -> Iterator[dict[str, Any]]:
    with open(path, "rb") as file:
        for raw in file:
            try:
                line = json.loads(raw)
                if not isinstance(line, dict):
                    raise ValueError("not an object")
            except ValueError:  # torn by a crash or a full disk; UnicodeDecodeError is one too
                window.damaged_lines += bool(raw.strip())
                continue
            yield line


def _numbers(text: str, head: Mapping[str, Any]) -> NDArray[np.float32]:
    projection = head["projection"]
    width = len(PIXEL_STATISTICS) + min(projection["dims"], projection["features"]) + 2
    values = np.frombuffer(base64.b64decode(text, validate=True), dtype="<f4")
    if len(values) != width or not np.isfinite(values).all():
        raise ValueError("not the numbers of one image")
    return values.astype(np.float32)


def _stack(rows: list[_Row]) -> Records:
    numbers = np.stack([row[2] for row in rows])
    pixels = len(PIXEL_STATISTICS)
    return Records(
        pixels=numbers[:, :pixels],
        embedding=numbers[:, pixels:-2],
        predicted=np.asarray([row[1] for row in rows], dtype=np.int32),
        confidence=numbers[:, -2],
        entropy=numbers[:, -1],
    )
