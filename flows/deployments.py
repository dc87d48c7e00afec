"""Bring the Prefect server in line with prefect.yaml: `python -m flows.deployments`, part of `trunkline up`.

The file is the only source: what it no longer holds (a schedule, a trigger, a deployment tagged `trunkline`)
goes from the server. It is deployed first and the rest removed afterwards, so a broken file removes nothing.
Flow runs that an earlier, crashed worker left RUNNING are closed, because each would hold its deployment's
only place.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flows import environment, params, paths

environment.prepare()

from prefect.client.orchestration import SyncPrefectClient, get_client  # noqa: E402
from prefect.client.schemas.actions import WorkPoolCreate  # noqa: E402
from prefect.client.schemas.filters import (  # noqa: E402
    DeploymentFilter,
    DeploymentFilterTags,
    FlowRunFilter,
    FlowRunFilterState,
    FlowRunFilterStateType,
)
from prefect.client.schemas.objects import StateType  # noqa: E402
from prefect.client.schemas.responses import DeploymentResponse  # noqa: E402
from prefect.exceptions import ObjectAlreadyExists  # noqa: E402
from prefect.states import Crashed  # noqa: E402

from flows.errors import ConfigError, ResourceError, TrunklineError, explain  # noqa: E402

FILE = "prefect.yaml"
TAG = "trunkline"
SAID_LINES = 15


@dataclass(frozen=True)
class Deployment:
    """An entry of prefect.yaml, as far as it has to be checked before anything is changed."""

    name: str
    entrypoint: str
    pool: str
    slugs: tuple[str, ...]


def read_file(root: Path) -> list[Deployment]:
    """
    Raises:
        ConfigError: an entry without a name, pool, tag or existing entrypoint, a schedule without a slug.
    """
    path = root / FILE
    found: list[Deployment] = []
    for entry in params.read(path).get("deployments") or []:
        name = str(entry.get("name") or "")
        where = f"{path}: deployment `{name}`"
        if not name or name in [other.name for other in found]:
            raise ConfigError(f"{path}: each deployment needs a name of its own, found `{name}`")
        entrypoint = str(entry.get("entrypoint") or "")
        if not (root / entrypoint.partition(":")[0]).is_file():
            raise ConfigError(f"{where}: `entrypoint`: {entrypoint or 'nothing'} does not exist")
        if TAG not in (entry.get("tags") or []):
            raise ConfigError(
                f"{where}: `tags` must hold {TAG}, by which it is found when it leaves the file"
            )
        pool = (entry.get("work_pool") or {}).get("name")
        if not pool:
            raise ConfigError(f"{where}: `work_pool` needs a name")
        slugs = [str(schedule.get("slug") or "") for schedule in entry.get("schedules") or []]
        if "" in slugs or len(set(slugs)) < len(slugs):
            raise ConfigError(f"{where}: each schedule needs a slug of its own, found {slugs}")
        found.append(Deployment(name, entrypoint, str(pool), tuple(slugs)))
    if not found:
        raise ConfigError(f"{path} has no deployments")
    return found


def deploy(root: Path, work_pool: str) -> list[str]:
    """Make the server hold exactly what the file says; returns a line for each change beyond deploying.

    Raises:
        ConfigError, ResourceError: nothing was removed.
    """
    wanted = read_file(root)
    said: list[str] = []
    with get_client(sync_client=True) as client:
        for pool in sorted({work_pool, *(entry.pool for entry in wanted)}):
            try:
                client.create_work_pool(WorkPoolCreate(name=pool, type="process"))
                said.append(f"work pool {pool} made")
            except ObjectAlreadyExists:
                pass
        _deploy_all(root)
        deployed = client.read_deployments(
            deployment_filter=DeploymentFilter(tags=DeploymentFilterTags(all_=[TAG]))
        )
        said += _remove_what_left(client, wanted, deployed)
        return said


def _deploy_all(root: Path) -> None:
    answer = subprocess.run(
        [sys.executable, "-m", "prefect", "--no-prompt", "deploy", "--all"],
        cwd=root,
        env={**os.environ, "PWD": str(root), "NO_COLOR": "1", "COLUMNS": "200"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    if answer.returncode != 0:
        words = [line.strip() for line in (answer.stdout + answer.stderr).splitlines() if line.strip()]
        raise ResourceError(f"{root / FILE} cannot be deployed: {' '.join(words[-SAID_LINES:])[-600:]}")


def _remove_what_left(
    client: SyncPrefectClient, wanted: list[Deployment], deployed: list[DeploymentResponse]
) -> list[str]:
    said = []
    slugs: Mapping[str, tuple[str, ...]] = {entry.name: entry.slugs for entry in wanted}
    for deployment in deployed:
        if deployment.name not in slugs:
            client.delete_deployment(deployment.id)
            said.append(f"deployment {deployment.name} removed")
            continue
        for schedule in deployment.schedules:
            if schedule.slug not in slugs[deployment.name]:
                client.delete_deployment_schedule(deployment.id, schedule.id)
                said.append(f"schedule {schedule.slug} of {deployment.name} removed")
    return said


def close_lost_runs() -> int:
    """Mark flow runs of our deployments as crashed that are under way for a server, while no worker lives."""
    states = [StateType.RUNNING, StateType.PENDING, StateType.CANCELLING]
    with get_client(sync_client=True) as client:
        lost = client.read_flow_runs(
            deployment_filter=DeploymentFilter(tags=DeploymentFilterTags(all_=[TAG])),
            flow_run_filter=FlowRunFilter(state=FlowRunFilterState(type=FlowRunFilterStateType(any_=states))),
        )
        for run in lost:
            client.set_flow_run_state(
                run.id, Crashed(message="its worker and its processes are gone"), force=True
            )
    return len(lost)


def main() -> int:
    """Under the supervisor. TRUNKLINE_OWN_PREFECT says that the server is this clone's and knows no other
    workers."""
    try:
        root = paths.home()
        for line in deploy(root, params.load(root / "params.yaml").services.work_pool):
            print(line, flush=True)
        if os.environ.get("TRUNKLINE_OWN_PREFECT") and (count := close_lost_runs()):
            print(f"{count} flow runs of a crashed worker closed", flush=True)
        print("deployed", flush=True)
        return 0
    except Exception as error:
        explained: Any = explain(error) if not isinstance(error, TrunklineError) else error
        if explained is None:
            raise
        print(f"error: {explained}", file=sys.stderr)
        return int(explained.exit_code)


if __name__ == "__main__":
    raise SystemExit(main())
