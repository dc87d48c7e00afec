"""Peak memory and step time of what saves memory, and what the planner says of each.

    python -m benchmarks.memory [--model swin_v2_tiny] [--rows plain zero2 …]

Every row trains a few steps of SimMIM through the real engine (`flows.training`) in fresh processes: one for
the rows about activations, two with gloo for those about sharding. On the CPU the peak is the growth of the
resident size from just before the model is made (`VmHWM`), the largest of the processes; on a GPU it is that
of the device's allocator. Step times are ratios to the first row of the same group. Beside them stands the
planner's figure (`flows/planning/memory.py`, without its reserve for gaps: here every tensor is given back),
which has to lie within 15 % (`plan / peak`). Writes benchmarks/results/memory.md.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.interleaved import describe_machine
from flows import files, params
from flows.planning.memory import Choice, Network, footprint, trace

RESULTS = Path("benchmarks/results/memory.md")
STEPS = 4


@dataclass(frozen=True)
class Row:
    """One setting."""

    title: str
    model: str
    image_size: int
    window_size: int
    choice: Choice
    precision: str


def rows_for(model: str, image_size: int, window_size: int, batch: int, precision: str) -> dict[str, Row]:
    def row(title: str, **choice: Any) -> Row:
        chosen = Choice(**{"zero_stage": 0, "micro_batch": batch, **choice})
        return Row(title, model, image_size, window_size, chosen, precision)

    one = {
        "plain": row("all activations kept"),
        "stage1": row("stage 1 recomputed", checkpointed_stages=1),
        "stages2": row("stages 1 and 2 recomputed", checkpointed_stages=2),
        "stages4": row("all stages recomputed", checkpointed_stages=4),
        "chunks": row("attention in chunks of 8 windows", attention_chunk=8),
        "both": row("all stages recomputed, chunks of 8", checkpointed_stages=4, attention_chunk=8),
    }
    two = {"zero0": row("2 processes, no ZeRO", devices=2, micro_batch=1)}
    for stage in (1, 2, 3):
        two[f"zero{stage}"] = row(f"2 processes, ZeRO {stage}", zero_stage=stage, devices=2, micro_batch=1)
    offload = {"devices": 2, "micro_batch": 1}
    two["offload"] = row(
        "2 processes, ZeRO 2, states offloaded", zero_stage=2, zero_offload="optimizer", **offload
    )
    two["offload3"] = row(
        "2 processes, ZeRO 3, parameters offloaded", zero_stage=3, zero_offload="parameters", **offload
    )
    return {**one, **two}


# ---- one process ----


def train_few(row: Row) -> dict[str, float]:
    """Peak growth and step time of this process."""
    import models
    from flows.serving.measure import peak_resident_bytes, reset_peak, resident_bytes
    from flows.training import group_parameters, initialize_processes
    from flows.training.distributed import build_engine
    from flows.training.optimizer import build_optimizer
    from models.parameter_groups import no_weight_decay
    from models.pretext.simmim import SimMIM, random_masks

    choice = row.choice
    raw = params.read(Path("params.yaml"))
    change = {
        "batch_size": choice.micro_batch * choice.devices, "processes": choice.devices, "precision": row.precision,  # noqa: E501
        "zero_stage": choice.zero_stage, "zero_offload": choice.zero_offload, "accumulation": 1,
    }  # fmt: skip
    overlaid = params.overlay(raw, {"pretrain": {"training": change}}, "benchmark")
    checked = params.check(overlaid, "benchmark")
    settings = checked.pretrain.training
    processes = initialize_processes(settings, checked.distributed)
    images = torch.randn(choice.micro_batch, 3, row.image_size, row.image_size, device=processes.device)
    mask = random_masks(choice.micro_batch, row.image_size // 32, 0.6).to(processes.device)
    # what the libraries allocate once
    torch.nn.Linear(64, 64)(torch.randn(64, 64)).sum().backward()
    reset_peak()
    before = resident_bytes()
    backbone = models.create(
        row.model, image_size=row.image_size, window_size=row.window_size,
        activation_checkpointing=choice.checkpointed_stages, attention_chunk=choice.attention_chunk,
    )  # fmt: skip
    model = SimMIM(backbone, 32)
    optimizer = build_optimizer(model, group_parameters(model, 0.05, no_weight_decay), settings)
    engine = build_engine(model, optimizer, settings, processes)
    engine.train()
    if processes.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    seconds = []
    for _ in range(STEPS):
        began = time.perf_counter()
        engine.backward(engine(images, mask).loss)
        engine.step()
        if processes.device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    if processes.device.type == "cuda":
        peak = torch.cuda.max_memory_allocated()
    else:
        peak = peak_resident_bytes() - before
    return {"peak": float(peak), "seconds": min(seconds)}


def run_row(row: Row) -> dict[str, float]:
    """In processes of its own."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    count = row.choice.devices
    cores = max(1, len(os.sched_getaffinity(0)) // count)
    children = []
    for rank in range(count):
        variables = {
            **os.environ, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count),
            "LOCAL_WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
            "OMP_NUM_THREADS": str(cores), "PYTHONWARNINGS": "ignore",
            # every larger tensor is given back when it is freed: the resident size is what is in use
            "MALLOC_MMAP_THRESHOLD_": "262144",
        }  # fmt: skip
        command = [sys.executable, "-m", "benchmarks.memory", "--child", json.dumps(asdict(row))]
        children.append(
            subprocess.Popen(
                command, env=variables, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
            )
        )
    answers = []
    for child in children:
        out, error = child.communicate(timeout=300)
        if child.returncode:
            raise RuntimeError(f"{row.title} failed:\n{error[-2000:]}")
        answers.append(json.loads(out.splitlines()[-1]))
    return {name: max(answer[name] for answer in answers) for name in ("peak", "seconds")}


