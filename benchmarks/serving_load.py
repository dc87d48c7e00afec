"""The vision server at saturation against the raw ONNX Runtime session, in the same core budget.

    python -m benchmarks.serving_load [--models pico tiny] [--seconds 5] [--rounds 3]

What is compared, for each model (random weights, exported by the project's own code):

- raw: a process that runs the session on full batches in a loop, nothing else; pinned to the server's cores,
  as many threads as cores;
- server: `flows.serving.vision` as it is shipped, access log on, pinned to the same cores with the same
  threads and the same largest batch. HTTP, parsing, batching and the network all have to fit into them.

The closed-loop clients have the last core to themselves. Raw and server take turns; each round gives ratios
of its own, and the table has their medians. Two of them: of images per second, and of images per second of
CPU time, which is what the first would be on a machine without other load. Everything is on loopback and
bounded by --rounds x --seconds. Writes benchmarks/results/serving_load.md.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from PIL import Image

from flows import environment, files, params
from flows.imaging import Preprocessing

GOAL = 0.85
CLASSES = 10
CLOCKS = ("seconds", "cpu_s")


@dataclass(frozen=True)
class Case:
    """A model and the load on it."""

    backbone: str
    image_size: int
    window_size: int
    max_batch: int
    images: int  # per tensor request
    connections: int  # enough for several batches to be waiting


CASES = {
    "pico": Case("swin_v2_pico", 32, 4, max_batch=32, images=8, connections=16),
    "tiny": Case("swin_v2_tiny", 192, 6, max_batch=8, images=4, connections=8),
}


@dataclass(frozen=True)
class Traffic:
    """One kind of request."""

    name: str
    path: str
    headers: tuple[str, ...]
    body: bytes
    images: int


# ---- the model ----


def make_package(folder: Path, case: Case) -> None:
    """A model package with random weights."""
    import torch

    import models
    from flows.exporting import export_onnx
    from flows.serving.package import MANIFEST, Manifest, TensorSpec, describe_variant, metadata
    from models.classification import Classifier, WithFeatures

    torch.manual_seed(0)
    backbone = models.create(case.backbone, image_size=case.image_size, window_size=case.window_size)
    classifier = Classifier(backbone, CLASSES).eval()
    preprocessing = Preprocessing(case.image_size, case.image_size, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
    labels = tuple(str(index) for index in range(CLASSES))
    export_onnx(
        WithFeatures(classifier), folder / "model.onnx", image_size=case.image_size, opset=20, max_batch=1024,
        metadata=metadata(preprocessing, labels), outputs=("logits", "features"),
    )  # fmt: skip
    manifest = Manifest(
        name="load", task="classification", opset=20,
        inputs=(TensorSpec("images", "FP32", (-1, 3, case.image_size, case.image_size)),),
        outputs=(
            TensorSpec("logits", "FP32", (-1, CLASSES)),
            TensorSpec("features", "FP32", (-1, backbone.num_features)),
        ),
        max_batch=1024, preprocessing=preprocessing, labels=labels,
        variants={"fp32": describe_variant(folder / "model.onnx")}, data_digest="", source={},
    )  # fmt: skip
    files.write_json(folder / MANIFEST, manifest.to_dict())


def traffic(case: Case) -> list[Traffic]:
    generator = np.random.default_rng(0)
    size = case.image_size

    def tensors(count: int, as_json: bool) -> Traffic:
        images = generator.standard_normal((count, 3, size, size)).astype("<f4")
        entry: dict[str, Any] = {"name": "images", "shape": list(images.shape), "datatype": "FP32"}
        plural = f"{count} image{'s' if count > 1 else ''}"
        path = "/v2/models/load/infer"
        if as_json:
            entry["data"] = [round(float(value), 6) for value in images.ravel()]
            body = json.dumps({"inputs": [entry]}).encode()
            return Traffic(f"JSON tensor, {plural}", path, ("Content-Type=application/json",), body, count)
        entry["parameters"] = {"binary_data_size": images.nbytes}
        head = json.dumps({"inputs": [entry], "parameters": {"binary_data_output": True}}).encode()
        headers = (f"Inference-Header-Content-Length={len(head)}", "Content-Type=application/octet-stream")
        return Traffic(f"binary tensor, {plural}", path, headers, head + images.tobytes(), count)

    pixels = generator.integers(0, 256, (size, size, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG")
    return [
        tensors(case.images, as_json=False),
        tensors(1, as_json=False),
        tensors(1, as_json=True),
        Traffic("JPEG file", "/v1/classify", ("Content-Type=image/jpeg",), buffer.getvalue(), 1),
    ]


# ---- the processes ----


def budget() -> tuple[list[int], list[int]]:
    """Cores of the server and of the clients: all but one, and that one."""
    cores = sorted(os.sched_getaffinity(0))
    return (cores[:-1], cores[-1:]) if len(cores) > 1 else (cores, cores)


def child(arguments: list[str], cores: list[int], **options: Any) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", *arguments],
        preexec_fn=lambda: os.sched_setaffinity(0, cores),
        stdout=subprocess.PIPE,
        text=True,
        **options,
    )


def run_raw(folder: Path, batch: int, seconds: float) -> dict[str, Any]:
    """In the child: the session on full batches in a loop."""
    from flows.serving.package import ModelPackage
    from flows.serving.session import open_session

    session = open_session(ModelPackage.open(folder).path("fp32"), "auto", 0)
    images = np.random.default_rng(0).standard_normal((batch, *session.image_shape), dtype=np.float32)
    session.warm_up([batch])
    latencies = []
    started, cpu = time.perf_counter(), time.process_time()
    while time.perf_counter() - started < seconds:
        before = time.perf_counter()
        session.run_all(images)
        latencies.append(time.perf_counter() - before)
    return {
        "seconds": time.perf_counter() - started,
        "cpu_s": time.process_time() - cpu,
        "latencies_s": latencies,
        "failed": 0,
    }


def run_server(folder: Path, max_batch: int) -> None:
    """In the child: the server as it is shipped."""
    from flows.serving.vision.server import serve

    log = str(folder / "access.log")
    changes = {"port": 0, "max_batch": max_batch, "access_log": log, "variant": "fp32"}
    settings = params.load().serve.model_copy(update=changes)
    serve(folder, settings, version="1", git_commit="", max_pixels=10**6)


@contextmanager
def server(folder: Path, case: Case, cores: list[int]) -> Iterator[tuple[int, psutil.Process]]:
    """The port of a running server, and its process."""
    process = child(["benchmarks.serving_load", "--serve", str(folder), str(case.max_batch)], cores)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        found = re.search(r":(\d+)$", line.strip())
        if found is None:
            raise RuntimeError(f"the server did not start: {line}")
        yield int(found.group(1)), psutil.Process(process.pid)
    finally:
        process.terminate()
        process.communicate()


def finish(process: subprocess.Popen[str]) -> dict[str, Any]:
    output, _ = process.communicate()
    if process.returncode:
        raise RuntimeError(f"{process.args} failed")
    return dict(json.loads(output.splitlines()[-1]))


# ---- the measurement ----


def measure(name: str, case: Case, seconds: float, rounds: int) -> list[list[str]]:
    """Rows of the table for one model."""
    server_cores, client_cores = budget()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        make_package(folder, case)
        kinds = traffic(case)
        raws: list[dict[str, Any]] = []
        served: dict[str, list[dict[str, Any]]] = {kind.name: [] for kind in kinds}
        ratios: dict[str, list[tuple[float, float]]] = {kind.name: [] for kind in kinds}
        with server(folder, case, server_cores) as (port, process):
            for number in range(rounds):
                for kind in kinds:
                    raw_arguments = [str(folder), str(case.max_batch), str(seconds)]
                    raw = finish(child(["benchmarks.serving_load", "--raw", *raw_arguments], server_cores))
                    answer = put_under_load(port, process, folder, case, kind, seconds, client_cores)
                    raws.append(raw)
                    served[kind.name].append(answer)
                    pair = [rate(answer, kind.images, of) / rate(raw, case.max_batch, of) for of in CLOCKS]
                    ratios[kind.name].append((pair[0], pair[1]))
                    print(
                        f"{name} round {number + 1}: {kind.name}: {pair[0]:.2f} of raw, "
                        f"{pair[1]:.2f} per CPU second",
                        flush=True,
                    )
    rows = [[name, f"raw session, batch {case.max_batch}", *columns(raws, case.max_batch), "1", "1"]]
    for kind in kinds:
        both = [spread([pair[index] for pair in ratios[kind.name]]) for index in (0, 1)]
        rows.append([name, kind.name, *columns(served[kind.name], kind.images), *both])
    return rows


def put_under_load(
    port: int,
    process: psutil.Process,
    folder: Path,
    case: Case,
    kind: Traffic,
    seconds: float,
    cores: list[int],
) -> dict[str, Any]:
    """One run of the clients; also the CPU time that the server took meanwhile."""
    (folder / "body").write_bytes(kind.body)
    arguments = ["127.0.0.1", str(port), str(folder / "body"), "--path", kind.path]
    arguments += ["--connections", str(case.connections * (case.images // kind.images))]
    arguments += ["--seconds", str(seconds), *(f"--header={text}" for text in kind.headers)]
    before = process.cpu_times()
    answer = finish(child(["benchmarks.load_client", *arguments], cores))
    after = process.cpu_times()
    if answer["failed"] or not answer["latencies_s"]:
        raise RuntimeError(f"{kind.name}: {answer['failed']} requests failed")
    return answer | {"cpu_s": after.user + after.system - before.user - before.system}


def rate(answer: dict[str, Any], images: int, clock: str) -> float:
    """Images per second of `clock`."""
    return float(len(answer["latencies_s"]) * images / answer[clock])


def spread(values: list[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f}–{max(values):.2f})"


def columns(answers: list[dict[str, Any]], images: int) -> list[str]:
    latencies_ms = 1e3 * np.concatenate([answer["latencies_s"] for answer in answers])
    throughput = statistics.median(rate(answer, images, "seconds") for answer in answers)
    return [f"{throughput:.1f}", *(f"{value:.1f}" for value in np.percentile(latencies_ms, [50, 95, 99]))]


def report(rows: list[list[str]], seconds: float, rounds: int) -> str:
    server_cores, client_cores = budget()
    head = ["model", "load", "images/s", "p50 ms", "p95 ms", "p99 ms", "of raw (range)", "per CPU second"]
    lines = [f"| {' | '.join(row)} |" for row in (head, ["---", "---", *["---:"] * 6], *rows)]
    sizes = ", ".join(f"{name}: {case.backbone} at {case.image_size} px" for name, case in CASES.items())
    return (
        f"# The vision server at saturation, against the raw session\n\n"
        f"`python -m benchmarks.serving_load --seconds {seconds:g} --rounds {rounds}` on {processor()}.\n"
        f"Server and raw session: {len(server_cores)} core(s), the same ones; clients: {len(client_cores)} "
        f"core(s). {sizes}.\nLatencies are of requests in the queue of a saturated server, and of batches "
        f"for the raw session. Goal: {GOAL:.0%} of raw.\n\n" + "\n".join(lines) + "\n"
    )


def processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--seconds", type=float, default=5.0, help="of each measurement")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--raw", nargs=3, metavar=("FOLDER", "BATCH", "SECONDS"), help=argparse.SUPPRESS)
    parser.add_argument("--serve", nargs=2, metavar=("FOLDER", "BATCH"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    environment.prepare()
    if arguments.raw:
        folder, batch, seconds = arguments.raw
        print(json.dumps(run_raw(Path(folder), int(batch), float(seconds))))
    elif arguments.serve:
        run_server(Path(arguments.serve[0]), int(arguments.serve[1]))
    else:
        rows = []
        for name in arguments.models:
            rows += measure(name, CASES[name], arguments.seconds, arguments.rounds)
        text = report(rows, arguments.seconds, arguments.rounds)
        files.write_text(Path("benchmarks/results/serving_load.md"), text)
        print(text)


if __name__ == "__main__":
    main()
