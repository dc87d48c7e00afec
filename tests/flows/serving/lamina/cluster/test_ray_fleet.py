"""Attention workers on several hosts: a Ray cluster of a head and two nodes on this machine."""

import os
import signal
import time

import numpy as np
import psutil
import pytest
from attention_servers import HEADS, KV_HEADS, LAYERS, TOKEN, Requests, connect, run

from flows.errors import ResourceError
from flows.serving.lamina.attention.partition import HeadPartition
from flows.serving.lamina.cluster.cluster_file import ClusterFile
from flows.serving.lamina.cluster.ports import hold_port
from flows.serving.lamina.cluster.ray_fleet import RayFleet

pytest.importorskip("ray", reason="Ray is not installed: pip install 'trunkline[cluster]'")
cluster_utils = pytest.importorskip("ray.cluster_utils")

QUICK = {
    "health_check_initial_delay_ms": 0,
    "health_check_period_ms": 800,
    "health_check_failure_threshold": 3,
}
PLAN = [[(1, 0, 40)], [(1, 40, 1)]]


def attend(fleet, epoch):
    """One request through both workers, against a float64 reference."""
    requests = Requests({1: 41})
    with connect(fleet.addresses, HeadPartition(KV_HEADS, [1, 1]), epoch=epoch) as pool:
        out = run(pool, requests, PLAN, {1: (1, 2, 3)})
    for layer in range(len(LAYERS)):
        assert out[1][layer].shape[1] == HEADS
        np.testing.assert_allclose(out[1][layer], requests.expected(1, layer), atol=2e-6)


def wait(fleet, condition):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        fleet.look()
        time.sleep(0.02)


def node_of(pid, raylets):
    """The node whose raylet the process descends from."""
    parents = {parent.pid for parent in psutil.Process(pid).parents()}
    return next(name for name, raylet in raylets.items() if raylet in parents)


def test_workers_land_where_asked_answer_and_are_replaced_on_another_host(tmp_path):
    cluster = cluster_utils.Cluster(
        initialize_head=True,
        head_node_args={"num_cpus": 0, "include_dashboard": False, "_system_config": QUICK},
    )
    fleet, holders = None, []
    try:
        nodes = {
            "a": cluster.add_node(num_cpus=1, resources={"a": 1, "kv": 1}),
            "b": cluster.add_node(num_cpus=2, resources={"b": 1, "kv": 1}),
        }
        raylets = {name: node.all_processes["raylet"][0].process.pid for name, node in nodes.items()}
        group = {"kv_mb": 16, "cpus": 0.5}
        file = ClusterFile.model_validate(
            {
                "address": cluster.address,
                "workers": [
                    {**group, "resources": {"b": 0.5}},
                    {**group, "resources": {"kv": 0.5}},
                ],
            }
        )
        crowded = RayFleet(
            ClusterFile.model_validate(
                {**file.model_dump(), "start_timeout_s": 0.5, "workers": [{"kv_mb": 1, "cpus": 64.0}]}
            ),
            TOKEN.decode(), tmp_path, print,
        )  # fmt: skip
        with pytest.raises(ResourceError, match=r"no room for the attention workers.*'CPU': 64"):
            crowded.start()
        said = []
        fleet = RayFleet(file, TOKEN.decode(), tmp_path, said.append)
        before = signal.getsignal(signal.SIGTERM)
        fleet.start()
        assert signal.getsignal(signal.SIGTERM) is before
        pids = list(map(fleet.pid_at, fleet.addresses))
        assert [node_of(pid, raylets) for pid in pids] == ["b", "a"]  # spread, and one of them pinned
        commands = [psutil.Process(pid).cmdline() for pid in pids]
        assert not any(TOKEN.decode() in word for command in commands for word in command)
        assert all(command[command.index("--host") + 1] != "0.0.0.0" for command in commands)
        attend(fleet, 1)

        addresses = list(fleet.addresses)
        os.kill(pids[0], signal.SIGKILL)  # its actor starts it again, on its port
        wait(fleet, lambda: fleet.pid_at(addresses[0]) not in (0, pids[0]))
        assert fleet.addresses == addresses

        cluster.remove_node(nodes["a"], allow_graceful=False)
        psutil.wait_procs([psutil.Process(pids[1])] if psutil.pid_exists(pids[1]) else [], 20)
        holders.append(hold_port(*addresses[1]))  # another host has no such port to give back
        wait(fleet, lambda: fleet.addresses != addresses and all(map(fleet.pid_at, fleet.addresses)))
        assert fleet.addresses[0] == addresses[0]
        assert node_of(fleet.pid_at(fleet.addresses[1]), raylets) == "b"
        assert any("has moved from" in line for line in said)
        attend(fleet, 2)
    finally:
        left = [pid for address in fleet.addresses if (pid := fleet.pid_at(address))] if fleet else []
        if fleet is not None:
            fleet.stop(5)
        assert [pid for pid in left if psutil.pid_exists(pid)] == []
        cluster.shutdown()
        for holder in holders:
            holder.close()
