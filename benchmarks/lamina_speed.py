"""Tokens per second of Lamina with 1 and 2 attention workers, without offload, and of transformers.

    python -m benchmarks.lamina_speed [--batch 16] [--context 1024] [--tokens 32] [--rounds 2]

One decoder of about 100 million parameters with random weights, the same requests for all: (a) the engine
with attention workers as processes, (b) the same engine with attention in its own process, (c) transformers,
eager attention with a KV cache, one padded-free batch of equal lengths. Time per token is that of decoding,
from the moment all requests have their first token; the prompts are computed before it and timed apart. The
contestants take turns in every round. Goals on two cores: (a) within 25 % of (b), at least twice (c).

Writes benchmarks/results/lamina_speed.md.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.lamina_engine import RunningEngine, running
from flows import files
from flows.serving.lamina.requests import Sampling, Submit
from flows.serving.measure import processor_name

RESULT = Path("benchmarks/results/lamina_speed.md")
ROWS = 256  # of an iteration
SIZES: dict[str, Any] = {
    "vocab_size": 32000, "hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12,
    "num_attention_heads": 12, "num_key_value_heads": 4, "max_position_embeddings": 4096,
    "bos_token_id": None, "eos_token_id": None, "pad_token_id": None, "tie_word_embeddings": True,
}  # fmt: skip


def make_model(folder: Path) -> int:
    """A Llama with random weights as a Hugging Face folder; gives its parameters."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES))
    model.save_pretrained(folder)
    return sum(parameter.numel() for parameter in model.parameters())


def prompts(batch: int, context: int) -> list[list[int]]:
    return np.random.default_rng(0).integers(0, SIZES["vocab_size"], (batch, context)).tolist()


def lamina(engine: RunningEngine, batch: int, context: int, tokens: int, name: str) -> tuple[float, float]:
    """Seconds of the prompts, and per token of decoding (one token of every request).

    Requests whose prompt is done decode beside the prompts of the others; what is measured begins when all
    decode.
    """
    beside = -(-batch * context // (ROWS - batch)) + 4  # iterations with prompts
    began = time.monotonic()
    answers = engine.generate(
        [
            Submit(id=f"{name}-{index}", prompt=tuple(prompt), max_tokens=tokens + beside, ignore_eos=True,
                   sampling=Sampling(temperature=0), arrived=time.time())
            for index, prompt in enumerate(prompts(batch, context))
        ],
        timeout_s=1800,
    )  # fmt: skip
    assert all(answer.finished and answer.finished.reason == "length" for answer in answers), answers[0]
    start = max(answer.times[0] for answer in answers)
    end = min(answer.times[-1] for answer in answers)
    made = sum(sum(start < when <= end for when in answer.times) for answer in answers)
    return start - began, batch * (end - start) / made


def transformers_eager(model: Any, batch: int, context: int, tokens: int) -> tuple[float, float]:
    ids = torch.tensor(prompts(batch, context))
    with torch.inference_mode():
        began = time.monotonic()
        answer = model(ids, use_cache=True, logits_to_keep=1)
        cache, last = answer.past_key_values, answer.logits[:, -1].argmax(-1)
        prefilled = time.monotonic()
        for _ in range(tokens):
            answer = model(last[:, None], past_key_values=cache, use_cache=True)
            last = answer.logits[:, -1].argmax(-1)
    return prefilled - began, (time.monotonic() - prefilled) / tokens


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.lamina_speed",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--set", action="append", default=[], help="group.key=value of section lamina")
    parser.add_argument("--no-result", action="store_true")
    arguments = parser.parse_args(argv)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from transformers import AutoModelForCausalLM

    from flows.language import export_language
    from flows.params import flatten, parse_setting

    settings = {
        name.removeprefix("lamina."): value
        for text in arguments.set
        for name, value in flatten(parse_setting(text)).items()
    }
    batch, context, tokens = arguments.batch, arguments.context, arguments.tokens
    megabytes = 64 + (batch * (context + 2 * tokens + 1536) * 12 * 2 * 4 * 64 * 4 >> 20)
    with tempfile.TemporaryDirectory() as folder:
        parameters = make_model(Path(folder) / "model")
        export_language(
            Path(folder) / "model", Path(folder) / "bundle", opset=20, tolerance=1e-3, force=False
        )
        model = AutoModelForCausalLM.from_pretrained(Path(folder) / "model", attn_implementation="eager")
        model.eval()
        names = {
            "(a) 2 attention workers": 2, "(a) 1 attention worker": 1, "(b) attention in the engine": 0,
        }  # fmt: skip
        contestants: dict[str, Callable[[], tuple[float, float]]] = {}
        for name, workers in names.items():

            def contest(workers: int = workers) -> tuple[float, float]:
                wanted = {
                    "kv.mb_per_worker": megabytes, "sched.max_rows": ROWS,
                    "sched.max_requests": max(batch, 48),
                    **({"cluster.worker_threads": 2} if workers == 0 else {}), **settings,
                }  # fmt: skip
                with running(Path(folder) / "bundle", workers, wanted) as engine:
                    print(engine.log().strip().splitlines()[-1], flush=True)
                    return lamina(engine, batch, context, tokens, "r")

            contestants[name] = contest
        contestants["(c) transformers, eager"] = lambda: transformers_eager(model, batch, context, tokens)
        taken: dict[str, list[tuple[float, float]]] = {name: [] for name in contestants}
        for round_ in range(arguments.rounds):
            order = list(contestants) if round_ % 2 == 0 else list(reversed(contestants))
            for name in order:
                taken[name].append(contestants[name]())
                prompt_s, token_s = taken[name][-1]
                print(f"{name}: prompts {prompt_s:.1f} s, {token_s * 1e3:.1f} ms a token, "
                      f"{batch / token_s:.1f} tokens/s", flush=True)  # fmt: skip
    lines = [
        f"{parameters / 1e6:.0f} M parameters (random), batch {batch}, context {context}, "
        f"{arguments.rounds} rounds in turns, median. {processor_name()}, {os.cpu_count()} cores. Measured.",
        "",
        "| | prompts, s | ms per token | tokens/s | of (b) | of (c) |",
        "|---|---|---|---|---|---|",
    ]
    median = {name: statistics.median(token for _, token in found) for name, found in taken.items()}
    for name, found in taken.items():
        prompt_s = statistics.median(prompt for prompt, _ in found)
        ours = median[name]
        b, c = (next(value for key, value in median.items() if key.startswith(k)) for k in ("(b)", "(c)"))
        lines.append(
            f"| {name} | {prompt_s:.1f} | {ours * 1e3:.1f} | {batch / ours:.1f} | "
            f"{b / ours:.2f} | {c / ours:.2f} |"
        )
    text = "\n".join(lines) + "\n"
    print(text)
    if not arguments.no_result:
        files.write_text(RESULT, "# Lamina: speed\n\n`python -m benchmarks.lamina_speed`\n\n" + text)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
