"""The monitor's page: one HTML file that needs nothing but itself, for a person who asks what changed.

Numbers come from the report (the JSON beside the page), pictures from `flows.plots`, words from
`flows/templates/monitor.html.j2`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from markupsafe import Markup

from flows import plots
from flows.assessment import Assessment
from flows.markup import format_number, inline_svg, percent, templates
from flows.serving.statistics import PIXEL_STATISTICS, Records

QUESTIONS = {
    "embedding": "do the images look different to the network?",
    "pixels": "do they look different before the network?",
    "predictions": "does it answer other classes?",
    "confidence": "is it less sure, or surer?",
}
NAMES = ("held-out images", "served images")
DIRECTIONS = 4  # of the embedding that are drawn


def render_page(
    report: Mapping[str, Any],
    assessment: Assessment,
    reference: Records | None,
    window: Records | None,
    labels: Sequence[str],
    history: Sequence[Mapping[str, Any]],
) -> str:
    """The page as text.

    Args:
        report: what the JSON file holds.
        history: lines of earlier reports and this one, oldest first.
    """
    environment = templates(percent=percent, number=format_number)
    pictures: dict[str, Markup | None] = {"history": _history(history, report["limits"])}
    if assessment.tests and reference is not None and window is not None:
        pictures |= _drift_pictures(assessment, reference, window, labels, report["limits"]["min_effect"])
    return environment.get_template("monitor.html.j2").render(
        report=report,
        families=assessment.families(),
        questions=QUESTIONS,
        pictures=pictures,
        tiles=_tiles(report, assessment),
        sentence=_sentence(report, assessment),
        tone={"alarm": "bad", "quiet": "good"}.get(assessment.verdict, "plain"),
        number=format_number,
    )


def _sentence(report: Mapping[str, Any], assessment: Assessment) -> str:
    if assessment.verdict == "alarm":
        what = [
            name for name, found in (("drift", assessment.drift), ("answers", assessment.degraded)) if found
        ]
        places = " and ".join(what)
        return f"Outside the limits: {places}."
    if assessment.verdict == "quiet":
        return f"{report['recorded']:,} served images look like the held-out ones."
    return f"{report['recorded']:,} recorded images are too few to judge."


def _tiles(report: Mapping[str, Any], assessment: Assessment) -> list[dict[str, str]]:
    alarmed = sum(test.alarmed for test in assessment.tests)
    tests = len(assessment.tests)
    tiles = [
        {
            "label": "Images compared",
            "value": f"{report['recorded']:,}",
            "note": f"of {report['images']:,} answered",
            "tone": "",
        },
        {
            "label": "Drift tests that alarm",
            "value": f"{alarmed} of {tests}" if tests else "not judged",
            "note": f"alpha {report['limits']['alpha']:g} over all of them" if tests else "too few images",
            "tone": ("bad" if alarmed else "good") if tests else "",
        },
    ]
    if (p95 := report["latency"]["p95_ms"]) is not None:
        late = any(reason.startswith("latency") for reason in assessment.degraded)
        note = f"median {format_number(report['latency']['p50_ms'])} ms"
        note += f", p99 {format_number(report['latency']['p99_ms'])} ms"
        tiles.append(
            {
                "label": "Latency p95",
                "value": f"{format_number(p95)} ms",
                "note": note,
                "tone": "bad" if late else "",
            }
        )
    if (errors := report["error_fraction"]) is not None:
        failing = any(reason.startswith("errors") for reason in assessment.degraded)
        note = f"status 5xx of {report['requests']:,} requests"
        tiles.append(
            {"label": "Errors", "value": percent(errors), "note": note, "tone": "bad" if failing else ""}
        )
    return tiles


def _drift_pictures(
    assessment: Assessment, reference: Records, window: Records, labels: Sequence[str], min_effect: float
) -> dict[str, Markup | None]:
    rows = [(test.family, test.effect, test.alarmed) for test in assessment.tests]
    pixels = {
        name.replace("_", " "): (reference.pixels[:, column], window.pixels[:, column])
        for column, name in enumerate(PIXEL_STATISTICS)
    }
    answers = {
        "confidence": (reference.confidence, window.confidence),
        "entropy, nats": (reference.entropy, window.entropy),
    }
    directions = sorted(
        (test for test in assessment.tests if test.family == "embedding"), key=lambda test: -test.effect
    )
    for test in directions[:DIRECTIONS]:
        column = int(test.name.rpartition(" ")[2])
        answers[test.name] = (reference.embedding[:, column], window.embedding[:, column])
    shares = [
        np.bincount(records.predicted, minlength=len(labels)) / len(records)
        for records in (reference, window)
    ]
    return {
        "effects": inline_svg(
            plots.effects(rows, min_effect, "svg"), "effects", "Effect of every drift test"
        ),
        "pixels": inline_svg(
            plots.distributions(pixels, NAMES, "svg"), "pixels", "Distributions of the pixel statistics"
        ),
        "classes": inline_svg(
            plots.class_shares(labels, shares[0], shares[1], NAMES, "svg"),
            "classes",
            "Shares of the predicted classes",
        ),
        "answers": inline_svg(
            plots.distributions(answers, NAMES, "svg"),
            "answers",
            "Distributions of confidence, entropy and the directions of the embedding that moved most",
        ),
    }


def _history(history: Sequence[Mapping[str, Any]], limits: Mapping[str, Any]) -> Markup | None:
    if len(history) < 2:
        return None

    def or_nan(value: float | None) -> float:
        return math.nan if value is None else value

    families = list(dict.fromkeys(name for line in history for name in line["effects"]))
    picture = plots.traffic_history(
        [(history[-1]["time"] - line["time"]) / 3600 for line in history],
        {name: [or_nan(line["effects"].get(name)) for line in history] for name in families},
        [or_nan(line["p95_ms"]) for line in history],
        (limits["min_effect"], limits["max_p95_ms"]),
        "svg",
    )
    return inline_svg(picture, "history", "Largest effects and latency of the latest reports")
