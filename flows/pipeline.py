"""The flow: DVC's stages one task each, then registration, promotion, smoke test and report. Which stages is
what `objective` says: those that lead to a served classifier, or to a language model.

Prefect decides when, retries and shows; DVC decides what has to run. Tasks never cache results: "is this
computed already" is DVC's question. `python -m flows.cli run` starts it; a deployment may call `pipeline`
with the same arguments.
"""

from __future__ import annotations

import os
import re
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from flows import environment

environment.prepare()

from prefect import flow, get_run_logger, task  # noqa: E402  # Prefect reads its settings at import
from prefect.artifacts import create_markdown_artifact, create_table_artifact  # noqa: E402
from prefect.cache_policies import NO_CACHE  # noqa: E402
from prefect.context import FlowRunContext  # noqa: E402
from prefect.events import emit_event  # noqa: E402
from prefect.futures import PrefectFuture  # noqa: E402
from prefect.task_runners import ThreadPoolTaskRunner  # noqa: E402

from flows import (  # noqa: E402
    dvc_stage,
    files,
    language_registration,
    language_registry,
    paths,
    promotion,
    registration,
    registry,
    retries,
    smoke,
    tracking,
    workspace,
)
from flows.dvc_stage import StageInfo  # noqa: E402
from flows.params import Params, flatten  # noqa: E402
from flows.recipes import SMOKE  # noqa: E402
from flows.registry import Version  # noqa: E402
from flows.report import build_report  # noqa: E402
from flows.tracking import MlflowRun  # noqa: E402

environment.hide_traces_of_mistakes()
REGISTERED_EVENT = "trunkline.challenger.registered"
CONTROL = ("finetune@scratch", "evaluate@scratch")
ENDS = {
    "image": ("pretrain", "finetune", "evaluate", "parity"),
    "causal_lm": ("language_evaluate", "language_export"),
}
"""What a run of each `objective` ends with; the stages that lead there are its track. Others (`study`, which
analyses a table of many runs) are no part of a run."""
LABELS_NEEDED = ("finetune", "evaluate", "export", "parity")


@task(task_run_name="{stage}", **retries.STAGES)
def run_stage(
    stage: str, root: str, parameters: dict[str, Any], environment: dict[str, str]
) -> dict[str, Any]:
    """One DVC stage; returns its status, duration and the receipt of the run that made its bytes."""
    logger = get_run_logger()
    started = time.monotonic()
    status, receipt = dvc_stage.run_stage(Path(root), stage, environment, logger.info)
    seconds = time.monotonic() - started
    table = [{"parameter": key, "value": str(value)} for key, value in parameters.items()]
    table.append({"parameter": "— MLflow run that made the outputs", "value": receipt.get("run_id", "")})
    table.append({"parameter": "— duration of this task", "value": f"{seconds:.1f} s ({status})"})
    create_table_artifact(
        table, key=re.sub(r"[^a-z0-9]", "-", stage), description=f"{stage}: parameters and outcome"
    )
    return {"stage": stage, "status": status, "seconds": seconds, "receipt": receipt}


@task(cache_policy=NO_CACHE, persist_result=False)
def register(params: Params, root: Path, run: MlflowRun) -> Version:
    """Register the export, or the bundle, as challenger."""
    if params.objective == "causal_lm":
        return language_registration.register_bundle(params, root, run)
    return registration.register_export(params, root, run)


@task(cache_policy=NO_CACHE, persist_result=False, name="smoke test")
def smoke_test(params: Params, root: Path, version: Version) -> smoke.SmokeResult:
    """Serve the registered version and compare its answers with the recorded predictions."""
    return smoke.smoke_test(params, root, version)


@task(cache_policy=NO_CACHE, persist_result=False, name="golden prompts")
def ask_bundle(params: Params, version: Version) -> dict[str, Any]:
    """Fetch the registered bundle as a server does and compare what it says with the golden prompts."""
    return language_registry.ask_registered(params, version)


@task(cache_policy=NO_CACHE, persist_result=False)
def report(params: Params, root: Path, run: MlflowRun, extra: dict[str, Any]) -> Path:
    """Write the HTML report and log it."""
    path = build_report(root, extra)
    run.log_artifact(path)
    return path


