"""The flow `monitor`: is what is served what the model was made for, and is it answered in time?

Hourly by schedule, or `trunkline monitor`. It reads what the servers of the champion recorded in the window,
compares it with the reference in the champion's export, writes report.json and report.html into
`.trunkline/monitor/<model>/`, logs them in the experiment `<prefix>/monitor`, and, above a limit, emits an
event:

    trunkline.monitor.alarm      the images have drifted; an automation starts the pipeline on it
    trunkline.monitor.degraded   answers are late or fail; for people: no training mends that

Both have the resource `trunkline.model.<name>`. The invariant: one lasting shift starts the pipeline once per
`monitor.cooldown_hours`, however often this flow runs.
"""

from __future__ import annotations

import fcntl
import json
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from flows import environment

environment.prepare()

from prefect import flow, get_run_logger  # noqa: E402  # Prefect reads its settings at import
from prefect.artifacts import create_table_artifact  # noqa: E402
from prefect.client.orchestration import get_client  # noqa: E402
from prefect.events import Event, Resource  # noqa: E402
from prefect.settings import get_current_settings  # noqa: E402

from flows import files, paths, tracking  # noqa: E402
from flows import params as parameters  # noqa: E402
from flows.assessment import Assessment, assess  # noqa: E402
from flows.errors import ConfigError, DataError, ResourceError  # noqa: E402
from flows.monitor_page import render_page  # noqa: E402
from flows.params import Params  # noqa: E402
from flows.registry import Version  # noqa: E402
from flows.serve import dataset_name, fetch, find  # noqa: E402
from flows.serving.package import ModelPackage  # noqa: E402
from flows.serving.reference import Reference, read_reference  # noqa: E402
from flows.serving.statistics import Records  # noqa: E402
from flows.serving.traffic import Window, read_window, traffic_folder  # noqa: E402

ALARM, DEGRADED = "trunkline.monitor.alarm", "trunkline.monitor.degraded"
CHAMPION = "champion"
HISTORY_LINES = 24 * 7  # one week of hourly reports
RECORDING = {"record", "sample_fraction", "max_images_per_s", "file_mb", "max_mb", "keep_days"}
"""Keys of section `monitor` that are not limits."""


@flow(name="monitor", persist_result=False, log_prints=False)
def monitor(model: str = "", hours: float = 0.0) -> dict[str, Any]:
    """Judge the traffic of the champion of `model` (default: the one of params.yaml's data set).

    Args:
        hours: length of the window up to now; 0: `monitor.hours`.

    Returns:
        A JSON-able summary: verdict, reasons, what could not be judged, emitted events, paths.

    Raises:
        ConfigError: `hours` is negative.
        DataError: the champion's files are damaged.
        ResourceError: the event of an alarm could not be emitted; the report is written all the same.
    """
    logger = get_run_logger()
    params = parameters.load()
    if not 0.0 <= hours < float("inf"):
        raise ConfigError(f"hours must be 0 (as in params.yaml) or more, got {hours}")
    if hours:
        params = params.model_copy(update={"monitor": params.monitor.model_copy(update={"hours": hours})})
    try:
        version = find(params, model or params.registered_model(dataset_name(params)), CHAMPION, "")
    except DataError as error:
        logger.warning("nothing to monitor: %s", error)
        return {"verdict": "nothing served", "reasons": [], "unjudged": [str(error)], "emitted": []}

    now = time.time()
    watched = watch(params, version, now)
    raised = raise_alarms(params, watched, now)
    report = describe(params, watched, raised)
    page = write_report(watched, report, now)
    with tracking.stage_run("monitor", None, params) as run:
        run.set_tags(
            {
                "trunkline.model": version.name,
                "trunkline.version": version.version,
                "trunkline.verdict": report["verdict"],
            }
        )
        run.log_metrics(metrics_of(watched))
        for path in (page, page.with_suffix(".json")):
            run.log_artifact(path)
    create_table_artifact(
        table_of(watched), key="monitor", description=f"{report['verdict']}: {version.name}"
    )

    reasons = report["drift"] + report["degraded"]
    logger.info("%s: %s", report["verdict"], "; ".join(reasons + report["unjudged"]) or "inside all limits")
    logger.info(report["action"])
    if raised.failure:
        raise ResourceError(f"the alarm could not be sent to Prefect: {raised.failure}")
    return {
        "model": version.name,
        "version": version.version,
        "verdict": report["verdict"],
        "reasons": reasons,
        "unjudged": report["unjudged"],
        "emitted": list(raised.emitted),
        "action": report["action"],
        "report": str(page),
    }


