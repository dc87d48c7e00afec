"""Measures this machine for the simulator, then asks whether the simulator tells the truth about it.

    python -m benchmarks.lamina_calibration BUNDLE [--workers 2] [--partition head] [--split] [--rounds 21]

Three parts, with the real slices and real attention workers in processes of their own. Parts of an iteration
are timed over a grid of rows and contexts, all points in turns, so that a busy moment meets all alike.
Loopback is timed with frames as large as the tensors. Short runs of the engine say what an iteration takes
beyond its parts; in turns with them the engine serves workloads that nothing is fitted to. The simulator
replays those, and mean time between tokens and throughput are compared: within 15 % each, or the check is not
passed. A busy machine gives fits that are far off, and then the check fails, as it should.
Writes artifacts/lamina_calibration.json, artifacts/lamina_truth_check.json, which `trunkline plan serve` asks
for, and benchmarks/results/lamina_calibration.md. Exit code 10 if the check is not passed.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import count, pairwise
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from numpy.typing import NDArray

from flows import environment, files, params
from flows.errors import GateFailed, TrunklineError
from flows.params import Lamina
from flows.serving.lamina.attention.frames import FrameType, Header, NumberType
from flows.serving.lamina.attention.transport import Link, LinkClosed
from flows.serving.lamina.engine.calibration import Calibration
from flows.serving.lamina.engine.engine import Engine
from flows.serving.lamina.engine.journal import Journal
from flows.serving.lamina.engine.memory import KvMemory
from flows.serving.lamina.engine.process import model_shape
from flows.serving.lamina.engine.sequence import Sequence as Request
from flows.serving.lamina.engine.wire import Wire
from flows.serving.lamina.engine.workers import Workers
from flows.serving.lamina.requests import Finished, Message, Rejected, Sampling, Submit, TokenEvent
from flows.serving.lamina.rows import PAGE_TOKENS, RowKind, RowTable, Span
from flows.serving.lamina.simulator import truth
from flows.serving.lamina.simulator.calibration import (
    AttentionTime,
    Fit,
    Measured,
    MeasuredCosts,
    OverheadTime,
    ProgramTime,
    WireTime,
    describe_errors,
    fit,
    held_out_errors,
    to_model,
)
from flows.serving.lamina.simulator.inputs import Policy, read_policy
from flows.serving.lamina.simulator.replay import replay
from flows.serving.lamina.simulator.results import Figures, summarise
from flows.serving.lamina.simulator.traces import Trace
from flows.serving.lamina.slices.bundle import MANIFEST, Bundle, read_bundle
from flows.serving.lamina.slices.runner import Run, Slices, open_slices
from flows.serving.measure import processor_name

WORKER = "flows.serving.lamina.attention.worker"
CALIBRATION = Path("artifacts/lamina_calibration.json")
RESULTS = Path("benchmarks/results/lamina_calibration.md")
ROWS = (1, 2, 4, 8, 16, 32)
LARGE_ROWS = (128, 256, 512, 1024, 2048, 4096)
CHUNKS = (16, 64, 127)
LONGEST = 512
LARGE_BUDGET_S = 20.0
WIRE_BYTES = (128, 1 << 10, 1 << 12, 1 << 14, 1 << 16, 1 << 18, 1 << 20, 1 << 22)
OVERHEAD_REQUESTS = (1, 2, 3, 4, 6, 8, 12, 16)


@dataclass(frozen=True)
class Place:
    """What is measured: slices of a bundle, workers, settings."""

    bundle: Bundle
    slices: Slices
    workers: Workers
    settings: Lamina
    journal: Path


@contextmanager
def opened(bundle: Bundle, workers: int, partition: str, split: bool) -> Iterator[Place]:
    """Real workers in processes of their own, ended at the end; attention in this process for 0."""
    base = params.load().lamina
    # patience: a busy machine is measured, not given up
    cluster = {"attention_workers": workers, "partition": partition, "layer_timeout_ms": 30_000}
    chosen = base.cluster.model_copy(update=cluster)
    sched = base.sched.model_copy(update={"micro_batches": 1})
    settings = base.model_copy(update={"cluster": chosen, "sched": sched})
    torch.set_num_threads(1)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        token = folder / "token"
        token.write_text(os.urandom(16).hex())
        room = str((settings.kv.mb_per_worker << 20) * 2)
        addresses = []
        for _ in range(workers):
            command = [sys.executable, "-m", WORKER, "--port", "0", "--token-file", str(token)]
            process = subprocess.Popen([*command, "--max-bytes", room], stdout=subprocess.PIPE)
            stack.callback(process.wait, 30)
            stack.callback(process.terminate)
            assert process.stdout is not None
            addresses.append(("127.0.0.1", json.loads(process.stdout.readline())["port"]))
        pool = Workers(
            model_shape(bundle), settings, addresses, token.read_text().encode(),
            first_epoch=int(time.time()), on_lost=lambda *_: None, on_epoch=lambda _: None,
        )  # fmt: skip
        stack.callback(pool.close)
        pool.start(lambda: None)
        slices = open_slices(bundle, split=split, threads=settings.model.threads, spin=False)
        yield Place(bundle, slices, pool, settings, folder / "journal")


# --- parts of an iteration


class TimedWire(Wire):
    """Times attention from the first byte of Q to the last of the output, less what was computed between."""

    seconds = 0.0

    def send_q(self, layer: int, q: NDArray[np.float32]) -> None:
        began = time.perf_counter()
        super().send_q(layer, q)
        self.seconds += time.perf_counter() - began

    def send_kv(self, layer: int, k: NDArray[np.float32], v: NDArray[np.float32]) -> None:
        began = time.perf_counter()
        super().send_kv(layer, k, v)
        self.seconds += time.perf_counter() - began

    def receive(self, layer: int) -> NDArray[np.float32]:
        began = time.perf_counter()
        answer = super().receive(layer)
        self.seconds += time.perf_counter() - began
        return answer


class NoAttention:
    """Answers with zeros, for timing slices alone."""

    def __init__(self, shape: tuple[int, int, int]) -> None:
        self._zeros = np.zeros(shape, np.float32)

    def send_q(self, layer: int, q: NDArray[np.float32]) -> None:
        pass

    def send_kv(self, layer: int, k: NDArray[np.float32], v: NDArray[np.float32]) -> None:
        pass

    def receive(self, layer: int) -> NDArray[np.float32]:
        return self._zeros


def grid(place: Place) -> list[tuple[Span, ...]]:
    """Decoding rows at equal contexts, prompt chunks, and both."""
    longest = min(LONGEST, place.bundle.manifest.max_context - 1)
    contexts = sorted({max(8, longest // part) for part in (1, 2, 4, 8, 32)})
    points = [
        tuple(Span(slot, context) for slot in range(rows))
        for context in contexts
        for rows in ROWS
        if rows <= place.settings.sched.max_requests
    ]
    for size in CHUNKS:
        for start in sorted({0, longest // 4, longest // 2, longest - size}):
            if 0 <= start <= longest - size and size < place.settings.sched.max_rows:
                chunk = Span(31, start, size, RowKind.CHUNK)
                points += [(chunk,), (*(Span(slot, longest // 2) for slot in range(8)), chunk)]
    return points


def measure_parts(place: Place, rounds: int) -> tuple[list[ProgramTime], list[AttentionTime]]:
    """Programs and attention of whole iterations, every point `rounds` times, in turns."""
    manifest, workers = place.bundle.manifest, place.workers
    points = grid(place)
    memory = KvMemory(workers.partition, workers.pages, place.settings.sched.max_requests)
    held = []
    for index in range(max(ROWS)):
        request = Request(Submit(id=f"grid-{index}", prompt=(0,), max_tokens=LONGEST, arrived=0.0), 0)
        if not memory.admit(request, min(LONGEST, manifest.max_context - 1) + 1):
            break
        held.append(request)
    room = {request.slot for request in held}
    points = [spans for spans in points if all(span.slot in room for span in spans)]
    workers.link.assign([delta for request in held if (delta := memory.deltas(request)) is not None])
    programs: dict[tuple[str, int], list[float]] = defaultdict(list)
    attention: list[list[float]] = [[] for _ in points]
    numbers = count(1)
    for round_ in range(rounds + 1):
        for index, spans in enumerate(points):
            wire, run, last = _iterate(place, spans, next(numbers))
            if not round_:
                continue  # the first warms up
            attention[index].append(wire.seconds / manifest.layers)
            for kind, seconds in run.seconds.items():
                if kind != "attention":
                    rows = last if kind == "post" else sum(span.length for span in spans)
                    programs[kind, rows].append(seconds / _runs_of(kind, manifest.layers))
    workers.link.free(sorted(room))
    times = [
        AttentionTime(
            rows=sum(span.kind is RowKind.DECODE for span in spans),
            chunk_rows=sum(span.length for span in spans if span.kind is RowKind.CHUNK),
            tokens=sum(span.position for span in spans if span.kind is RowKind.DECODE),
            pairs=sum(
                span.length * span.position + span.length * (span.length + 1) // 2
                for span in spans
                if span.kind is RowKind.CHUNK
            ),
            wire_bytes=_wire_bytes(place, sum(span.length for span in spans)),
            seconds=statistics.median(values),
            runs=len(values),
        )
        for spans, values in zip(points, attention, strict=True)
    ]
    known = [
        ProgramTime(kind=kind, rows=rows, seconds=statistics.median(values), runs=len(values))
        for (kind, rows), values in sorted(programs.items())
    ]
    return known, times


def _iterate(place: Place, spans: Sequence[Span], number: int) -> tuple[TimedWire, Run, int]:
    table = RowTable(tuple(spans))
    place.workers.link.plan(table, number, 0)
    wire = TimedWire(place.workers.link, number, 0)
    # a chunk of a prompt that goes on gives no token; here it does, as its last piece would
    run = place.slices.start(np.zeros(table.rows, np.int64), table.positions, wire, table.last_rows)
    while run.step():
        pass
    return wire, run, len(table.last_rows)


def measure_large(place: Place) -> list[ProgramTime]:
    """Slices alone with more rows than fit into an iteration of the settings."""
    manifest, found = place.bundle.manifest, []
    began = time.monotonic()
    for rows in LARGE_ROWS:
        attention = NoAttention((rows, manifest.heads, manifest.head_size))
        ids, positions = np.zeros(rows, np.int64), np.arange(rows) % manifest.max_context
        times: dict[str, list[float]] = defaultdict(list)
        for round_ in range(21):
            run = place.slices.start(ids, positions, attention)
            while run.step():
                pass
            for kind, seconds in run.seconds.items():
                if round_ and kind != "attention":
                    times[kind].append(seconds / _runs_of(kind, manifest.layers))
        found += [
            ProgramTime(kind=kind, rows=rows, seconds=statistics.median(values), runs=len(values))
            for kind, values in times.items()
        ]
        if time.monotonic() - began > LARGE_BUDGET_S:
            break
    return found


def _runs_of(kind: str, layers: int) -> int:
    return {"kvx": layers, "post_qx": layers - 1, "post_qx_kvx": layers - 1}.get(kind, 1)


def _wire_bytes(place: Place, rows: int) -> int:
    manifest = place.bundle.manifest
    if not place.settings.cluster.attention_workers:
        return 0
    return rows * (2 * manifest.heads + 2 * manifest.kv_heads) * manifest.head_size * 4


# --- loopback


def echo() -> int:
    """The other end: sends every frame back until the connection ends."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        print(listener.getsockname()[1], flush=True)
        link = Link(listener.accept()[0], "the measuring process")
        try:
            while True:
                frame = link.receive()
                link.send(frame.header, frame.payload)
        except LinkClosed:
            return 0


