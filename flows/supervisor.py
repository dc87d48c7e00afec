"""Keeps the services of `trunkline up` running: `python -m flows.supervisor FOLDER`.

Reads FOLDER/plan.json (written by `flows.services`), starts each service when those it comes after are ready,
starts one that ended again after a growing pause, keeps its log short, and writes what it knows to
FOLDER/state.json. SIGTERM ends everything in reverse order. It holds FOLDER/lock as long as it lives: the
kernel releases it whatever happens, so the lock, not a pid in a file, says whether services run. Every
process below it carries `MARKER` in its environment; that is how they are found after a crash.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import psutil

from flows import files

MARKER = "TRUNKLINE_SERVICES"
TICK_S = 0.3
PROBE_S = 5.0
LONGEST_PAUSE_S = 60.0
STABLE_S = 60.0  # a service that lived this long starts again at once
LOCK_S = 3.0
LAST_S = 10.0  # for servers without work of their own to save


@dataclass
class Service:
    """One process and how to tell that it is ready."""

    name: str
    command: list[str]
    environment: dict[str, str] = field(default_factory=dict)
    after: list[str] = field(default_factory=list)
    once: bool = False
    """Runs to its end; ready when that was exit code 0."""
    page: str = ""
    """Address for people."""
    health: str = ""
    """URL that answers 200 when it is ready."""
    workers: str = ""
    """For a Prefect worker: URL that lists those of its pool; ready when one is online since the start."""
    patience_s: float = LAST_S
    """From SIGTERM to SIGKILL; for a worker what its flow runs get to save their work."""


@dataclass
class State:
    """What became of a service; `status`: waiting, starting, ready, done, pausing, stopped."""

    status: str = "waiting"
    pid: int = 0
    since: str = ""
    restarts: int = 0
    exit_code: int | None = None


class Supervisor:
    def __init__(self, folder: Path, services: list[Service], log_mb: int) -> None:
        self.folder, self.services, self.log_bytes = folder, services, log_mb * 1_000_000
        self.states = {service.name: State() for service in services}
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._started: dict[str, float] = {}
        self._not_before: dict[str, float] = {}
        self._stop = False
        self._written = ""

    def run(self) -> None:
        for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(signum, self._request_stop)
        try:
            while not self._stop:
                for service in self.services:
                    self._look_after(service)
                    self._shorten_log(service)
                self._write()
                time.sleep(TICK_S)
        finally:
            for service in reversed(self.services):
                self._end(service)
            self._write()

    def _request_stop(self, signum: int, frame: object) -> None:
        self._stop = True

    def _look_after(self, service: Service) -> None:
        state, process = self.states[service.name], self._processes.get(service.name)
        if process is None:
            ready = all(self.states[name].status in ("ready", "done") for name in service.after)
            if state.status != "done" and ready and time.monotonic() >= self._not_before.get(service.name, 0):
                self._start(service)
            return
        code = process.poll()
        if code is not None:
            del self._processes[service.name]
            if service.once and code == 0:
                self._change(state, status="done", exit_code=0, pid=0)
                return
            # children that outlive their service hold its port; flow runs are sessions of their own and go on
            end_processes(self._group(process.pid), LAST_S)
            lived_s = time.monotonic() - self._started[service.name]
            state.restarts = state.restarts + 1 if lived_s < STABLE_S else 1
            pause_s = min(LONGEST_PAUSE_S, 2.0 ** (state.restarts - 1))
            self._not_before[service.name] = time.monotonic() + pause_s
            self._change(state, status="pausing", exit_code=code, pid=0)
        elif state.status == "starting" and self._is_ready(service):
            self._change(state, status="ready")

    def _start(self, service: Service) -> None:
        log = self.folder / f"{service.name}.log"
        with open(log, "ab") as output:
            output.write(f"-- {_now()} {service.name} starts\n".encode())
            output.flush()
            self._processes[service.name] = subprocess.Popen(
                service.command,
                env={**os.environ, **service.environment},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        self._started[service.name] = time.monotonic()
        state = self.states[service.name]
        self._change(state, status="starting", pid=self._processes[service.name].pid)

    def _is_ready(self, service: Service) -> bool:
        with contextlib.suppress(OSError, ValueError):
            if service.workers:
                born = datetime.fromisoformat(self.states[service.name].since)
                return any(
                    worker["status"] == "ONLINE"
                    and datetime.fromisoformat(worker["last_heartbeat_time"]) >= born
                    for worker in json.loads(fetch(service.workers, b"{}"))
                )
            if service.health:
                fetch(service.health)
                return True
        return not (service.health or service.workers or service.once)

    def _end(self, service: Service) -> None:
        process = self._processes.pop(service.name, None)
        if process is None:
            return
        self._change(self.states[service.name], status="stopping")
        self._write()
        if service.workers:
            # asked first and alone, a flow run stops its stage, waits for the checkpoint and reports to the
            # server; being a session of its own, it would survive the end of the worker's process group
            _end_runs(process.pid, service.patience_s)
        family = [psutil.Process(process.pid), *descendants(process.pid)] if process.poll() is None else []
        patience_s = LAST_S if service.workers else service.patience_s
        end_processes([*family, *self._group(process.pid)], patience_s)
        self._change(self.states[service.name], status="stopped", pid=0, exit_code=process.poll())

    def _group(self, pgid: int) -> list[psutil.Process]:
        """What is left of a service's process group; the mark, because ids are given out again."""
        found = []
        for process in marked_processes(self.folder):
            with contextlib.suppress(ProcessLookupError, PermissionError):
                if os.getpgid(process.pid) == pgid:
                    found.append(process)
        return found

    def _change(self, state: State, **values: Any) -> None:
        for key, value in values.items():
            setattr(state, key, value)
        state.since = _now()

    def _shorten_log(self, service: Service) -> None:
        """Keep one older part. The service goes on writing to the same file, opened to append."""
        log = self.folder / f"{service.name}.log"
        with contextlib.suppress(OSError):
            if log.stat().st_size > self.log_bytes:
                shutil.copyfile(log, f"{log}.1")
                os.truncate(log, 0)

    def _write(self) -> None:
        """A full disk must not end the services: the state is then told late."""
        text = json.dumps(
            {"pid": os.getpid(), "services": {name: asdict(state) for name, state in self.states.items()}}
        )
        if text != self._written:
            with contextlib.suppress(OSError):
                files.write_text(self.folder / "state.json", text + "\n")
                self._written = text


