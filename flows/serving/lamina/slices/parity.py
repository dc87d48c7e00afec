"""Do the slices compute what the model computes? Random texts through both, every logit compared.

The model runs as transformers runs it: whole texts at once, eager attention with its own masks. The slices
run as they will be served: the texts as prompt chunks beside rows that decode, attention with its K and V
kept by position. What agrees here agrees in the marker's properties, the cuts, the ONNX graphs and the shared
weights.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from flows.errors import GateFailed
from flows.serving.lamina.slices.bundle import Bundle, Parity
from flows.serving.lamina.slices.runner import Floats, LocalAttention, Row, Slices, open_slices

SAMPLES = 2
TOKENS = 48
BEYOND_WINDOW = 8
MOST_TOKENS = 320  # a window above this is not walked out of, and the report says so
CHUNK_ROWS = 12


def measure_parity(bundle: Bundle, model: Any, tolerance: float, seed: int = 0) -> Parity:
    """
    Args:
        model: the transformers model that was sliced. Its attention is eager afterwards.

    Raises:
        GateFailed: a logit is not finite or differs by more than `tolerance`.
    """
    manifest = bundle.manifest
    windows = [layer.window for layer in manifest.attention if layer.window]
    wanted = max([TOKENS, *(window + BEYOND_WINDOW for window in windows)])
    tokens = min(wanted, MOST_TOKENS, manifest.max_context)
    generator = np.random.default_rng(seed)
    texts = generator.integers(0, manifest.vocab_size, (SAMPLES, tokens))
    model.set_attn_implementation("eager")
    with torch.no_grad():
        expected = np.stack([model(torch.from_numpy(text)[None], use_cache=False).logits[0].numpy()
                             for text in texts])  # fmt: skip
    ways = (True, False) if any(step.fused for step in manifest.steps) else (True,)
    found = np.stack([replay(open_slices(bundle, split=split), texts) for split in ways])
    error = np.abs(found - expected)
    parity = Parity(
        samples=SAMPLES,
        tokens=int(texts.size),
        longest_context=tokens,
        max_abs_error=float(error.max()),
        max_relative_error=float((error / np.maximum(np.abs(expected), 1.0)).max()),
        argmax_agreement=float((found.argmax(-1) == expected.argmax(-1)).mean()),
        tolerance=tolerance,
        covers_windows=tokens > max(windows, default=0),
    )
    if not parity.max_abs_error <= tolerance:  # also when it is not a number
        raise GateFailed(
            f"the slices of {manifest.name} differ from the model by {parity.max_abs_error:.2g} in a logit, "
            f"{tolerance:g} is allowed; nothing was written"
        )
    return parity


def replay(slices: Slices, texts: np.ndarray[Any, np.dtype[np.int64]]) -> Floats:
    """Logits of every position, (texts, tokens, vocabulary): text n starts when text n-1 has had a chunk, and
    the last third of each goes row by row, so that chunks and single rows mix."""
    samples, tokens = texts.shape
    attention = LocalAttention(slices.bundle.manifest.attention)
    done = [0] * samples
    chunked = tokens - tokens // 3
    answers = np.empty((samples, tokens, slices.bundle.manifest.vocab_size), np.float32)
    turn = 0
    while min(done) < tokens:
        rows: list[Row] = []
        for text in range(min(turn + 1, samples)):
            count = min(CHUNK_ROWS, chunked - done[text]) if done[text] < chunked else 1
            rows += [Row(text, done[text] + n) for n in range(count) if done[text] < tokens]
        attention.begin(rows)
        positions = np.array([row.position for row in rows], np.int64)
        ids = np.array([texts[row.request, row.position] for row in rows], np.int64)
        for row, logits in zip(rows, slices.run(ids, positions, attention), strict=True):
            answers[row.request, row.position] = logits
            done[row.request] = row.position + 1
        turn += 1
    return answers
