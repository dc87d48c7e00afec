"""How long an iteration takes, learnt from those that have run: a + b·rows + c·keys attended.

For admission by a promised time per token. Non-negative least squares over the last iterations, so that more
work is never predicted to take less time.
"""

from __future__ import annotations

from collections import deque

import numpy as np
from scipy.optimize import nnls

WINDOW = 256
LEAST = 8  # iterations before anything is predicted
REFIT = 16  # iterations between two fits


class StepTime:
    """Prediction of an iteration's seconds."""

    def __init__(self) -> None:
        self._seen: deque[tuple[float, float, float, float]] = deque(maxlen=WINDOW)
        self._since_fit = 0
        self._coefficients: np.ndarray | None = None

    def observe(self, rows: int, attended: int, seconds: float) -> None:
        """An iteration of so many rows, which attended to so many keys together, took so long."""
        self._seen.append((1.0, float(rows), float(attended), seconds))
        self._since_fit += 1
        if len(self._seen) >= LEAST and (self._coefficients is None or self._since_fit >= REFIT):
            table = np.array(self._seen)
            scale = table[:, :3].max(axis=0).clip(1.0)
            solution, _ = nnls(table[:, :3] / scale, table[:, 3])
            self._coefficients = solution / scale
            self._since_fit = 0

    def predict(self, rows: int, attended: int) -> float | None:
        """Seconds, or None before enough has been seen."""
        if self._coefficients is None:
            return None
        return float(self._coefficients @ (1.0, float(rows), float(attended)))
