"""Which workers still have their pages after the engine has connected again."""

import socket

import pytest
from attention_servers import MODEL, TOKEN, serving

from flows.errors import ResourceError
from flows.params import check
from flows.serving.lamina.attention.pool import WorkerLost
from flows.serving.lamina.attention.transport import LinkTimeout, dial
from flows.serving.lamina.engine import workers as module
from flows.serving.lamina.engine.workers import Workers


@pytest.fixture
def connected(raw_params):
    """Workers that are connected, their servers, and how often the dialling of an address is to fail."""
    made = []

    def connect(count, wanted):
        context = serving(count)
        servers, addresses = context.__enter__()
        made.append(context)
        failures = dict.fromkeys(addresses, 0)

        def dial_or_fail(host, port, timeout_s):
            if failures[host, port]:
                failures[host, port] -= 1
                raise LinkTimeout("busy")
            return dial(host, port, timeout_s)

        raw_params["lamina"]["cluster"]["attention_workers"] = wanted
        raw_params["lamina"]["kv"]["mb_per_worker"] = 1
        workers = Workers(
            MODEL, check(raw_params, "").lamina, addresses, TOKEN, first_epoch=1,
            on_lost=lambda *_: None, on_epoch=lambda _: None, connect=dial_or_fail,
        )  # fmt: skip
        made.append(workers)
        workers.start(lambda: None)
        return workers, servers, addresses, failures

    yield connect
    while made:
        last = made.pop()
        last.close() if isinstance(last, Workers) else last.__exit__(None, None, None)


def restart(server):
    """As a successor of a killed process: it has no pages."""
    server.session.settings = server.session._store = None


def test_a_successor_has_no_pages_even_if_a_failed_attempt_has_configured_it(connected):
    workers, servers, addresses, failures = connected(2, 2)
    assert workers.reconnect(WorkerLost(0, "a broken connection"), lambda: None).lost == set()
    restart(servers[0])
    failures[addresses[1]] = 2  # worker 0 is configured, then worker 1 does not answer
    assert 0 in workers.reconnect(WorkerLost(0, "gone"), lambda: None).lost


def test_pages_of_a_time_before_are_none(connected):
    workers, _, addresses, failures = connected(3, 2)
    failures[addresses[0]] = 1
    assert workers.reconnect(WorkerLost(0, "slow"), lambda: None).lost == {0}  # the spare takes its place
    assert addresses[0] not in workers.assigned
    failures[addresses[2]] = 1
    assert workers.reconnect(WorkerLost(0, "slow"), lambda: None).lost == {0}  # and the first takes its place
    assert addresses[0] in workers.assigned


def test_heads_are_divided_by_what_the_workers_have_measured(raw_params):
    with serving(2) as (servers, addresses):
        servers[0].session.copy_bytes_per_s, servers[1].session.copy_bytes_per_s = 9e9, 3e9
        raw_params["lamina"]["cluster"]["weights"] = "auto"
        raw_params["lamina"]["kv"]["mb_per_worker"] = 1
        workers = Workers(
            MODEL, check(raw_params, "").lamina, addresses, TOKEN, first_epoch=1,
            on_lost=lambda *_: None, on_epoch=lambda _: None,
        )  # fmt: skip
        assert workers.partition.counts == [2, 2]
        workers.start(lambda: None)
        assert workers.partition.counts == [3, 1]
        workers.close()


@pytest.mark.parametrize("weights", ["equal", "auto"])
def test_a_worker_that_says_nothing_while_the_engine_starts_is_reported(raw_params, monkeypatch, weights):
    monkeypatch.setattr(module, "PROBE_S", 0.1)
    monkeypatch.setattr(module, "START_S", 0.5)
    lost = []
    with serving(1) as (_, addresses), socket.create_server(("127.0.0.1", 0)) as silent:
        raw_params["lamina"]["cluster"]["weights"] = weights
        raw_params["lamina"]["kv"]["mb_per_worker"] = 1
        workers = Workers(
            MODEL, check(raw_params, "").lamina, [*addresses, silent.getsockname()], TOKEN, first_epoch=1,
            on_lost=lambda *found: lost.append(found), on_epoch=lambda _: None,
        )  # fmt: skip
        with pytest.raises(ResourceError, match="not all attention workers"):
            workers.start(lambda: None)
        workers.close()
        assert {(address, pid) for address, pid, _ in lost} == {(silent.getsockname(), 0)}


def test_a_worker_that_is_not_there_yet_is_not_reported(raw_params, monkeypatch):
    monkeypatch.setattr(module, "START_S", 0.3)
    lost = []
    with socket.create_server(("127.0.0.1", 0)) as closed:
        address = closed.getsockname()
    raw_params["lamina"]["cluster"]["attention_workers"] = 1
    workers = Workers(
        MODEL, check(raw_params, "").lamina, [address], TOKEN, first_epoch=1,
        on_lost=lambda *found: lost.append(found), on_epoch=lambda _: None,
    )  # fmt: skip
    with pytest.raises(ResourceError, match="not all attention workers"):
        workers.start(lambda: None)
    assert not lost
