"""The promotion flow: one registered version on trial; all gates passed makes it `champion`.

`trunkline promote` starts it, the pipeline calls it after registering, a deployment starts it when a
challenger is registered. Every gate is a task, and a row of the table `gates` in Prefect. A refusal is a
normal end: the flow completes and says so.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from functools import partial
from typing import Any, cast

from flows import environment

environment.prepare()

from prefect import flow, get_run_logger, task  # noqa: E402  # Prefect reads its settings at import
from prefect.artifacts import create_table_artifact  # noqa: E402
from prefect.cache_policies import NO_CACHE  # noqa: E402
from prefect.client.orchestration import get_client  # noqa: E402
from prefect.context import FlowRunContext  # noqa: E402
from prefect.exceptions import FlowPauseTimeout  # noqa: E402
from prefect.flow_runs import pause_flow_run  # noqa: E402
from prefect.input import RunInput  # noqa: E402
from prefect.states import Completed, Running  # noqa: E402

from flows import decision, gates  # noqa: E402
from flows import params as parameters  # noqa: E402
from flows.decision import Decision  # noqa: E402
from flows.gates import Candidate, Gate  # noqa: E402
from flows.params import Params  # noqa: E402
from flows.registry import Version  # noqa: E402
from flows.serve import default_model  # noqa: E402

environment.hide_traces_of_mistakes()
POLL_S = 5  # how often a waiting flow looks for an answer


class Approval(RunInput):
    """What Prefect's page asks."""

    approve: bool
    comment: str = ""


@flow(name="promotion", persist_result=False)
def promotion(model: str = "", version: str = "", again: bool = False) -> dict[str, Any]:
    """Try `version` of `model` and promote it if every gate passes.

    Args:
        model: registered model; empty: the one of the data set or text in the current workspace.
        version: its number; empty: the challenger.
        again: also when it was rolled back before.

    Returns:
        The decision as a JSON-able mapping, in a completed state whose message says it in words.
    """
    logger = get_run_logger()
    params = parameters.load()
    name = model or default_model(params)
    chosen = decision.choose(params, name, version)
    if chosen is None:
        text = f"{name} has no challenger; nothing to promote"
        return _completed(text, {"name": name, "version": "", "refused": False, "reason": text})
    params, root = decision.workspace_of(params, chosen)
    logger.info("version %s of %s, judged in %s", chosen.version, name, root)

    made = decision.decide(
        params,
        root,
        chosen,
        again=again,
        check=check_gate,
        approve=partial(ask_person, params) if params.promotion.require_approval else None,
    )
    publish(made)
    text = describe(made)
    logger.info(text)
    return _completed(text, made.to_dict())


def _completed(message: str, result: dict[str, Any]) -> dict[str, Any]:
    """A state with a message of its own. Prefect takes it for the flow's end, the caller gets `result`."""
    return cast(dict[str, Any], Completed(message=message, data=result))


@task(task_run_name="{name}", cache_policy=NO_CACHE, persist_result=False)
def check_gate(name: str, candidate: Candidate, champion: Version | None) -> Gate:
    """One gate; a failed one is a result, not an error of the task."""
    gate = gates.check_gate(name, candidate, champion)
    log = get_run_logger()
    (log.info if gate.passed else log.warning)("%s %s", gate.name, gate.verdict)
    return gate


def describe(made: Decision) -> str:
    """One sentence: the state message of the flow."""
    what = f"version {made.version.version} of {made.version.name}"
    if made.refused:
        return f"refused: {what}: {made.reason}"
    return f"promoted: {what} is champion" if made.promoted else f"unchanged: {what}: {made.reason}"


def publish(made: Decision) -> None:
    """The table of gates in Prefect, one row each."""
    if made.gates:
        rows = [
            {
                "gate": gate.name,
                "verdict": "passed" if gate.passed else "failed",
                "reason": gate.reason,
                "figures": json.dumps(gate.figures, default=str),
            }
            for gate in made.gates
        ]
        create_table_artifact(rows, key="gates", description=describe(made))


def ask_person(params: Params, version: Version, passed: Sequence[Gate]) -> str | None:
    """Wait on Prefect's page for a decision: None is yes, else the reason of the refusal."""
    limit_s = params.promotion.approval_timeout_s
    table = "\n".join(f"- **{gate.name}**: {gate.reason}" for gate in passed)
    question = f"Make version **{version.version}** of **{version.name}** champion?\n\n{table}"
    get_run_logger().info("waiting up to %s s for approval on Prefect's page of this run", limit_s)
    try:
        answer = pause_flow_run(
            wait_for_input=Approval.with_initial_data(description=question),
            timeout=limit_s,
            poll_interval=min(POLL_S, math.ceil(limit_s / 2)),
        )
    except FlowPauseTimeout:
        _go_on()
        return f"nobody approved it within {limit_s} s"
    if answer.approve:
        return None
    return f"a person said no{': ' * bool(answer.comment)}{answer.comment}"


def _go_on() -> None:
    """Prefect fails a run whose pause nobody ended; here that is an answer, and the run completes."""
    run = FlowRunContext.get()
    if run is not None and run.flow_run is not None:
        with get_client(sync_client=True) as client:
            client.set_flow_run_state(run.flow_run.id, Running(), force=True)


if __name__ == "__main__":
    promotion()
