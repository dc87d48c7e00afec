"""The engine's socket to the HTTP process: one conversation at a time, and nothing left of the others."""

from __future__ import annotations

import queue
import socket
import threading
import time
from pathlib import Path

import pytest

from flows.serving.lamina.engine.endpoint import Endpoint
from flows.serving.lamina.requests import (
    Accepted,
    AskMetrics,
    Cancel,
    Heartbeat,
    decode_from_engine,
    encode,
)


@pytest.fixture
def endpoint(tmp_path: Path):
    taken: queue.Queue = queue.Queue()
    made = Endpoint(
        tmp_path / "s",
        0.02,
        deliver=taken.put,
        heartbeat=lambda: Heartbeat(state="ready"),
        metrics=lambda: "# text",
    )
    yield made, taken, tmp_path / "s"
    made.close()


def connect(path: Path) -> socket.socket:
    peer = socket.socket(socket.AF_UNIX)
    peer.settimeout(20)
    peer.connect(str(path))
    return peer


def kinds(peer: socket.socket, wanted: str) -> list[str]:
    """Types of the messages up to the wanted one."""
    seen = []
    for line in peer.makefile("rb"):
        seen.append(decode_from_engine(line).type)
        if seen[-1] == wanted:
            return seen
    raise AssertionError(f"it ended after {seen}")


def test_a_new_connection_replaces_the_old_one_and_no_thread_stays(endpoint) -> None:
    made, taken, path = endpoint
    before = threading.active_count()
    for _ in range(6):
        peer = connect(path)
        assert kinds(peer, "heartbeat")
    peer.sendall(encode(Cancel(id="r")) + encode(AskMetrics()))
    assert taken.get(timeout=20) == Cancel(id="r")
    kinds(peer, "metrics_text")
    made.send(Accepted(id="r"))
    kinds(peer, "accepted")
    deadline = time.monotonic() + 20
    while threading.active_count() > before + 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threading.active_count() == before + 2  # reader and writer of the last one


@pytest.mark.parametrize("rubbish", [b"{}\n", b"\xff\xfe\n", b"[" * 5000 + b"\n", b"no end"])
def test_a_peer_that_sends_rubbish_is_cut_off_and_the_next_one_is_heard(endpoint, rubbish: bytes) -> None:
    made, taken, path = endpoint
    peer = connect(path)
    peer.sendall(rubbish)
    peer.shutdown(socket.SHUT_WR)
    while peer.recv(65536):
        pass
    for _ in range(100):
        made.send(Accepted(id="nobody"))  # without a connection it is dropped, and keeps nothing
    assert made._current is None or made._current._unsent.qsize() <= 2
    following = connect(path)
    kinds(following, "heartbeat")
    following.sendall(encode(Cancel(id="r")))
    assert taken.get(timeout=20) == Cancel(id="r")
