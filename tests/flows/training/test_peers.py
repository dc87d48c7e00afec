"""A machine that falls silent, or whose store is gone, is noticed while the main thread may hang."""

from __future__ import annotations

import dataclasses
import threading
from typing import Any

import pytest
from forked import in_processes
from small_training import DISTRIBUTED, training

from flows.errors import PeerLost
from flows.params import Training
from flows.training import initialize_processes, peers

PATIENCE_S = 60.0


def member(settings: Training, silent: int, leaves: int) -> str:
    """One of two machines: what it hears of the other, while `silent` does not count up or `leaves` ends."""
    processes = initialize_processes(settings, DISTRIBUTED)
    processes = dataclasses.replace(processes, machine=processes.rank, machines=2, local_rank=0)
    if processes.rank == silent:
        peers._Watch._keep_beating = lambda self: None  # type: ignore[method-assign]
    peers.GRACE_S = 0.5
    heard: list[PeerLost] = []
    told = threading.Event()

    def listen(error: PeerLost) -> None:
        heard.append(error)
        told.set()

    with peers.watch_peers(processes, 2.0, listen):
        if processes.rank == leaves:
            return "left"
        told.wait(PATIENCE_S if silent >= 0 or leaves >= 0 else 4.0)
    return str(heard[0]) if heard else "nothing"


def test_two_that_count_hear_nothing(raw_params: dict[str, Any]) -> None:
    assert in_processes(2, member, training(raw_params), -1, -1) == ["nothing", "nothing"]


def test_a_silent_machine_is_named(raw_params: dict[str, Any]) -> None:
    answer, _ = in_processes(2, member, training(raw_params), 1, -1)
    assert answer.startswith("machine 1 of 0-1 has not been heard of for ")
    assert "start the same command on all machines again" in answer


def test_the_end_of_the_machine_with_the_store_is_noticed(raw_params: dict[str, Any]) -> None:
    left, answer = in_processes(2, member, training(raw_params), -1, 0)
    assert left == "left"
    assert answer.startswith("machine 0 of 0-1 has not been heard of")


def test_one_machine_needs_no_watch(monkeypatch: pytest.MonkeyPatch, raw_params: dict[str, Any]) -> None:
    processes = initialize_processes(training(raw_params), DISTRIBUTED)
    before = threading.active_count()
    with peers.watch_peers(processes, 1.0, lambda error: pytest.fail(str(error))):
        assert threading.active_count() == before