@flow(name="pipeline", persist_result=False, log_prints=False)
def pipeline(
    dataset: str = "",
    recipe: str = "",
    settings: list[str] | None = None,
    promote: bool = True,
    smoke: bool = False,
) -> dict[str, Any]:
    """Raw images or texts in, a served model out. The first arguments select and override params as
    `trunkline run` does.

    Args:
        promote: call the promotion flow; else the event `trunkline.challenger.registered` is sent, which a
            deployment of that flow can be triggered by.
        smoke: a shrunken run under a registered name of its own, neither promoted nor announced.

    Returns:
        A JSON-able summary: stages with status and seconds, metrics, version, aliases, paths.
    """
    logger = get_run_logger()
    started = time.monotonic()
    retries.stopping.clear()
    place = workspace.prepare(dataset, recipe, settings or [], smoke)
    params, root = place.params, place.root
    flow_run = FlowRunContext.get()
    flow_id = str(flow_run.flow_run.id) if flow_run and flow_run.flow_run else ""
    tags = {"prefect.flow_run_id": flow_id, "trunkline.workspace": str(root)}
    if smoke:
        tags["trunkline.smoke"] = "true"
        logger.warning("smoke run: sizes and steps are those of %s", SMOKE)
    if place.settings:
        tags["trunkline.overrides"] = " ".join(f"-S {setting}" for setting in place.settings)
    os.chdir(root)  # params, provenance and relative paths of this run are those of its workspace
    with workspace.alone_in(root), tracking.pipeline_run(params, name=root.name, tags=tags) as run:
        logger.info("workspace %s", root)
        try:
            outcomes = _run_stages(params, root, run)
        except BaseException:
            tracking.close_abandoned_runs(params, run.run_id)
            raise
        summary = _deliver(params, root, run, outcomes, promote, smoke)
        summary["seconds"] = time.monotonic() - started
        _log_outcome(run, root, summary, paths.TEXT if params.objective == "causal_lm" else paths.DATA)
    create_markdown_artifact(_markdown(summary), key="summary", description="What this run made")
    return summary


def _run_stages(params: Params, root: Path, run: MlflowRun) -> list[dict[str, Any]]:
    """Submit every stage in DVC's order; each starts when the ones it needs are done."""
    variables = {tracking.PARENT_VARIABLE: run.run_id, "TRUNKLINE_FLOW_PID": str(os.getpid())}
    variables["MLFLOW_TRACKING_URI"] = tracking.tracking_uri(params)
    sections = params.model_dump()
    futures: dict[str, PrefectFuture[Any]] = {}
    runner: ThreadPoolTaskRunner[Any] = ThreadPoolTaskRunner(max_workers=params.pipeline.parallel_stages)
    with runner:
        try:
            for info in dvc_stage.leading_to(dvc_stage.read_graph(root), ENDS[params.objective]):
                if info.family in LABELS_NEEDED and not _is_labelled(futures, root):
                    continue
                if info.name in CONTROL and not params.pipeline.control:
                    continue
                futures[info.name] = runner.submit(
                    run_stage.with_options(retries=params.pipeline.retries),
                    parameters={
                        "stage": info.name,
                        "root": str(root),
                        "parameters": _parameters_of(info, sections),
                        "environment": variables,
                    },
                    wait_for=[futures[name] for name in info.needs if name in futures],
                )
            return [future.result() for future in futures.values()]
        except BaseException:
            # before the runner waits for its threads: a stage that ends now must not be tried again
            retries.stopping.set()
            _stop_children()
            raise


def _is_labelled(futures: dict[str, PrefectFuture[Any]], root: Path) -> bool:
    """Known only once the images are read: without classes the pipeline ends with pretraining."""
    futures["ingest"].result()
    return bool(files.read_json(root / paths.DATA / "manifest.json")["classes"])


def _parameters_of(info: StageInfo, sections: dict[str, Any]) -> dict[str, Any]:
    """The values that DVC watches for this stage; dvc.yaml names sections or single keys."""
    flat = flatten(sections)
    return {
        key: value
        for key, value in flat.items()
        if any(f"{key}.".startswith(f"{name}.") for name in info.sections)
    }


def _stop_children() -> None:
    """End the stages of this process, so that they checkpoint instead of going on as orphans."""
    import psutil

    for child in psutil.Process().children():
        if "dvc" in " ".join(child.cmdline()):
            dvc_stage.terminate_tree(child.pid)


