"""The page of `trunkline plan serve`: the Pareto set as a picture and a table, in one file."""

from __future__ import annotations

from pathlib import Path

from flows import files, plots
from flows.markup import inline_svg, templates
from flows.serve_planning import Question, describe_question, describe_search
from flows.serving.lamina.simulator.planner import Plan, Point
from flows.serving.lamina.simulator.results import Interval


def write_page(path: Path, question: Question, found: Plan) -> None:
    picture = None
    if found.pareto:
        best = {id(point) for point in found.pareto}
        others = [p for p in (found.homogeneous, found.disaggregated) if p is not None and id(p) not in best]
        points = [_cost_point(point, True) for point in found.pareto]
        drawn = plots.costs([*points, *(_cost_point(point, False) for point in others)], "svg")
        picture = inline_svg(drawn, "costs", "dollars per million tokens over milliseconds between tokens")
    lines = [*describe_question(question), "", *describe_search(found)]
    page = templates().get_template("plan_serving.html.j2")
    files.write_text(path, page.render(question=question, plan=found, picture=picture, lines=lines))


def _cost_point(point: Point, joined: bool) -> plots.CostPoint:
    assert point.judged is not None
    kind = "equal devices" if point.candidate.set_up.homogeneous else "attention elsewhere"
    usd, gap = point.judged.usd_per_million_tokens, point.judged.tbt_p99_ms
    return plots.CostPoint(point.candidate.label, kind, _triple(usd), _triple(gap), joined)


def _triple(interval: Interval) -> tuple[float, float, float]:
    return interval.value, interval.low, interval.high
