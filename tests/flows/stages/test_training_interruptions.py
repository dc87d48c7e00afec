"""A training stage as a process: disturbed in every way, it ends with the weights of an undisturbed one, bit
for bit.

Starting a process costs seconds, so one history of interrupted attempts serves several tests.
"""

from __future__ import annotations

import re
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import network
import psutil
import pytest
import training_workspace as workspaces
from network import Host, Network
from training_workspace import Attempt

from flows import files, params, ports, tracking

PEER_TIMEOUT_S = 8
SOON_S = 20.0
"""Far above the second or two it takes, far below the time training would still need, agents' patience
included."""


@dataclass
class History:
    """A run that was interrupted again and again, its attempts, and the same run undisturbed."""

    workspace: Path
    undisturbed: Path
    attempts: dict[str, Attempt]
    codes: dict[str, int]
    seconds: dict[str, float]

    def end(self, name: str) -> None:
        """Note how the attempt ended and how long that took from now."""
        started = time.monotonic()
        self.codes[name] = self.attempts[name].wait()
        self.seconds[name] = time.monotonic() - started

    def begin(self, name: str, step: int, **options: Any) -> Attempt:
        """Start an attempt and let it come to `step`."""
        self.attempts[name] = Attempt(self.workspace, "pretrain", **options)
        self.attempts[name].wait_for_step(step)
        return self.attempts[name]

    def finish(self, name: str, workspace: Path, **options: Any) -> None:
        """Start an attempt and let it come to its end."""
        self.attempts[name] = Attempt(workspace, "pretrain", **options)
        self.end(name)

    def close(self) -> None:
        for attempt in self.attempts.values():
            attempt.close()


