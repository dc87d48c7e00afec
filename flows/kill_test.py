"""The kill test (spec section 18): the real server, two attention workers, and one of them dies in the middle
of an answer. The client must read the recorded text all the same.

    trunkline serve language FOLDER --attention-workers 2 --port 0
    → stream a golden prompt → SIGKILL to a worker once text has come → same text, one recovery counted

An answer that was over before the kill counts as asked, not as killed; then it is tried again.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil

from flows.errors import GateFailed
from flows.golden_texts import COMPLETIONS, GoldenText, ask_texts, read_texts
from flows.serving.lamina.slices.bundle import read_bundle

READY_S = 120.0
STOP_S = 15.0
REQUEST_S = 60.0
ATTEMPTS = 12
WORKERS = 2
WORKER_MODULE = "flows.serving.lamina.attention.worker"
RECOVERIES = re.compile(r"^trunkline_request_recoveries_sum ([\d.e+]+)$", re.MULTILINE)
SETTINGS = (
    "lamina.cluster.spares=0",
    "lamina.cluster.weights=equal",
    "lamina.kv.redundancy=none",
    'lamina.http.api_key_file=""',
)


@dataclass(frozen=True)
class KillResult:
    answers: int  # that were compared; a worker died in the middle of the last one
    seconds: float


def kill_test(root: Path, folder: Path) -> KillResult:
    """
    Args:
        root: workspace with the params.yaml that counts.
        folder: a bundle with golden prompts.

    Raises:
        GateFailed: the server does not start, an answer differs, or no answer lasted until the kill.
    """
    began = time.monotonic()
    texts = sorted(read_texts(folder), key=lambda text: -text.tokens)
    manifest = read_bundle(folder).manifest
    partition = "head" if manifest.kv_heads >= WORKERS else "request"
    with (
        server(root, folder, partition) as (process, url),
        httpx.Client(base_url=url, timeout=REQUEST_S, trust_env=False) as client,
    ):
        if problem := ask_texts(client, manifest.name, texts):
            raise GateFailed(f"kill test: before anything was killed: {problem}")
        streams = kill_in_the_middle(client, process.pid, manifest.name, texts, WORKERS)
        return KillResult(len(texts) + streams, time.monotonic() - began)


def kill_in_the_middle(
    client: httpx.Client, server_pid: int, model: str, texts: Sequence[GoldenText], workers: int
) -> int:
    """Stream golden prompts until a worker died in the middle of one; returns how many that took.

    Raises:
        GateFailed: an answer is not the recorded one, or none lasted until the kill.
    """
    for attempt in range(ATTEMPTS):
        golden, before = texts[attempt % len(texts)], recoveries(client)
        text = stream(client, model, golden, worker_pid(server_pid, workers, attempt))
        if problem := golden.problem(text):
            raise GateFailed(f"kill test: with a killed attention worker: {problem}")
        if recoveries(client) > before:
            return attempt + 1
    raise GateFailed(
        f"kill test: {ATTEMPTS} answers were over before a worker could be killed; raise "
        "language_promotion.golden_tokens"
    )


def stream(client: httpx.Client, model: str, golden: GoldenText, victim: int) -> str:
    """The text of a streamed answer, during which the process `victim` is killed."""
    text, killed = "", False
    with client.stream("POST", COMPLETIONS, json=golden.body(model, stream=True)) as answer:
        if answer.status_code != 200:
            raise GateFailed(f"kill test: status {answer.status_code}: {answer.read()[:200].decode()}")
        for line in answer.iter_lines():
            data = line.removeprefix("data: ")
            if not line or data == "[DONE]":
                continue
            event = json.loads(data)
            if error := event.get("error"):
                raise GateFailed(f"kill test: the answer ended with an error: {error.get('message')}")
            text += "".join(choice["text"] for choice in event["choices"])
            if not killed:
                os.kill(victim, signal.SIGKILL)
                killed = True
    return text


def worker_pid(server_pid: int, workers: int, attempt: int) -> int:
    """An attention worker of the server, another one at the next attempt; waits until all are there."""
    until = time.monotonic() + READY_S
    while time.monotonic() < until:
        found = []
        for child in psutil.Process(server_pid).children():
            with contextlib.suppress(psutil.Error):
                if WORKER_MODULE in child.cmdline():
                    found.append(child.pid)
        if len(found) == workers:
            return sorted(found)[attempt % workers]
        time.sleep(0.05)
    raise GateFailed(f"kill test: a killed attention worker was not replaced within {READY_S:g} s")


def recoveries(client: httpx.Client) -> int:
    """Of all answers so far."""
    found = RECOVERIES.search(client.get("/metrics").text)
    return int(float(found.group(1))) if found else 0


@contextlib.contextmanager
def server(root: Path, folder: Path, partition: str) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """`trunkline serve language` as a child process; yields it and its address once it is ready."""
    code = Path(__file__).resolve().parents[1]  # `flows` must be importable from any working directory
    inherited = os.environ.get("PYTHONPATH", "")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [str(code), inherited]))}
    with tempfile.NamedTemporaryFile() as log:
        process = subprocess.Popen(
            _command(folder, partition), cwd=root, stdout=log, stderr=subprocess.STDOUT, env=environment
        )
        try:
            yield process, _wait_ready(process, Path(log.name))
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(STOP_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _command(folder: Path, partition: str) -> Sequence[str]:
    command = [sys.executable, "-m", "flows.cli", "serve", "language", str(folder.resolve())]
    command += ["--host", "127.0.0.1", "--port", "0", "--attention-workers", str(WORKERS)]
    command += ["--partition", partition]
    for setting in SETTINGS:
        command += ["--set", setting]
    return command


def _wait_ready(process: subprocess.Popen[bytes], log: Path) -> str:
    deadline = time.monotonic() + READY_S
    while True:
        ended = process.poll() is not None or time.monotonic() > deadline
        said = log.read_text(errors="replace")
        if found := re.search(r"^ready: .* at (http://\S+)$", said, re.MULTILINE):
            return found.group(1)
        if ended:
            raise GateFailed(f"kill test: the server did not get ready:\n{said[-2000:]}")
        time.sleep(0.1)
