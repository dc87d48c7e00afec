"""How near the attention workers come to the machine's memory bandwidth, and what a round trip costs.

    python -m benchmarks.attention_worker [--threads 1] [--rounds 5] [--only bandwidth round_trip]
                                          [--kernel fused torch]

Bandwidth: decode rows over a store larger than the caches, so every byte of keys and values is read from
memory once per step. The limit is copying with the same threads, in turns with it in the same run, reading
and writing counted; the goal is 60 % of it at 4,096 tokens and 16 requests or more. Tensors are copied as
torch allocates them, and arrays in huge pages, as the fused kernel has them, which goes faster. Round trip:
Q, KV and OUT of one layer over loopback to a real worker process with a context of less than one page; the
goal is 150 µs. Writes benchmarks/results/attention_worker.md.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from benchmarks.interleaved import describe_machine
from flows import files
from flows.serving.lamina.attention.frames import (
    Frame,
    FrameType,
    Header,
    NumberType,
    pack_json,
    pack_tensors,
)
from flows.serving.lamina.attention.memory import PageMemory, TensorMemory
from flows.serving.lamina.attention.partition import HeadPartition
from flows.serving.lamina.attention.pool import AttentionPool, ModelShape
from flows.serving.lamina.attention.session import LayerSettings, Session, WorkerSettings
from flows.serving.lamina.rows import PAGE_TOKENS, RowTable, Span, TableDelta

Kernel = Literal["fused", "torch"]
WORKER = "flows.serving.lamina.attention.worker"
RESULTS = Path("benchmarks/results/attention_worker.md")
HEAD_DIM, KV_HEADS = 128, 4
CONTEXTS, REQUESTS, GROUPS = (512, 2048, 4096, 8192), (1, 4, 16, 32), (1, 4, 8)
STORE_BYTES = 2 << 30  # larger settings are left out
COPY_BYTES = 256 << 20
ROUND_TRIPS = 300


class Bandwidth:
    """One worker's session, filled, and copying with the same threads."""

    def __init__(self, context: int, requests: int, group: int, threads: int, kernel: Kernel) -> None:
        self.threads = threads
        per_request = -(-(context + 1) // PAGE_TOKENS)
        self.requests = requests
        self.bytes = requests * context * 2 * KV_HEADS * HEAD_DIM * 4
        blocks = -(-per_request * PAGE_TOKENS // 1024)
        pages = requests * blocks * 64
        settings = WorkerSettings(
            layers=[LayerSettings(scale=HEAD_DIM**-0.5)], kv_heads=KV_HEADS, group=group, head_dim=HEAD_DIM,
            pages=pages,
        )  # fmt: skip
        self.session = Session(1 << 40, threads, kernel=kernel)
        self.session.handle(Frame(Header(FrameType.CONFIG), pack_json(settings.model_dump())))
        deltas = [
            TableDelta(slot, 0, tuple(range(slot * blocks * 64, slot * blocks * 64 + per_request)))
            for slot in range(requests)
        ]
        generator = np.random.default_rng(0)
        self.q = generator.standard_normal((requests, KV_HEADS, group, HEAD_DIM), dtype=np.float32)
        self.kv = generator.standard_normal((2, requests, KV_HEADS, HEAD_DIM), dtype=np.float32)
        self.plan = RowTable(tuple(Span(slot, context) for slot in range(requests)), tuple(deltas)).encode()
        self.step()  # assigns the pages, which clears them
        self.fill()
        self.plan = RowTable(tuple(Span(slot, context) for slot in range(requests))).encode()

    def fill(self) -> None:
        memory = self.session._store.memory  # type: ignore[union-attr]
        assert isinstance(memory, PageMemory | TensorMemory)
        generator = np.random.default_rng(0)
        for array in (memory.keys, memory.values):
            numbers = array.reshape(-1) if isinstance(memory, PageMemory) else array.view(-1).numpy()
            for start in range(0, len(numbers), 1 << 24):
                part = numbers[start : start + (1 << 24)]
                generator.standard_normal(len(part), dtype=np.float32, out=part)

    def step(self) -> None:
        header = Header(FrameType.PLAN, iteration=1)
        self.session.handle(Frame(header, self.plan))
        for kind, tensors in ((FrameType.Q, (self.q,)), (FrameType.KV, tuple(self.kv))):
            header = Header(kind, iteration=1, number_type=NumberType.FLOAT32)
            self.session.handle(Frame(header, pack_tensors(*tensors)))


class Copy:
    """Copying with as many threads."""

    def __init__(self, threads: int, huge_pages: bool) -> None:
        size = COPY_BYTES // threads // 4
        make = (lambda: np.ones(size, np.float32)) if huge_pages else lambda: torch.ones(size).numpy()
        self.pairs = [(make(), make()) for _ in range(threads)]
        self.pool = ThreadPoolExecutor(threads)
        self.bytes = 2 * COPY_BYTES

    def step(self) -> None:
        list(self.pool.map(lambda pair: np.copyto(*pair), self.pairs))


def seconds_of(step: object) -> float:
    began = time.perf_counter()
    step()  # type: ignore[operator]
    return time.perf_counter() - began


def measure_bandwidth(
    threads: int, rounds: int, contexts: Sequence[int], counts: Sequence[int], kernels: Sequence[Kernel]
) -> list[str]:
    rows = [
        "| context | requests | G | kernel | keys and values, GB/s | copy, GB/s | ratio "
        "| copy in huge pages, GB/s | ratio |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    copies = [Copy(threads, huge_pages) for huge_pages in (False, True)]
    for group, context, requests, kernel in product(GROUPS, contexts, counts, kernels):
        if requests * (context + 1024) * 2 * KV_HEADS * HEAD_DIM * 4 > STORE_BYTES:
            continue
        ours = Bandwidth(context, requests, group, threads, kernel)
        repeats = max(1, (64 << 20) // ours.bytes)

        def several(ours: Bandwidth = ours, repeats: int = repeats) -> None:
            for _ in range(repeats):
                ours.step()

        several()
        turns = [
            [ours.bytes * repeats / seconds_of(several)]
            + [copy.bytes / seconds_of(copy.step) for copy in copies]
            for _ in range(rounds)
        ]
        mine, *limits = (statistics.median(column) / 1e9 for column in zip(*turns, strict=True))
        cells = [f"{context} | {requests} | {group} | {kernel} | {mine:.1f}"]
        for number, limit in enumerate(limits, 1):
            ratio = statistics.median(turn[0] / turn[number] for turn in turns)
            cells.append(f"{limit:.1f} | {ratio:.0%}")
        rows.append(f"| {' | '.join(cells)} |")
        print(rows[-1], file=sys.stderr, flush=True)
        del ours
    return rows


def measure_round_trip() -> list[str]:
    rows = ["| rows | bytes there and back | median, µs | 95 %, µs |", "|---|---|---|---|"]
    token = os.urandom(16).hex().encode()
    heads, kv_heads, hd = 8, 2, 64
    model = ModelShape([LayerSettings(scale=hd**-0.5)], heads, kv_heads, hd)
    with tempfile.NamedTemporaryFile() as file:
        file.write(token)
        file.flush()
        worker = subprocess.Popen(
            [sys.executable, "-m", WORKER, "--port", "0", "--token-file", file.name],
            stdout=subprocess.PIPE,
        )  # fmt: skip
        try:
            assert worker.stdout is not None
            port = json.loads(worker.stdout.readline())["port"]
            with AttentionPool([("127.0.0.1", port)], token, HeadPartition(kv_heads, [1]), model, 64) as pool:
                pings = sorted(pool.ping(0) for _ in range(ROUND_TRIPS))
                for count in (1, 2, 4, 8, 16):
                    generator = np.random.default_rng(0)
                    q, k, v = (
                        generator.standard_normal((count, n, hd), dtype=np.float32)
                        for n in (heads, kv_heads, kv_heads)
                    )
                    took = []
                    for iteration in range(1, ROUND_TRIPS + 1):
                        spans = tuple(Span(slot, 8) for slot in range(count))
                        deltas = tuple(TableDelta(slot, 0, (slot,)) for slot in range(count))
                        pool.plan(RowTable(spans, deltas), iteration)
                        pool.ping(0)  # the plan is not part of the layer
                        began = time.perf_counter()
                        pool.send_q(0, q, iteration)
                        pool.kv(0, k, v, iteration)
                        took.append(time.perf_counter() - began)
                    p50, p95 = np.percentile(took, [50, 95]) * 1e6
                    rows.append(f"| {count} | {2 * q.nbytes + k.nbytes + v.nbytes} | {p50:.0f} | {p95:.0f} |")
                    print(rows[-1], file=sys.stderr, flush=True)
                p50, p95 = np.percentile(pings, [50, 95]) * 1e6
                rows.append(f"| PING, nothing computed | 72 | {p50:.0f} | {p95:.0f} |")
        finally:
            worker.terminate()
            worker.wait(30)
    return rows


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.attention_worker",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parts = ("bandwidth", "round_trip")
    parser.add_argument("--kernel", nargs="+", choices=("fused", "torch"), default=("fused",))
    parser.add_argument("--only", nargs="+", choices=parts, default=parts)
    parser.add_argument("--contexts", type=int, nargs="+", default=CONTEXTS)
    parser.add_argument("--requests", type=int, nargs="+", default=REQUESTS)
    parser.add_argument("--dry-run", action="store_true", help="print the tables, write nothing")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    text = [
        "# Attention workers",
        "",
        f"`python -m benchmarks.attention_worker --threads {arguments.threads}`",
    ]
    text += ["", describe_machine(), ""]
    if "round_trip" in arguments.only:
        text += ["Round trip of one layer (Q, KV, OUT) on loopback, contexts of 8 tokens:", ""]
        text += [*measure_round_trip(), ""]
    if "bandwidth" in arguments.only:
        text += [
            f"Decode rows, {KV_HEADS} heads of keys and values of {HEAD_DIM}, float32; copying counts "
            f"what is read and written; medians of {arguments.rounds} rounds in turns:",
            "",
        ]
        text += [
            *measure_bandwidth(
                arguments.threads, arguments.rounds, arguments.contexts, arguments.requests, arguments.kernel
            ),
            "",
        ]
    print("\n".join(text))
    if not arguments.dry_run:
        files.write_text(RESULTS, "\n".join(text))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
