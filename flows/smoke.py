"""Start the real server on a registered version, classify real test images, compare, stop it."""

from __future__ import annotations

import contextlib
import csv
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import httpx

from flows import paths
from flows.data import ImageDataset
from flows.errors import GateFailed
from flows.params import Params
from flows.ports import free_port
from flows.registry import Version
from flows.serving.traffic import SWITCH

READY_S = 90.0
STOP_S = 15.0
REQUEST_S = 30.0
CONFIDENCE_TOLERANCE = 5e-3


@dataclass(frozen=True)
class SmokeResult:
    images: int
    correct: int
    seconds: float


def smoke_test(params: Params, root: Path, version: Version) -> SmokeResult:
    """Send the first test images to a server of `version` and compare with artifacts/evaluate/pretrained.

    Raises:
        GateFailed: the server does not get ready or answers otherwise than was recorded.
    """
    with open(root / paths.EVALUATE / "pretrained" / "predictions.csv", newline="") as file:
        recorded = list(csv.DictReader(file))[: params.pipeline.smoke_images]
    rows = [int(line["row"]) for line in recorded]
    dataset = ImageDataset(
        root / paths.DATA, params.evaluate.split, rows=rows, cache_mb=0, max_pixels=params.ingest.max_pixels
    )
    started = time.monotonic()
    correct = 0
    with server(root, version) as address, httpx.Client(base_url=address, timeout=REQUEST_S) as client:
        for position, line in enumerate(recorded):
            answer = client.post("/v1/classify", files={"file": ("image", dataset.encoded(position))})
            if answer.status_code != 200:
                raise GateFailed(
                    f"smoke test: {line['key']}: status {answer.status_code}: {answer.text[:200]}"
                )
            _compare(answer.json(), line)
            correct += line["label"] == line["predicted"]
    return SmokeResult(len(recorded), correct, time.monotonic() - started)


def _compare(answer: dict[str, object], recorded: dict[str, str]) -> None:
    same = str(answer["index"]) == recorded["predicted"]
    difference = abs(float(str(answer["confidence"])) - float(recorded["confidence"]))
    if not same or difference > CONFIDENCE_TOLERANCE:
        raise GateFailed(
            f"smoke test: {recorded['key']}: "
            f"the server says class {answer['index']} ({answer['confidence']}), "
            f"evaluation recorded {recorded['predicted']} ({recorded['confidence']})"
        )


@contextlib.contextmanager
def server(root: Path, version: Version) -> Iterator[str]:
    """`trunkline serve vision` as a child process on a free loopback port; yields its address once ready."""
    port = free_port()
    command = [sys.executable, "-m", "flows.cli", "serve", "vision", "--model", version.name]
    command += ["--version", version.version, "--host", "127.0.0.1", "--port", str(port), "--variant", "fp32"]
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            command,
            cwd=root,
            stdout=log,
            stderr=subprocess.STDOUT,
            # what is tried out here must not pass for traffic
            env={**os.environ, "NO_COLOR": "1", SWITCH: "off"},
        )
        try:
            address = f"http://127.0.0.1:{port}"
            _wait_ready(process, address, log)
            yield address
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(STOP_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _wait_ready(process: subprocess.Popen[bytes], address: str, log: IO[bytes]) -> None:
    deadline = time.monotonic() + READY_S
    while time.monotonic() < deadline and process.poll() is None:
        with contextlib.suppress(httpx.HTTPError):
            if httpx.get(f"{address}/v2/health/ready", timeout=2).status_code == 200:
                return
        time.sleep(0.1)
    log.seek(0)
    said = log.read().decode(errors="replace")[-2000:]
    raise GateFailed(f"the server did not get ready:\n{said}")
