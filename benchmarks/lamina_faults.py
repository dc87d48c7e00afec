"""Break Lamina in every place and see whether the texts stay the same: `make faults`.

    python -m benchmarks.lamina_faults [--only PART …] [--every N] [--engine-kills N] [--no-result]

Three requests are generated while one thing goes wrong: an attention worker, a real process, is killed or
stopped before a certain frame of a certain layer, or that frame is dropped, damaged, cut off, held up, sent
twice or in an older epoch, or its connection is closed. Frames that arrive (OUT) are treated alike. All
partitions, prompts and decoding, one and two micro-batches, with and without parity; then two things at once;
then the engine's process itself, killed or stopped and started again from its journal.

A run passes if every text is the undisturbed one, every token was said once and in order, no page is left on
either side, and it ended in time. A fault that did not happen fails, too. `--every N` takes each N-th run.

Writes benchmarks/results/lamina_faults.md; the exit code is 1 if anything failed.
"""

from __future__ import annotations

import argparse
import itertools
import os
import random
import signal
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.forked_workers import Zygote
from benchmarks.lamina_engine import running, section
from flows import files
from flows.params import Lamina
from flows.serving.lamina.attention.frames import HEADER_BYTES, Frame, FrameError, FrameType, Header, encode
from flows.serving.lamina.attention.transport import Link, LinkClosed
from flows.serving.lamina.engine import workers as workers_module
from flows.serving.lamina.engine.calibration import Calibration
from flows.serving.lamina.engine.engine import Engine
from flows.serving.lamina.engine.journal import Journal
from flows.serving.lamina.engine.process import model_shape
from flows.serving.lamina.engine.workers import Workers
from flows.serving.lamina.requests import Cancel, Finished, Sampling, Submit, TokenEvent
from flows.serving.lamina.slices.bundle import Bundle, read_bundle
from flows.serving.lamina.slices.runner import Slices, greedy, open_slices
from flows.serving.measure import processor_name

RESULT = Path("benchmarks/results/lamina_faults.md")
PROMPTS = ([1, 70, 71, 72, 73], [1], [1, *range(40, 62)])
TOKENS = 14
MAX_ROWS = 8
BOUND_S = 30.0  # for one run, undisturbed far below a second
LAYER_TIMEOUT_MS = 400
PROBE_S = 0.5
SENT = ("kill", "stop", "drop", "corrupt", "truncate", "delay", "hold", "close", "twice", "stale")
RECEIVED = ("kill", "stop", "drop", "corrupt", "delay", "hold", "close")
DELAY_S, HOLD_S = 0.05, 0.7  # a hold is longer than a layer may take
PHASES = (2, 9)  # iterations from which a fault is due: among prompts, among decoding rows


@dataclass
class Fault:
    """What happens to the first frame of this kind, to or from this worker, from an iteration on."""

    kind: str
    frame: str
    layer: int
    worker: int
    iteration: int
    fired: bool = False

    def due(self, header: Header, worker: int, iteration: int) -> bool:
        found = (header.type.name, worker) == (self.frame, self.worker)
        layered = self.frame in ("PLAN", "FREE") or header.layer == self.layer
        return not self.fired and found and layered and iteration >= self.iteration

    def __str__(self) -> str:
        return f"{self.kind} {self.frame} layer {self.layer} worker {self.worker} from {self.iteration}"


@dataclass
class Case:
    part: str
    faults: list[Fault]
    settings: dict[str, Any] = field(default_factory=dict)


