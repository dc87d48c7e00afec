"""Does the engine say what transformers says, token for token, however attention is divided?

    python -m benchmarks.lamina_exactness [--families llama gemma2] [--tokens 200] [--model DIR]

Nine families of decoders with tiny random weights are exported and served by the engine with attention
workers as processes: 1, 2 and 3 of them, head-, request- and sequence-level, one and two micro-batches, both
cuts of the layers. Four prompts arrive at different moments and share iterations; each greedy text is
compared with transformers' of the prompt alone, eager attention and a KV cache. `--model` adds a folder of a
real model.

Writes benchmarks/results/lamina_exactness.md; the exit code is 1 unless all texts are identical.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Sequence
from importlib.metadata import version
from itertools import chain, count
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.forked_workers import Zygote
from benchmarks.lamina_engine import section
from benchmarks.language_parity import FAMILIES, continue_eagerly, make_model
from flows import files
from flows.params import Lamina
from flows.serving.lamina.attention.transport import dial
from flows.serving.lamina.engine.calibration import Calibration
from flows.serving.lamina.engine.engine import Engine
from flows.serving.lamina.engine.journal import Journal
from flows.serving.lamina.engine.process import model_shape
from flows.serving.lamina.engine.workers import Workers
from flows.serving.lamina.requests import Finished, Sampling, Submit, TokenEvent
from flows.serving.lamina.slices.bundle import Bundle
from flows.serving.lamina.slices.export import export_bundle
from flows.serving.lamina.slices.runner import Slices, open_slices

RESULT = Path("benchmarks/results/lamina_exactness.md")
PROMPTS = (23, 5, 1, 41)  # tokens
EPOCHS = count(1)  # workers drop what is of an older one
WAYS = (  # workers, partition, micro-batches, Q before K and V
    (1, "head", 1, True), (2, "head", 2, False), (3, "head", 1, False), (2, "request", 2, True),
    (3, "request", 1, True), (2, "sequence", 1, False), (3, "sequence", 2, True),
)  # fmt: skip


def serve(
    bundle: Bundle, slices: Slices, zygote: Zygote, token: bytes, way: tuple[int, str, int, bool],
    prompts: Sequence[Sequence[int]], tokens: int, epoch: int,
) -> list[list[int]]:  # fmt: skip
    """The greedy texts of all prompts, served together."""
    workers, partition, micro_batches, split = way
    lamina = Lamina.model_validate(
        section({"cluster.attention_workers": workers, "cluster.partition": partition, "kv.mb_per_worker": 32,
                 "sched.micro_batches": micro_batches, "sched.max_rows": 16, "sched.max_requests": 8,
                 "cluster.layer_timeout_ms": 30_000})
    )  # fmt: skip
    while len(zygote.pids) < workers:
        zygote.start()
    addresses = [("127.0.0.1", port) for port in list(zygote.pids)[:workers]]
    said: list[Any] = []
    pool = Workers(
        model_shape(bundle), lamina, addresses, token, first_epoch=epoch,
        on_lost=lambda address, pid, reason: None, on_epoch=lambda epoch: None, connect=dial,
    )  # fmt: skip
    engine = Engine(slices, lamina, pool, Journal(None), Calibration("", split, None, True), said.append)
    pool.start(lambda: None)
    try:
        for index, prompt in enumerate(prompts):
            engine.inbox.put(Submit(id=str(index), prompt=tuple(prompt), max_tokens=tokens, ignore_eos=True,
                                    sampling=Sampling(temperature=0), arrived=time.time()))  # fmt: skip
            for _ in range(index):
                engine.turn()
        while sum(isinstance(message, Finished) for message in said) < len(prompts):
            engine.turn()
        engine.turn()
    finally:
        pool.close()
    events = [message for message in said if isinstance(message, TokenEvent)]
    return [[event.token for event in events if event.id == str(index)] for index in range(len(prompts))]


def compare(name: str, model: Path, target: Path, zygote: Zygote, token: bytes, tokens: int) -> list[str]:
    """One line of the table for each way."""
    bundle = export_bundle(model, target)
    generator = np.random.default_rng(0)
    low = 3  # not the marks of a real vocabulary
    prompts = [generator.integers(low, bundle.manifest.vocab_size, length).tolist() for length in PROMPTS]
    expected = [continue_eagerly(model, prompt, tokens)[0] for prompt in prompts]
    opened = {split: open_slices(bundle, split=split) for split in (True, False)}
    lines = []
    for way in WAYS:
        workers, partition, micro_batches, split = way
        if partition == "head" and workers > bundle.manifest.kv_heads:
            continue
        found = serve(bundle, opened[split], zygote, token, way, prompts, tokens, next(EPOCHS))
        pairs = zip(chain(*found), chain(*expected), strict=True)
        same = sum(a == b for a, b in pairs)
        verdict = "identical" if found == expected else "DIFFERENT"
        cut = "Q first" if split else "together"
        lines.append(
            f"| {name} | {workers} | {partition} | {micro_batches} | {cut} | "
            f"{same} of {tokens * len(prompts)} | {verdict} |"
        )
        print(lines[-1], flush=True)
    return lines


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.lamina_exactness",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--families", nargs="+", choices=list(FAMILIES), default=list(FAMILIES))
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--model", type=Path, help="folder of a real model, as Hugging Face has them")
    parser.add_argument("--no-result", action="store_true")
    arguments = parser.parse_args(argv)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    lines = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        token = os.urandom(16).hex()
        (folder / "token").write_text(token)
        zygote = Zygote(folder / "token")
        try:
            models = {family: make_model(family, folder / family) for family in arguments.families}
            if arguments.model:
                models[arguments.model.name] = arguments.model
            for family, model in models.items():
                target = folder / f"{family}-bundle"
                lines += compare(family, model, target, zygote, token.encode(), arguments.tokens)
        finally:
            zygote.close()
    failed = sum("DIFFERENT" in line for line in lines)
    made = f"transformers {version('transformers')}"
    text = "\n".join([
        f"{made}, {len(lines)} ways of serving, {failed} with other tokens. Measured.",
        "",
        "| model | workers | partition | micro-batches | K and V | equal tokens | |",
        "|---|---|---|---|---|---|---|",
        *lines,
    ]) + "\n"  # fmt: skip
    print(text.splitlines()[0])
    if not arguments.no_result:
        command = "python -m benchmarks.lamina_exactness --model DIR_OF_TINY_LLM"
        files.write_text(RESULT, f"# Lamina: exactness\n\n`{command}`\n\n{text}")
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
