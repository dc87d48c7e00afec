"""From logits to the next token, so that a token that is chosen again is the same token.

Randomness is a function of the seed and the token's index, and of nothing else: Philox, a counter-based
generator, gives the one uniform number of each index without any state (spec section 14). Not the request's
id: a client who sends a seed twice expects the same text twice, as the OpenAI API promises.

All arithmetic is in float64, on one row at a time: no row sees another.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from flows.errors import DataError
from flows.serving.lamina.requests import Sampling


class Choice(NamedTuple):
    """A token; its log-probability and the best alternatives', if they were asked for."""

    token: int
    logprob: float | None
    alternatives: tuple[tuple[int, float], ...]


class NotFinite(DataError):
    """Logits with a NaN or infinity: nothing can be chosen from them."""


def uniform(seed: int, index: int) -> float:
    """A number in [0, 1) that belongs to this seed and index."""
    generator = np.random.Philox(key=seed, counter=[index, 0, 0, 0])
    return float(np.random.Generator(generator).random())


def choose(logits: NDArray[np.float32], sampling: Sampling, index: int) -> Choice:
    """The token of one row.

    Args:
        logits: (vocabulary,).
        index: of the token among the generated ones.

    Raises:
        NotFinite: the row holds a NaN or an infinity.
    """
    if not np.isfinite(logits).all():
        raise NotFinite("the model's logits are not finite; the request cannot go on")
    token = int(logits.argmax()) if sampling.temperature == 0 else _draw(logits, sampling, index)
    if sampling.logprobs is None:
        return Choice(token, None, ())
    scores = logits.astype(np.float64)
    scores -= scores.max()
    scores -= np.log(np.exp(scores).sum())
    best = np.argsort(-scores, kind="stable")[: sampling.logprobs]
    return Choice(token, float(scores[token]), tuple((int(i), float(scores[i])) for i in best))


def _draw(logits: NDArray[np.float32], sampling: Sampling, index: int) -> int:
    order = np.argsort(-logits, kind="stable")  # best first; equal ones by their number
    if sampling.top_k:
        order = order[: sampling.top_k]
    scaled = logits[order].astype(np.float64)
    scaled = (scaled - scaled[0]) / sampling.temperature
    weights = np.exp(scaled)
    totals = weights.cumsum()
    kept = len(order)
    if sampling.top_p < 1:  # the fewest whose probability reaches top_p
        kept = min(kept, int(np.searchsorted(totals, sampling.top_p * totals[-1])) + 1)
    drawn = uniform(sampling.seed, index) * totals[kept - 1]
    return int(order[min(int(np.searchsorted(totals[:kept], drawn, side="right")), kept - 1)])