def measure_wire() -> list[WireTime]:
    command = [sys.executable, "-m", "benchmarks.lamina_calibration", "--echo"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        port = int(process.stdout.readline())
        link = Link(socket.create_connection(("127.0.0.1", port), 10), "echo")
        times: list[list[float]] = [[] for _ in WIRE_BYTES]
        for _ in range(60):
            for index, size in enumerate(WIRE_BYTES):
                payload = bytes(size // 2)
                began = time.perf_counter()
                link.send(Header(FrameType.Q, number_type=NumberType.FLOAT32), payload)
                link.receive(10)
                times[index].append(time.perf_counter() - began)
        link.close()
    finally:
        process.terminate()
        process.wait(30)
    return [
        WireTime(bytes=size, seconds=statistics.median(values), runs=len(values))
        for size, values in zip(WIRE_BYTES, times, strict=True)
    ]


# --- the engine


@dataclass(frozen=True)
class Workload:
    name: str
    prompts: tuple[int, ...]
    outputs: tuple[int, ...]
    at_once: int

    @property
    def trace(self) -> Trace:
        return Trace(
            self.name, np.zeros(len(self.prompts)), np.array(self.prompts), np.array(self.outputs)
        )  # fmt: skip


@dataclass(frozen=True)
class Served:
    """What the engine did: all gaps between two tokens of a request, and seconds from first to last."""

    gaps_s: list[float]
    tokens: int
    seconds: float
    iterations: list[tuple[int, int, float]]  # rows, keys attended, seconds of the whole turn


def serve(place: Place, work: Workload) -> Served:
    """All requests at once through the engine, in this process; ends of texts are ignored."""
    sched = place.settings.sched.model_copy(update={"max_requests": work.at_once, "tbt_slo_ms": 0.0})
    settings = place.settings.model_copy(update={"sched": sched})
    moments: dict[str, list[float]] = defaultdict(list)
    ended: list[str] = []

    def take(message: Message) -> None:
        if isinstance(message, TokenEvent):
            moments[message.id].append(time.perf_counter())
        elif isinstance(message, Rejected):
            raise GateFailed(f"the engine refused a request of the workload {work.name}: {message.message}")
        elif isinstance(message, Finished):
            ended.append(message.id)

    place.journal.unlink(missing_ok=True)
    journal = Journal(place.journal)
    found = Calibration("", place.slices.split, None, True)
    engine = Engine(place.slices, settings, place.workers, journal, found, take)
    engine.state = "ready"
    vocabulary = place.bundle.manifest.vocab_size
    generator = np.random.default_rng(0)
    for index, (prompt, output) in enumerate(zip(work.prompts, work.outputs, strict=True)):
        tokens = tuple(generator.integers(3, vocabulary, prompt).tolist())
        sampling = Sampling(temperature=0.0)
        engine.inbox.put(
            Submit(
                id=f"{work.name}-{index}",
                prompt=tokens,
                max_tokens=output,
                sampling=sampling,
                ignore_eos=True,
                arrived=time.time(),
            )
        )
    seen: list[tuple[int, int, float]] = []
    observe = engine.step_time.observe

    def watch(rows: int, attended: int, seconds: float) -> None:
        observe(rows, attended, seconds)
        seen.append((rows, attended, seconds))

    engine.step_time.observe = watch  # type: ignore[method-assign]
    iterations = []
    began = time.perf_counter()
    while len(ended) < len(work.prompts):
        before, at = len(seen), time.perf_counter()
        engine.turn()
        if len(seen) > before:
            rows, attended, _ = seen[-1]
            iterations.append((rows, attended, time.perf_counter() - at))
    seconds = time.perf_counter() - began
    engine.turn()  # what has ended is forgotten by the workers
    journal.close()
    gaps = [b - a for times in moments.values() for a, b in pairwise(times)]
    return Served(gaps, sum(map(len, moments.values())), seconds, iterations)


def measure_engine(
    place: Place, repeats: int, works: Sequence[Workload]
) -> tuple[dict[int, list[tuple[int, float]]], dict[str, list[Served]]]:
    """Short runs for what an iteration takes beyond its parts, and the workloads to be foretold, in turns.

    Returns:
        Keys attended and seconds of iterations in which so many rows decoded; the runs of each workload.
    """
    around: dict[int, list[tuple[int, float]]] = defaultdict(list)
    runs: dict[str, list[Served]] = defaultdict(list)
    limit = place.settings.sched.max_requests
    for _ in range(repeats):
        for requests in [size for size in OVERHEAD_REQUESTS if size <= limit]:
            served = serve(place, Workload("overhead", (24,) * requests, (32,) * requests, requests))
            around[requests] += [(keys, s) for rows, keys, s in served.iterations if rows == requests]
        for work in works:
            runs[work.name].append(serve(place, work))
    return around, runs


def find_overhead(
    place: Place, measured: Measured, around: dict[int, list[tuple[int, float]]]
) -> list[OverheadTime]:
    """What is left of the short runs' iterations without their parts, on average."""
    costs = costs_of(place, fit(measured), measured, read_policy(None))
    return [
        OverheadTime(
            rows=rows,
            seconds=statistics.fmean(
                seconds - costs.iteration(rows).seconds(costs.token_s * (keys - rows))
                for keys, seconds in iterations
            ),
        )
        for rows, iterations in around.items()
    ]


def costs_of(place: Place, fitted: Fit, measured: Measured, policy: Policy) -> MeasuredCosts:
    tokens = place.workers.pages * PAGE_TOKENS
    return MeasuredCosts(measured, fitted, to_model(place.bundle.manifest), tokens, policy)


# --- truth


def workloads(longest: int) -> list[Workload]:
    """Not those of the calibration: other lengths, mixed, more requests than run at once."""
    generator = np.random.default_rng(7)
    found = []
    for name, requests, at_once, prompt, output in (
        ("few, short", 9, 3, (0.02, 0.1), (0.1, 0.2)),
        ("ten at once", 24, 10, (0.05, 0.4), (0.05, 0.3)),
        ("many, long", 40, 24, (0.2, 0.6), (0.05, 0.3)),
    ):
        lengths = [
            tuple(np.maximum(2, generator.uniform(*share, requests) * longest).astype(int).tolist())
            for share in (prompt, output)
        ]
        found.append(Workload(name, lengths[0], lengths[1], at_once))
    return found


def simulate(place: Place, fitted: Fit, measured: Measured, work: Workload) -> Figures:
    settings = place.settings
    policy = read_policy(None).model_copy(
        update={
            "prefill": "chunked", "max_rows": settings.sched.max_rows, "max_requests": work.at_once,
            "reserve": settings.kv.reserve,
        }
    )  # fmt: skip
    costs = costs_of(place, fitted, measured, policy)
    return summarise(replay(work.trace, costs, saturated=False))


def compare(
    place: Place, measured: Measured, works: Sequence[Workload], served: dict[str, list[Served]]
) -> list[truth.Comparison]:
    """Of each workload the median run."""
    found, fitted = [], fit(measured)
    for work in works:
        runs = sorted(served[work.name], key=lambda run: run.seconds)
        run = runs[len(runs) // 2]
        figures = simulate(place, fitted, measured, work)
        assert figures.tbt_mean_ms is not None
        found.append(
            truth.Comparison(
                name=work.name,
                requests=len(work.prompts),
                tokens=run.tokens,
                measured_tbt_ms=1e3 * statistics.fmean(run.gaps_s),
                simulated_tbt_ms=figures.tbt_mean_ms,
                measured_tokens_per_s=run.tokens / run.seconds,
                simulated_tokens_per_s=figures.tokens_per_s,
            )
        )
    return found


def describe_comparisons(comparisons: Sequence[truth.Comparison]) -> list[str]:
    names = ("workload", "requests", "tokens", "TBT measured, ms", "simulated", "off", "tokens/s measured")
    rows = [f"| {' | '.join(names)} | simulated | off |", "|---" * 9 + "|"]
    for c in comparisons:
        rows.append(
            f"| {c.name} | {c.requests} | {c.tokens} | {c.measured_tbt_ms:.2f} | {c.simulated_tbt_ms:.2f} | "
            f"{c.tbt_error:+.1%} | {c.measured_tokens_per_s:,.0f} | {c.simulated_tokens_per_s:,.0f} | "
            f"{c.throughput_error:+.1%} |"
        )
    return rows


def describe_fit(fitted: Fit) -> str:
    c0, c1, d1, per_token, per_pair = fitted.attention
    return (
        f"attention of a layer: {c0 * 1e6:.0f} µs + {c1 * 1e6:.1f} µs/row + {d1 * 1e6:.1f} µs/chunk row + "
        f"{per_token * 1e9:.1f} ns/token + {per_pair * 1e9:.1f} ns/pair\n"
        f"wire: {fitted.wire[0] * 1e6:.0f} µs + {fitted.wire[1] * 1e9:.2f} ns/byte\n"
        f"beyond, of an iteration: {fitted.overhead[0] * 1e6:.0f} µs + {fitted.overhead[1] * 1e6:.1f} µs/row"
    )


def host() -> str:
    return f"{processor_name()}, {len(os.sched_getaffinity(0))} cores, {platform.system()}"


def measure_machine(place: Place, rounds: int) -> Measured:
    """All parts; what lies around them is not known yet."""
    manifest, cluster = place.bundle.manifest, place.settings.cluster
    programs, attention = measure_parts(place, rounds)
    return Measured(
        format=1, kind="lamina simulator", host=host(),
        date=datetime.datetime.now(datetime.UTC).replace(microsecond=0),
        versions={module.__name__: module.__version__ for module in (torch, onnxruntime, np)},
        bundle=manifest.name, bundle_sha256=files.sha256_file(place.bundle.folder / MANIFEST),
        layers=manifest.layers, split=place.slices.split, workers=cluster.attention_workers,
        partition=cluster.partition, programs=[*programs, *measure_large(place)], attention=attention,
        wire=measure_wire() if cluster.attention_workers else [],
        overhead=[OverheadTime(rows=rows, seconds=0.0) for rows in (1, 2)],
    )  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.lamina_calibration",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("bundle", type=Path, nargs="?", metavar="BUNDLE")
    parser.add_argument("--echo", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--workers", type=int, default=2, help="0: attention in the engine's process")
    parser.add_argument("--partition", choices=("head", "request"), default="head")
    parser.add_argument("--split", action="store_true", help="Q leaves before K and V are computed")
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--repeats", type=int, default=5, help="of each workload; the median counts")
    parser.add_argument("--dry-run", action="store_true", help=f"do not write {RESULTS}")
    parser.add_argument("--calibration", type=Path, default=CALIBRATION)
    parser.add_argument("--truth-check", type=Path, default=truth.DEFAULT_RECORD)
    arguments = parser.parse_args(argv)
    if arguments.echo:
        return echo()
    if arguments.bundle is None or arguments.rounds < 20:
        parser.error("a BUNDLE is needed, and at least 20 rounds")
    environment.interrupt_on_sigterm()  # so that the workers are ended too
    try:
        bundle = read_bundle(arguments.bundle)
        with opened(bundle, arguments.workers, arguments.partition, arguments.split) as place:
            works = workloads(min(LONGEST, bundle.manifest.max_context - 1))
            measured = measure_machine(place, arguments.rounds)
            around, served = measure_engine(place, arguments.repeats, works)
            measured = measured.model_copy(update={"overhead": find_overhead(place, measured, around)})
            comparisons = compare(place, measured, works, served)
        files.write_text(arguments.calibration, measured.model_dump_json(indent=1) + "\n")
        record = truth.TruthCheck(
            format=1, host=host(), date=measured.date, bundle=measured.bundle,
            calibration_sha256=files.sha256_file(arguments.calibration),
            engine=f"the engine with {arguments.workers} attention workers, {arguments.partition} partition, "
            f"{'early Q' if arguments.split else 'Q, K and V together'}",
            comparisons=comparisons,
        )  # fmt: skip
        files.write_text(arguments.truth_check, record.model_dump_json(indent=1) + "\n")
        text = [
            "# The simulator against this machine",
            "",
            f"`python -m benchmarks.lamina_calibration BUNDLE --workers {arguments.workers} --partition "
            f"{arguments.partition}`",
            "",
            f"{host()}; load average at the end {os.getloadavg()[0]:.1f}; {measured.bundle}, "
            f"{measured.layers} layers, {record.engine}",
            "",
            "Fits, on points that they have not seen:",
            "",
            *describe_errors(held_out_errors(measured)),
            "",
            *(f"- {line}" for line in describe_fit(fit(measured)).splitlines()),
            "",
            f"Engine, measured, and its simulation; of {arguments.repeats} runs the median:",
            "",
            *describe_comparisons(comparisons),
            "",
            f"Truth check {'passed' if record.passed else 'NOT PASSED'}: furthest off {record.worst:.1%}, "
            f"{truth.TOLERANCE:.0%} are allowed.",
        ]
        print("\n".join(text))
        if not arguments.dry_run:
            files.write_text(RESULTS, "\n".join(text) + "\n")
        return 0 if record.passed else GateFailed.exit_code
    except TrunklineError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code


if __name__ == "__main__":
    raise SystemExit(main())
