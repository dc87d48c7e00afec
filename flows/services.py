"""`trunkline up`, `down` and `services`: Prefect, MLflow, deployments and a worker in the background.

A supervisor (`flows.supervisor`) keeps them running; everything about them lies in `.trunkline/services/`:
plan.json (what is started how), state.json (what runs), one log each. What already exists elsewhere is not
started here: with `PREFECT_API_URL`, or a tracking store at http(s)://, only the rest is. While the services
run, every `trunkline` command of this clone uses them (`use_running`).
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from flows import files, paths, ports, tracking
from flows.errors import ResourceError
from flows.params import Params
from flows.supervisor import (
    MARKER,
    Service,
    end_processes,
    fetch,
    marked_processes,
)

LOOK_S = 0.2
LAST_LINES = 12


@dataclass(frozen=True)
class Running:
    """A service as `trunkline services` shows it."""

    name: str
    status: str
    pid: int
    page: str
    log: Path
    restarts: int
    exit_code: int | None
    since: str


def folder() -> Path:
    return paths.home() / ".trunkline" / "services"


# ---- what is started ---------------------------------------------------------------------------------------


def plan(params: Params) -> list[Service]:
    """The services this clone has to start itself, each after those it needs."""
    settings = params.services
    python = [sys.executable, "-m"]
    found: list[Service] = []
    shared = {MARKER: str(folder()), "TRUNKLINE_HOME": str(paths.home())}
    api = os.environ.get("PREFECT_API_URL", "")
    if not api:
        page = page_url(settings.host, settings.prefect_port)
        api = f"{page}/api"
        shared["TRUNKLINE_OWN_PREFECT"] = "1"
        found.append(
            Service(
                "prefect",
                prefect_command(settings.host, settings.prefect_port),
                {**shared, "PREFECT_LOGGING_SERVER_LEVEL": "WARNING"},
                page=page,
                health=f"{api}/health",
            )
        )
    shared["PREFECT_API_URL"] = api
    store = tracking.tracking_uri(params)
    if not tracking.is_server(store):
        page = page_url(settings.host, settings.mlflow_port)
        found.append(
            Service(
                "mlflow",
                mlflow_command(params, settings.host, settings.mlflow_port),
                {**shared, **mlflow_environment(params)},
                page=page,
                health=f"{page}/health",
            )
        )
        store = page
    shared["MLFLOW_TRACKING_URI"] = store
    servers = [service.name for service in found]
    found.append(Service("deployments", [*python, "flows.deployments"], shared, after=servers, once=True))
    found.append(
        Service(
            "worker",
            [
                *(*python, "prefect", "worker", "start", "--type", "process", "--pool", settings.work_pool),
                *("--name", worker_name(), "--limit", str(settings.parallel_runs)),
            ],
            shared,
            after=["deployments"],
            workers=f"{api}/work_pools/{settings.work_pool}/workers/filter",
            patience_s=settings.stop_patience_s,
        )
    )
    return found


def worker_name() -> str:
    return f"{socket.gethostname()}:{paths.home().name}"


def page_url(host: str, port: int) -> str:
    """How this machine itself reaches a server that listens on `host`."""
    reached = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)
    return f"http://{reached}:{port}"


def prefect_command(host: str, port: int) -> list[str]:
    return [sys.executable, "-m", "prefect", "server", "start", "--host", host, "--port", str(port)]


def mlflow_command(params: Params, host: str, port: int) -> list[str]:
    """The store is not among the arguments: its URI may hold a password, and everybody can list processes."""
    return [
        *(sys.executable, "-m", "mlflow", "server", "--host", host, "--port", str(port)),
        # files are written where the experiment says, by whoever logs them, with or without this server
        *("--default-artifact-root", tracking.artifact_root(params), "--no-serve-artifacts"),
        # each worker takes some 300 MB
        *("--workers", "1", "--uvicorn-opts", "--log-level warning"),
    ]


def mlflow_environment(params: Params) -> dict[str, str]:
    return {
        "MLFLOW_BACKEND_STORE_URI": tracking.tracking_uri(params),
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
    }


# ---- up and down -------------------------------------------------------------------------------------------


def up(params: Params) -> bool:
    """Start the supervisor; False if services run already. Returns at once: see `wait_until_ready`.

    Raises:
        ResourceError: a port is in use.
    """
    with _alone():
        if is_up():
            return False
        clean_up(params.services.stop_patience_s)
        services = plan(params)
        for service in services:
            if service.name == "prefect":
                ports.require_free(params.services.host, params.services.prefect_port)
            if service.name == "mlflow":
                ports.require_free(params.services.host, params.services.mlflow_port)
        if not tracking.is_server(tracking.tracking_uri(params)):
            tracking.client(params)  # creates the store, or says in one line why it cannot
        # the store's URI may hold a password, so it travels through the environment and not through a file
        secret = mlflow_environment(params)
        for service in services:
            for key in secret.keys() & service.environment.keys():
                del service.environment[key]
        files.write_json(
            folder() / "plan.json",
            {"services": [asdict(service) for service in services], "log_mb": params.services.log_mb},
        )
        (folder() / "state.json").unlink(missing_ok=True)
        with open(folder() / "supervisor.log", "ab") as log:
            supervisor = subprocess.Popen(
                [sys.executable, "-m", "flows.supervisor", str(folder())],
                cwd=paths.home(),
                env={**os.environ, **secret, MARKER: str(folder()), "PWD": str(paths.home())},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        while not (is_up() and (folder() / "state.json").exists()):
            if supervisor.poll() is not None:
                raise ResourceError(f"the services did not start: {_last_words('supervisor')}")
            time.sleep(LOOK_S)
        return True


def wait_until_ready(params: Params, tell: Any = lambda line: None) -> None:
    """Until every service is ready.

    Raises:
        ResourceError: one of them ends again and again, or patience is over.
    """
    told: dict[str, str] = {}
    deadline = time.monotonic() + params.services.start_patience_s
    while True:
        found = running()
        for service in found:
            if service.status != told.get(service.name) and service.status in ("ready", "done"):
                tell(f"{service.name} {service.status}")
            told[service.name] = service.status
        if found and all(service.status in ("ready", "done") for service in found):
            return
        broken = [service for service in found if service.restarts >= 2 and service.status == "pausing"]
        late = time.monotonic() > deadline
        if broken or late or not is_up():
            waiting = [s for s in found if s.status not in ("ready", "done", "waiting")]
            first = next(iter([*broken, *waiting, *found]), None)
            name = first.name if first else "supervisor"
            why = f"ends with exit code {first.exit_code}" if broken and first else "is not ready"
            raise ResourceError(f"{name} {why}: {_last_words(name)}; log: {folder() / name}.log")
        time.sleep(LOOK_S)


def down(params: Params) -> bool:
    """End everything that `up` started; False if nothing ran. A stage gets the time to save its checkpoint.

    Raises:
        ResourceError: a process is still there.
    """
    with _alone():
        was_up = is_up()
        if was_up:
            pid = int(_read_state().get("pid", 0))
            with contextlib.suppress(ProcessLookupError):
                if pid:
                    os.kill(pid, signal.SIGTERM)
            # each service in turn may take its patience and be killed after it
            deadline = time.monotonic() + 2 * params.services.stop_patience_s
            while is_up() and time.monotonic() < deadline:
                time.sleep(LOOK_S)
        left = clean_up(params.services.stop_patience_s)
        return was_up or left > 0


def clean_up(patience_s: float) -> int:
    """End what a crashed supervisor left, and drop its files; returns how many processes there were.

    Raises:
        ResourceError: a process cannot be ended.
    """
    left = marked_processes(folder())
    if alive := end_processes(left, patience_s):
        pids = ", ".join(str(process.pid) for process in alive)
        raise ResourceError(f"processes {pids} of the services cannot be ended; end them by hand")
    for name in ("plan.json", "state.json"):
        (folder() / name).unlink(missing_ok=True)
    return len(left)


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    """`up` and `down` at once would undo each other half-way."""
    folder().mkdir(parents=True, exist_ok=True)
    with open(folder() / "command.lock", "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


# ---- what runs ---------------------------------------------------------------------------------------------


def is_up() -> bool:
    """True while a supervisor of this clone lives: it holds the lock, whatever the files say."""
    try:
        with open(folder() / "lock") as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False


def running() -> list[Running]:
    """The services of this clone as the supervisor last saw them; empty when it does not live."""
    if not is_up():
        return []
    states, found = _read_state().get("services", {}), []
    with contextlib.suppress(FileNotFoundError):
        for service in files.read_json(folder() / "plan.json")["services"]:
            name, state = service["name"], states.get(service["name"], {})
            found.append(
                Running(
                    name,
                    state.get("status", "waiting"),
                    state.get("pid", 0),
                    service["page"],
                    folder() / f"{name}.log",
                    state.get("restarts", 0),
                    state.get("exit_code"),
                    state.get("since", ""),
                )
            )
    return found


def probe(service: Running) -> str:
    """The status, checked now: a server that is "ready" but does not answer is "silent"."""
    if service.status == "ready" and service.page:
        try:
            fetch(f"{service.page}/{'api/health' if service.name == 'prefect' else 'health'}")
        except OSError:
            return "silent"
    return service.status


def use_running() -> None:
    """Let this process and its children use the servers of `up`, unless the environment names others."""
    variables = {"prefect": ("PREFECT_API_URL", "/api"), "mlflow": ("MLFLOW_TRACKING_URI", "")}
    for service in running():
        if service.name in variables and service.status == "ready":
            variable, path = variables[service.name]
            os.environ[variable] = os.environ.get(variable) or service.page + path


def _read_state() -> dict[str, Any]:
    with contextlib.suppress(FileNotFoundError, json.JSONDecodeError):
        return dict(files.read_json(folder() / "state.json"))
    return {}


def _last_words(name: str) -> str:
    """What a service said last: the line that names the error, if there is one."""
    with contextlib.suppress(OSError):
        lines = (folder() / f"{name}.log").read_text(errors="replace").splitlines()[-LAST_LINES:]
        lines = [line.strip() for line in lines if line.strip() and not line.startswith("-- ")]
        named = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
        if chosen := (named or lines)[-1:]:
            return chosen[0][:300]
    return "it said nothing"
