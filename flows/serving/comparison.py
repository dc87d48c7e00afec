"""How closely an exported network follows its PyTorch original: pure functions on logits.

The parity stage runs both and feeds the numbers here; the limits come from params.yaml.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Logits = NDArray[np.float32]


@dataclass(frozen=True)
class Comparison:
    """One variant on one provider at one batch size against PyTorch, over the same samples."""

    variant: str
    provider: str
    batch_size: int
    max_abs_error: float  # of the logits
    mean_abs_error: float
    min_cosine: float  # smallest cosine similarity of two logit vectors of the same image
    mean_cosine: float
    agreement: float  # fraction of equal top-1 answers
    accuracy: float  # top-1 against the labels

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Check:
    """One number against its limit in params.yaml."""

    name: str
    value: float
    relation: Literal["<=", ">="]
    limit: float
    key: str  # of params.yaml

    @property
    def passed(self) -> bool:
        """False for NaN as well."""
        return self.value <= self.limit if self.relation == "<=" else self.value >= self.limit

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "passed": self.passed}


def compare(
    reference: Logits,
    logits: Logits,
    labels: NDArray[np.int64],
    *,
    variant: str,
    provider: str,
    batch_size: int,
) -> Comparison:
    """Compare two (n, classes) arrays of the same samples.

    Raises:
        ValueError: shapes differ.
    """
    if reference.shape != logits.shape:
        raise ValueError(f"logits of shape {logits.shape} cannot be compared with {reference.shape}")
    error = np.abs(reference.astype(np.float64) - logits)
    cosine = cosine_similarity(reference, logits)
    return Comparison(
        variant=variant,
        provider=provider,
        batch_size=batch_size,
        max_abs_error=float(error.max()),
        mean_abs_error=float(error.mean()),
        min_cosine=float(cosine.min()),
        mean_cosine=float(cosine.mean()),
        agreement=float((reference.argmax(1) == logits.argmax(1)).mean()),
        accuracy=accuracy(logits, labels),
    )


def accuracy(logits: Logits, labels: NDArray[np.int64]) -> float:
    """Top-1, fraction."""
    return float((logits.argmax(1) == labels).mean())


def cosine_similarity(first: Logits, second: Logits) -> NDArray[np.float64]:
    """Per row, (n,); 1 where both rows are zero."""
    a, b = first.astype(np.float64), second.astype(np.float64)
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    similarity = (a * b).sum(1) / np.maximum(norms, np.finfo(np.float64).tiny)
    return np.asarray(np.where(norms > 0, similarity, (a == b).all(1)))


def run_in_batches(
    run: Callable[[NDArray[np.float32]], Logits], images: NDArray[np.float32], batch_size: int
) -> Logits:
    """Logits (n, classes) of all images, `batch_size` at a time; the last batch may be smaller."""
    return np.concatenate(
        [run(images[start : start + batch_size]) for start in range(0, len(images), batch_size)]
    )


def worst(comparisons: list[Comparison], variant: str) -> Comparison:
    """The comparisons of `variant` folded into one that is as bad as the worst in every column."""
    chosen = [entry for entry in comparisons if entry.variant == variant]
    return Comparison(
        variant=variant,
        provider=", ".join(dict.fromkeys(entry.provider for entry in chosen)),
        batch_size=0,
        max_abs_error=_fold(max, [entry.max_abs_error for entry in chosen]),
        mean_abs_error=_fold(max, [entry.mean_abs_error for entry in chosen]),
        min_cosine=_fold(min, [entry.min_cosine for entry in chosen]),
        mean_cosine=_fold(min, [entry.mean_cosine for entry in chosen]),
        agreement=_fold(min, [entry.agreement for entry in chosen]),
        accuracy=_fold(min, [entry.accuracy for entry in chosen]),
    )


def _fold(function: Callable[[list[float]], float], values: list[float]) -> float:
    """max or min that lets a NaN win instead of hiding it."""
    return float("nan") if any(np.isnan(values)) else function(values)
