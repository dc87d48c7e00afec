"""`trunkline up` and `down`: what runs is known, what crashed is cleaned up, nothing is left behind."""

from __future__ import annotations

import fcntl
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from tiny_clone import change_params

from flows import files, params, ports, services, supervisor
from flows.errors import ConfigError, ResourceError
from flows.params import Params
from flows.supervisor import Service

ROOT = Path(__file__).resolve().parents[2]
PATIENCE_S = 120.0
SLEEP = "import time; time.sleep(1000)"
STUBBORN = f"import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); open('stubborn', 'w'); {SLEEP}"
POPEN = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {SLEEP!r}]"
FAMILY = f"{POPEN}); {SLEEP}"
DIVIDED = f"{POPEN}, start_new_session=True); {SLEEP}"
FAILS = "print('error: there is no cheese'); raise SystemExit(3)"


def wait_for(condition: Callable[[], Any], what: str) -> Any:
    deadline = time.monotonic() + PATIENCE_S
    while not (value := condition()):
        assert time.monotonic() < deadline, f"{what} did not come"
        time.sleep(0.05)
    return value


@pytest.fixture
def settings(home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Params]:
    """Free ports, no servers of other tests, a short patience; whatever a failed test leaves is killed."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    yield change_params(
        home,
        {
            "services.prefect_port": ports.free_port(),
            "services.mlflow_port": ports.free_port(),
            "services.stop_patience_s": 1.0,
        },
    )
    supervisor.end_processes(supervisor.marked_processes(services.folder()), 0.0)


@pytest.fixture
def planned(settings: Params, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Params]:
    """`planned(name="python code", …)`: what `up` will start instead of servers."""

    def plan(**codes: str) -> Params:
        found = [
            Service(name, [sys.executable, "-c", code], patience_s=1.0, once=name.startswith("once"))
            for name, code in codes.items()
        ]
        monkeypatch.setattr(services, "plan", lambda params: found)
        return settings

    return plan


def pids() -> set[int]:
    return {process.pid for process in supervisor.marked_processes(services.folder())}


def status() -> dict[str, str]:
    return {service.name: service.status for service in services.running()}


def test_up_and_down_leave_nothing(planned: Callable[..., Params], home: Path) -> None:
    settings = planned(family=DIVIDED, stubborn=STUBBORN, once="print('done')")
    assert services.running() == []
    assert services.up(settings)
    services.wait_until_ready(settings)
    assert status() == {"family": "ready", "stubborn": "ready", "once": "done"}
    wait_for(lambda: len(pids()) == 4, "supervisor, two services and a child")
    wait_for((home / "stubborn").exists, "a service that ignores SIGTERM")
    before = pids()
    assert not services.up(settings), "already up"
    assert pids() == before
    assert services.down(settings)
    assert pids() == set()
    assert status() == {}
    left = {path.name for path in services.folder().iterdir()}
    assert left == {"command.lock", "family.log", "lock", "once.log", "stubborn.log", "supervisor.log"}
    assert "done" in (services.folder() / "once.log").read_text()
    assert not services.down(settings), "nothing was up"


def test_a_service_that_ends_starts_again_and_its_children_are_gone(planned: Callable[..., Params]) -> None:
    settings = planned(family=FAMILY)
    services.up(settings)
    services.wait_until_ready(settings)
    first = services.running()[0].pid
    child = wait_for(lambda: psutil.Process(first).children(), "a child")[0]
    os.kill(first, signal.SIGKILL)
    wait_for(lambda: services.running()[0].pid not in (0, first), "a new process")
    again = services.running()[0]
    assert (again.restarts, again.exit_code) == (1, -signal.SIGKILL)
    assert not child.is_running()
    services.down(settings)
    assert pids() == set()


def test_a_service_that_cannot_start_is_named_with_its_last_words(planned: Callable[..., Params]) -> None:
    settings = planned(good=SLEEP, bad=FAILS)
    services.up(settings)
    with pytest.raises(
        ResourceError, match=r"^bad ends with exit code 3: there is no cheese; log: .*bad\.log$"
    ):
        services.wait_until_ready(settings)
    assert status()["good"] == "ready"
    services.down(settings)


def test_what_a_killed_supervisor_left_is_ended_by_the_next_up(planned: Callable[..., Params]) -> None:
    settings = planned(family=DIVIDED)
    services.up(settings)
    services.wait_until_ready(settings)
    wait_for(lambda: len(pids()) == 3, "supervisor, service and child")
    orphans = pids()
    os.kill(files.read_json(services.folder() / "state.json")["pid"], signal.SIGKILL)
    wait_for(lambda: not services.is_up(), "the lock's release")
    assert status() == {}, "stale files do not count"
    assert services.up(settings)
    services.wait_until_ready(settings)
    assert not orphans & pids()
    services.down(settings)
    assert pids() == set()


def test_a_recycled_pid_is_not_ours(planned: Callable[..., Params]) -> None:
    """A stale state file names the pid of this very process."""
    settings = planned(family=SLEEP)
    services.folder().mkdir(parents=True)
    files.write_json(
        services.folder() / "state.json",
        {"pid": os.getpid(), "services": {"family": {"status": "ready", "pid": os.getpid()}}},
    )
    assert services.running() == []
    assert not services.down(settings)
    assert services.up(settings)
    services.down(settings)


def test_looking_does_not_keep_the_supervisor_from_starting(settings: Params) -> None:
    """`is_up` holds the lock for an instant, which must not be taken for another supervisor."""
    services.folder().mkdir(parents=True)
    with open(services.folder() / "lock", "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_SH)
        files.write_json(services.folder() / "plan.json", {"services": [], "log_mb": 1, "temporary": ""})
        late = subprocess.Popen([sys.executable, "-m", "flows.supervisor", str(services.folder())])
        wait_for(lambda: opened(late.pid, "lock"), "its look at the lock")
    wait_for((services.folder() / "state.json").exists, "the supervisor")
    late.terminate()
    assert late.wait(60) == 0


def opened(pid: int, name: str) -> bool:
    return any(Path(file.path).name == name for file in psutil.Process(pid).open_files())


def test_an_occupied_port_is_one_line_and_starts_nothing(settings: Params) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", settings.services.mlflow_port))
        other.listen()
        with pytest.raises(
            ResourceError, match=f"cannot listen on 127.0.0.1:{settings.services.mlflow_port}"
        ):
            services.up(settings)
    assert pids() == set()
    assert not services.is_up()


def test_what_exists_elsewhere_is_not_started(settings: Params, monkeypatch: pytest.MonkeyPatch) -> None:
    assert [service.name for service in services.plan(settings)] == [
        "prefect",
        "mlflow",
        "deployments",
        "worker",
    ]
    monkeypatch.setenv("PREFECT_API_URL", "http://prefect.example:4200/api")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://mlflow.example")
    found = services.plan(settings)
    assert [service.name for service in found] == ["deployments", "worker"]
    for service in found:
        assert service.environment["PREFECT_API_URL"] == "http://prefect.example:4200/api"
        assert service.environment["MLFLOW_TRACKING_URI"] == "https://mlflow.example"
        assert "TRUNKLINE_OWN_PREFECT" not in service.environment, "others' flow runs are not ours to close"


def test_no_password_is_shown_in_arguments_or_files(
    settings: Params, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "postgresql+psycopg://me:secret@127.0.0.1:1/mlflow")
    assert not any("secret" in word for service in services.plan(settings) for word in service.command)
    monkeypatch.setattr(services.tracking, "client", lambda params: None)
    monkeypatch.setattr(services, "prefect_command", lambda host, port: [sys.executable, "-c", SLEEP])
    monkeypatch.setattr(services, "mlflow_command", lambda *arguments: [sys.executable, "-c", SLEEP])
    services.up(settings)
    wait_for(lambda: len(pids()) >= 3, "the services")
    environments = [process.environ() for process in supervisor.marked_processes(services.folder())]
    assert any("secret" in environment["MLFLOW_BACKEND_STORE_URI"] for environment in environments)
    services.down(settings)
    for path in services.folder().iterdir():
        assert "secret" not in path.read_text()


def test_a_log_stays_short(tmp_path: Path) -> None:
    service = Service("chatty", [])
    watcher = supervisor.Supervisor(tmp_path, [service], 1)
    log = tmp_path / "chatty.log"
    with open(log, "ab", buffering=0) as output:
        output.write(b"x" * 1_000_001)
        watcher._shorten_log(service)
        output.write(b"after")
    assert log.read_bytes() == b"after"
    assert len((tmp_path / "chatty.log.1").read_bytes()) == 1_000_001


def test_the_two_ports_differ(raw_params: dict[str, Any]) -> None:
    raw_params["services"]["mlflow_port"] = raw_params["services"]["prefect_port"]
    with pytest.raises(ConfigError, match="must differ"):
        params.check(raw_params, "params.yaml")


@pytest.mark.parametrize(
    ("host", "url"),
    [
        ("127.0.0.1", "http://127.0.0.1:80"),
        ("0.0.0.0", "http://127.0.0.1:80"),
        ("::", "http://[::1]:80"),
        ("::1", "http://[::1]:80"),
        ("10.0.0.7", "http://10.0.0.7:80"),
    ],
)
def test_the_page_can_be_opened_on_this_machine(host: str, url: str) -> None:
    assert services.page_url(host, 80) == url
