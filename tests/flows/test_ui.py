"""`trunkline ui`: both servers answer, one signal ends them with all their processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx
import psutil
import pytest

from flows import ports
from flows.errors import ResourceError

ROOT = Path(__file__).resolve().parents[2]
PATIENCE_S = 150.0


def wait_for_page(address: str, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while True:
        try:
            assert httpx.get(address, timeout=5).status_code == 200
            return
        except httpx.TransportError:
            assert process.poll() is None, "it ended by itself"
            assert time.monotonic() < deadline, f"{address} does not answer"
            time.sleep(0.2)


def test_both_pages_answer_until_a_signal(home: Path) -> None:
    prefect, mlflow = ports.free_port(), ports.free_port()
    arguments = ["ui", "--prefect-port", str(prefect), "--mlflow-port", str(mlflow)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PREFECT_HOME": str(home / ".prefect")}
    environment.pop("PREFECT_API_URL", None)
    process = subprocess.Popen(
        [sys.executable, "-m", "flows.cli", *arguments],
        cwd=home,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        # a suite that was started in the background inherits SIGINT as ignored
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    family = [psutil.Process(process.pid)]
    try:
        wait_for_page(f"http://127.0.0.1:{prefect}/api/health", process)
        wait_for_page(f"http://127.0.0.1:{mlflow}/health", process)
        family += family[0].children(recursive=True)
        assert len(family) >= 3
        process.send_signal(signal.SIGINT)
        said, _ = process.communicate(timeout=PATIENCE_S)
    finally:
        alive = psutil.wait_procs(family, timeout=10)[1]
        for left in alive:
            left.kill()
    assert alive == []
    assert process.returncode == 0
    assert f"http://127.0.0.1:{prefect}" in said
    assert f"http://127.0.0.1:{mlflow}" in said
    assert "Traceback" not in said
    ports.require_free("127.0.0.1", prefect)
    ports.require_free("127.0.0.1", mlflow)


SHOW = """
import sys
from flows import params, tracking, ui
tracking.client = lambda params: None
sleep = [sys.executable, "-c", "import time; time.sleep(1000)"]
ui.server_commands = lambda *arguments: {"Prefect": sleep, "MLflow": sleep}
ui.show(params.load(), 0, 0)
"""


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGHUP])
def test_a_closed_terminal_leaves_no_server(signum: signal.Signals, home: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", SHOW],
        cwd=home,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout
    while "Ctrl-C" not in process.stdout.readline():
        assert process.poll() is None
    servers = psutil.Process(process.pid).children()
    assert len(servers) == 2
    process.send_signal(signum)
    assert process.wait(60) == 0
    _, alive = psutil.wait_procs(servers, timeout=10)
    assert alive == []


def test_a_free_port_is_free() -> None:
    port = ports.free_port()
    ports.require_free("127.0.0.1", port)
    with pytest.raises(ResourceError, match=r"cannot listen on 192\.0\.2\.1"):
        ports.require_free("192.0.2.1", port)  # an address of documentation, never this machine's