# ---- the table ----


def predicted(row: Row) -> float:
    choice = row.choice
    network = Network(row.model, row.image_size, row.window_size, row.precision)
    needs = footprint(network, choice, trace(network, choice))
    # without a GPU the host is the device
    return needs.in_use + (0.0 if torch.cuda.is_available() else needs.host)


def table(rows: dict[str, Row]) -> str:
    lines = [
        "| setting | peak MB | plan MB | plan / peak | memory | step time |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    base: dict[int, dict[str, float]] = {}
    for row in rows.values():
        found = run_row(row)
        first = base.setdefault(row.choice.devices, found)
        plan = predicted(row)
        lines.append(
            f"| {row.title} | {found['peak'] / 1e6:.0f} | {plan / 1e6:.0f} | {plan / found['peak']:.2f} | "
            f"{found['peak'] / first['peak']:.2f}× | {found['seconds'] / first['seconds']:.2f}× |"
        )
        print(lines[-1], file=sys.stderr, flush=True)
    return "\n".join(lines)


def run(names: list[str] | None = None, model: str = "swin_v2_tiny", batch: int = 8) -> str:
    machine = describe_machine()
    sections = []
    if torch.cuda.is_available():
        for big, size in (("swin_v2_large", 16), ("swin_v2_huge", 8), ("swin_v2_giant", 2)):
            rows = {
                name: row
                for name, row in rows_for(big, 192, 12, size, "bf16").items()
                if row.choice.devices == 1
            }
            sections.append(f"## {big}, 192 px, window 12, batch {size}, bf16\n\n{table(rows)}")
        machine = describe_machine(torch.device("cuda"))
    else:
        rows = rows_for(model, 192, 12, batch, "fp32")
        chosen = {name: row for name, row in rows.items() if names is None or name in names}
        sections.append(
            f"## {model}, 192 px, window 12, fp32; batch {batch}, or 1 in each of two processes\n\n{table(chosen)}"  # noqa: E501
        )
    text = f"# Memory of a training step\n\n{machine}\n\n" + "\n\n".join(sections) + "\n"
    files.write_text(RESULTS, text)
    return text


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="swin_v2_tiny")
    parser.add_argument("--batch", type=int, default=8, help="of the rows with one process")
    parser.add_argument("--rows", nargs="+")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.child:
        row = json.loads(arguments.child)
        print(json.dumps(train_few(Row(**{**row, "choice": Choice(**row["choice"])}))))
        return 0
    print(run(arguments.rows, arguments.model, arguments.batch))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