@pytest.fixture(scope="module")
def alone(ingested: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[History]:
    """One process: killed, left by its parent, asked to stop while a second one waits; then left alone."""
    folder = tmp_path_factory.mktemp("alone")
    undisturbed = workspaces.copy(ingested, folder / "undisturbed")
    history = History(workspaces.copy(ingested, folder / "disturbed"), undisturbed, {}, {}, {})
    try:
        history.begin("killed", 9).kill()
        history.end("killed")

        orphan = history.begin("orphaned", 15, parent=True)
        stage = psutil.Process(int(orphan.wait_for(r"stage is (\d+)")[1]))
        orphan.process.kill()
        history.end("orphaned")
        workspaces.wait_until_gone([stage.pid])

        first = history.begin("terminated", 18)
        first.process.send_signal(signal.SIGSTOP)  # it keeps its lock, and does not finish meanwhile
        second = history.attempts["second"] = Attempt(history.workspace, "pretrain")
        second.wait_for("waiting for another process")
        second.process.terminate()
        history.end("second")
        first.process.send_signal(signal.SIGCONT)
        first.process.terminate()
        history.end("terminated")

        history.finish("last", history.workspace)
        history.finish("undisturbed", undisturbed)
        yield history
    finally:
        history.close()


@pytest.fixture(scope="module")
def pair(ingested: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[History]:
    """Two processes under torchrun's agent: one killed, agent left by its parent, all terminated; then left
    alone.

    The undisturbed run uses two agents, as on two machines.
    """
    folder = tmp_path_factory.mktemp("pair")
    change = {"pretrain": {"training": {"processes": 2}}}
    undisturbed = workspaces.copy(ingested, folder / "undisturbed", change)
    history = History(workspaces.copy(ingested, folder / "disturbed", change), undisturbed, {}, {}, {})
    try:
        history.begin("one killed", 9).workers()[1].kill()
        history.end("one killed")

        orphan = history.begin("orphaned", 18, parent=True)
        agent = psutil.Process(int(orphan.wait_for(r"stage is (\d+)")[1]))
        family = [agent, *agent.children()]
        orphan.process.kill()
        history.end("orphaned")
        workspaces.wait_until_gone([process.pid for process in family])

        # as the flow ends a stage: every process gets the signal, and the agent passes its own on
        cancelled = history.begin("terminated", 27, TRUNKLINE_TRACKING="on")
        for process in [*cancelled.workers(), cancelled.process]:
            process.terminate()
        history.end("terminated")
        history.finish("last", history.workspace, TRUNKLINE_TRACKING="on")

        address = f"--master-addr 127.0.0.1 --master-port {ports.free_port()}"
        machines = f"--nnodes 2 --nproc-per-node 1 {address} --node-rank"
        history.attempts["machine 1"] = Attempt(undisturbed, "pretrain", TRUNKLINE_TORCHRUN=f"{machines} 1")
        history.finish("undisturbed", undisturbed, TRUNKLINE_TORCHRUN=f"{machines} 0")
        history.end("machine 1")
        yield history
    finally:
        history.close()


@dataclass
class Machines:
    """A run on two hosts with a clone each, which share artifacts/ and scratch, and the hosts' attempts."""

    workspaces: list[Path]
    network: Network
    attempts: dict[str, list[Attempt]]
    codes: dict[str, list[int]]
    seconds: dict[str, float]

    @property
    def hosts(self) -> list[Host]:
        return self.network.hosts

    def start(self, name: str, number: int, master: str = "") -> Attempt:
        """One host's part of an attempt."""
        attempt = Attempt(
            self.workspaces[number],
            "pretrain",
            prefix=self.hosts[number].command,
            PIPELINE_SCRATCH=str(self.workspaces[0] / "scratch"),
            TRUNKLINE_TORCHRUN=f"--nnodes 2 --node-rank {number} --nproc-per-node 1 --master-port 29500 "
            f"--master-addr {master or self.hosts[0].address}",
        )
        self.attempts.setdefault(name, []).append(attempt)
        return attempt

    def end(self, name: str) -> None:
        """Note how the attempt ended on each host and how long that took from now."""
        started = time.monotonic()
        self.codes[name] = [attempt.wait() for attempt in self.attempts[name]]
        self.seconds[name] = time.monotonic() - started
        print(f"two hosts: {name}: exit codes {self.codes[name]} after {self.seconds[name]:.1f} s")

    def close(self) -> None:
        for attempt in [attempt for group in self.attempts.values() for attempt in group]:
            attempt.close()


@pytest.fixture(scope="module")
def machines(ingested: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machines]:
    """Two hosts: the second comes late; the network is away for a moment; the second is killed; the network
    stays away; then they are left alone."""
    if reason := network.why_not():
        pytest.skip(reason)
    folder = tmp_path_factory.mktemp("machines")
    change = {"distributed": {"rendezvous_timeout_s": 120, "peer_timeout_s": PEER_TIMEOUT_S}}
    first = workspaces.copy(ingested, folder / "first", change)
    second = folder / "second"
    second.mkdir()
    for name in ("flows", "models", "params.yaml", "artifacts"):
        (second / name).symlink_to(first / name)
    with Network(2) as joined:
        run = Machines([first, second], joined, {}, {}, {})
        try:
            leader = run.start("killed", 0)
            time.sleep(3.0)  # it is waiting for the other one, or about to
            follower = run.start("killed", 1)
            leader.wait_for_step(9)
            joined.unplug(run.hosts[1])
            time.sleep(PEER_TIMEOUT_S / 3)
            joined.plug_in(run.hosts[1])
            leader.wait_for_step(last_step(leader) + 3)
            follower.kill()
            run.end("killed")

            leader, _ = run.start("cut", 0), run.start("cut", 1)
            leader.wait_for_step(36)
            joined.unplug(run.hosts[1])
            run.end("cut")
            joined.plug_in(run.hosts[1])

            for number in (1, 0):
                run.start("last", number)
            run.end("last")
            yield run
        finally:
            run.close()


def last_step(attempt: Attempt) -> int:
    return max(
        int(found[1]) for line in attempt.lines if (found := re.search(r" step (\d+)/\d+  loss", line))
    )


def assert_equal(history: History) -> None:
    for name in ("last", "undisturbed"):
        assert history.codes[name] == 0, history.attempts[name].output
    assert workspaces.weights(history.workspace) == workspaces.weights(history.undisturbed)
    assert workspaces.curves(history.workspace) == workspaces.curves(history.undisturbed)


def assert_stopped_cleanly(history: History, name: str) -> None:
    attempt = history.attempts[name]
    assert "Traceback" not in attempt.output
    assert len(workspaces.errors(attempt)) == 1, attempt.output
    assert f"of {workspaces.STEPS}; the same command continues there" in workspaces.errors(attempt)[0]
    assert history.seconds[name] < SOON_S


def test_a_disturbed_run_equals_an_undisturbed_one(alone: History) -> None:
    assert_equal(alone)


def test_every_attempt_resumes_where_the_last_one_was_saved(alone: History) -> None:
    assert alone.codes["killed"] == -signal.SIGKILL
    assert "pretrain: scratch: random weights" in alone.attempts["killed"].lines
    began = {
        name: alone.attempts[name].wait_for(r"resume: step (\d+) from")[1]
        for name in ("orphaned", "terminated", "last")
    }
    # a kill falls back to the last multiple of checkpoint_every, a request to stop saves on the spot
    assert int(began["orphaned"]) in range(5, 16, 5)
    for earlier, later in (("orphaned", "terminated"), ("terminated", "last")):
        stopped_at = workspaces.errors(alone.attempts[earlier])[0].split("stopped at step ")[1].split()[0]
        assert began[later] == stopped_at


def test_a_request_to_stop_saves_and_ends_within_seconds(alone: History) -> None:
    assert alone.codes["terminated"] == 75
    assert_stopped_cleanly(alone, "terminated")


def test_a_stage_whose_parent_was_killed_saves_and_ends(alone: History) -> None:
    assert alone.codes["orphaned"] == -signal.SIGKILL, "the stand-in for DVC"
    assert_stopped_cleanly(alone, "orphaned")


def test_a_second_training_of_the_same_run_waits_and_harms_nothing(alone: History) -> None:
    second = alone.attempts["second"]
    assert alone.codes["second"] == 75
    assert len(workspaces.errors(second)) == 1
    assert "another process" in workspaces.errors(second)[0]
    assert "Traceback" not in second.output
    assert alone.codes["terminated"] == 75, "the first went on until it was asked to stop"


def test_outputs_leave_no_checkpoints(alone: History) -> None:
    assert list((alone.workspace / "scratch" / "pretrain").iterdir()) == []


def test_a_disturbed_pair_equals_an_undisturbed_one_on_two_machines(pair: History) -> None:
    assert_equal(pair)


def test_the_second_machine_writes_nothing(pair: History) -> None:
    assert pair.codes["machine 1"] == 0
    assert pair.attempts["machine 1"].lines == []
    receipt = files.read_json(pair.undisturbed / "artifacts" / "receipts" / "pretrain.json")
    assert receipt["stage"] == "pretrain"


def test_two_disturbed_hosts_end_like_an_undisturbed_pair(machines: Machines, pair: History) -> None:
    assert machines.codes["last"] == [0, 0], machines.attempts["last"][1].output
    assert workspaces.weights(machines.workspaces[0]) == workspaces.weights(pair.undisturbed)
    assert workspaces.curves(machines.workspaces[0]) == workspaces.curves(pair.undisturbed)


def test_a_host_that_was_killed_ends_the_other_with_one_line(machines: Machines) -> None:
    survivor, _ = machines.attempts["killed"]
    assert machines.codes["killed"] == [75, -signal.SIGKILL]
    assert machines.seconds["killed"] < SOON_S
    (line,) = workspaces.errors(survivor)
    assert "a training process on another machine ended or cannot be reached" in line
    assert "it continues from the last checkpoint" in line
    assert "Traceback" not in survivor.output


def test_a_network_that_stays_away_ends_both_hosts(machines: Machines) -> None:
    """No connection is closed there: without a sign of life nobody would know for half an hour."""
    assert machines.codes["cut"] == [75, 75]
    for number, attempt in enumerate(machines.attempts["cut"]):
        (line,) = workspaces.errors(attempt)
        assert f"machine {1 - number} of 0-1 has not been heard of for" in line
        assert "Traceback" not in attempt.output
    assert machines.seconds["cut"] < PEER_TIMEOUT_S + SOON_S


def test_hosts_resume_where_the_last_checkpoint_was(machines: Machines) -> None:
    began = {
        name: int(leader.wait_for(r"resume: step (\d+) from")[1])
        for name, leader in (("cut", machines.attempts["cut"][0]), ("last", machines.attempts["last"][1]))
    }
    assert 10 <= began["cut"] < began["last"]
    assert machines.attempts["last"][0].lines == [], "the second host writes nothing"


def test_a_killed_worker_ends_the_others_with_one_line(pair: History) -> None:
    attempt = pair.attempts["one killed"]
    assert pair.codes["one killed"] == 137
    assert workspaces.errors(attempt) == [
        "error: pretrain: training process 1 was ended by SIGKILL; the same command continues from the last "
        "checkpoint"
    ]
    assert "Traceback" not in attempt.output
    assert pair.seconds["one killed"] < SOON_S


@pytest.mark.parametrize("name", ["orphaned", "terminated"])
def test_a_pair_saves_and_stops_together(pair: History, name: str) -> None:
    assert_stopped_cleanly(pair, name)


def test_the_agent_says_that_the_stage_was_interrupted(pair: History) -> None:
    assert pair.codes["terminated"] == 75


def test_only_rank_0_opens_a_run_and_closes_it(pair: History, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two attempts were tracked: the one that was terminated and the one that finished."""
    monkeypatch.chdir(pair.workspace)
    monkeypatch.setenv("TRUNKLINE_HOME", str(pair.workspace))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "")  # set, so that what `client` puts there is undone
    client = tracking.client(params.load())
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    runs = client.search_runs(experiments, order_by=["attributes.start_time ASC"])
    assert [run.info.status for run in runs] == ["KILLED", "FINISHED"]
    resumed = int(pair.attempts["last"].wait_for(r"resume: step (\d+) from")[1])
    logged = client.get_metric_history(runs[1].info.run_id, "train_loss")
    assert [metric.step for metric in logged] == [
        step for step in range(3, workspaces.STEPS + 1, 3) if step > resumed
    ]
