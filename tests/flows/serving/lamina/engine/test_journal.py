"""What an engine promised survives it."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest
from attention_servers import serving
from engines import PROMPTS, make_engine, reference

from flows.errors import DataError
from flows.serving.lamina.engine import journal as module
from flows.serving.lamina.engine.journal import Journal, JournalFull, Remembered
from flows.serving.lamina.engine.sampling import Choice
from flows.serving.lamina.requests import Finished, Sampling, Submit
from flows.serving.lamina.slices.bundle import Bundle


def submit(name: str, **fields) -> Submit:
    return Submit(id=name, prompt=(1, 2, 3), max_tokens=9, arrived=1.0, **fields)


def test_what_was_written_is_read_again(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    journal = Journal(path)
    journal.begin()
    journal.entered(17)
    journal.submitted(submit("a", sampling=Sampling(seed=2**64 - 1, logprobs=2)))
    journal.submitted(submit("b"))
    journal.chose([("a", 0, Choice(5, -0.5, ((5, -0.5), (6, -1.0)))), ("b", 0, Choice(7, None, ()))])
    journal.chose([("a", 0, Choice(5, -0.5, ())), ("a", 1, Choice(8, None, ()))])  # the first one again
    journal.finished([Finished(id="b", reason="length")])
    journal.close()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    again = Journal(path)
    again.begin()
    assert again.epoch == 17
    a, b = again.requests["a"], again.requests["b"]
    assert a.submit == submit("a", sampling=Sampling(seed=2**64 - 1, logprobs=2))
    assert a.choices == [Choice(5, -0.5, ((5, -0.5), (6, -1.0))), Choice(8, None, ())]
    assert (a.finished, a.restarts) == (None, 0)
    assert b.finished is not None
    assert b.finished.reason == "length"
    again.close()
    assert Journal(path).requests["a"].restarts == 1


def test_half_a_line_is_cut_off_and_a_damaged_one_is_told(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    journal = Journal(path)
    journal.submitted(submit("a"))
    journal.chose([("a", 0, Choice(5, None, ()))])
    journal.close()
    whole = path.read_bytes()
    for cut in (1, 5, len(whole.splitlines()[1]) - 1):
        path.write_bytes(whole[:-cut])
        opened = Journal(path)
        assert opened.requests["a"].choices == []
        opened.chose([("a", 0, Choice(6, None, ()))])
        opened.close()
        assert Journal(path).requests["a"].choices == [Choice(6, None, ())]
    path.write_bytes(whole.replace(b"tokens", b"tokems", 1))
    with pytest.raises(DataError, match="damaged"):
        Journal(path)


def test_a_grown_journal_is_written_anew_with_what_is_open(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    journal = Journal(path, limit_bytes=4000)
    for index in range(40):
        journal.submitted(submit(f"r{index}"))
        journal.finished([Finished(id=f"r{index}", reason="stop")])
    journal.submitted(submit("open"))
    before = path.stat().st_size
    assert journal.compact([Remembered(submit("open"), [Choice(4, None, ())])])
    assert path.stat().st_size < before / 10
    journal.chose([("open", 1, Choice(5, None, ()))])  # goes to the new file
    journal.close()
    assert [choice.token for choice in Journal(path).requests["open"].choices] == [4, 5]


def test_a_new_journal_keeps_ends_that_nobody_may_have_been_told(bundle: Bundle, tmp_path: Path) -> None:
    with serving(1) as (_, addresses):
        driven = make_engine(bundle, addresses, journal=Journal(tmp_path / "j", limit_bytes=1))
        driven.submit("ended", PROMPTS[0], 3)
        driven.submit("open", PROMPTS[1], 30)
        while not any(getattr(said, "type", "") == "finished" for said in driven.said):
            driven.engine.turn()
        driven.engine.workers.close()
    again = Journal(tmp_path / "j")
    ended = again.requests["ended"]
    assert ended.finished is not None
    assert [choice.token for choice in ended.choices] == driven.tokens("ended")
    assert again.requests["open"].finished is None


def test_a_new_journal_that_cannot_be_written_leaves_the_old_one_alone(tmp_path: Path, monkeypatch) -> None:
    journal = Journal(tmp_path / "journal", limit_bytes=10)
    journal.submitted(submit("open"))
    before = set(os.listdir("/proc/self/fd"))

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module.os, "fsync", full)
    assert not journal.compact([Remembered(submit("open"))])
    assert [path.name for path in tmp_path.iterdir()] == ["journal"]
    assert set(os.listdir("/proc/self/fd")) == before
    journal.chose([("open", 0, Choice(5, None, ()))])
    journal.close()
    assert len(Journal(tmp_path / "journal").requests["open"].choices) == 1


def test_a_record_that_the_disk_takes_in_pieces_is_written_whole(tmp_path: Path, monkeypatch) -> None:
    journal = Journal(tmp_path / "journal")
    real = os.write
    monkeypatch.setattr(module.os, "write", lambda handle, data: real(handle, data[:50]))
    journal.submitted(submit("a"))
    journal.submitted(submit("b"))
    monkeypatch.undo()
    journal.close()
    assert set(Journal(tmp_path / "journal").requests) == {"a", "b"}


def test_a_full_disk_refuses_and_leaves_whole_lines(tmp_path: Path, monkeypatch) -> None:
    path = tmp_path / "journal"
    journal = Journal(path)
    journal.submitted(submit("a"))
    real = os.write

    def nearly_full(handle: int, data: bytes) -> int:
        if not state["tried"]:
            state["tried"] = True
            return real(handle, data[:10])
        raise OSError(28, "No space left on device")

    state = {"tried": False}
    monkeypatch.setattr(module.os, "write", nearly_full)
    with pytest.raises(JournalFull, match="No space left"):
        journal.submitted(submit("b"))
    monkeypatch.setattr(module.os, "write", real)
    journal.submitted(submit("c"))
    journal.close()
    assert set(Journal(path).requests) == {"a", "c"}


@pytest.mark.parametrize("killed_after", [1, 9, 21])
def test_the_next_engine_goes_on_with_the_same_text(
    bundle: Bundle, tmp_path: Path, killed_after: int
) -> None:
    expected = reference(bundle, PROMPTS, 20)
    sampling = Sampling(temperature=0, logprobs=1)
    with serving(2) as (_, addresses):
        first = make_engine(bundle, addresses, journal=Journal(tmp_path / "j"))
        for index, prompt in enumerate(PROMPTS):
            first.submit(f"r{index}", prompt, 20, sampling=sampling)
        for _ in range(killed_after):
            first.engine.turn()
        told = [said for said in first.said if getattr(said, "type", "") == "token"]
        second = make_engine(bundle, addresses, journal=Journal(tmp_path / "j"))
        second.engine.workers.close()
        second = make_engine(bundle, addresses, journal=Journal(tmp_path / "j"), recover__max_recoveries=5)
        second.turn_until_done()
        # what the first one sent is known to the second
        known = {name: request for name, (request, _) in second.engine._ended.items()}
        for event in told:
            assert known[event.id].event(event.index) == event
        for index, tokens in enumerate(expected):
            request = known[f"r{index}"]
            assert request.recoveries == 1  # an engine that starts is an interruption, the first one, too
            assert [choice.token for choice in request.choices] == tokens
        second.assert_nothing_leaked()
        second.engine.workers.close()


def test_a_full_journal_stops_admission_and_is_an_end_not_a_lie(bundle: Bundle, tmp_path: Path) -> None:
    journal = Journal(tmp_path / "j")
    with serving(1) as (_, addresses):
        driven = make_engine(bundle, addresses, journal=journal)
        driven.submit("running", PROMPTS[0], 20)
        for _ in range(5):
            driven.engine.turn()

        def full(record) -> None:
            raise JournalFull("the journal cannot be written (No space left on device)")

        journal._write = full  # type: ignore[method-assign]
        driven.submit("new", PROMPTS[0], 20)
        driven.turn_until_done()
        assert driven.rejected("new").code == "journal_full"
        assert driven.finished("running").code == "journal_full"
        driven.engine.workers.close()
