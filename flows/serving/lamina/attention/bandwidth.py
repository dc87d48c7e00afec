"""How fast a worker's memory is: what `cluster.weights: auto` divides heads by.

Attention reads every key and value once per step, so the bandwidth of a copy bounds it. The measurement is
short and others may run beside it; it tells a fast device from a slow one, not two equal ones apart.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import torch

from flows.serving.lamina.attention.frames import FrameError, FrameType, Header, unpack_json
from flows.serving.lamina.attention.transport import dial

BUFFER_BYTES = 32 << 20
"""Of each of two buffers, divided over the threads: more than the caches of most cores."""
BUDGET_S = 0.05
MAX_COPIES = 50


def copy_bandwidth(threads: int, device: str = "cpu", budget_s: float = BUDGET_S) -> float:
    """Bytes read and written per second by the fastest of the copies that fit into `budget_s`; at least one
    is made beside the one that warms up."""
    elements = BUFFER_BYTES // 4 // threads
    pairs = [
        (torch.zeros(elements, device=device), torch.ones(elements, device=device)) for _ in range(threads)
    ]

    def copy(pair: tuple[torch.Tensor, torch.Tensor]) -> None:
        pair[0].copy_(pair[1])

    moved = 2 * 4 * elements * threads
    fastest_s = float("inf")
    with ThreadPoolExecutor(threads) as pool:
        end = time.monotonic() + budget_s
        for run in range(MAX_COPIES):
            began = time.monotonic()
            list(pool.map(copy, pairs))
            if torch.device(device).type == "cuda":
                torch.cuda.synchronize()
            now = time.monotonic()
            if run:
                fastest_s = min(fastest_s, now - began)
                if now > end:
                    break
    return moved / fastest_s


def ask_bandwidths(
    addresses: Sequence[tuple[str, int]], token: bytes, epoch: int, timeout_s: float = 5.0
) -> list[float]:
    """What each worker measured at its start, bytes per second.

    Raises:
        LinkClosed, LinkTimeout: a worker does not answer.
        FrameError: it answers nonsense, or is in a later epoch already.
    """
    found = []
    for host, port in addresses:
        link = dial(host, port, timeout_s)
        try:
            for question, payload in ((FrameType.HELLO, token), (FrameType.STATS, b"")):
                link.send(Header(question, epoch), payload, timeout_s)
                frame = link.receive(timeout_s)
                answer = unpack_json(frame)
                if frame.header.type is not question:
                    raise FrameError(f"attention worker {host}:{port}: {answer.get('error', 'no answer')}")
            found.append(float(answer["copy_bytes_per_s"]))
        finally:
            link.close()
    return found
