"""Which cells have seen their images too often (spec 4.3).

A series is one model on one set of images at several lengths. It is overfitted if its longest training ends
with a higher validation loss than its shortest; a cell lies past the minimum of its series if a shorter
training reached a lower loss. Of a series with one length nothing can be said, and that is said.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from flows.studies.cells import Cell

Verdict = Literal["fitted", "rising", "overfitted", "unknown"]
MEANING = {
    "fitted": "no shorter training of its series reached a lower loss",
    "rising": "a shorter training reached a lower loss, but its series ends below its beginning",
    "overfitted": "a shorter training reached a lower loss, and its series ends above its beginning",
    "unknown": "its series has one length only",
}


@dataclass(frozen=True)
class Series:
    """One model on one set of images, by length; repetitions of a length (seeds) count as their mean."""

    model: str
    parameters: float
    images: float
    data: str
    iterations: tuple[float, ...]
    losses: tuple[float, ...]
    accuracies: tuple[float | None, ...]

    @property
    def is_overfitted(self) -> bool | None:
        """None if there is one length only."""
        return None if len(self.losses) < 2 else self.losses[-1] > self.losses[0]

    @property
    def minimum_at(self) -> float:
        """The length with the lowest loss, the shortest of equals."""
        return self.iterations[self.losses.index(min(self.losses))]

    @property
    def rises_from_start(self) -> bool:
        """Its best length may be shorter still than any that was tried."""
        return bool(self.is_overfitted) and self.minimum_at == self.iterations[0]

    @property
    def accuracy_change(self) -> float | None:
        """Percentage points from the shortest to the longest training."""
        first, last = self.accuracies[0], self.accuracies[-1]
        return None if first is None or last is None or len(self.losses) < 2 else last - first


def find_series(cells: Sequence[Cell]) -> dict[tuple[str, float], Series]:
    """All series, smaller models and fewer images first."""
    members: dict[tuple[str, float], list[Cell]] = {}
    for cell in sorted(cells, key=lambda cell: (cell.parameters, cell.model, cell.images)):
        members.setdefault(cell.series, []).append(cell)
    return {key: _make_series(found) for key, found in members.items()}


def _make_series(cells: Sequence[Cell]) -> Series:
    lengths = sorted({cell.iterations for cell in cells})
    at = [[cell for cell in cells if cell.iterations == length] for length in lengths]
    tops = [[c.finetuned_top1 for c in same if c.finetuned_top1 is not None] for same in at]
    first = cells[0]
    return Series(
        first.model,
        first.parameters,
        first.images,
        first.data_label,
        tuple(lengths),
        tuple(statistics.fmean(cell.loss for cell in same) for same in at),
        tuple(statistics.fmean(found) if found else None for found in tops),
    )


def judge_cell(cell: Cell, series: Series) -> Verdict:
    if series.is_overfitted is None:
        return "unknown"
    if cell.iterations <= series.minimum_at:
        return "fitted"
    return "overfitted" if series.is_overfitted else "rising"


def can_be_fitted(cell: Cell, series: Series) -> bool:
    """Whether a law without overfitting may describe the cell: it is not past its series' minimum, nor of a
    series that only rises (whose minimum lies at an unknown shorter length)."""
    return judge_cell(cell, series) in ("fitted", "unknown") and not series.rises_from_start
