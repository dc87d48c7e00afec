"""Timing contestants in turns, so that whatever else the machine does meets all of them alike.

Every round runs each contestant once and yields one ratio per pair; the tables show the median over the
rounds. Seconds are the machine's and good for nothing but these ratios. On a machine with other work, one
thread and the CPU's clock (`--threads 1 --clock cpu`) are what comes closest to a quiet one.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from flows.serving.measure import processor_name

WARM_UP_ROUNDS = 2
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


@dataclass(frozen=True)
class Rounds:
    """Seconds of each contestant, one entry per round."""

    seconds: Mapping[str, list[float]]

    def median(self, name: str) -> float:
        return statistics.median(self.seconds[name])

    def speedup(self, name: str, over: str) -> float:
        """How many times as fast `name` is: the median over the rounds."""
        pairs = zip(self.seconds[name], self.seconds[over], strict=True)
        return statistics.median(theirs / ours for ours, theirs in pairs)

    def spread(self, name: str, over: str) -> tuple[float, float]:
        """Least and largest speed-up of a round."""
        ratios = [b / a for a, b in zip(self.seconds[name], self.seconds[over], strict=True)]
        return min(ratios), max(ratios)


def interleave(
    contestants: Mapping[str, Callable[[], object]],
    rounds: int,
    device: torch.device | None = None,
    clock: Callable[[], float] = time.perf_counter,
    repeats: int = 1,
    pause_s: float = 0.0,
) -> Rounds:
    """Run all in turns, `rounds` times after warming up; the order turns round from round to round.

    Thread pools spin for a while after their work and would take the cores from the next contestant. Where
    contestants have pools of their own, `pause_s` lets them fall asleep first; one run that does not count
    then wakes the own pool, and `repeats` runs are timed together.
    """
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    order = list(contestants)
    for index in range(WARM_UP_ROUNDS + rounds):
        for name in order if index % 2 == 0 else reversed(order):
            time.sleep(pause_s)
            took = _time(contestants[name], repeats, device, clock) / repeats
            if index >= WARM_UP_ROUNDS:
                seconds[name].append(took)
    return Rounds(seconds)


def _time(
    work: Callable[[], object], repeats: int, device: torch.device | None, clock: Callable[[], float]
) -> float:
    if repeats > 1:
        work()
    if device is not None and device.type == "cuda":
        started, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(device)
        started.record()
        for _ in range(repeats):
            work()
        ended.record()
        torch.cuda.synchronize(device)
        return float(started.elapsed_time(ended)) / 1e3
    began = clock()
    for _ in range(repeats):
        work()
    return clock() - began


def describe_machine(device: torch.device | None = None) -> str:
    """One line for the head of a table."""
    if device is not None and device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        name = f"{processor_name()}, {torch.get_num_threads()} threads"
    load = os.getloadavg()[0]
    return f"{name}; torch {torch.__version__}; load average at the start {load:.1f}"
