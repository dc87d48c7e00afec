"""One process that is kept running."""

import signal
import sys
import time

import pytest

from flows.serving.lamina.cluster import keeper as keeper_module
from flows.serving.lamina.cluster.child import Child, describe_exit, end_children
from flows.serving.lamina.cluster.keeper import Keeper, pause_after


def python(code):
    return [sys.executable, "-S", "-c", code]


def run(keeper, until):
    """Look after it until something is so; the endings on the way."""
    endings = []
    deadline = time.monotonic() + 20
    while not until(endings):
        assert time.monotonic() < deadline
        ending = keeper.look()
        if ending:
            endings.append(ending)
        time.sleep(0.005)
    return endings


@pytest.fixture
def keep():
    kept = []

    def make(code, **options):
        said = []
        options = {"is_ready": lambda child: bool(child.first_line)} | options
        kept.append(Keeper("it", python(code), said.append, **options))
        return kept[-1], said

    yield make
    for keeper in kept:
        keeper.stop(0.1)


def test_pauses_double_up_to_ten_seconds():
    assert [pause_after(early) for early in range(9)] == [0, 0, 0.5, 1, 2, 4, 8, 10, 10]


def test_an_ended_process_says_why_and_is_started_again(keep, monkeypatch):
    monkeypatch.setattr(keeper_module, "pause_after", lambda early: 0.0)
    keeper, said = keep(
        "import sys; print('up', flush=True)\nprint('error: no luck\\nbye', file=sys.stderr); sys.exit(74)"
    )
    endings = run(keeper, lambda endings: len(endings) == 3)
    assert [ending.early for ending in endings] == [1, 2, 3]
    assert endings[0].reason == "it ended with exit code 74: no luck"
    assert (keeper.starts, said[:2]) == (3, ["it: error: no luck", "it: bye"])


def test_a_process_that_lived_long_is_no_crash_loop(keep, monkeypatch):
    monkeypatch.setattr(keeper_module, "pause_after", lambda early: 0.0)
    monkeypatch.setattr(keeper_module, "STABLE_S", 0.0)
    keeper, _ = keep("pass")
    assert [ending.early for ending in run(keeper, lambda endings: len(endings) == 2)] == [1, 1]


def test_it_waits_before_the_third_start(keep):
    keeper, _ = keep("pass")
    run(keeper, lambda endings: len(endings) == 2)
    assert keeper.look() is None
    assert (keeper.child, keeper.starts) == (None, 2)


def test_a_killed_process_is_told_from_one_that_fell(keep):
    keeper, _ = keep("print('up', flush=True); import time; time.sleep(60)")
    run(keeper, lambda _: keeper.ready)
    keeper.child._process.send_signal(signal.SIGSTOP)
    keeper.kill("nobody likes it")
    (ending,) = run(keeper, lambda endings: endings)
    assert ending.reason == "it was killed by SIGKILL: nobody likes it"
    assert not keeper.ready


def test_one_that_never_gets_ready_is_ended(keep, monkeypatch):
    monkeypatch.setattr(keeper_module, "START_PATIENCE_S", 0.1)
    keeper, _ = keep("import time; time.sleep(60)")
    (ending,) = run(keeper, lambda endings: endings)
    assert "it was not ready 0.1 s after its start" in ending.reason


def test_a_command_that_cannot_be_started_is_an_ending_too():
    keeper = Keeper("it", ["/nowhere/at/all"], print, is_ready=lambda _: True)
    ending = keeper.look()
    assert (ending.code, ending.early) == (74, 1)
    assert "cannot be started: No such file" in ending.reason


def test_one_that_ignores_sigterm_is_killed():
    deaf = "import signal, time; signal.signal(15, signal.SIG_IGN); print('up', flush=True); time.sleep(60)"
    children = [
        Child("deaf", python(deaf), print),
        Child("fine", python("import time; time.sleep(60)"), print),
    ]
    while not children[0].first_line:
        time.sleep(0.01)
    end_children(children, 0.2)
    assert [child.poll() for child in children] == [-signal.SIGKILL, -signal.SIGTERM]


def test_endless_output_does_not_block_it(keep):
    keeper, said = keep("import sys; sys.stderr.write('x' * 10_000_000); sys.stdout.write('y' * 10_000_000)")
    (ending,) = run(keeper, lambda endings: endings)
    assert ending.code == 0
    assert max(map(len, said)) < 100_000


def test_exits_are_described():
    assert describe_exit(3) == "ended with exit code 3"
    assert describe_exit(-9) == "was killed by SIGKILL"
    assert describe_exit(-99) == "was killed by signal 99"
