"""Latency and memory of one network in a process of its own: `python -m flows.serving.measure --help`.

A fresh process is what makes the numbers comparable: no other network's allocations, threads or caches.
Memory is the growth of the process's peak resident size (VmHWM on Linux) from just before the network is
loaded, all libraries being imported, until batches of that size have run; batch sizes ascend, so each peak
belongs to its own batch. Weights, the runtime's arenas and activations count; the libraries' code and memory
on a GPU do not.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from numpy.typing import NDArray

from flows.serving.session import available_threads, open_session

WARM_UP_RUNS = 3
MEGABYTE = 1e6


Runner = Callable[[NDArray[np.float32]], object]
"""Runs a network on float32 (n, 3, S, S)."""
Opener = Callable[[], tuple[Runner, tuple[int, ...]]]
"""Loads a network; also gives the shape (3, S, S) of its images."""


@dataclass(frozen=True)
class Measurement:
    """One row of latency.csv."""

    provider: str
    variant: str
    batch: int
    p50_ms: float  # per call
    p95_ms: float
    p99_ms: float
    images_per_s: float
    peak_memory_mb: float

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def measure_variant(
    path: Path, variant: str, provider: str, batch_sizes: list[int], runs: int, threads: int
) -> list[Measurement]:
    """Measure an ONNX file on one provider in a child process."""
    return _measure(
        ["--model", str(path), "--provider", provider], variant, provider, batch_sizes, runs, threads
    )


def measure_eager(folder: Path, batch_sizes: list[int], runs: int, threads: int) -> list[Measurement]:
    """Measure the classifier in `folder` with PyTorch in eager mode on the CPU, in a child process."""
    return _measure(["--classifier", str(folder)], "pytorch", "PyTorch eager CPU", batch_sizes, runs, threads)


def _measure(
    what: list[str], variant: str, provider: str, batch_sizes: list[int], runs: int, threads: int
) -> list[Measurement]:
    root = Path(__file__).resolve().parents[2]  # `flows` must be importable from any working directory
    command = [
        sys.executable,
        "-m",
        "flows.serving.measure",
        *what,
        "--threads",
        str(threads),
        "--runs",
        str(runs),
    ]
    command += ["--batches", *(str(size) for size in sorted(set(batch_sizes)))]
    inherited = os.environ.get("PYTHONPATH", "")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [str(root), inherited]))}
    answer = subprocess.run(command, env=environment, capture_output=True, text=True)
    if answer.returncode != 0:
        raise RuntimeError(f"measuring {variant} on {provider} failed:\n{answer.stderr[-2000:]}")
    rows = json.loads(answer.stdout.splitlines()[-1])
    return [Measurement(provider=provider, variant=variant, **row) for row in rows]


def time_runner(open_runner: Opener, batch_sizes: list[int], runs: int) -> list[dict[str, float]]:
    """Load a network and time it in this process.

    Args:
        batch_sizes: ascending.
        runs: timed calls per batch size.
    """
    before = resident_bytes()
    run, shape = open_runner()
    generator = np.random.default_rng(0)
    rows = []
    for size in batch_sizes:
        images = generator.standard_normal((size, *shape), dtype=np.float32)
        for _ in range(WARM_UP_RUNS):
            run(images)
        seconds = np.empty(runs)
        for index in range(runs):
            started = time.perf_counter()
            run(images)
            seconds[index] = time.perf_counter() - started
        p50, p95, p99 = np.percentile(seconds, [50, 95, 99]) * 1e3
        rows.append(
            {
                "batch": size,
                "p50_ms": round(float(p50), 4),
                "p95_ms": round(float(p95), 4),
                "p99_ms": round(float(p99), 4),
                "images_per_s": round(size * runs / float(seconds.sum()), 2),
                "peak_memory_mb": round(max(0, peak_resident_bytes() - before) / MEGABYTE, 2),
            }
        )
    return rows


def processor_name() -> str:
    """Of this machine, as its maker calls it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")),
        platform.machine(),
    )


def resident_bytes() -> int:
    return int(psutil.Process().memory_info().rss)


def peak_resident_bytes() -> int:
    """High-water mark of this process; where the system has none (not Linux), the present size."""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return resident_bytes()
    for line in status.splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return resident_bytes()


def reset_peak() -> None:
    """Forget the high-water mark of importing, where the kernel allows it."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m flows.serving.measure", description=__doc__)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--model", type=Path, help="ONNX file")
    what.add_argument(
        "--classifier", type=Path, help="folder of a finetuned classifier, run by PyTorch on the CPU"
    )
    parser.add_argument("--provider", default="CPUExecutionProvider", help="for --model")
    parser.add_argument("--threads", type=int, default=0, help="0 = available cores")
    parser.add_argument("--runs", type=int, default=30)
    parser.add_argument("--batches", type=int, nargs="+", required=True)
    arguments = parser.parse_args(argv)
    threads = arguments.threads or available_threads()

    if arguments.model:
        opener = onnx_opener(arguments.model, arguments.provider, threads)
    else:
        opener = eager_opener(arguments.classifier, threads)
    reset_peak()
    print(json.dumps(time_runner(opener, sorted(arguments.batches), arguments.runs)))
    return 0


def onnx_opener(path: Path, provider: str, threads: int) -> Opener:
    """Opens an ONNX file on one provider."""

    def open_runner() -> tuple[Runner, tuple[int, ...]]:
        session = open_session(path, [provider], threads)
        return session.run, session.image_shape

    return open_runner


def eager_opener(folder: Path, threads: int) -> Opener:
    """Opens a classifier with PyTorch on the CPU."""
    import torch  # only here: ONNX rows are measured in a process without PyTorch

    from flows.classifiers import load_classifier

    torch.set_num_threads(threads)

    def open_runner() -> tuple[Runner, tuple[int, ...]]:
        model, config = load_classifier(folder)
        size = config.preprocessing.image_size

        def run(images: NDArray[np.float32]) -> object:
            with torch.inference_mode():
                return model(torch.from_numpy(images))

        return run, (3, size, size)

    return open_runner


if __name__ == "__main__":
    raise SystemExit(main())
