"""Keys and values that survive the loss of a worker, bit for bit (spec section 14, parity).

One further worker stores, for every position and layer, the XOR of the bits that the workers of a head-level
partition store. Shards with fewer heads count as padded with zero bits. What any one of them held is the XOR
of what all the others hold: nothing is computed again, and no bit differs.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]


def parity(shards: Iterable[Floats], heads: int) -> Floats:
    """XOR of the bits of shards (rows, heads of each, hd), as (rows, heads, hd)."""
    total: NDArray[np.uint32] | None = None
    for shard in shards:
        bits = np.ascontiguousarray(shard).view(np.uint32)
        if total is None:
            total = np.zeros((len(bits), heads, bits.shape[2]), np.uint32)
        total[:, : bits.shape[1]] ^= bits
    assert total is not None, "no shard"
    return total.view(np.float32)
