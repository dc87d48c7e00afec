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

FEW = 1024  # tokens among which the most probable ones nearly always are


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
    best = _best(logits, sampling.logprobs) if sampling.logprobs else ()
    return Choice(token, float(scores[token]), tuple((int(i), float(scores[i])) for i in best))


def _draw(logits: NDArray[np.float32], sampling: Sampling, index: int) -> int:
    weights = np.exp((logits.astype(np.float64) - float(logits.max())) / sampling.temperature)
    drawn = uniform(sampling.seed, index)
    if not sampling.top_k and sampling.top_p == 1:
        return _pick(weights, drawn)
    order = _best(logits, sampling.top_k or min(FEW, len(logits)))
    wanted = sampling.top_p * (weights[order].sum() if sampling.top_k else weights.sum())
    if not sampling.top_k and weights[order].sum() < wanted:  # a flat distribution: all have to be sorted
        order = _best(logits, len(logits))
    sorted_weights = weights[order]
    if sampling.top_p < 1:  # the fewest whose probability reaches top_p
        kept = int(np.searchsorted(sorted_weights.cumsum(), wanted)) + 1
        sorted_weights = sorted_weights[:kept]
    return int(order[_pick(sorted_weights, drawn)])


def _pick(weights: NDArray[np.float64], drawn: float) -> int:
    totals = weights.cumsum()
    return min(int(np.searchsorted(totals, drawn * totals[-1], side="right")), len(weights) - 1)


def _best(logits: NDArray[np.float32], count: int) -> NDArray[np.intp]:
    """The `count` largest, best first, equal ones by their number; without sorting a whole vocabulary."""
    if count < len(logits):
        least = np.partition(logits, len(logits) - count)[len(logits) - count]
        above = np.flatnonzero(logits > least)
        chosen = np.concatenate([above, np.flatnonzero(logits == least)[: count - len(above)]])
    else:
        chosen = np.arange(len(logits))
    return chosen[np.argsort(-logits[chosen], kind="stable")]
