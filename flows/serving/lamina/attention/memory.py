"""Where the numbers of the pages lie: one layout for the compiled kernel, one for torch.

Both keep pages in arenas of one super-block each, head before page, so that the keys of one head are one run
of memory where pages follow one another, as the allocator sees to. `PageMemory` is what the kernel reads,
keys transposed within a page. `TensorMemory` has the tokens of an arena in a row, as matrix products want.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flows.serving.lamina.rows import PAGE_TOKENS

Floats = NDArray[np.float32]
Places = NDArray[np.int64]
"""Page, and token in it, of each row, (rows, 2)."""

FLOAT_BYTES = 4


class Memory(Protocol):
    """Keys and values of all layers."""

    bytes: int

    def fill(self, page: int, value: float) -> None:
        """Set all numbers of a page."""

    def take(self, layer: int, places: Places) -> tuple[Floats, Floats]:
        """Keys and values (rows, KV, hd)."""


class PageMemory:
    """For the kernel: keys (L, arenas, KV, pages, hd, 16), values (L, arenas, KV, pages, 16, hd).

    numpy asks the system for huge pages, which doubles what one core can read in a second.
    """

    def __init__(self, layers: int, arenas: int, kv_heads: int, head_dim: int, per_arena: int) -> None:
        self.per_arena = per_arena
        heads = (layers, arenas, kv_heads, per_arena)
        size = int(np.prod(heads)) * head_dim * PAGE_TOKENS
        flat = [np.zeros(size + PAGE_TOKENS, np.float32) for _ in range(2)]  # vectors may reach over the end
        self.keys = flat[0][:size].reshape(*heads, head_dim, PAGE_TOKENS)
        self.values = flat[1][:size].reshape(*heads, PAGE_TOKENS, head_dim)
        self.bytes = 2 * size * FLOAT_BYTES
        ends = range(0, size, size // layers)
        self.flat = [tuple(x[start : start + size // layers + PAGE_TOKENS] for x in flat) for start in ends]

    def fill(self, page: int, value: float) -> None:
        arena, index = divmod(page, self.per_arena)
        self.keys[:, arena, :, index] = value
        self.values[:, arena, :, index] = value

    def take(self, layer: int, places: Places) -> tuple[Floats, Floats]:
        arenas, indices = np.divmod(places[:, 0], self.per_arena)
        tokens = places[:, 1]
        return self.keys[layer][arenas, :, indices, :, tokens], self.values[layer][arenas, :, indices, tokens]


class TensorMemory:
    """For torch: keys and values (L, arenas, KV, tokens, hd)."""

    def __init__(
        self, layers: int, arenas: int, kv_heads: int, head_dim: int, per_arena: int, device: str
    ) -> None:
        self.per_arena = per_arena
        shape = (layers, arenas, kv_heads, per_arena * PAGE_TOKENS, head_dim)
        self.keys = torch.zeros(shape, device=device)
        self.values = torch.zeros(shape, device=device)
        self.bytes = 2 * self.keys.numel() * FLOAT_BYTES

    def fill(self, page: int, value: float) -> None:
        arena, tokens = self._tokens(page, 1)
        self.keys[:, arena, :, tokens] = value
        self.values[:, arena, :, tokens] = value

    def take(self, layer: int, places: Places) -> tuple[Floats, Floats]:
        arenas, tokens = self._spots(places)
        found = (memory[layer][arenas, :, tokens].cpu().numpy() for memory in (self.keys, self.values))
        return next(found), next(found)

    def write(self, layer: int, places: Places, k: Tensor, v: Tensor) -> None:
        """Keys and values (rows, KV, hd)."""
        arenas, tokens = self._spots(places)
        self.keys[layer][arenas, :, tokens] = k
        self.values[layer][arenas, :, tokens] = v

    def read(self, layer: int, pages: NDArray[np.int64]) -> tuple[Tensor, Tensor]:
        """Keys and values (KV, T, hd): in place where pages follow one another, gathered otherwise."""
        if bool((np.diff(pages) == 1).all()) and pages[0] // self.per_arena == pages[-1] // self.per_arena:
            arena, tokens = self._tokens(int(pages[0]), len(pages))
            return self.keys[layer, arena, :, tokens], self.values[layer, arena, :, tokens]
        spots = [self._tokens(page, 1) for page in pages.tolist()]
        k, v = (
            torch.cat([memory[layer, arena, :, tokens] for arena, tokens in spots], 1)
            for memory in (self.keys, self.values)
        )
        return k, v

    def _tokens(self, page: int, pages: int) -> tuple[int, slice]:
        arena, index = divmod(page, self.per_arena)
        return arena, slice(index * PAGE_TOKENS, (index + pages) * PAGE_TOKENS)

    def _spots(self, places: Places) -> tuple[Tensor, Tensor]:
        arenas, indices = np.divmod(places[:, 0], self.per_arena)
        return torch.from_numpy(arenas), torch.from_numpy(indices * PAGE_TOKENS + places[:, 1])
