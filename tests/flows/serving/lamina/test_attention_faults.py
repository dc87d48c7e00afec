"""What peers, networks and the process table can do to an attention worker."""

import json
import os
import signal
import socket
import struct
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from attention_servers import BLOCK, HEAD_DIM, HEADS, KV_HEADS, TOKEN, Requests, connect, run, serving

from flows.errors import ConfigError, DataError
from flows.serving.lamina.attention import frames
from flows.serving.lamina.attention.frames import FrameType, Header
from flows.serving.lamina.attention.partition import HeadPartition
from flows.serving.lamina.attention.pool import WorkerLost
from flows.serving.lamina.attention.transport import LinkClosed, dial, dial_badly
from flows.serving.lamina.attention.worker import main, read_token
from flows.serving.lamina.rows import RowKind, RowTable, Span, TableDelta

WHOLE = HeadPartition(KV_HEADS, [1])
ROOT = Path(__file__).parents[4]


@pytest.fixture
def worker():
    with serving(1) as (servers, addresses):
        yield servers[0], addresses


def hello(address, token=TOKEN, epoch=1):
    link = dial(*address, 20)
    link.send(Header(FrameType.HELLO, epoch), token)
    return link


def error_of(link):
    frame = link.receive(20)
    assert frame.header.type is FrameType.ERROR
    return json.loads(bytes(frame.payload))["error"]


def head_bytes(**changes):
    """A header with some fields replaced, unchecked."""
    values = {"magic": frames.MAGIC, "version": 1, "type": 4, "number": 1, "size": 0, "checksum": 0} | changes
    return struct.pack(
        "<IBBBxIQHHIII", values["magic"], values["version"], values["type"], values["number"], 1, 1, 0, 0, 1,
        values["size"], values["checksum"],
    )  # fmt: skip


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"GET / HTTP/1.1\r\nHost: a\r\nAccept: */*\r\n\r\n", "protocol"),
        (head_bytes(version=9), "version 9"),
        (head_bytes(type=99), "unknown frame"),
        (head_bytes(number=7), "unknown frame"),
        (head_bytes(size=2**32 - 1), "announces 4294967295 bytes"),
        (head_bytes(type=2, size=2**21), "CONFIG frame announces"),
        (head_bytes(checksum=5), "checksum"),
        (head_bytes(type=7), "checksum"),
    ],
    ids=["http", "version", "type", "number", "oversize", "config", "checksum", "reserved"],
)
def test_bytes_that_are_no_frame_end_one_connection_with_a_reason(data, words, worker):
    _, (address,) = worker
    with connect([address], WHOLE) as pool:
        link = hello(address)
        link.receive(20)
        link._socket.sendall(data)
        assert words in error_of(link)
        with pytest.raises(LinkClosed):
            link.receive(20)
        link.close()
        assert pool.stats(0)["epoch"] == 1
        requests = Requests({1: 3})
        out = run(pool, requests, [[(1, 0, 3)]], {1: (5,)})
        np.testing.assert_allclose(out[1][0], requests.expected(1, 0), atol=2e-6)


@pytest.mark.parametrize("token", [b"", b"a token for tests, 32 bytes lonG", TOKEN + b"x"])
def test_without_the_token_nothing_is_said(token, worker):
    _, (address,) = worker
    link = hello(address, token)
    assert "token" in error_of(link)
    link.close()
    link = dial(*address, 20)
    link._socket.sendall(head_bytes(type=1, number=0, size=5000))  # an oversize HELLO
    assert "announces 5000 bytes" in error_of(link)
    link.close()


def test_a_replayed_iteration_gives_the_same_bits_and_keeps_the_pages(worker):
    server, addresses = worker
    requests = Requests({1: 50})
    plans = [[(1, 0, 30)], *[[(1, at, 1)] for at in range(30, 50)]]
    with connect(addresses, WHOLE) as pool:
        once = run(pool, requests, plans, {1: (1, 2, 3, 8)})
        table = RowTable((Span(1, 0, 50, RowKind.CHUNK),), (TableDelta(1, 0, (1, 2, 3, 8)),))
        pool.plan(table, 100)
        for _ in range(2):
            q, k, v = requests.rows(table, 0)
            pool.send_q(0, q, 100)
            np.testing.assert_array_equal(pool.kv(0, k, v, 100), once[1][0])
        step = RowTable((Span(1, 41),))  # written over in the middle, as a replay does
        for iteration in (101, 101, 102):
            pool.plan(step, iteration)
            q, k, v = requests.rows(step, 0)
            pool.send_q(0, q, iteration)
            np.testing.assert_array_equal(pool.kv(0, k, v, iteration)[0], once[1][0][41])
        server.session._store.check()


