"""What is logged reaches the store once, in order, whatever happens on the way."""

from __future__ import annotations

import errno
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tiny_clone import change_params

from flows import spool, stores, tracking
from flows.errors import Interrupted, ResourceError
from flows.params import Params
from flows.spool import Record, Refused, Sender, Spool, deliver_all
from flows.stores import StoreAway
from flows.tracking import stage_run

ROOT = Path(__file__).resolve().parents[2]


def metric(value: int) -> Record:
    return {"op": "metrics", "values": [["loss", float(value), 1000 + value, value]]}


@pytest.fixture
def kept(tmp_path: Path) -> Iterator[Spool]:
    made = Spool.create(tmp_path / "spool", {"run_id": "1"})
    yield made
    made.close()


class Store:
    """Takes records; can be away, refuse, or take them and lose the answer."""

    def __init__(self) -> None:
        self.taken: list[Record] = []
        self.attempts = 0
        self.away = False
        self.refused = ""
        self.losing_answers = 0

    def __call__(self, kept: Spool, records: list[Record]) -> None:
        self.attempts += 1
        if self.away:
            raise ConnectionError("nobody there")
        if self.refused and records[0]["op"] == self.refused:
            raise Refused("no such run")
        self.taken += records
        if self.losing_answers:
            self.losing_answers -= 1
            raise TimeoutError("no answer")

    def numbers(self) -> list[int]:
        return [record["n"] for record in self.taken]


# ---- on disk ----


def test_records_come_back_in_order_and_only_once(kept: Spool) -> None:
    store = Store()
    for value in range(2500):
        kept.append(metric(value))
    kept.append({"op": "end", "status": "FINISHED"})
    deliver_all(kept, store)
    assert store.numbers() == list(range(1, 2502))
    assert kept.is_empty()
    deliver_all(kept, store)
    assert len(store.taken) == 2501


def test_a_killed_process_leaves_what_the_next_one_delivers(kept: Spool) -> None:
    """Half a line at the end (the process died while it wrote) does not count and harms nothing."""
    for value in range(3):
        kept.append(metric(value))
    kept.advance({"n": 1})
    kept._log.write(b'{"op": "metrics", "val')
    kept.close()
    [again] = spool.leftovers(kept.folder.parent)
    assert (again.delivered, again.last) == (1, 3)
    store = Store()
    deliver_all(again, store)
    assert store.numbers() == [2, 3]
    again.close()


def test_the_spool_of_a_living_process_is_left_alone(kept: Spool) -> None:
    assert list(spool.leftovers(kept.folder.parent)) == []


