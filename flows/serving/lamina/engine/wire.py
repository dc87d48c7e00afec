"""The attention of one micro-batch of one iteration, in the three calls that slices make."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from flows.serving.lamina.attention.pool import AttentionPool


class Wire:
    """See `slices.runner.Attention`."""

    def __init__(self, pool: AttentionPool, iteration: int, micro_batch: int) -> None:
        self._pool, self._key = pool, (iteration, micro_batch)

    def send_q(self, layer: int, q: NDArray[np.float32]) -> None:
        self._pool.send_q(layer, q, *self._key)

    def send_kv(self, layer: int, k: NDArray[np.float32], v: NDArray[np.float32]) -> None:
        self._pool.send_kv(layer, k, v, *self._key)

    def receive(self, layer: int) -> NDArray[np.float32]:
        return self._pool.receive(layer, *self._key)
