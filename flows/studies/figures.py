"""The pictures of a study from its analysis, as PNG for the folder or SVG for the page."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from flows import plots
from flows.plots import Format, Group, Mark, Panel, write_count
from flows.studies.analysis import Analysis, Judged

NAMES = ("loss_over_data", "loss_over_size", "gap_over_time", "accuracy_over_loss", "held_out")
MAX_PANELS = 6


def draw(analysis: Analysis, format: Format) -> dict[str, bytes]:
    """Name → picture, of those that the table has something to show for."""
    makers: dict[str, Callable[[Analysis, Format], bytes | None]] = {
        "loss_over_data": _loss_over_data,
        "loss_over_size": _loss_over_size,
        "gap_over_time": _gap_over_time,
        "accuracy_over_loss": _accuracy_over_loss,
        "held_out": _held_out,
    }
    drawn = {name: maker(analysis, format) for name, maker in makers.items()}
    return {name: data for name, data in drawn.items() if data is not None}


def _hint(found: Judged) -> str:
    cell = found.cell
    top = "" if cell.finetuned_top1 is None else f", finetuned {cell.finetuned_top1:.2f} %"
    verdict = "" if found.verdict in ("fitted", "unknown") else f" · {found.verdict}"
    return f"{cell.label}: loss {cell.loss:.4f}{top}{verdict}"


def _mark(found: Judged, x: float, y: float) -> Mark:
    is_begin = bool(found.series_overfitted) and found.verdict == "fitted"
    return Mark(x, y, _hint(found), found.verdict == "overfitted", is_begin)


def _group(cells: Sequence[Judged], label: Callable[[Judged], str]) -> list[tuple[str, list[Judged]]]:
    """Members per label, in the order of the first of each."""
    found: dict[str, list[Judged]] = {}
    for judged in cells:
        found.setdefault(label(judged), []).append(judged)
    return list(found.items())


def _by_size(analysis: Analysis) -> list[Judged]:
    return sorted(
        analysis.cells, key=lambda found: (found.cell.parameters, found.cell.images, found.cell.iterations)
    )


def _length_panels(
    cells: Sequence[Judged], label: Callable[[Judged], str], x: Callable[[Judged], float]
) -> list[Panel]:
    """A panel per length, the longest ones if there are many."""
    lengths = sorted({found.cell.iterations for found in cells})[-MAX_PANELS:]
    panels = []
    for length in lengths:
        here = sorted((found for found in cells if found.cell.iterations == length), key=x)
        order = {name: at for at, (name, _) in enumerate(_group(cells, label))}
        groups = sorted(_group(here, label), key=lambda group: order[group[0]])
        panels.append(
            Panel(
                f"{write_count(length)} iterations",
                [Group(name, [_mark(m, x(m), m.cell.loss) for m in members]) for name, members in groups],
            )
        )
    return panels


def _loss_over_data(analysis: Analysis, format: Format) -> bytes | None:
    cells = _by_size(analysis)
    if len({found.cell.images for found in cells}) < 2:
        return None
    panels = _length_panels(cells, lambda found: found.cell.model, lambda found: found.cell.images)
    return plots.study_lines(panels, "training images", "validation loss", "loss-over-data", format)


def _loss_over_size(analysis: Analysis, format: Format) -> bytes | None:
    cells = sorted(analysis.cells, key=lambda found: (found.cell.images, found.cell.parameters))
    if len({found.cell.parameters for found in cells}) < 2:
        return None
    panels = _length_panels(cells, lambda found: found.cell.data_label, lambda found: found.cell.parameters)
    return plots.study_lines(panels, "parameters", "validation loss", "loss-over-size", format)


def _gap_over_time(analysis: Analysis, format: Format) -> bytes | None:
    """Validation minus train loss: what overfitting looks like while it happens. A panel per data set."""
    cells = [found for found in _by_size(analysis) if found.cell.train_loss is not None]
    if not cells:
        return None
    by_data = _group(sorted(cells, key=lambda found: found.cell.images), lambda found: found.cell.data_label)
    panels = [
        Panel(
            label,
            [
                Group(
                    model,
                    [
                        _mark(m, m.cell.iterations, m.cell.loss - (m.cell.train_loss or 0.0))
                        for m in sorted(same, key=lambda found: found.cell.iterations)
                    ],
                )
                for model, same in _group(
                    sorted(members, key=lambda found: found.cell.parameters), lambda found: found.cell.model
                )
            ],
        )
        for label, members in by_data[:MAX_PANELS]
    ]
    return plots.study_lines(panels, "iterations", "validation − train loss", "gap-over-time", format)


def _accuracy_over_loss(analysis: Analysis, format: Format) -> bytes | None:
    cells = [found for found in _by_size(analysis) if found.cell.finetuned_top1 is not None]
    if len(cells) < 2:
        return None
    groups = [
        Group(name, [_mark(m, m.cell.loss, m.cell.finetuned_top1 or 0.0) for m in members])
        for name, members in _group(cells, lambda found: found.cell.model)
    ]
    line = analysis.boundary
    return plots.study_scatter(
        groups,
        line.loss if line else None,
        (line.slope_below, line.intercept_below) if line else None,
        format,
    )


def _held_out(analysis: Analysis, format: Format) -> bytes | None:
    found = analysis.held_out
    if not found or not found.predictions:
        return None
    by_data: dict[str, list[Mark]] = {}
    nearest = []
    for each in found.predictions:
        hint = f"{each.cell.label}: true {each.truth:.4f}, predicted {each.predicted:.4f}"
        low, high = each.interval or (None, None)
        mark = Mark(each.truth, each.predicted, hint, not each.is_fitted, low=low, high=high)
        by_data.setdefault(each.cell.data_label, []).append(mark)
        if each.nearest is not None:
            hint = f"{each.cell.label}: true {each.truth:.4f}, next smaller model {each.nearest:.4f}"
            nearest.append(Mark(each.truth, each.nearest, hint))
    groups = [Group(label, marks) for label, marks in by_data.items()]
    return plots.study_predictions(groups, nearest, "next smaller model's loss", format)
