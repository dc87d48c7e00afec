"""Aliases move all or none: refusals, kills at every step, two processes at once, rollback, the log."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from promotion_workspace import NAME, add_version, aliases_of, all_pass, failing

from flows import aliases, decision, live, promotion_log, registry, tracking
from flows.decision import Decision, decide
from flows.errors import DataError
from flows.gates import GATES
from flows.params import Params
from flows.registry import Version

ROOT = Path(__file__).resolve().parents[2]


def promote(settings: Params, version: Version, check: Any = all_pass, **options: Any) -> Decision:
    return decide(settings, Path(), version, check=check, **options)


def logged(settings: Params) -> list[tuple[str, str, str]]:
    return [(e.action, e.from_version, e.to_version) for e in promotion_log.read(settings, NAME)]


# ---- promotion ---------------------------------------------------------------------------------------------


def test_every_gate_passed_makes_a_champion_and_keeps_the_old_one(home_params: Params) -> None:
    for number in ("1", "2", "3"):
        made = promote(home_params, add_version(home_params))
        assert made.promoted
        assert made.version.version == number
        assert made.version.aliases == ("champion",)
    assert aliases_of(home_params) == {"champion": "3", "previous": "2"}
    assert logged(home_params) == [("promote", "", "1"), ("promote", "1", "2"), ("promote", "2", "3")]
    tags = registry.version_of(home_params, NAME, "3").tags
    assert {name: tags[f"gate.{name}"] for name in GATES} == dict.fromkeys(GATES, "passed: fine")


@pytest.mark.parametrize("gate", GATES)
def test_a_failed_gate_changes_no_alias(gate: str, home_params: Params) -> None:
    promote(home_params, add_version(home_params))
    promote(home_params, add_version(home_params))
    challenger = add_version(home_params)
    before = aliases_of(home_params)
    made = promote(home_params, challenger, failing(gate))
    assert (made.promoted, made.refused) == (False, True)
    assert aliases_of(home_params) == before == {"champion": "2", "previous": "1", "challenger": "3"}
    tags = registry.version_of(home_params, NAME, "3").tags
    assert tags[f"gate.{gate}"] == "failed: no good"
    assert all(tags[f"gate.{other}"] == "passed: fine" for other in GATES if other != gate), "every gate ran"
    assert made.reason == f"{gate}: no good"
    last = promotion_log.read(home_params, NAME)[-1]
    assert (last.action, last.from_version, last.to_version) == ("refused", "2", "3")
    assert last.gates[gate] == "failed: no good"


def test_deciding_twice_changes_nothing(home_params: Params) -> None:
    promote(home_params, add_version(home_params))
    version = add_version(home_params)
    promote(home_params, version)
    before, log = aliases_of(home_params), logged(home_params)

    def never(*arguments: Any) -> Any:
        raise AssertionError("a champion does not challenge itself")

    again = promote(home_params, version, never)
    assert (again.promoted, again.refused, again.gates) == (False, False, ())
    assert (aliases_of(home_params), logged(home_params)) == (before, log)


def test_a_person_may_say_no(home_params: Params) -> None:
    version = add_version(home_params)
    asked: list[str] = []

    def no(found: Version, gates: Any) -> str:
        asked.append(found.version)
        return "a person said no"

    assert promote(home_params, version, approve=no).reason == "a person said no"
    assert aliases_of(home_params) == {"challenger": "1"}
    assert promote(home_params, version, failing("parity"), approve=no).reason == "parity: no good"
    assert asked == ["1"], "nobody is asked about what has failed"
    assert promote(home_params, version, approve=lambda found, gates: None).promoted


# ---- killed ------------------------------------------------------------------------------------------------


class Killed(BaseException):
    """The process ends here."""


STEPS: list[tuple[Any, str]] = [
    (registry, "set_model_tag"),
    (registry, "set_alias"),
    (registry, "delete_alias"),
    (registry, "tag_version"),
    (registry, "delete_model_tag"),
    (promotion_log, "append"),
]


def kill_before(step: int, action: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> bool:
    """Run `action` and end it before its change number `step`; False when it has fewer."""
    count = 0

    def counted(original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            nonlocal count
            count += 1
            if count > step:
                raise Killed
            return original(*arguments, **options)

        return call

    with monkeypatch.context() as patched:
        for module, name in STEPS:
            patched.setattr(module, name, counted(getattr(module, name)))
        try:
            action()
        except Killed:
            return True
    return False


def test_a_promotion_killed_at_any_step_is_undone_or_finished(
    home_params: Params, monkeypatch: pytest.MonkeyPatch
) -> None:
    promote(home_params, add_version(home_params))
    champion, previous = promote(home_params, add_version(home_params)).version.version, "1"
    outcomes = set()
    for step in range(100):
        version = add_version(home_params)
        challenged = {"champion": champion, "previous": previous, "challenger": version.version}
        moved = {"champion": version.version, "previous": champion}
        lines = len(logged(home_params))

        def move(found: Version = version, old: str = champion, older: str = previous) -> None:
            with aliases.exclusive():
                entry = aliases.describe(
                    "promote", registry.version_of(home_params, NAME, old), found, "killed", previous=older
                )
                aliases.move(home_params, entry)

        if not kill_before(step, move, monkeypatch):
            break
        assert aliases_of(home_params)["champion"] in (champion, version.version), "always valid"
        live.read_status(home_params, NAME)  # repairs
        found = aliases_of(home_params)
        assert found in (challenged, moved), f"killed before change {step}"
        assert len(logged(home_params)) == lines + (found == moved)
        assert registry.model_tag(home_params, NAME, aliases.INTENT) is None
        outcomes.add(found == moved)
        made = promote(home_params, version)
        assert made.promoted == (found == challenged)
        assert aliases_of(home_params) == moved
        assert len(logged(home_params)) == lines + 1
        champion, previous = version.version, champion
    assert step >= 6, "intent, previous, champion, challenger, log, intent"
    assert outcomes == {True, False}


def test_a_rollback_killed_at_any_step_is_undone_or_finished(
    home_params: Params, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(aliases, "_verify_files", lambda params, version: None)
    for step in range(100):
        old = promote(home_params, add_version(home_params)).version.version
        new = promote(home_params, add_version(home_params)).version.version
        lines = len(logged(home_params))
        if not kill_before(step, lambda: aliases.rollback(home_params, NAME), monkeypatch):
            break
        assert aliases_of(home_params)["champion"] in (old, new)
        live.read_status(home_params, NAME)
        found = aliases_of(home_params)
        assert found in ({"champion": new, "previous": old}, {"champion": old})
        assert len(logged(home_params)) == lines + (found == {"champion": old})
        if found["champion"] == new:
            aliases.rollback(home_params, NAME)
        assert aliases_of(home_params) == {"champion": old}
        assert registry.version_of(home_params, NAME, new).tags[aliases.ROLLED_BACK]
    assert step >= 5, "intent, champion, mark, previous, log, intent"


def test_what_was_cut_off_is_given_up_when_somebody_moved_the_champion(home_params: Params) -> None:
    promote(home_params, add_version(home_params))
    version, other = add_version(home_params), add_version(home_params, alias="other")
    champion = registry.version_of(home_params, NAME, "1")
    entry = aliases.describe("promote", champion, version, "cut off")
    registry.set_model_tag(home_params, NAME, aliases.INTENT, entry.to_json())
    registry.set_alias(home_params, NAME, "champion", other.version)
    status = live.read_status(home_params, NAME)
    assert "given up" in status["notes"][0]
    assert "outside Trunkline" in status["notes"][1]
    assert aliases_of(home_params)["champion"] == other.version
    assert logged(home_params)[-1] == ("abandoned", "1", version.version)


# ---- two at once -------------------------------------------------------------------------------------------

RIVAL = """
import sys, time
from pathlib import Path
from flows import params, registry
from flows.decision import decide
from flows.gates import Gate

