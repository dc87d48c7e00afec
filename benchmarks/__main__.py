"""`make bench`: training step, inference, data path and memory, one after another; one text, minutes in all.

    python -m benchmarks [--only train_step inference data_path memory]

Each part runs in a process of its own and writes its table to benchmarks/results/; a part that fails is said
so at the end and does not keep the others back.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time

PARTS = {"train_step": 300, "inference": 400, "data_path": 200, "memory": 500}
"""Seconds that a part may take at most, on two cores without other work far less."""


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--only", nargs="+", choices=list(PARTS), default=list(PARTS))
    failed = []
    for part in parser.parse_args(argv).only:
        began = time.monotonic()
        print(f"--- {part}", file=sys.stderr, flush=True)
        try:
            done = subprocess.run(
                [sys.executable, "-W", "ignore", "-m", f"benchmarks.{part}"], timeout=PARTS[part]
            )
            reason = f"exit code {done.returncode}" if done.returncode else ""
        except subprocess.TimeoutExpired:
            reason = f"not done after {PARTS[part]} s"
        if reason:
            failed.append(f"{part} ({reason})")
        print(f"--- {part}: {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
    if failed:
        print(f"error: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
