"""Every way in which a request can begin and end, and that nothing stays behind."""

from __future__ import annotations

import time

import numpy as np
import pytest
from engines import PROMPTS, Driven, an_engine, reference

from flows.errors import DataError, ResourceError
from flows.serving.lamina.requests import Accepted, Cancel, Drain, Follow
from flows.serving.lamina.slices.bundle import Bundle


@pytest.fixture(scope="module")
def shared(bundle: Bundle):
    """One engine for the tests of this file that leave it as they found it."""
    with an_engine(bundle, 1, admit__max_queued_requests=2, sched__max_requests=2) as driven:
        yield driven


@pytest.fixture
def driven(shared: Driven):
    shared.said.clear()
    shared.engine._ended.clear()  # every test may use the same names
    yield shared
    shared.turn_until_done()
    shared.assert_nothing_leaked()


def test_length_and_end_token_end_a_request(driven: Driven, bundle: Bundle) -> None:
    (expected,) = reference(bundle, [PROMPTS[0]], 12)
    driven.submit("length", PROMPTS[0], 5)
    driven.submit("stop", PROMPTS[0], 12, stop_token_ids=(expected[2],))
    driven.turn_until_done()
    assert (driven.finished("length").reason, driven.tokens("length")) == ("length", expected[:5])
    assert driven.finished("stop").reason == "stop"
    assert driven.tokens("stop") == expected[: expected.index(expected[2]) + 1]
    assert driven.finished("length").completion_tokens == 5


def test_a_cancelled_request_frees_its_pages_within_two_iterations(driven: Driven) -> None:
    engine = driven.engine
    driven.submit("running", PROMPTS[0], 80)
    for _ in range(4):
        engine.turn()
    assert engine.memory.used
    engine.inbox.put(Cancel(id="running"))
    before = engine.iteration
    driven.submit("other", PROMPTS[1], 10)
    engine.turn()
    engine.turn()
    assert engine.iteration <= before + 2
    assert all(request.id == "other" for request in engine.scheduler.running)
    assert driven.finished("running").reason == "cancelled"


def test_a_waiting_request_can_be_cancelled_and_a_stranger_is_ignored(driven: Driven) -> None:
    for name in ("a", "b", "waits"):
        driven.submit(name, PROMPTS[0], 30)
    driven.engine.turn()
    driven.engine.inbox.put(Cancel(id="waits", reason="stop"))
    driven.engine.inbox.put(Cancel(id="nobody"))
    driven.turn_until_done()
    assert driven.finished("waits").reason == "stop"
    assert driven.finished("waits").completion_tokens == 0


def test_a_full_queue_an_unknown_token_and_a_long_prompt_are_refused(driven: Driven, bundle: Bundle) -> None:
    for name in ("r1", "r2"):
        driven.submit(name, PROMPTS[0], 30)
        driven.engine.turn()
    for name in ("w1", "w2", "too-many", "r1"):
        driven.submit(name, PROMPTS[0], 30)
    driven.submit("unknown", [bundle.manifest.vocab_size], 5)
    driven.submit("long", [5] * 50, bundle.manifest.max_context - 49)
    driven.engine.turn()
    refused = {name: driven.rejected(name) for name in ("too-many", "r1", "unknown", "long")}
    assert {name: (r.status, r.code) for name, r in refused.items()} == {
        "too-many": (429, "queue_full"), "r1": (409, "duplicate_id"),
        "unknown": (400, "invalid_token"), "long": (400, "context_length_exceeded"),
    }  # fmt: skip
    assert (refused["too-many"].retry_after_s or 0) >= 1
    assert str(bundle.manifest.max_context) in refused["long"].message
    assert sum(isinstance(said, Accepted) for said in driven.said) == 4


def test_the_longest_request_that_is_allowed_runs_to_its_end(driven: Driven, bundle: Bundle) -> None:
    driven.submit("longest", [5] * 50, bundle.manifest.max_context - 50, ignore_eos=True)
    driven.turn_until_done()
    assert len(driven.tokens("longest")) == bundle.manifest.max_context - 50


def test_deadlines_end_waiting_and_running_requests(driven: Driven) -> None:
    now = time.time()
    for name in ("r1", "r2"):
        driven.submit(name, PROMPTS[0], 60)
        driven.engine.turn()
    driven.submit("queued", PROMPTS[0], 30, queue_deadline=now - 1)
    driven.engine.turn()
    expired = driven.finished("queued")
    assert (expired.reason, expired.code, expired.status) == ("error", "deadline_exceeded", 504)
    assert "waited" in (expired.message or "")
    request = next(request for request in driven.engine.scheduler.running if request.id == "r1")
    request.submit = request.submit.model_copy(update={"deadline": now - 1, "queue_deadline": now - 1})
    driven.turn_until_done()
    assert driven.finished("r1").code == "deadline_exceeded"
    assert driven.finished("r2").reason == "length"


