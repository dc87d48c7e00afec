"""A cache for position biases, which depend on weights alone and need computing only once in evaluation.

The one invariant: a cached value is never returned for other weights than those it was computed from. Every
look-up compares the weights' storage and version counter, which covers optimiser steps, ``load_state_dict``
and moves; the cache keeps the old storage alive meanwhile, so that a recycled address cannot pass for it.
Writing through ``weight.data`` is the one change PyTorch does not count: ``train()`` and ``eval()`` clear the
cache.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


class BiasCache:
    """Holds one tensor together with the weights it was computed from; a copy or a pickle of it is empty."""

    _value: Tensor | None
    _weights: tuple[tuple[Tensor, int], ...]
    _context: object

    def __init__(self) -> None:
        self.clear()

    def get(self, weights: Sequence[Tensor], context: object, compute: Callable[[], Tensor]) -> Tensor:
        """The value for these weights within ``context`` (compared by identity), computed at most once."""
        if self._value is None or self._context is not context or not self._is_current(weights):
            # Outside of inference mode, so that the value may later meet autograd.
            with torch.inference_mode(False), torch.no_grad():
                self._value = compute()
            self._weights = tuple((weight.detach(), _version(weight)) for weight in weights)
            self._context = context
        return self._value

    def clear(self) -> None:
        """Forget the value and let go of the weights."""
        self._value = None
        self._weights = ()
        self._context = None

    def _is_current(self, weights: Sequence[Tensor]) -> bool:
        return len(weights) == len(self._weights) and all(
            weight.data_ptr() == seen.data_ptr()
            and weight.dtype == seen.dtype
            and _version(weight) == version
            for weight, (seen, version) in zip(weights, self._weights, strict=True)
        )

    def __reduce__(self) -> tuple[type[BiasCache], tuple[()]]:
        return (BiasCache, ())


def _version(tensor: Tensor) -> int:
    """How often the tensor was written to; tensors made in inference mode do not count and cannot be
    changed."""
    return -1 if tensor.is_inference() else tensor._version