def _deliver(
    params: Params,
    root: Path,
    run: MlflowRun,
    outcomes: list[dict[str, Any]],
    promote: bool,
    is_smoke_run: bool,
) -> dict[str, Any]:
    """Everything with an effect outside the workspace; the report last, because it tells of the rest."""
    summary: dict[str, Any] = {
        "workspace": str(root),
        "tracking_uri": tracking.tracking_uri(params),
        "run_id": run.run_id,
        "smoke_run": is_smoke_run,
        "stages": outcomes,
        "executed": [outcome["stage"] for outcome in outcomes if outcome["status"] == "executed"],
        "metrics": _read_metrics(root, {outcome["stage"] for outcome in outcomes}),
    }
    extra = {
        "tracking_uri": summary["tracking_uri"],
        "executed": summary["executed"],
        "git": tracking.git_commit(),
        "dirty": tracking.git_is_dirty(),
        "lock_sha256": files.sha256_file(root / "dvc.lock"),
        "run_id": run.run_id,
    }
    is_language = params.objective == "causal_lm"
    summary["objective"] = params.objective
    if any(outcome["stage"] in ("parity", "language_export") for outcome in outcomes):
        version = register(params, root, run)
        if is_smoke_run:
            summary["registry"] = _describe(version)
        else:
            summary["registry"] = _promote(version) if promote else _announce(version)
        if is_language:
            summary["smoke"] = ask_bundle(params, version)
        else:
            summary["smoke"] = asdict(smoke_test(params, root, version))
        extra["registry"] = summary["registry"]
        extra["smoke"] = summary["smoke"]
    summary["report"] = str(report(params, root, run, extra))
    return summary


def _read_metrics(root: Path, stages: set[str]) -> dict[str, Any]:
    """What the stages of this run measured, `evaluate-scratch` for `evaluate@scratch`; earlier runs of the
    workspace may have left figures of others."""
    names = {stage.replace("@", "-") for stage in stages}
    found = {path.stem: files.read_json(path) for path in sorted((root / paths.METRICS).glob("*.json"))}
    return {name: metrics for name, metrics in found.items() if name in names}


def _promote(version: Version) -> dict[str, Any]:
    """The promotion flow as part of this one: what became of the version."""
    return promotion.promotion(model=version.name, version=version.version)


def _announce(version: Version) -> dict[str, Any]:
    """Leave the decision to whoever listens; a version that is champion already is not news."""
    if registry.CHAMPION not in version.aliases:
        emit_event(
            event=REGISTERED_EVENT,
            resource={"prefect.resource.id": f"trunkline.model.{version.name}"},
            payload={"model": version.name, "version": version.version},
        )
    return _describe(version)


def _describe(version: Version) -> dict[str, Any]:
    """A registered version that nobody has judged."""
    return {
        "name": version.name,
        "version": version.version,
        "aliases": list(version.aliases),
        "promoted": False,
        "gates": [],
        "digest": version.tags.get("onnx.digest", ""),
    }


def _log_outcome(run: MlflowRun, root: Path, summary: dict[str, Any], data: Path) -> None:
    for stage, metrics in summary["metrics"].items():
        numbers = {key: value for key, value in flatten(metrics).items() if isinstance(value, int | float)}
        run.log_metrics({f"{stage}.{key}": value for key, value in numbers.items()})
    run.log_metrics({"seconds": summary["seconds"], "stages_executed": len(summary["executed"])})
    run.log_artifact(root / data / "manifest.json")
    run.log_artifact(root / "params.yaml")
    run.log_artifact(root / "dvc.lock")
    # the lock has its final content only now
    run.set_tags(tracking.provenance_tags())


def _markdown(summary: dict[str, Any]) -> str:
    rows = [f"| {o['stage']} | {o['status']} | {o['seconds']:.1f} |" for o in summary["stages"]]
    lines = ["| stage | status | seconds |", "| --- | --- | ---: |", *rows, ""]
    if registry := summary.get("registry"):
        aliases = ", ".join(registry["aliases"]) or "no alias"
        lines.append(f"Registered: **{registry['name']}** version **{registry['version']}** ({aliases}).")
    lines.append(f"Report: `{summary['report']}`")
    return "\n".join(lines)


if __name__ == "__main__":
    pipeline()
