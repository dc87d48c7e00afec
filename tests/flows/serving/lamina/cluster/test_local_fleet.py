"""Real attention workers on this machine: killed, stopped, orphaned."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from flows.errors import ConfigError
from flows.serving.lamina.attention.bandwidth import ask_bandwidths
from flows.serving.lamina.cluster.fleet import LocalFleet
from flows.serving.lamina.cluster.probe import answers
from flows.serving.lamina.cluster.run_folder import remove_stale, run_folder

ROOT = Path(__file__).parents[5]
ORPHANS = """
import sys, time
from pathlib import Path
from flows.serving.lamina.cluster.fleet import LocalFleet
from flows.serving.lamina.cluster.run_folder import run_folder
from flows.serving.lamina.cluster.supervisor import Supervisor
with run_folder(Path(sys.argv[1])) as folder:
    fleet = LocalFleet(1, folder.token_file, print, max_bytes=1 << 20)
    one = Supervisor(fleet, folder, settings={"recover": {"journal": True}}, bundle="fine", calibration="",
                     command=sys.argv[2:])
    one.start()
    while not one.engine.ready and one.failure is None:
        time.sleep(0.01)
    print(one.failure or "up", flush=True)
    time.sleep(60)
"""


def wait(condition, look=lambda: None):
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        look()
        time.sleep(0.02)


def test_workers_come_back_on_their_ports_and_leave_nothing(tmp_path):
    with run_folder(tmp_path) as folder:
        said = []
        fleet = LocalFleet(2, folder.token_file, said.append, max_bytes=1 << 20)
        token = folder.token.encode()
        try:
            fleet.start()
            addresses = list(fleet.addresses)
            assert all(answers(*address, token) for address in addresses)
            assert min(ask_bandwidths(addresses, token, 1)) > 1e8
            before = list(map(fleet.pid_at, addresses))
            os.kill(before[0], signal.SIGKILL)
            os.kill(before[1], signal.SIGSTOP)
            assert not answers(*addresses[1], token, 0.1)
            fleet.replace(addresses[1], "it is silent")
            wait(lambda: not any(map(fleet.pid_at, addresses)), fleet.look)
            wait(lambda: all(map(fleet.pid_at, addresses)), fleet.look)
            assert fleet.addresses == addresses
            assert not set(map(fleet.pid_at, addresses)) & set(before)
            assert all(answers(*address, token) for address in addresses)
            assert any("killed by SIGKILL: it is silent" in line for line in said)
        finally:
            fleet.stop(10)
        assert psutil.Process().children() == []
        assert not answers(*addresses[0], token, 0.1)


def test_a_worker_that_cannot_start_is_an_error_with_its_reason(tmp_path):
    fleet = LocalFleet(1, tmp_path / "no_token", lambda line: None, max_bytes=1 << 20)
    with pytest.raises(ConfigError, match=r"attention worker .* exit code 11: cannot read the token file"):
        fleet.start()
    assert psutil.Process().children() == []


def test_a_killed_parent_takes_its_children_along(tmp_path):
    engine = str(Path(__file__).with_name("stand_in_engine.py"))
    command = [sys.executable, "-c", ORPHANS, str(tmp_path), sys.executable, "-S", engine]
    parent = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        assert parent.stdout.readline() == "up\n"
        children = psutil.Process(parent.pid).children(recursive=True)
        assert len(children) == 2
    finally:
        parent.kill()
        parent.wait()
        parent.stdout.close()
    _, alive = psutil.wait_procs(children, 10)
    assert alive == []
    assert len(remove_stale(tmp_path)) == 1
    assert list(tmp_path.iterdir()) == []
