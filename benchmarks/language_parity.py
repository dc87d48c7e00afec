"""Do the slices of nine families of decoders say what transformers says, token for token?

    python -m benchmarks.language_parity [--families llama gemma2] [--tokens 200] [--model DIR]

Every family with tiny random weights is exported as a user would, and two prompts are continued greedily: by
transformers, one after the other, eager attention and a KV cache; and by the slices, both at once, prompts in
chunks beside rows that decode. The sliding windows are shorter than the texts. Compared are all tokens, and
the logits that each was chosen from. `--model` adds a folder of a real model.

Writes benchmarks/results/language_parity.md. The exit code is 1 unless every family passes.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from flows import files
from flows.errors import TrunklineError
from flows.serving.lamina.slices.export import TOLERANCE, export_bundle
from flows.serving.lamina.slices.runner import greedy, open_slices

RESULT = Path("benchmarks/results/language_parity.md")
SEED = 0
PROMPTS = (23, 5)  # tokens
CHUNK_ROWS = 8
SIZES: dict[str, Any] = {
    "vocab_size": 211,
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,  # so that the likeliest token is likelier by far more than rounding
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {},
    "qwen3": {"head_dim": 16},  # heads · head size is not the hidden size
    # and soft caps; with a tied output matrix its random weights say one token for ever
    "gemma2": {
        "head_dim": 16,
        "sliding_window": 24,
        "query_pre_attn_scalar": 16,
        "tie_word_embeddings": False,
    },
    "mistral": {"sliding_window": 24},
    "phi3": {},
    "gpt_neox": {"num_key_value_heads": None},
    "gpt2": {},
    "opt": {"ffn_dim": 56, "word_embed_proj_dim": 32, "init_std": 0.2},
}
HEADER = ("family", "attention", "tokens", "distinct", "same", "first other", "logits, max abs",
          "bytes kept / naive", "graphs", "export s")  # fmt: skip


def make_model(family: str, folder: Path) -> Path:
    """Write a tiny random model of a family, as Hugging Face has them."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(SEED)
    older = {"hidden_size": "n_embd", "num_hidden_layers": "n_layer", "num_attention_heads": "n_head",
             "max_position_embeddings": "n_positions"}  # fmt: skip
    names = older if family == "gpt2" else {}
    values = {
        names.get(key, key): value for key, value in (SIZES | FAMILIES[family]).items() if value is not None
    }
    ends = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **values, **ends))
    model.save_pretrained(folder)
    return folder


def continue_eagerly(folder: Path, prompt: list[int], tokens: int) -> tuple[list[int], np.ndarray[Any, Any]]:
    """What transformers says after a prompt, and the logits of each token."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation="eager", dtype=torch.float32
    ).eval()
    new, past = torch.tensor([prompt]), None
    said: list[int] = []
    logits = []
    with torch.no_grad():
        for _ in range(tokens):
            answer = model(input_ids=new, past_key_values=past, use_cache=True)
            past = answer.past_key_values
            logits.append(answer.logits[0, -1].numpy())
            said.append(int(logits[-1].argmax()))
            new = torch.tensor([[said[-1]]])
    return said, np.stack(logits)


def measure(name: str, model: Path, folder: Path, tokens: int) -> tuple[list[str], bool]:
    """One row of the table, and whether the family passes."""
    began = time.monotonic()
    bundle = export_bundle(model, folder / "bundle")
    export_s = time.monotonic() - began
    manifest = bundle.manifest
    generator = np.random.default_rng(SEED)
    prompts = [generator.integers(3, manifest.vocab_size, count).tolist() for count in PROMPTS]
    tokens = min(tokens, manifest.max_context - max(PROMPTS))
    endless = bundle.manifest.model_copy(
        update={"eos_token_ids": ()}
    )  # compare all tokens, also after an end
    found = greedy(open_slices(type(bundle)(bundle.folder, endless)), prompts, tokens, chunk_rows=CHUNK_ROWS)
    same, error, other = 0, 0.0, tokens
    distinct: set[int] = set()  # few would mean texts that repeat themselves, which prove little
    for prompt, slices in zip(prompts, found, strict=True):
        said, logits = continue_eagerly(model, prompt, tokens)
        distinct.update(said)
        differ = [n for n, (a, b) in enumerate(zip(said, slices.tokens, strict=True)) if a != b]
        agreed = differ[0] if differ else tokens
        other = min(other, agreed)
        same += sum(a == b for a, b in zip(said, slices.tokens, strict=True))
        # After a different token the texts differ, and logits say nothing.
        error = max(error, float(np.abs(logits[: agreed + 1] - slices.logits[: agreed + 1]).max()))
    windows = sorted({layer.window for layer in manifest.attention})
    caps = sorted({layer.soft_cap for layer in manifest.attention})
    attention = f"{manifest.heads}/{manifest.kv_heads} heads of {manifest.head_size}"
    attention += f", window {'/'.join(map(str, windows))}" if any(windows) else ""
    attention += f", soft cap {caps[-1]:g}" if any(caps) else ""
    kept = max(step.context_bytes_per_row for step in manifest.steps)
    naive = max(step.naive_bytes_per_row for step in manifest.steps)
    total = tokens * len(prompts)
    passed = same == total and error <= TOLERANCE
    row = [name, attention, str(total), str(len(distinct)), str(same), "–" if other == tokens else str(other),
           f"{error:.1e}", f"{kept:g} / {naive:g}", str(len(manifest.graphs)), f"{export_s:.1f}"]  # fmt: skip
    return row, passed


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.language_parity",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--families", nargs="*", choices=list(FAMILIES), default=list(FAMILIES))
    parser.add_argument("--tokens", type=int, default=200, help="per prompt")
    parser.add_argument("--model", type=Path, action="append", default=[], help="folder of a real model")
    parser.add_argument("--no-write", action="store_true", help="print only")
    given = parser.parse_args(argv)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    from transformers.utils import logging

    logging.disable_progress_bar()
    lines = [f"| {' | '.join(HEADER)} |", f"|{'---|' * len(HEADER)}"]
    print("\n".join(lines), flush=True)
    failed = []
    for name in [*given.families, *map(str, given.model)]:
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            try:
                model = make_model(name, folder / "model") if name in FAMILIES else Path(name)
                row, passed = measure(Path(name).name, model, folder, given.tokens)
            except TrunklineError as error:
                row, passed = [name, f"error: {error}", *("" for _ in HEADER[2:])], False
        lines.append(f"| {' | '.join(row)} |")
        print(lines[-1], flush=True)
        failed += [] if passed else [name]
    verdict = (
        f"failed: {', '.join(failed)}" if failed else f"all pass: same tokens, logits within {TOLERANCE:g}"
    )
    print(verdict)
    if not given.no_write:
        title = f"# Slices against transformers: greedy, {given.tokens} tokens after {len(PROMPTS)} prompts"
        made = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "onnxruntime"))
        files.write_text(RESULT, "\n".join([title, "", *lines, "", f"{verdict}; {made}", ""]))
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