def test_micro_batches_do_not_mix(worker):
    _, addresses = worker
    requests = Requests({1: 9, 2: 9})
    with connect(addresses, WHOLE) as pool:
        tables = [RowTable((Span(s, 0, 9, RowKind.CHUNK),), (TableDelta(s, 0, (s,)),)) for s in (1, 2)]
        for micro, table in enumerate(tables):
            pool.plan(table, 5, micro)
        for micro, table in enumerate(tables):
            pool.send_q(0, requests.rows(table, 0)[0], 5, micro)
        for micro, table in enumerate(tables):
            out = pool.kv(0, *requests.rows(table, 0)[1:], 5, micro)
            np.testing.assert_allclose(out, requests.expected(micro + 1, 0), atol=2e-6)


def test_an_older_engine_is_fenced(worker):
    server, addresses = worker
    with connect(addresses, WHOLE, layer_timeout_s=1.0) as old, connect(addresses, WHOLE, epoch=2):
        table = RowTable((Span(1, 0),), (TableDelta(1, 0, (1,)),))
        q, k, v = Requests({1: 1}).rows(table, 0)
        old.plan(table, 1)
        old.send_q(0, q, 1)
        with pytest.raises(WorkerLost, match=r"attention worker 0 .* no answer"):
            old.kv(0, k, v, 1)
        assert server.session.counts["stale"] == 3
        assert not server.session._store.owners
    with pytest.raises(DataError, match="in 2 already"):
        connect(addresses, WHOLE, epoch=1)


def test_mistakes_of_the_engine_are_named_and_change_nothing(worker):
    server, addresses = worker
    q = np.zeros((1, HEADS, HEAD_DIM), np.float32)
    k = np.zeros((1, KV_HEADS, HEAD_DIM), np.float32)
    with pytest.raises(DataError, match=r"attention worker 0 .*: CONFIG asks for .* at most"):
        connect(addresses, WHOLE, pages=1 << 20)
    cases = [
        (RowTable((Span(1, 16),), (TableDelta(1, 0, (3,)),)), "no page for position 16"),
        (RowTable((Span(2, 0),), (TableDelta(2, 0, (3,)),)), "given to slot 2 too"),
        (RowTable((Span(2, 0),), (TableDelta(2, 0, (64,)),)), "this worker has 64 pages"),
        (RowTable((Span(2, 0),), (TableDelta(2, 0, (9, 9)),)), "one page twice"),
    ]
    for epoch, (table, words) in enumerate(cases, 1):
        with connect(addresses, WHOLE, epoch=epoch) as pool:
            pool.plan(table, 1)
            pool.send_q(0, q, 1)
            with pytest.raises(DataError, match=words):
                pool.kv(0, k, k, 1)
            server.session._store.check()
    with connect(addresses, WHOLE, epoch=9) as pool:
        pool.plan(RowTable((Span(1, 0),)), 1)
        with pytest.raises(DataError, match="expected float32"):
            pool.send_q(0, q.astype(np.float64), 1)


def test_freed_pages_hold_nothing_of_the_request_before(worker):
    server, addresses = worker
    with connect(addresses, WHOLE) as pool:
        bad = Requests({1: 20})
        for tensors in bad.tensors[1]:
            tensors[1][:], tensors[2][:] = np.nan, np.nan  # a request gone wrong
        run(pool, bad, [[(1, 0, 20)]], {1: (1, 2)})
        assert np.isnan(server.session._store.page(0, 1)[0]).all()  # poisoned
        good = Requests({4: 3})
        out = run(pool, good, [[(4, at, 1)] for at in range(3)], {4: (1,)})
        np.testing.assert_allclose(out[4][0], good.expected(4, 0), atol=2e-6)


def test_a_bad_network_costs_an_iteration_never_a_wrong_answer(worker):
    _, addresses = worker
    requests, outcomes = Requests({1: 1}), set()
    for epoch in range(1, 13):
        options = {"drop": 0.04, "corrupt": 0.04, "seed": epoch, "latency_s": 1e-4}
        try:
            with connect(
                addresses,
                WHOLE,
                epoch=epoch,
                layer_timeout_s=0.5,
                connect_timeout_s=1.0,
                dial=dial_badly(**options),
            ) as pool:
                out = run(pool, requests, [[(1, 0, 1)]], {1: (1,)})
                np.testing.assert_allclose(out[1][0], requests.expected(1, 0), atol=2e-6)
                outcomes.add("right")
        except (WorkerLost, DataError) as error:
            outcomes.add("told" if "attention worker 0" in str(error) else str(error))
    assert outcomes == {"right", "told"}