# ---- looking ----


@dataclass(frozen=True)
class Watched:
    """One version's traffic and what is to be said about it."""

    version: Version
    package: ModelPackage
    reference: Reference | None
    window: Window
    assessment: Assessment

    @property
    def expected(self) -> Records | None:
        """The reference of the variant that was served."""
        return self.reference.records.get(self.window.variant) if self.reference else None


def watch(params: Params, version: Version, now: float) -> Watched:
    """Read and judge the window that ends `now`.

    Raises:
        DataError: the version's files are not those that were registered.
    """
    # no variants: a server verifies the networks; here only the reference is read, whose hash is checked
    package = ModelPackage.open(fetch(params, version), variants=(), digest=version.tags.get("onnx.digest"))
    known = package.manifest.reference
    reference = read_reference(package.folder / known.file) if known else None
    folder = traffic_folder(paths.home(), version.name, version.version, package.variant("fp32").digest)
    since = now - 3600.0 * params.monitor.hours
    window = read_window(folder, since, now, known.sha256 if known else None)
    expected = reference.records.get(window.variant) if reference else None
    if reference is not None and expected is None:  # nothing was recorded: any variant's will do
        expected = next(iter(reference.records.values()))
    return Watched(version, package, reference, window, assess(window, expected, params.monitor))


# ---- alarms ----


@dataclass(frozen=True)
class Raised:
    """What became of the alarms."""

    emitted: tuple[str, ...] = ()
    waiting_until: float = 0.0  # seconds since 1970; an alarm that the cool-down kept back
    failure: str = ""
    unheard: bool = False  # there is an alarm, but no server whose automations could follow


def has_server() -> bool:
    """False with the temporary server of a single command: it has no automations and forgets every event."""
    return bool(get_current_settings().api.url)


def raise_alarms(params: Params, watched: Watched, now: float) -> Raised:
    """Emit an event per kind of alarm, unless the same was emitted for this model a short time ago.

    The time is kept per model, not per version: a new version that does not help must not be trained again
    every hour. It is written after Prefect has accepted the event, so that a killed monitor rather repeats an
    alarm than loses it.
    """
    due = {ALARM: watched.assessment.drift, DEGRADED: watched.assessment.degraded}
    if not has_server():
        # a look by hand must not use up the cool-down of the scheduled monitor, whose event is heard
        return Raised(unheard=any(due.values()))
    emitted: list[str] = []
    waiting_until = 0.0
    with _alarm_times(report_folder(watched.version.name)) as (times, save):
        for event, reasons in due.items():
            if not reasons:
                continue
            until = times.get(event, 0.0) + 3600.0 * params.monitor.cooldown_hours
            if times.get(event, 0.0) <= now < until:
                waiting_until = max(waiting_until, until)
                continue
            try:
                emit(event, watched, reasons)
            except Exception as error:  # of httpx, Prefect or the server's configuration
                return Raised(tuple(emitted), waiting_until, f"{type(error).__name__}: {error}")
            times[event] = now
            save()
            emitted.append(event)
    return Raised(tuple(emitted), waiting_until)


