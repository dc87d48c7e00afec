"""Whether the bits of a row depend on the rows beside it, tried out on this machine (spec section 12).

Recomputation after a loss runs the same tokens in other company. The text goes on unchanged only where a
row's bits do not depend on its company: a property of one build of ONNX Runtime on one kind of CPU, so it is
tried at every start and never assumed.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from flows.serving.lamina.slices.runner import Slices

ROWS = 40
GROUPS = (1, 2, 3, 5, 8, 16)  # with what is left, sizes in which the same rows are run again


class _GivenAttention:
    """Some output for every row and layer, whoever asks."""

    def __init__(self, outputs: NDArray[np.float32], rows: slice) -> None:
        self._outputs, self._rows = outputs, rows

    def send_q(self, layer: int, q: NDArray[np.float32]) -> None:
        pass

    def send_kv(self, layer: int, k: NDArray[np.float32], v: NDArray[np.float32]) -> None:
        pass

    def receive(self, layer: int) -> NDArray[np.float32]:
        return self._outputs[layer % len(self._outputs), self._rows]


def slices_batch_invariant(slices: Slices) -> bool:
    """Whether the logits of rows run together have the bits of the same rows run in smaller groups."""
    manifest = slices.bundle.manifest
    rows = min(ROWS, manifest.max_context)
    generator = np.random.default_rng(0)
    ids = generator.integers(0, manifest.vocab_size, rows)
    positions = np.arange(rows)
    shape = (2, rows, manifest.heads, manifest.head_size)
    outputs = generator.standard_normal(shape, dtype=np.float32)

    def run(part: slice) -> NDArray[np.float32]:
        return slices.run(ids[part], positions[part], _GivenAttention(outputs, part))

    together = run(slice(0, rows))
    start = 0
    for size in (*GROUPS, rows):
        part = slice(start, min(rows, start + size))
        if start >= rows:
            break
        if not np.array_equal(run(part), together[part]):
            return False
        start += size
    return True