def test_a_killed_worker_is_named_and_a_terminated_one_drains(tmp_path):
    (tmp_path / "token").write_bytes(TOKEN)
    command = [sys.executable, "-m", "flows.serving.lamina.attention.worker", "--port", "0"]
    processes = [
        subprocess.Popen(
            [*command, "--token-file", str(tmp_path / "token")], cwd=ROOT, stdout=subprocess.PIPE
        )
        for _ in range(2)
    ]
    try:
        addresses = [("127.0.0.1", json.loads(process.stdout.readline())["port"]) for process in processes]
        requests = Requests({1: 8})
        with connect(addresses, HeadPartition(KV_HEADS, [1, 1])) as pool:
            out = run(pool, requests, [[(1, 0, 8)]], {1: (1,)})
            np.testing.assert_allclose(out[1][0], requests.expected(1, 0), atol=2e-6)
            assert pool.ping(0) < 60
            table = RowTable((Span(1, 0, 8, RowKind.CHUNK),), (TableDelta(1, 0, (1,)),))
            pool.plan(table, 9)
            q, k, v = requests.rows(table, 0)
            pool.send_q(0, q, 9)
            os.kill(processes[1].pid, signal.SIGKILL)
            processes[1].wait(60)
            began = time.monotonic()
            with pytest.raises(WorkerLost, match=r"attention worker 1 \(127.0.0.1:\d+\) is lost") as lost:
                pool.kv(0, k, v, 9)
            assert lost.value.worker == 1
            assert time.monotonic() - began < 60  # the deadline of the layer
        os.kill(processes[0].pid, signal.SIGTERM)
        assert processes[0].wait(60) == 0
    finally:
        for process in processes:
            process.kill()
            process.wait()
            process.stdout.close()


def test_a_draining_worker_ends_its_iteration_and_takes_no_other(worker):
    server, addresses = worker
    requests = Requests({1: 2})
    with connect(addresses, WHOLE) as pool:
        table = RowTable((Span(1, 0, 2, RowKind.CHUNK),), (TableDelta(1, 0, (1,)),))
        pool.plan(table, 1)
        pool.drain()
        while not server.session.draining:
            time.sleep(0.01)
        for layer in range(2):
            q, k, v = requests.rows(table, layer)
            pool.send_q(layer, q, 1)
            np.testing.assert_allclose(pool.kv(layer, k, v, 1), requests.expected(1, layer), atol=2e-6)


def test_nobody_there_and_no_token_are_said(tmp_path, capsys):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound and not listening: refuses
        with pytest.raises(WorkerLost, match=r"attention worker 0 .* is the worker running"):
            connect([taken.getsockname()], WHOLE)
    assert main(["--port", "0", "--token-file", str(tmp_path / "none")]) == ConfigError.exit_code
    assert "cannot read the token file" in capsys.readouterr().err
    (tmp_path / "short").write_text("short")
    with pytest.raises(ConfigError, match="has 5 bytes"):
        read_token(tmp_path / "short")


def test_threads_change_no_bit():
    requests = Requests(dict.fromkeys(range(4), 45))
    tables = {slot: range(3 * slot, 3 * slot + 3) for slot in range(4)}
    plans = [[(slot, 0, 44) for slot in range(4)], [(slot, 44, 1) for slot in range(4)]]
    found = []
    for threads in (1, 2):
        with serving(1, threads) as (_, addresses), connect(addresses, WHOLE, block_tokens=BLOCK) as pool:
            found.append(run(pool, requests, plans, tables))
    for slot in range(4):
        np.testing.assert_array_equal(found[0][slot][0], found[1][slot][0])


def test_a_page_freed_during_an_iteration_is_not_written(worker):
    server, addresses = worker
    requests = Requests({1: 1})
    with connect(addresses, WHOLE) as pool:
        table = RowTable((Span(1, 0),), (TableDelta(1, 0, (1,)),))
        pool.plan(table, 1)
        pool.free([1])
        pool.assign([TableDelta(2, 0, (1,))])  # a broken fence: the page has another owner already
        q, k, v = requests.rows(table, 0)
        pool.send_q(0, q, 1)
        with pytest.raises(DataError, match="slot 1 has no page for position 0"):
            pool.kv(0, k, v, 1)
        assert not server.session._store.page(0, 1)[0].any()
