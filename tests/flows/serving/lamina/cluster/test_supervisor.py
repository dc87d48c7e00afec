"""What becomes of an engine and of what it reports. The engine is a stand-in, the fleet a list of notes."""

import json
import os
import signal
import stat
import sys
import time
from pathlib import Path

import pytest

from flows.errors import DataError, GateFailed, ResourceError
from flows.serving.lamina.cluster import keeper, supervisor
from flows.serving.lamina.cluster.run_folder import run_folder
from flows.serving.lamina.cluster.supervisor import Supervisor
from flows.serving.lamina.requests import WorkersMoved, decode_to_engine, encode

ENGINE = [sys.executable, "-S", str(Path(__file__).with_name("stand_in_engine.py"))]
ADDRESS = ("127.0.0.1", 9)
PID = 4711
SETTINGS = {"recover": {"journal": True}}


class NotedFleet:
    """Workers that are only noted down."""

    labels = ()

    def __init__(self):
        self.addresses = [ADDRESS]
        self.replaced, self.pid, self.stopped = [], PID, False

    def start(self):
        pass

    def look(self):
        pass

    def replace(self, address, why):
        self.replaced.append((address, why))

    def pid_at(self, address):
        return self.pid if address in self.addresses else 0

    def stop(self, patience_s):
        self.stopped = True


@pytest.fixture
def service(monkeypatch):
    """Starts supervisors; all are stopped at the end, and nothing may be left of them."""
    monkeypatch.setattr(supervisor, "STOP_PATIENCE_S", 2.0)
    monkeypatch.setattr(keeper, "pause_after", lambda early: 0.0)
    with run_folder() as folder:
        made = []

        def start(bundle="fine", settings=SETTINGS):
            made.append(
                Supervisor(
                    NotedFleet(), folder, settings=settings, bundle=bundle, calibration="c", command=ENGINE,
                    say=lambda line: None,
                )
            )  # fmt: skip
            made[-1].start()
            return made[-1]

        yield start
        for one in made:
            one.stop()
            assert one.fleet.stopped
            assert one.engine.child is None
    assert not folder.path.exists()


def wait(condition):
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def starts(service):
    path = service.folder.path / "starts"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def test_the_engine_gets_its_config_and_is_started_again(service):
    one = service()
    wait(lambda: one.engine.ready)
    assert not one.is_replacing()
    config = one.folder.engine_config
    assert stat.S_IMODE(config.stat().st_mode) == 0o600
    assert json.loads(config.read_text()) == {
        "bundle": "fine", "lamina": SETTINGS, "workers": [list(ADDRESS)], "calibration": "c",
        "token_file": str(one.folder.token_file), "socket": str(one.folder.socket),
        "journal": str(one.folder.journal),
    }  # fmt: skip
    os.kill(one.engine.child.pid, signal.SIGKILL)
    wait(lambda: len(starts(one)) == 2)
    wait(lambda: one.engine.ready)
    assert one.failure is None


def test_an_engine_without_a_heartbeat_is_killed_even_if_it_is_stopped(service):
    one = service(settings={"recover": {"journal": False}})
    wait(lambda: one.engine.ready)
    os.kill(one.engine.child.pid, signal.SIGSTOP)
    one.engine_silent()
    wait(lambda: len(starts(one)) == 2)
    assert json.loads(one.folder.engine_config.read_text())["journal"] is None


@pytest.mark.parametrize(("code", "kind"), [(11, DataError), (10, GateFailed)])
def test_an_engine_that_refuses_its_bundle_ends_the_service(code, kind, service):
    told = []
    one = service(f"exit:{code}")
    one.watch(told.append)
    wait(lambda: told)
    assert type(told[0]) is kind
    assert str(told[0]) == "the stand-in cannot load its bundle"
    assert len(starts(one)) == 1
    late = []
    one.watch(late.append)  # as if serving had begun after the failure
    assert late == told


def test_an_engine_that_dies_again_and_again_ends_the_service(service):
    one = service("exit:1")
    wait(lambda: one.failure)
    assert isinstance(one.failure, ResourceError)
    assert "died 6 times in a row" in str(one.failure)
    assert "exit code 1: the stand-in cannot load its bundle" in str(one.failure)
    assert len(starts(one)) == 6


def test_a_drained_engine_is_not_replaced(service):
    one = service()
    wait(lambda: one.engine.ready)
    one.draining()
    os.kill(one.engine.child.pid, signal.SIGKILL)  # it has not finished what was admitted
    wait(lambda: len(starts(one)) == 2)
    wait(lambda: one.engine.ready)
    one.drained()
    os.kill(one.engine.child.pid, signal.SIGTERM)
    wait(lambda: one.engine.child.poll() is not None)
    time.sleep(0.2)
    assert len(starts(one)) == 2


def test_an_engine_that_ignores_sigterm_is_killed_at_the_end(service, monkeypatch):
    monkeypatch.setattr(supervisor, "STOP_PATIENCE_S", 0.2)
    one = service("deaf")
    wait(lambda: one.engine.ready)
    pid = one.engine.child.pid
    one.stop()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_a_lost_worker_is_ended_and_its_successor_is_not(service, monkeypatch):
    asked, answering = [], [True]

    def answers(host, port, token):
        asked.append((host, port, token))
        return answering[0]

    monkeypatch.setattr(supervisor, "answers", answers)
    one = service()
    one.worker_lost("127.0.0.1", 10, PID, "not one of ours")
    one.worker_lost(*ADDRESS, PID - 1, "that was its predecessor")
    one.worker_lost(*ADDRESS, 0, "nobody has ever answered there, but now it does")
    wait(lambda: asked == [(*ADDRESS, one.folder.token.encode())])
    one.fleet.pid = 0
    assert one.is_replacing()
    one.worker_lost(*ADDRESS, PID, "it is being replaced")
    wait(lambda: not one._reports)
    time.sleep(0.1)
    assert one.fleet.replaced == []
    one.fleet.pid = PID
    one.worker_lost(*ADDRESS, PID, "silence")
    wait(lambda: len(one.fleet.replaced) == 1)
    answering[0] = False
    one.worker_lost(*ADDRESS, 0, "nobody answers")
    wait(lambda: len(one.fleet.replaced) == 2)
    assert one.fleet.replaced[0] == (ADDRESS, "it was ended, because silence")
    assert len(asked) == 2


def test_a_worker_that_moves_is_told_to_the_engine_and_to_the_next_one(service):
    told, late = [], []
    one = service()
    wait(lambda: one.engine.ready)
    one.watch(lambda _: None, told.append)
    assert told == []
    one.fleet.addresses = [("10.0.0.2", 21000)]
    wait(lambda: told)
    assert told == [WorkersMoved(addresses=(("10.0.0.2", 21000),))]
    assert decode_to_engine(encode(told[0])) == told[0]
    os.kill(one.engine.child.pid, signal.SIGKILL)
    wait(lambda: len(starts(one)) == 2)
    assert [start["workers"] for start in starts(one)] == [[list(ADDRESS)], [["10.0.0.2", 21000]]]
    one.watch(lambda _: None, late.append)  # whoever begins to serve later
    assert late == told


def test_a_mistake_of_the_supervisor_ends_the_service_instead_of_watching_over_nothing(service, monkeypatch):
    monkeypatch.setattr("threading.excepthook", lambda _: None)
    one = service()
    one.fleet.look = lambda: 1 / 0
    wait(lambda: one.failure)
    assert "the supervisor failed: ZeroDivisionError" in str(one.failure)