@contextmanager
def _alarm_times(folder: Path) -> Iterator[tuple[dict[str, float], Any]]:
    """Times of the last events, by name, and a function that saves them; one monitor at a time."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "alarms.json"
    with open(folder / "alarms.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            times = {str(name): float(value) for name, value in files.read_json(path).items()}
        except (OSError, ValueError, TypeError, AttributeError):
            times = {}  # absent or damaged: rather one alarm too many
        yield times, lambda: files.write_json(path, times)


def emit(event: str, watched: Watched, reasons: tuple[str, ...]) -> None:
    """Hand the event to Prefect and wait until it is accepted; `emit_event` would only queue it."""
    version = watched.version
    resource = {
        "prefect.resource.id": f"trunkline.model.{version.name}",
        "prefect.resource.name": version.name,
        "trunkline.version": version.version,
    }
    payload = {"model": version.name, "version": version.version, "reasons": list(reasons)}
    sent = Event(event=event, resource=Resource(resource), payload=payload)
    with get_client(sync_client=True) as client:
        client.request("POST", "/events", json=[sent.model_dump(mode="json")]).raise_for_status()


# ---- telling ----


def report_folder(model: str) -> Path:
    return paths.home() / ".trunkline" / "monitor" / model


def describe(params: Params, watched: Watched, raised: Raised) -> dict[str, Any]:
    """The content of report.json."""
    version, window, assessment = watched.version, watched.window, watched.assessment
    return {
        "format": 1,
        "model": version.name,
        "version": version.version,
        "digest": watched.package.variant("fp32").digest,
        "data_digest": watched.reference.data_digest if watched.reference else None,
        "variant": window.variant,
        "since": _utc(window.since),
        "until": _utc(window.until),
        **assessment.to_dict(),
        "action": _action(assessment, raised),
        "emitted": list(raised.emitted),
        "images": window.images,
        "recorded": 0 if window.records is None else len(window.records),
        "reference_images": 0 if watched.expected is None else len(watched.expected),
        "left_out": window.left_out,
        "unusable": window.unusable,
        "other_records": window.other_records,
        "damaged_lines": window.damaged_lines,
        "requests": window.requests,
        "statuses": {str(status): count for status, count in sorted(window.statuses.items())},
        "limits": params.monitor.model_dump(mode="json", exclude=RECORDING),
    }


def _utc(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M")


def _action(assessment: Assessment, raised: Raised) -> str:
    """What follows from the verdict, in one sentence."""
    if raised.failure:
        return "The event of this alarm could not be handed to Prefect."
    if raised.unheard:
        return (
            "Nothing was started: no Prefect server is configured (PREFECT_API_URL), so no event was emitted."
        )
    if raised.emitted:
        return f"Emitted {' and '.join(raised.emitted)}."
    if raised.waiting_until:
        until = _utc(raised.waiting_until)
        return f"The same alarm was raised before; it is not raised again before {until} UTC."
    return "Nothing was started."


def write_report(watched: Watched, report: Mapping[str, Any], now: float) -> Path:
    """Replace report.json and report.html, extend history.jsonl; the path of the page."""
    folder = report_folder(watched.version.name)
    history = [*_read_history(folder / "history.jsonl"), history_line(watched.assessment, now)][
        -HISTORY_LINES:
    ]
    page = render_page(
        report,
        watched.assessment,
        watched.expected,
        watched.window.records,
        watched.package.manifest.labels,
        history,
    )
    files.write_text(folder / "history.jsonl", "".join(json.dumps(line) + "\n" for line in history))
    files.write_json(folder / "report.json", report)
    files.write_text(folder / "report.html", page)
    return folder / "report.html"


def history_line(assessment: Assessment, now: float) -> dict[str, Any]:
    return {
        "time": now,
        "verdict": assessment.verdict,
        "effects": {
            result.name: max(test.effect for test in assessment.tests if test.family == result.name)
            for result in assessment.families()
        },
        "p95_ms": assessment.latency["p95_ms"],
    }


def _read_history(path: Path) -> list[dict[str, Any]]:
    """Earlier lines; those that cannot be read are left out."""
    found = []
    lines = path.read_text(errors="replace").splitlines() if path.is_file() else []
    for text in lines:
        try:
            line = json.loads(text)
            float(line["time"]), dict(line["effects"]), line["p95_ms"]
        except (ValueError, TypeError, KeyError):
            continue
        found.append(line)
    return found


def metrics_of(watched: Watched) -> dict[str, float]:
    """For the tracker: what has a value in this window."""
    window, assessment = watched.window, watched.assessment
    metrics: dict[str, float] = {
        "images": window.images,
        "recorded": 0 if window.records is None else len(window.records),
        "requests": window.requests,
        "alarm": float(assessment.verdict == "alarm"),
        "drift_tests_alarmed": sum(test.alarmed for test in assessment.tests),
    }
    optional = {**assessment.latency, "error_fraction": assessment.error_fraction}
    metrics |= {name: value for name, value in optional.items() if value is not None}
    for result in assessment.families():
        effects = [test.effect for test in assessment.tests if test.family == result.name]
        metrics |= {f"{result.name}.effect": max(effects), f"{result.name}.adjusted_p": result.adjusted_p}
    return metrics


def table_of(watched: Watched) -> list[dict[str, Any]]:
    """For Prefect's page: one row per family and per limit."""
    assessment = watched.assessment
    rows = [
        {
            "what": result.name,
            "value": f"{result.alarmed} of {result.tests} tests, effect {result.strongest.effect:.3f}",
            "verdict": "alarm" if result.alarmed else "quiet",
        }
        for result in assessment.families()
    ]
    for name, value in {**assessment.latency, "error_fraction": assessment.error_fraction}.items():
        rows.append({"what": name, "value": "–" if value is None else f"{value:.4g}", "verdict": ""})
    rows += [{"what": "outside its limit", "value": text, "verdict": "alarm"} for text in assessment.degraded]
    rows += [{"what": "not judged", "value": text, "verdict": ""} for text in assessment.unjudged]
    return rows


if __name__ == "__main__":
    monitor()