def test_priority_goes_first_and_waiting_long_makes_up_for_it(driven: Driven) -> None:
    for name in ("r1", "r2"):
        driven.submit(name, PROMPTS[0], 20)
        driven.engine.turn()
    driven.submit("patient", PROMPTS[0], 5)
    driven.submit("urgent", PROMPTS[0], 5, priority=-3)
    driven.engine.turn()
    scheduler = driven.engine.scheduler
    first = sorted(scheduler.waiting, key=scheduler._urgency)
    assert [request.id for request in first] == ["urgent", "patient"]
    ageing_s = driven.engine.settings.sched.ageing_s
    next(request for request in scheduler.waiting if request.id == "patient").queued_at -= 4 * ageing_s
    first = sorted(scheduler.waiting, key=scheduler._urgency)
    assert [request.id for request in first] == ["patient", "urgent"]


def test_logits_that_are_not_numbers_end_one_request_alone(driven: Driven, monkeypatch) -> None:
    from flows.serving.lamina.engine import engine as module

    def choose(row, sampling, index):
        return original(row * np.float32("nan") if sampling.seed == 13 else row, sampling, index)

    original = module.choose
    monkeypatch.setattr(module, "choose", choose)
    from flows.serving.lamina.requests import Sampling

    driven.submit("bad", PROMPTS[0], 10, sampling=Sampling(seed=13))
    driven.submit("good", PROMPTS[0], 10)
    driven.turn_until_done()
    assert (driven.finished("bad").code, driven.finished("good").reason) == ("numeric_error", "length")


def test_a_new_connection_gets_what_it_missed(driven: Driven) -> None:
    driven.submit("r", PROMPTS[0], 12)
    driven.turn_until_done()
    told = driven.tokens("r")
    driven.said.clear()
    driven.engine.inbox.put(Follow(id="r", index=5))
    driven.engine.inbox.put(Follow(id="stranger", index=0))
    driven.engine.turn()
    assert [event.token for event in driven.said if event.type == "token"] == told[5:]
    assert driven.finished("r").reason == "length"
    assert (driven.finished("stranger").code, driven.finished("stranger").status) == ("unknown_request", 404)


def test_a_draining_engine_finishes_and_admits_nothing(bundle: Bundle) -> None:
    with an_engine(bundle, 1) as driven:
        driven.submit("r", PROMPTS[0], 12)
        driven.engine.turn()
        driven.engine.inbox.put(Drain())
        driven.engine.turn()
        driven.submit("late", PROMPTS[0], 12)
        while not driven.engine.stopped:
            driven.engine.turn()
        assert driven.finished("r").reason == "length"
        assert (driven.rejected("late").status, driven.rejected("late").code) == (503, "draining")


def test_many_requests_leave_no_page_behind(bundle: Bundle) -> None:
    generator = np.random.default_rng(0)
    with an_engine(bundle, 2, sched__max_requests=8) as driven:
        for index in range(120):
            prompt = generator.integers(3, 200, generator.integers(1, 40)).tolist()
            driven.submit(f"r{index}", prompt, int(generator.integers(1, 12)))
            if index % 7 == 0:
                driven.engine.inbox.put(Cancel(id=f"r{index - 3}"))
            if index % 3 == 0:
                driven.engine.turn()
        driven.turn_until_done()
        ended = [said for said in driven.said if getattr(said, "type", "") == "finished"]
        assert len(ended) == 120
        driven.assert_nothing_leaked()


def test_a_request_after_a_long_idle_time_is_not_taken_for_one_that_stands_still(
    driven: Driven, monkeypatch
) -> None:
    engine = driven.engine
    beats = []
    iterate = engine._iterate

    def watched(rows):
        beats.append(engine.heartbeat())
        return iterate(rows)

    monkeypatch.setattr(engine, "_iterate", watched)
    engine._progress -= 3600.0  # nothing was asked for an hour
    driven.submit("r", PROMPTS[0], 2)
    driven.turn_until_done()
    assert beats[0].running == 1
    assert beats[0].since_progress_s < 60.0
    engine._progress -= 3600.0
    engine.scheduler.running.append(None)  # type: ignore[arg-type]  # something runs, and stands still
    assert engine.heartbeat().since_progress_s > 3000.0
    engine.scheduler.running.clear()


def test_workers_that_refuse_again_and_again_end_the_engine_instead_of_a_loop(
    bundle: Bundle, monkeypatch
) -> None:
    with an_engine(bundle, 1) as driven:
        attempts = []

        def refused(change) -> None:
            attempts.append(change)
            assert len(attempts) < 20, "it never ends"
            raise DataError("slot 3 is unknown")

        monkeypatch.setattr(driven.engine, "_settle", refused)
        with pytest.raises(ResourceError, match="again and again: slot 3"):
            driven.engine._recover(DataError("slot 3 is unknown"))