def fetch(url: str, body: bytes | None = None) -> bytes:
    """The answer of a server of this machine: POST with a JSON body, else GET. Never through a proxy.

    Raises:
        OSError: no answer, or another one than 2xx.
    """
    request = urllib.request.Request(url, body, {"Content-Type": "application/json"})
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(request, timeout=PROBE_S) as answer:
        return bytes(answer.read())


def descendants(pid: int) -> list[psutil.Process]:
    with contextlib.suppress(psutil.Error):
        return psutil.Process(pid).children(recursive=True)
    return []


def _end_runs(worker: int, patience_s: float) -> None:
    """SIGTERM to the flow runs of a worker; returns when they and all below them have ended, or late."""
    runs = []
    with contextlib.suppress(psutil.Error):
        runs = psutil.Process(worker).children()
    families = [process for run in runs for process in (run, *descendants(run.pid))]
    for run in runs:
        with contextlib.suppress(psutil.Error):
            run.terminate()
    psutil.wait_procs(families, timeout=patience_s)


def marked_processes(folder: Path) -> list[psutil.Process]:
    """All that belongs to the services of `folder`, found by the environment they inherit."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if process.pid != os.getpid() and process.environ().get(MARKER) == str(folder):
                found.append(process)
    return found


def end_processes(processes: list[psutil.Process], patience_s: float) -> list[psutil.Process]:
    """SIGTERM, and SIGKILL after `patience_s`; returns what is still there (a process of another user)."""
    unique = list({process.pid: process for process in processes}.values())
    for process in unique:
        with contextlib.suppress(psutil.Error):
            process.terminate()
    _, alive = psutil.wait_procs(unique, timeout=patience_s)
    for process in alive:
        with contextlib.suppress(psutil.Error):
            process.kill()
    return list(psutil.wait_procs(alive, timeout=LAST_S)[1])


def _now() -> str:
    return datetime.now().astimezone().isoformat(timespec="milliseconds")


def _acquire(lock: int) -> bool:
    """Whoever looks whether services run holds the lock for an instant, too; only a supervisor keeps it."""
    deadline = time.monotonic() + LOCK_S
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() > deadline:
                return False
            time.sleep(0.01)


def main() -> int:
    folder = Path(sys.argv[1])
    with open(folder / "lock", "a") as lock:
        if not _acquire(lock.fileno()):
            return 0  # another one was quicker
        plan = files.read_json(folder / "plan.json")
        services = [Service(**values) for values in plan["services"]]
        Supervisor(folder, services, plan["log_mb"]).run()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