me, name, other = sys.argv[1:]
def check(gate, candidate, champion):
    Path(f"compared-{me}").open("a").write(f"{gate} with {champion.version}\\n")
    Path(f"gated-{me}").touch()
    while gate == "budget" and not Path(f"gated-{other}").exists():  # neither moves before both have compared
        time.sleep(0.05)
    return Gate(gate, True, "fine")

settings = params.load()
made = decide(settings, Path(), registry.version_of(settings, name, me), check=check)
print(made.promoted)
"""


def test_two_promotions_at_once_are_one_after_the_other(home: Path, home_params: Params) -> None:
    promote(home_params, add_version(home_params))
    rivals = [add_version(home_params).version, add_version(home_params).version]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PREFECT_API_URL": ""}
    running = [
        subprocess.Popen(
            [sys.executable, "-c", RIVAL, me, NAME, other],
            cwd=home,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for me, other in (rivals, reversed(rivals))
    ]
    try:
        answers = [process.communicate(timeout=300) for process in running]
    finally:
        for process in running:
            process.kill()
    assert [out.strip() for out, _ in answers] == ["True", "True"], answers
    found = aliases_of(home_params)
    second, first = found["champion"], found["previous"]
    assert sorted([first, second]) == rivals
    assert logged(home_params)[-2:] == [("promote", "1", first), ("promote", first, second)]
    assert f"quality with {first}" in (home / f"compared-{second}").read_text(), (
        "compared with the new champion"
    )
    assert f"with {second}" not in (home / f"compared-{first}").read_text()


def test_the_same_version_twice_at_once_is_promoted_once(home_params: Params) -> None:
    version = add_version(home_params)

    def meanwhile(found: Version, gates: Any) -> None:
        assert promote(home_params, version).promoted

    made = promote(home_params, version, approve=meanwhile)
    assert (made.promoted, made.refused, made.reason) == (False, False, "another process promoted it")
    assert logged(home_params) == [("promote", "", "1")]


def test_status_does_not_repair_what_is_under_way(home: Path, home_params: Params) -> None:
    promote(home_params, add_version(home_params))
    version = add_version(home_params)
    with aliases.exclusive():
        entry = aliases.describe("promote", registry.version_of(home_params, NAME, "1"), version, "going on")
        registry.set_model_tag(home_params, NAME, aliases.INTENT, entry.to_json())
        notes = live.read_status(home_params, NAME)["notes"]
        assert notes == ["another process moves the aliases just now; try again in a moment"]
        assert registry.model_tag(home_params, NAME, aliases.INTENT)


# ---- rollback ----------------------------------------------------------------------------------------------


def test_rollback_goes_back_once_and_stays(home_params: Params, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(aliases, "_verify_files", lambda params, version: None)
    promote(home_params, add_version(home_params))
    bad = promote(home_params, add_version(home_params)).version
    made = aliases.rollback(home_params, NAME)
    assert (made.action, made.from_version, made.to_version) == ("rollback", "2", "1")
    assert aliases_of(home_params) == {"champion": "1"}
    with pytest.raises(DataError, match=r"no previous version.*promote --model \S+ --version 2 --again"):
        aliases.rollback(home_params, NAME)
    assert aliases_of(home_params) == {"champion": "1"}

    # the nightly run makes the same weights again and finds them registered
    registry.set_alias(home_params, NAME, "challenger", bad.version)
    refused = promote(home_params, bad)
    assert refused.refused
    assert "rolled back" in refused.reason
    assert aliases_of(home_params)["champion"] == "1"
    assert promote(home_params, bad, again=True).promoted
    assert aliases_of(home_params) == {"champion": "2", "previous": "1"}
    assert not registry.version_of(home_params, NAME, "2").tags[aliases.ROLLED_BACK]


def test_a_rollback_needs_files_that_are_there(home_params: Params) -> None:
    promote(home_params, add_version(home_params))
    promote(home_params, add_version(home_params))
    with pytest.raises(DataError, match=r"version 1 of \S+ cannot be served") as caught:
        aliases.rollback(home_params, NAME)
    assert "\n" not in str(caught.value)
    assert aliases_of(home_params) == {"champion": "2", "previous": "1"}


def test_nothing_to_roll_back(home_params: Params) -> None:
    with pytest.raises(DataError, match="no champion"):
        aliases.rollback(home_params, NAME)
    promote(home_params, add_version(home_params))
    with pytest.raises(DataError, match="no previous version to roll back to; champion stays version 1"):
        aliases.rollback(home_params, NAME)


# ---- the log -----------------------------------------------------------------------------------------------


def test_the_log_survives_the_loss_of_either_copy(home: Path, home_params: Params) -> None:
    for _ in range(3):
        promote(home_params, add_version(home_params))
    whole = promotion_log.read(home_params, NAME)
    path = home / ".trunkline/promotions.jsonl"
    assert [json.loads(line)["to_version"] for line in path.read_text().splitlines()] == ["1", "2", "3"]
    assert {"id", "time", "by", "to_digest", "git_commit", "gates"} <= json.loads(
        path.read_text().splitlines()[0]
    ).keys()

    path.unlink()
    assert promotion_log.read(home_params, NAME) == whole
    assert len(path.read_text().splitlines()) == 3, "and is filled in again"

    experiment = tracking.client(home_params).get_experiment_by_name("trunkline/promotion")
    for run in tracking.client(home_params).search_runs([experiment.experiment_id]):
        tracking.client(home_params).delete_run(run.info.run_id)
    assert promotion_log.read(home_params, NAME) == whole


def test_a_line_that_was_cut_off_is_repaired(home: Path, home_params: Params) -> None:
    promote(home_params, add_version(home_params))
    promote(home_params, add_version(home_params))
    whole = promotion_log.read(home_params, NAME)
    path = home / ".trunkline/promotions.jsonl"
    path.write_bytes(path.read_bytes()[:-40])
    promote(home_params, add_version(home_params))
    assert [entry.to_version for entry in promotion_log.read(home_params, NAME)] == ["1", "2", "3"]
    assert promotion_log.read(home_params, NAME)[:2] == whole
    assert all(json.loads(line) for line in path.read_text().splitlines())


def test_a_damaged_log_is_told_before_anything_moves(home: Path, home_params: Params) -> None:
    promote(home_params, add_version(home_params))
    version = add_version(home_params)
    path = home / ".trunkline/promotions.jsonl"
    path.write_text("damage\n" + path.read_text())
    before = aliases_of(home_params)
    with pytest.raises(DataError, match=r"line 1 of \S+ is damaged"):
        promote(home_params, version)
    assert aliases_of(home_params) == before


def test_a_store_that_goes_away_before_the_log_leaves_an_intent(
    home_params: Params, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An error, not a kill: what was begun is finished by whoever comes next."""
    promote(home_params, add_version(home_params))
    version = add_version(home_params)
    with monkeypatch.context() as patched:
        patched.setattr(
            promotion_log.tracking, "pipeline_run", lambda *a, **b: (_ for _ in ()).throw(OSError("gone"))
        )
        with pytest.raises(OSError, match="gone"):
            promote(home_params, version)
    made = promote(home_params, version)
    assert (made.promoted, made.refused) == (False, False)
    assert aliases_of(home_params) == {"champion": "2", "previous": "1"}
    assert logged(home_params)[-1] == ("promote", "1", "2")