class FaultyLink(Link):
    """A link that asks before every frame whether something happens to it."""

    def __init__(self, link: Link, bench: Bench, address: tuple[str, int]) -> None:
        super().__init__(link._socket, link.peer)
        self._bench, self._address = bench, address

    def send(
        self, header: Header, payload: bytes | bytearray | memoryview = b"", timeout_s: float = 10.0
    ) -> None:
        fault = self._bench.due(header, self._address)
        if fault is None:
            super().send(header, payload, timeout_s)
            return
        if fault.kind == "drop":
            return
        if fault.kind in ("corrupt", "truncate"):
            head, body = encode(header, payload)
            data = bytearray(head) + body
            if fault.kind == "truncate":
                self._socket.sendall(data[: max(1, len(data) // 2)])
                return
            data[-1 if len(data) > HEADER_BYTES else HEADER_BYTES - 1] ^= 4
            self._socket.sendall(data)
            return
        if fault.kind == "twice":
            super().send(header, payload, timeout_s)
        if fault.kind == "stale":
            super().send(header._replace(epoch=header.epoch - 1), payload, timeout_s)
        self._bench.happen(fault, self._address, self)
        super().send(header, payload, timeout_s)

    def receive(self, timeout_s: float | None = None, limit: int = 1 << 28) -> Frame:
        while True:
            if (early := self._bench.before_receiving(self._address)) is not None:
                self._bench.happen(early, self._address, self)
            frame = super().receive(timeout_s, limit)
            fault = self._bench.due(frame.header, self._address, received=True)
            if fault is None:
                return frame
            if fault.kind == "drop":
                continue
            if fault.kind == "corrupt":
                raise FrameError("an OUT frame was damaged on its way (wrong checksum)")
            self._bench.happen(fault, self._address, self)
            if fault.kind == "close":
                raise LinkClosed(f"{self.peer} closed the connection")
            return frame


class Bench:
    """One bundle, worker processes that live across runs, and the texts that are expected."""

    def __init__(self, bundle: Bundle, folder: Path) -> None:
        self.bundle = bundle
        token = folder / "token"
        token.write_text(os.urandom(16).hex())
        self.token = token.read_bytes()
        self.zygote = Zygote(token)
        self.slices: dict[bool, Slices] = {
            split: open_slices(bundle, split=split, threads=1, spin=False) for split in (True, False)
        }
        alone = [greedy(self.slices[True], [prompt], TOKENS)[0] for prompt in PROMPTS]
        self.expected = [list(continuation.tokens) for continuation in alone]
        self.ports: list[int] = []
        self.epoch = 1
        self._case = Case("", [])
        self._engine: Engine | None = None

    # --- what the links ask

    def due(self, header: Header, address: tuple[str, int], received: bool = False) -> Fault | None:
        if received != (header.type is FrameType.OUT):
            return None
        for fault in self._case.faults:
            if received and fault.kind in ("kill", "stop"):
                continue  # they happen before the frame comes, see `before_receiving`
            if fault.due(header, self._worker(address), self._iteration()):
                fault.fired = True
                return fault
        return None

    def before_receiving(self, address: tuple[str, int]) -> Fault | None:
        """A worker that is to be lost while its answer is awaited."""
        for fault in self._case.faults:
            awaited = fault.frame == "OUT" and fault.kind in ("kill", "stop") and not fault.fired
            if awaited and self._worker(address) == fault.worker and self._iteration() >= fault.iteration:
                pool = self._engine.workers.pool if self._engine else None
                layers = (
                    [layer for current in pool._current.values() for layer in current.began] if pool else []
                )
                if fault.layer in layers:
                    fault.fired = True
                    return fault
        return None

    def happen(self, fault: Fault, address: tuple[str, int], link: FaultyLink) -> None:
        if fault.kind in ("kill", "stop"):
            number = signal.SIGKILL if fault.kind == "kill" else signal.SIGSTOP
            with suppress(ProcessLookupError):  # of two faults the other was faster
                os.kill(self.zygote.pids[address[1]], number)
        elif fault.kind == "close":
            link.close()
        elif fault.kind in ("delay", "hold"):
            time.sleep(DELAY_S if fault.kind == "delay" else HOLD_S)

    def connect(self, host: str, port: int, timeout_s: float) -> Link:
        return FaultyLink(workers_module.dial(host, port, timeout_s), self, (host, port))  # type: ignore[arg-type]

    def _worker(self, address: tuple[str, int]) -> int:
        assigned = self._engine.workers.assigned if self._engine else []
        return assigned.index(address) if address in assigned else -1

    def _iteration(self) -> int:
        return self._engine.iteration if self._engine else 0

    # --- a run

    def run(self, case: Case) -> tuple[str, float]:
        """What is wrong (empty: nothing), and how long the longest pause between two tokens was."""
        lamina = Lamina.model_validate(
            section(
                {"cluster.attention_workers": 2, "kv.mb_per_worker": 4, "sched.max_rows": MAX_ROWS,
                 "sched.max_requests": 4, "cluster.layer_timeout_ms": LAYER_TIMEOUT_MS,
                 "recover.max_recoveries": 50, **case.settings}
            )
        )  # fmt: skip
        while len(self.ports) < lamina.processes:
            self.ports.append(self.zygote.start())
        for port in self.ports:  # the last thing of the run before may have been a loss that nobody noticed
            if not self.zygote.lives(port):
                self.zygote.replace(port)
        said: list[Any] = []
        times: list[float] = []

        def say(message: Any) -> None:
            said.append(message)
            if isinstance(message, TokenEvent):
                times.append(time.monotonic())

        self._case = Case("", [])
        addresses = [("127.0.0.1", port) for port in self.ports[: lamina.processes]]
        workers = Workers(
            model_shape(self.bundle), lamina, addresses, self.token, first_epoch=self.epoch,
            on_lost=lambda address, pid, reason: self._replace(address, pid),
            on_epoch=lambda epoch: None, connect=self.connect,
        )  # fmt: skip
        split = case.settings.get("model.split", True)
        engine = Engine(
            self.slices[split], lamina, workers, Journal(None), Calibration("", split, None, True), say
        )
        workers.start(lambda: None)
        engine.state = "ready"
        workers.link.free(range(lamina.sched.max_requests))
        self._engine, self._case = engine, case
        deadline = time.monotonic() + BOUND_S
        try:
            for index, prompt in enumerate(PROMPTS):
                engine.inbox.put(
                    Submit(id=f"r{index}", prompt=tuple(prompt), max_tokens=TOKENS,
                           sampling=Sampling(temperature=0), arrived=time.time())
                )  # fmt: skip
                engine.turn()
            while engine.scheduler.running or engine.scheduler.waiting:
                engine.turn()
                if time.monotonic() > deadline:
                    return f"not done after {BOUND_S:g} s", BOUND_S
            engine.turn()
            return self._judge(case, engine, said), max(b - a for a, b in itertools.pairwise(times))
        except Exception as error:
            return f"{type(error).__name__}: {error}", 0.0
        finally:
            self._case = Case("", [])
            self.epoch = workers.epoch + 1
            workers.close()
            self._engine = None

    def _replace(self, address: tuple[str, int], pid: int) -> None:
        if pid in (0, self.zygote.pids[address[1]]):
            self.zygote.replace(address[1])

    def _judge(self, case: Case, engine: Engine, said: list[Any]) -> str:
        for fault in case.faults:
            if not fault.fired:
                return f"{fault} did not happen"
        for index, expected in enumerate(self.expected):
            events = [m for m in said if isinstance(m, TokenEvent) and m.id == f"r{index}"]
            if [event.index for event in events] != list(range(len(events))):
                return f"request {index} lost or doubled a token"
            if [event.token for event in events] != expected:
                return f"request {index} says something else"
            ends = [m.reason for m in said if isinstance(m, Finished) and m.id == f"r{index}"]
            if len(ends) != 1 or ends[0] not in ("length", "stop"):
                return f"request {index} ended as {ends}"
        try:
            engine.memory.check({})
        except AssertionError as error:
            return f"pages: {error}"
        if engine.memory.used:
            return f"{engine.memory.used} pages are still held"
        for worker, up in enumerate(engine.workers.up):
            stats = engine.workers.link.stats(worker) if up else {}
            if any(stats.get(key) for key in ("pages_used", "slots", "plans")):
                return f"worker {worker} still holds {stats}"
        return ""


def cases(layers: int) -> Iterator[Case]:
    """All runs, in an order that mixes them."""
    points = [("PLAN", 0), ("FREE", 0), *itertools.product(("Q", "KV", "OUT"), range(layers))]
    found: list[Case] = []
    index = 0
    for partition, (frame, layer), iteration in itertools.product(
        ("head", "request", "sequence"), points, PHASES
    ):
        for kind in RECEIVED if frame == "OUT" else SENT:
            index += 1
            # sequence-level: these short texts lie on one worker, which differs from slot to slot
            fault = Fault(kind, frame, layer, index % 2, 0 if frame == "FREE" else iteration)
            settings = {"cluster.partition": partition, "sched.micro_batches": 1 + index // 2 % 2,
                        "model.split": index // 4 % 2 == 0}  # fmt: skip
            found.append(Case(f"one fault, {partition}-level", [fault], settings))
    for (frame, layer), iteration, worker in itertools.product(points, PHASES, range(3)):
        if worker == 2 and frame in ("Q", "OUT"):
            continue  # the parity worker gets none
        name = "PREFILL_KV" if worker == 2 and frame == "KV" else frame
        for kind in ("kill", "stop", "drop", "close"):
            index += 1
            fault = Fault(kind, name, layer, worker, 0 if frame == "FREE" else iteration)
            settings = {"kv.redundancy": "parity", "sched.micro_batches": 1 + index % 2}
            found.append(Case("one fault, with parity", [fault], settings))
    generator = random.Random(0)
    for index in range(200):
        kinds = ("kill", "stop", "drop", "corrupt", "close", "truncate")
        faults = [
            Fault(generator.choice(kinds), generator.choice(("Q", "KV")), generator.randrange(layers),
                  worker, generator.randrange(2, 12))
            for worker in (0, 1)
        ]  # fmt: skip
        settings = {"cluster.partition": ("head", "request", "sequence")[index % 3]}
        found.append(Case("two faults", faults, settings))
    generator.shuffle(found)
    yield from found


def soak(bundle: Path, requests: int, say: Any) -> list[tuple[str, str, float]]:
    """Many short requests, some cancelled, some with deadlines, some refused because too many wait."""
    generator = random.Random(0)
    settings = {"kv.mb_per_worker": 4, "sched.max_requests": 32, "admit.max_queued_requests": 64,
                "recover.journal_mb": 1}  # fmt: skip
    began = time.monotonic()
    with running(bundle, 2, settings) as engine:
        answers = engine.answers

        def room() -> bool:  # with the next 32 a few more than may run and wait
            return sum(not answer.ended for answer in answers.values()) < 67

        for index in range(requests):
            prompt = [generator.randrange(3, 200) for _ in range(generator.randrange(1, 24))]
            deadline = time.time() + 0.05 if generator.random() < 0.02 else None
            engine.send(Submit(id=f"s{index}", prompt=tuple(prompt), max_tokens=generator.randrange(1, 6),
                               arrived=time.time(), deadline=deadline))  # fmt: skip
            if generator.random() < 0.05:
                engine.send(Cancel(id=f"s{index}"))
            if index % 32 == 31:
                engine.wait_for(room, BOUND_S)
        done = engine.wait(timeout_s=BOUND_S)
        engine.wait_for(lambda: engine.heartbeat is not None and not engine.heartbeat.pages_used, 5)
        held = engine.heartbeat.pages_used if engine.heartbeat else -1
        journal = (engine.folder / "journal").stat().st_size
    ends: dict[str, int] = {}
    for answer in engine.answers.values():
        end = answer.finished.reason if answer.finished else "refused" if answer.rejected else "open"
        ends[end] = ends.get(end, 0) + 1
    took = time.monotonic() - began
    say(f"soak: {requests} requests, {ends}, {held} pages held, journal {journal >> 10} KiB, {took:.0f} s")
    problem = (
        "" if done and not held and not engine.doubled and len(engine.answers) == requests else "see above"
    )
    return [(f"soak of {requests} requests", problem, 0.0)]


def kill_engine(bundle: Path, kills: int, say: Any) -> list[tuple[str, str, float]]:
    """The engine's process, killed or stopped after some tokens, and started again from its journal."""
    results = []
    expected = [
        list(greedy(open_slices(read_bundle(bundle), threads=1), [prompt], 60)[0].tokens)
        for prompt in PROMPTS
    ]
    settings = {"kv.mb_per_worker": 4, "recover.max_recoveries": 50, "model.split": True,
                "sched.micro_batches": 1}  # fmt: skip
    with running(bundle, 2, settings) as engine:
        for index in range(kills):
            names = [f"k{index}-{number}" for number in range(len(PROMPTS))]
            for name, prompt in zip(names, PROMPTS, strict=True):
                engine.send(Submit(id=name, prompt=tuple(prompt), max_tokens=60, ignore_eos=True,
                                   sampling=Sampling(temperature=0), arrived=time.time()))  # fmt: skip
            wanted = (7 * index) % 50

            def told(names: list[str] = names, wanted: int = wanted) -> bool:
                counts = [len(engine.answers[name].tokens) for name in names]
                return min(counts) >= 1 and max(counts) >= wanted  # all of them are in the journal

            engine.wait_for(told, 30)
            kind = ("kill", "stop")[index % 2]
            began = time.monotonic()
            os.kill(engine.engine.pid, signal.SIGKILL if kind == "kill" else signal.SIGSTOP)
            engine.restart_engine()
            done = engine.wait(names, BOUND_S)
            took = time.monotonic() - began
            problem = "" if done else "not done in time"
            for name, tokens in zip(names, expected, strict=True):
                if done and engine.answers[name].tokens[: len(tokens)] != tokens:
                    problem = f"{name} says something else"
                if done and len(engine.answers[name].tokens) != 60:
                    problem = f"{name} lost or doubled a token"
            if engine.doubled:
                problem = "a token was said twice, differently"
            results.append((f"engine, {kind}", problem, took))
            say(f"engine {kind} after {wanted} tokens: {problem or 'same text'}, {took:.1f} s")
    return results


def tiny_bundle(folder: Path) -> Path:
    """A decoder with random weights, exported; three layers, grouped heads, a window in one of them."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from flows.serving.lamina.slices.export import export_bundle

    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "gemma2", vocab_size=211, hidden_size=32, intermediate_size=56, num_hidden_layers=3,
        num_attention_heads=8, num_key_value_heads=4, head_dim=8, sliding_window=12,
        max_position_embeddings=256, initializer_range=0.2, query_pre_attn_scalar=8,
        tie_word_embeddings=False, bos_token_id=None, eos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(folder / "model")
    export_bundle(folder / "model", folder / "bundle", say=lambda line: None)
    return folder / "bundle"


def run_cases(bundle: Path, folder: Path, chosen: Sequence[Case], say: Any) -> list[tuple[str, str, float]]:
    """Part, problem (empty: none) and longest pause of each."""
    workers_module.PROBE_S = PROBE_S
    bench = Bench(read_bundle(bundle), folder)
    results = []
    try:
        for number, case in enumerate(chosen, 1):
            problem, pause = bench.run(case)
            results.append((case.part, problem, pause))
            if problem:
                say(f"FAILED {case.part}, {case.settings}, {[str(f) for f in case.faults]}: {problem}")
            if number % 100 == 0:
                say(f"{number} of {len(chosen)} runs, {sum(bool(p) for _, p, _ in results)} failed")
    finally:
        bench.zygote.close()
    return results


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.lamina_faults",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--every", type=int, default=1, help="take each N-th run")
    parser.add_argument("--engine-kills", type=int, default=24)
    parser.add_argument("--soak", type=int, default=10_000, help="requests, and a look for pages that leak")
    parser.add_argument("--no-result", action="store_true")
    arguments = parser.parse_args(argv)

    def say(line: str) -> None:
        print(line, flush=True)

    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="faults-") as name:
        folder = Path(name)
        bundle = tiny_bundle(folder)
        chosen = list(cases(read_bundle(bundle).manifest.layers))[:: arguments.every]
        results = run_cases(bundle, folder, chosen, say)
        results += kill_engine(bundle, arguments.engine_kills, say)
        results += soak(bundle, arguments.soak, say)
    failed = sum(bool(problem) for _, problem, _ in results)
    lines = [
        f"{len(results)} runs with faults, {failed} failed, {time.monotonic() - began:.0f} s. "
        f"{processor_name()}, {os.cpu_count()} cores. Measured.",
        "",
        "| | runs | failed | pause, median s | pause, longest s |",
        "|---|---|---|---|---|",
    ]
    for part in sorted({part for part, _, _ in results}):
        rows = [(problem, pause) for name, problem, pause in results if name == part]
        pauses = sorted(pause for _, pause in rows)
        lines.append(
            f"| {part} | {len(rows)} | {sum(bool(p) for p, _ in rows)} | {pauses[len(pauses) // 2]:.2f} | "
            f"{pauses[-1]:.2f} |"
        )
    text = "\n".join(lines) + "\n"
    say("\n" + text)
    if not arguments.no_result:
        files.write_text(RESULT, "# Lamina: faults\n\n`make faults`\n\n" + text)
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