def test_a_full_disk_is_said_once_and_loses_nothing_while_the_store_answers(
    kept: Spool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Full:
        """Takes half of what it is given, like a disk that has just become full."""

        def __init__(self, file: Any) -> None:
            self.file = file

        def write(self, data: bytes) -> int:
            self.file.write(data[: len(data) // 2])
            raise OSError(errno.ENOSPC, "No space left on device")

        def fileno(self) -> int:
            return int(self.file.fileno())

    kept.append(metric(0))
    log = kept._log
    kept._log = Full(log)  # type: ignore[assignment]
    for value in range(1, 4):
        kept.append(metric(value))
    kept._log = log
    kept.append(metric(4))
    assert capsys.readouterr().err.count("No space left on device") == 1
    assert (kept.folder / "log.jsonl").read_bytes().count(b"\n") == 2
    store = Store()
    deliver_all(kept, store)
    assert store.numbers() == [1, 2, 3, 4, 5]


def test_a_copy_lasts_until_it_is_delivered(kept: Spool, tmp_path: Path) -> None:
    (tmp_path / "plots").mkdir()
    (tmp_path / "plots" / "a.png").write_bytes(b"picture")
    copy = kept.keep_file(tmp_path / "plots")
    (tmp_path / "plots" / "a.png").unlink()
    assert (copy / "a.png").read_bytes() == b"picture"
    kept.append({"op": "artifact", "path": str(copy), "folder": None})
    deliver_all(kept, Store())
    assert not copy.exists()


def test_a_refused_record_is_set_aside_and_the_rest_goes_on(
    kept: Spool, capsys: pytest.CaptureFixture[str]
) -> None:
    store = Store()
    store.refused = "tags"
    for record in (metric(0), {"op": "tags", "values": []}, {"op": "tags", "values": []}, metric(1)):
        kept.append(record)
    deliver_all(kept, store)
    assert store.numbers() == [1, 4]
    assert capsys.readouterr().err.count("no such run") == 1
    assert (kept.folder.parent / "refused.jsonl").read_text().count("no such run") == 2


# ---- in the background ----


def test_logging_never_waits_and_a_store_that_comes_back_gets_all(
    kept: Spool, capsys: pytest.CaptureFixture[str]
) -> None:
    store, asked = Store(), threading.Event()
    store.away = True
    sender = Sender(kept, store, asked.set)
    for value in range(500):
        sender.put(metric(value))
    assert not sender.flush(patience_s=0.2), "it gives up waiting, not the records"
    store.away = False
    assert sender.flush(patience_s=60)
    assert store.numbers() == list(range(1, 501))
    assert asked.wait(60), "then it looks for what others left"
    sender.stop()
    said = capsys.readouterr().err
    assert said.count("does not answer") == said.count("is back") == 1


def test_a_lost_answer_sends_again_and_keeps_the_order(kept: Spool) -> None:
    store = Store()
    store.losing_answers = 1
    sender = Sender(kept, store)
    for value in range(3):
        sender.put(metric(value))
    sender.put({"op": "end"})
    assert sender.flush(patience_s=60)
    sender.stop()
    assert store.numbers()[-4:] == [1, 2, 3, 4]


# ---- with MLflow ----


@pytest.fixture
def impatient(home: Path) -> Params:
    return change_params(home, {"tracking.patience_s": 0.1})


def recorded(settings: Params, kind: str) -> list[Any]:
    connection = tracking.client(settings)
    experiment = connection.get_experiment_by_name(f"trunkline/{kind}")
    return list(connection.search_runs([experiment.experiment_id])) if experiment else []


def spools(home: Path) -> list[Path]:
    return [path for path in (home / tracking.SPOOL).glob("*") if path.is_dir()]


class LosingAnswers:
    """A client whose store does what it is told, and whose first answer to each kind of call is lost."""

    def __init__(self, connection: Any) -> None:
        self._connection, self.lost = connection, set[str]()

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._connection, name)
        if not callable(found) or name.startswith(("search", "get")):
            return found

        def call(*arguments: Any, **options: Any) -> Any:
            answer = found(*arguments, **options)
            if (key := f"{name} {sorted(options)}") not in self.lost:
                self.lost.add(key)
                raise StoreAway("API request to the server failed with timeout exception")
            return answer

        return call


def test_nothing_is_doubled_when_every_first_answer_is_lost(
    home: Path, home_params: Params, monkeypatch: pytest.MonkeyPatch
) -> None:
    flaky = LosingAnswers(tracking.client(home_params))
    (home / "picture.png").write_bytes(b"png")
    with monkeypatch.context() as patch:
        patch.setattr(tracking, "client", lambda params: flaky)
        with stage_run("pretrain", None, home_params) as run:
            assert run.run_id.startswith(tracking.PENDING)
            for step in range(1, 4):
                run.log_metrics({"loss": 1 / step, "nan": float("nan")}, step)
            run.log_artifact(home / "picture.png")
            run.set_tags({"colour": "red"})
    assert len(flaky.lost) >= 6
    [found] = recorded(home_params, "pretrain")
    assert (found.info.status, found.info.run_id) == ("FINISHED", run.run_id)
    assert found.data.tags["colour"] == "red"
    for key in ("loss", "nan"):
        history = tracking.client(home_params).get_metric_history(run.run_id, key)
        assert [point.step for point in history] == [1, 2, 3]
    listed = tracking.client(home_params).list_artifacts(run.run_id)
    assert [entry.path for entry in listed] == ["picture.png"]
    assert spools(home) == []


def away(params: Params) -> Any:
    raise StoreAway("the MLflow store http://elsewhere cannot be used: Connection refused")


def test_a_store_that_is_away_all_the_time_gets_it_from_sync(
    home: Path, impatient: Params, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(tracking.PARENT_VARIABLE, "pipeline-a")
    with monkeypatch.context() as patch:
        patch.setattr(tracking, "client", away)
        with stage_run("finetune", "scratch", impatient) as run:
            run.log_metrics({"loss": 2.0}, 7)
        assert run.run_id == tracking.PENDING + spools(home)[0].name
        with pytest.raises(StoreAway):
            tracking.deliver_leftovers(impatient)
    assert "trunkline sync" in capsys.readouterr().err
    assert tracking.deliver_leftovers(impatient) == (1, 0)
    assert tracking.deliver_leftovers(impatient) == (0, 0)
    cell, group = sorted(recorded(impatient, "finetune"), key=lambda found: found.info.run_name, reverse=True)
    assert (cell.info.run_name, cell.info.status, cell.data.metrics) == ("scratch", "FINISHED", {"loss": 2.0})
    assert cell.data.tags["mlflow.parentRunId"] == group.info.run_id
    assert cell.data.tags[tracking.SPOOL_TAG] == run.run_id.removeprefix(tracking.PENDING)
    assert cell.data.params["seed"] == "0"
    assert cell.info.start_time < cell.info.end_time


def test_a_run_that_was_stopped_while_the_store_was_away_is_killed(
    home: Path, impatient: Params, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(tracking, "client", away)
        with pytest.raises(Interrupted), stage_run("scale", None, impatient):
            raise Interrupted("stopped")
    tracking.deliver_leftovers(impatient)
    assert [found.info.status for found in recorded(impatient, "scale")] == ["KILLED"]


def test_what_needs_the_store_stops_at_once(
    home: Path, home_params: Params, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracking, "client", away)
    with pytest.raises(StoreAway, match="cannot be used"), tracking.pipeline_run(home_params, "home", {}):
        pytest.fail("it began")
    assert spools(home) == []


def test_another_store_does_not_get_it(
    home: Path, impatient: Params, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(tracking, "client", away)
        with stage_run("scale", None, impatient):
            pass
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{home}/other.db")
    assert tracking.deliver_leftovers(impatient) == (0, 1)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{home}/mlflow.db")
    assert tracking.deliver_leftovers(impatient) == (1, 0)


KILLED = """
import os, signal, time
from flows import environment
environment.prepare()
from flows import params
from flows.tracking import stage_run
with stage_run("scale", None, params.load()) as run:
    run.log_metrics({"loss": 3.0}, 1)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_the_next_run_delivers_what_a_killed_process_left(
    home: Path, home_params: Params, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    assert subprocess.run([sys.executable, "-c", KILLED], cwd=home).returncode == -9
    assert len(spools(home)) == 1
    with stage_run("ingest", None, home_params) as run:
        run.log_metrics({"images": 1.0})
        wait_for(lambda: [found.info.status for found in recorded(home_params, "scale")] == ["KILLED"])
    assert recorded(home_params, "scale")[0].data.metrics == {"loss": 3.0}
    assert spools(home) == []


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


# ---- stores ----


@pytest.mark.parametrize(
    ("uri", "safe"),
    [
        ("postgresql+psycopg://me:s3:cr%40t@host:5432/db", "postgresql+psycopg://me:***@host:5432/db"),
        ("postgresql://me@host/db", "postgresql://me@host/db"),
        ("sqlite:////tmp/a:b@c/mlflow.db", "sqlite:////tmp/a:b@c/mlflow.db"),
        ("https://me:secret@mlflow.example/path", "https://me:***@mlflow.example/path"),
    ],
)
def test_a_store_is_named_without_its_password(uri: str, safe: str) -> None:
    assert stores.shown(uri) == safe


def test_messages_of_others_lose_the_password_too() -> None:
    uri = "postgresql://me:p%40ss@host/db"
    assert stores.without_password(f"cannot connect to {uri}, tried p@ss and p%40ss", uri) == (
        "cannot connect to postgresql://me:***@host/db, tried *** and ***"
    )


def test_the_server_of_up_is_the_store_behind_it(
    home_params: Params, monkeypatch: pytest.MonkeyPatch
) -> None:
    direct = tracking.store_identity(home_params)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:5000")
    assert tracking.store_identity(home_params) == direct
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://mlflow.example:5000")
    assert tracking.store_identity(home_params) != direct


def test_a_name_nobody_knows_is_a_mistake_not_an_outage(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(OSError, match=r"not known|resolution"):
        stores.probe("http://nowhere.invalid:5000")
    with pytest.raises(StoreAway):
        stores.probe("http://127.0.0.1:1")
    assert issubclass(StoreAway, ResourceError)
