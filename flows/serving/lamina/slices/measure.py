"""Time per token and memory of a bundle, in a process of its own that `flows.language_gates` starts.

One text grows by one token at a time, all in this process with the exact, slow attention of
`runner.LocalAttention`: it bounds what a machine can be asked for, and says nothing of how fast a server is.
Memory is the growth of the process's peak from just before the bundle is opened, as in
`flows.serving.measure`.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np

from flows.serving.lamina.slices.bundle import read_bundle
from flows.serving.lamina.slices.runner import LocalAttention, Row, open_slices
from flows.serving.measure import MEGABYTE, peak_resident_bytes, reset_peak, resident_bytes

WARM_UP_TOKENS = 3


def time_tokens(folder: Path, tokens: int, threads: int) -> dict[str, float]:
    """Milliseconds per token (median, 95th percentile), how many were timed, and MB of memory."""
    before = resident_bytes()
    slices = open_slices(read_bundle(folder), split=False, threads=threads)
    manifest = slices.bundle.manifest
    attention = LocalAttention(manifest.attention)
    count = min(tokens + WARM_UP_TOKENS, manifest.max_context)
    warm_up = min(WARM_UP_TOKENS, count - 1)
    token, seconds = manifest.bos_token_id or 0, np.empty(count)
    for position in range(count):
        began = time.perf_counter()
        attention.begin([Row(0, position)])
        logits = slices.run(np.array([token], np.int64), np.array([position], np.int64), attention)
        token = int(logits[0].argmax())
        seconds[position] = time.perf_counter() - began
    p50, p95 = np.percentile(seconds[warm_up:], [50, 95]) * 1e3
    return {
        "tokens": count - warm_up,
        "p50_ms": round(float(p50), 4),
        "p95_ms": round(float(p95), 4),
        "memory_mb": round(max(0, peak_resident_bytes() - before) / MEGABYTE, 2),
    }


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m flows.serving.lamina.slices.measure", description=__doc__
    )
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--threads", type=int, default=0, help="0 = available cores")
    arguments = parser.parse_args(argv)
    reset_peak()
    print(json.dumps(time_tokens(arguments.bundle, arguments.tokens, arguments.threads)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
