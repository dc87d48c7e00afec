"""Traffic is recorded exactly, without images, within bounds, whatever happens to the process or the disk."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from serving_workspace import ROOT, Exported

from flows.errors import DataError
from flows.params import Monitor
from flows.serving import traffic
from flows.serving.package import ModelPackage
from flows.serving.reference import describe_images, read_reference
from flows.serving.session import Session
from flows.serving.statistics import Records
from flows.serving.traffic import TrafficRecorder, Window, latency_bucket, read_window, traffic_folder


@dataclass(frozen=True)
class Info:
    name: str = "digits"
    version: str = "3"
    variant: str = "fp32"


INFO = Info()


@pytest.fixture
def settings(exported: Exported) -> Monitor:
    return exported.params.monitor.model_copy(update={"max_images_per_s": 1e6})


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path


def folder_of(home: Path, exported: Exported) -> Path:
    return traffic_folder(home, "digits", "3", exported.package.variant("fp32").digest)


def sha_of(package: ModelPackage) -> str:
    assert package.manifest.reference is not None
    return package.manifest.reference.sha256


def read(home: Path, exported: Exported, since: float = 0.0, until: float = 1e12) -> Window:
    return read_window(folder_of(home, exported), since, until, sha_of(exported.package))


def serve(recorder: TrafficRecorder, session: Session, images: np.ndarray, info: Info = INFO) -> None:
    recorder.on_batch(images, session.run_all(images), info)


def record(home: Path, exported: Exported, session: Session, settings: Monitor, images: np.ndarray) -> None:
    recorder = TrafficRecorder(home, settings, lambda name, version: exported.package)
    serve(recorder, session, images)
    recorder.close()


def test_what_is_read_is_what_was_served(
    home: Path, exported: Exported, session: Session, settings: Monitor
) -> None:
    record(home, exported, session, settings, exported.images)
    window = read(home, exported)
    reference = read_reference(exported.package.folder / "reference.safetensors")
    expected = describe_images(session, exported.images, reference.projection)
    assert window.records is not None
    for field in fields(Records):  # to the last bit: rounding would tear equal values apart
        np.testing.assert_array_equal(getattr(window.records, field.name), getattr(expected, field.name))
    assert (window.images, window.variant, window.damaged_lines) == (len(exported.images), "fp32", 0)
    assert (np.diff(window.times) >= 0).all()


def test_no_image_and_no_client_is_recorded(
    home: Path, exported: Exported, session: Session, settings: Monitor
) -> None:
    record(home, exported, session, settings, exported.images)
    (path,) = folder_of(home, exported).iterdir()
    keys = {"head": {"kind", "format", "model", "version", "digest", "variant", "reference", "projection"}}
    keys["image"] = {"kind", "t", "class", "numbers"}
    keys["interval"] = {
        "kind",
        "from",
        "to",
        "images",
        "recorded",
        "left_out",
        "unusable",
        "statuses",
        "latencies",
    }
    for line in map(json.loads, path.read_text().splitlines()):
        assert set(line) == keys[line["kind"]]
        if line["kind"] == "image":  # 9 + 32 + 2 numbers of 4 bytes: there is no room for pixels
            assert len(line["numbers"]) == 4 * -(-4 * 43 // 3)


def test_a_torn_line_costs_itself_only(
    home: Path, exported: Exported, session: Session, settings: Monitor
) -> None:
    record(home, exported, session, settings, exported.images)
    (path,) = folder_of(home, exported).iterdir()
    whole = path.read_bytes().splitlines(keepends=True)
    nan = json.loads(whole[5]) | {"numbers": "AADAfw" * 40}
    other = [
        b"[1]\n",
        b"\xff\xfe\n",
        b'{"kind": "image", "t": "soon"}\n',
        json.dumps(nan).encode() + b"\n",
        b"{}\n",
    ]
    path.write_bytes(b"".join([*whole[:10], *other, *whole[10:-2], whole[-2][:20]]))
    window = read(home, exported)
    assert window.records is not None
    assert len(window.records) == len(exported.images) - 1
    assert window.damaged_lines == len(other) + 1


def test_servers_do_not_disturb_one_another(
    home: Path, exported: Exported, session: Session, settings: Monitor
) -> None:
    recorders = [TrafficRecorder(home, settings, lambda name, version: exported.package) for _ in range(3)]
    threads = [
        threading.Thread(target=lambda r=recorder: [serve(r, session, exported.images[:8]) for _ in range(5)])
        for recorder in recorders
        for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for recorder in recorders:
        recorder.close()
    window = read(home, exported)
    assert window.records is not None
    assert len(window.records) == window.images == 3 * 2 * 5 * 8
    assert window.damaged_lines == 0
    assert len(list(folder_of(home, exported).iterdir())) == 3


KILLED = """
import os, sys
from pathlib import Path
sys.path[:0] = [{tests!r}]
import serving_workspace
from types import SimpleNamespace
from flows import params
from flows.serving.package import ModelPackage
from flows.serving.session import open_session
from flows.serving.traffic import TrafficRecorder
import numpy as np
package = ModelPackage.open(Path({folder!r}))
settings = params.load(Path({params!r})).monitor
recorder = TrafficRecorder(Path({home!r}), settings, lambda name, version: package)
session = open_session(package.path("fp32"), ["CPUExecutionProvider"], 1)
images = np.zeros((4, 3, 16, 16), np.float32)
info = SimpleNamespace(name="digits", version="3", variant="fp32")
recorder.on_batch(images, session.run_all(images), info)
os.kill(os.getpid(), 9)
"""


def test_images_outlive_a_killed_server(home: Path, exported: Exported) -> None:
    script = KILLED.format(
        tests=str(Path(__file__).parents[1]),
        folder=str(exported.package.folder),
        params=str(exported.root / "params.yaml"),
        home=str(home),
    )
    assert subprocess.run([sys.executable, "-c", script], cwd=ROOT).returncode == -9
    window = read(home, exported)
    assert window.records is not None
    assert len(window.records) == 4


def test_recording_is_bounded_and_says_what_it_leaves_out(
    home: Path, exported: Exported, session: Session, settings: Monitor
) -> None:
    few = settings.model_copy(update={"max_images_per_s": 1e-6})  # at least one, then nothing
    record(home, exported, session, few, exported.images)
    window = read(home, exported)
    assert window.records is not None
    assert (window.images, len(window.records), window.left_out) == (40, 1, 39)


def test_a_fraction_is_recorded_at_random(
    home: Path, exported: Exported, session: Session, settings: Monitor
) -> None:
    recorder = TrafficRecorder(
        home, settings.model_copy(update={"sample_fraction": 0.25}), lambda name, version: exported.package
    )
    for _ in range(10):
        serve(recorder, session, exported.images)
    recorder.close()
    window = read(home, exported)
    assert window.records is not None
    assert 60 < len(window.records) < 140  # 100 ± 8.7
    assert (window.images, window.left_out) == (400, 0)
    assert len(np.unique(window.records.pixels[:, 0])) > 20  # not always the same rows


def test_old_files_go_first(
    home: Path, exported: Exported, session: Session, settings: Monitor, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = folder_of(home, exported)
    folder.mkdir(parents=True)
    ancient = folder / f"{1:013d}-1-aaaa.jsonl"
    ancient.write_text("{}\n")
    os.utime(ancient, (1, 1))
    for number in range(4):
        (folder / f"{1000 + number:013d}-1-aaaa.jsonl").write_bytes(b"\n" * 600_000)
    small = settings.model_copy(update={"file_mb": 1, "max_mb": 2})
    record(home, exported, session, small, exported.images)
    left = sorted(path.name[:13] for path in folder.iterdir())
    assert left[:-1] == [f"{1003:013d}"]  # of five files one beside the new one fits into 2 MB
    assert len(left) == 2


def test_a_file_that_is_full_or_removed_is_replaced(
    home: Path, exported: Exported, session: Session, settings: Monitor
) -> None:
    recorder = TrafficRecorder(home, settings, lambda name, version: exported.package)
    serve(recorder, session, exported.images)
    (path,) = folder_of(home, exported).iterdir()
    path.unlink()  # by another server's tidying
    serve(recorder, session, exported.images)
    (second,) = folder_of(home, exported).iterdir()
    with open(second, "ab") as file:
        file.write(b" " * (settings.file_mb * 1_000_000) + b"\n")
    serve(recorder, session, exported.images)
    recorder.close()
    assert len(list(folder_of(home, exported).iterdir())) == 2
    window = read(home, exported)
    assert window.records is not None
    assert (len(window.records), window.damaged_lines) == (80, 0)


def test_a_full_disk_costs_records_only(
    home: Path, exported: Exported, session: Session, settings: Monitor, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorder = TrafficRecorder(home, settings, lambda name, version: exported.package)
    serve(recorder, session, exported.images)
    real, full = os.write, [True]

    def write(handle: int, data: bytes) -> int:
        if full[0] and len(data) > 100:
            real(handle, data[:90])
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(handle, data)

    monkeypatch.setattr(traffic.os, "write", write)
    serve(recorder, session, exported.images)
    full[0] = False
    serve(recorder, session, exported.images)
    recorder.close()
    window = read(home, exported)
    assert window.records is not None
    assert (len(window.records), window.images, window.left_out) == (80, 120, 40)
    assert window.damaged_lines == 1  # the torn line, and not the good one after it


def test_a_version_that_cannot_be_read_is_served_all_the_same(
    home: Path, exported: Exported, session: Session, settings: Monitor, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(name: str, version: str) -> ModelPackage:
        raise DataError("it is gone")

    recorder = TrafficRecorder(home, settings, fail)
    for _ in range(2):
        serve(recorder, session, exported.images)
    recorder.on_request(INFO, 200, 0.1)
    recorder.close()
    assert caplog.text.count("is not recorded: it is gone") == 1
    assert not (home / ".trunkline").exists()


def test_numbers_that_are_not_finite_are_counted_not_written(
    home: Path, exported: Exported, session: Session, settings: Monitor
) -> None:
    outputs = session.run_all(exported.images)
    outputs["features"] = outputs["features"].copy()
    outputs["features"][3] = np.inf
    recorder = TrafficRecorder(home, settings, lambda name, version: exported.package)
    recorder.on_batch(exported.images, outputs, INFO)
    recorder.close()
    window = read(home, exported)
    assert window.records is not None
    assert (len(window.records), window.unusable, window.damaged_lines) == (39, 1, 0)


def test_each_version_and_variant_is_kept_apart(
    home: Path, exported: Exported, session: Session, settings: Monitor
) -> None:
    recorder = TrafficRecorder(home, settings, lambda name, version: exported.package)
    serve(recorder, session, exported.images[:30])
    serve(recorder, session, exported.images[:7], Info(variant="int8"))
    serve(recorder, session, exported.images[:5], Info(version="4"))
    recorder.close()
    window = read(home, exported)
    assert window.records is not None
    assert (window.variant, len(window.records), window.other_records) == ("fp32", 30, 7)
    elsewhere = read_window(
        folder_of(home, exported), 0, 1e12, "0" * 64
    )  # another reference, other directions
    assert elsewhere.records is None
    assert elsewhere.other_records == 37


def test_only_the_window_counts(home: Path, exported: Exported, session: Session, settings: Monitor) -> None:
    before = time.time()
    record(home, exported, session, settings, exported.images)
    assert read(home, exported, since=before - 1).images == 40
    for window in (read(home, exported, until=before - 1), read(home, exported, since=time.time() + 5)):
        assert (window.images, window.records, window.requests) == (0, None, 0)
    assert read(home / "absent", exported).images == 0


def test_percentiles_are_right_to_five_per_cent(home: Path, exported: Exported, settings: Monitor) -> None:
    milliseconds = np.random.default_rng(0).lognormal(3, 1, 3000)
    recorder = TrafficRecorder(home, settings, lambda name, version: exported.package)
    for index, value in enumerate(milliseconds):
        recorder.on_request(INFO, 500 if index % 100 == 0 else 429 if index % 100 == 1 else 200, value / 1e3)
    recorder.close()
    window = read(home, exported)
    for fraction in (0.5, 0.95, 0.99):
        exact = np.quantile(milliseconds, fraction, method="inverted_cdf")
        assert exact <= window.latency_ms(fraction) * (1 + 1e-9) <= 1.06 * exact
    assert (window.requests, window.errors, window.statuses[429]) == (3000, 30, 30)
    assert np.isnan(Window(0, 1).latency_ms(0.5))
    assert latency_bucket(0.0) == latency_bucket(1e-9)  # a clock that did not move


def test_a_server_that_is_only_tried_out_records_nothing(
    settings: Monitor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(traffic.SWITCH, raising=False)
    assert traffic.is_recorded(settings)
    assert not traffic.is_recorded(settings.model_copy(update={"record": False}))
    monkeypatch.setenv(traffic.SWITCH, "off")
    assert not traffic.is_recorded(settings)


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    yield
    assert not [thread for thread in threading.enumerate() if thread.name == "traffic"]


def test_counts_are_written_while_serving(
    home: Path, exported: Exported, settings: Monitor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(traffic, "INTERVAL_S", 0.01)
    recorder: Any = TrafficRecorder(home, settings, lambda name, version: exported.package)
    recorder.on_request(INFO, 200, 0.01)
    deadline = time.monotonic() + 60
    while not read(home, exported).requests and time.monotonic() < deadline:
        time.sleep(0.01)
    assert read(home, exported).requests == 1
    recorder.close()