# ---- which version -----------------------------------------------------------------------------------------


def test_the_challenger_is_chosen(home_params: Params) -> None:
    with pytest.raises(DataError, match="none yet"):
        decision.choose(home_params, NAME, "")
    promote(home_params, add_version(home_params))
    assert decision.choose(home_params, NAME, "") is None
    add_version(home_params)
    found = decision.choose(home_params, NAME, "")
    assert found
    assert found.version == "2"
    assert decision.choose(home_params, NAME, "1") is not None
    with pytest.raises(DataError, match="no version '7'; it has 1, 2"):
        decision.choose(home_params, NAME, "7")


def test_images_of_the_workspace_that_made_it_judge_it(home: Path, home_params: Params) -> None:
    for name, digest in (("one", "a"), ("two", "b")):
        folder = home / ".trunkline/workspaces" / name
        (folder / "artifacts/data").mkdir(parents=True)
        (folder / "artifacts/data/manifest.json").write_text(json.dumps({"digest": digest}))
        text = (home / "params.yaml").read_text()
        (folder / "params.yaml").write_text(text.replace("min_top1: 0.5", f"min_top1: 0.{ord(digest)}"))
    version = add_version(home_params, **{"data.digest": "b"})
    chosen, root = decision.workspace_of(home_params, version)
    assert root == home / ".trunkline/workspaces/two"
    assert chosen.promotion.min_top1 == float(f"0.{ord('b')}")
    gone = add_version(home_params, **{"data.digest": "c"})
    assert decision.workspace_of(home_params, gone) == (home_params, home)
