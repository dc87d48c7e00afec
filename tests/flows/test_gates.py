"""The five gates on a real export of real digits: each can pass, and each can fail for every reason it
knows."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from promotion_workspace import change_export, complete, confuse, edit_head, register, settings_of
from serving_workspace import ROOT, Exported

from flows import files, paths, smoke
from flows.champion import judge_folder
from flows.gates import GATES, Candidate, Gate, check_gate, fetched
from flows.imaging import Preprocessing
from flows.params import Params
from flows.registry import Version
from flows.serving import golden
from flows.serving.package import Manifest


@dataclass(frozen=True)
class Registered:
    """A clone with two registered models of the same data, the second one worse; both downloaded."""

    home: Path
    params: Params
    good: Candidate
    confused: Candidate


@pytest.fixture(scope="module")
def registered(
    exported: Exported, empty_store: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Registered]:
    """Made once, because registering takes seconds; its home is these tests' current folder."""
    home = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(home)
        patched.setenv("TRUNKLINE_HOME", str(home))
        patched.setenv("MLFLOW_TRACKING_URI", "")
        patched.setenv("PYTHONPATH", str(ROOT))
        patched.delenv("TRUNKLINE_PARENT_RUN", raising=False)
        shutil.copytree(exported.root, home, dirs_exist_ok=True)
        shutil.copy(empty_store, home / "mlflow.db")
        complete(home)
        settings = settings_of(home, exported.params)
        first = register(settings, home)
        change_export(home, edit_head(confuse))
        second = register(settings, home)
        with fetched(settings, home, first) as good, fetched(settings, home, second) as confused:
            yield Registered(home, settings, good, confused)


@pytest.fixture
def candidate(registered: Registered, tmp_path: Path) -> Candidate:
    """The good model, in a folder that the test may change."""
    folder = tmp_path / "candidate"
    shutil.copytree(registered.good.folder, folder)
    return replace(registered.good, folder=folder)


@pytest.fixture
def confused(registered: Registered) -> Candidate:
    """A worse model of the same data."""
    return registered.confused


@pytest.fixture
def workspace(exported: Exported, registered: Registered, tmp_path: Path) -> Path:
    """A workspace to change, with the good export."""
    shutil.copytree(exported.root, tmp_path / "workspace")
    complete(tmp_path / "workspace")
    return tmp_path / "workspace"


@pytest.fixture
def settings(registered: Registered) -> Params:
    return registered.params


def limited(candidate: Candidate, **limits: Any) -> Candidate:
    promotion = candidate.params.promotion.model_copy(update=limits)
    return replace(candidate, params=candidate.params.model_copy(update={"promotion": promotion}))


def tagged(candidate: Candidate, **tags: str) -> Candidate:
    version = replace(candidate.version, tags={**candidate.version.tags, **tags})
    return replace(candidate, version=version)


def test_a_sound_export_passes_every_gate(candidate: Candidate) -> None:
    found = {name: check_gate(name, candidate, None) for name in GATES}
    assert {name: gate.passed for name, gate in found.items()} == dict.fromkeys(GATES, True), found
    assert found["servability"].figures["requests"] == 8
    assert found["servability"].figures["largest_difference"] < 1e-4
    assert found["budget"].figures["fp32_p95_ms_batch_4"] > 0
    assert found["budget"].figures["machine"] in found["budget"].reason
    assert 0.85 < found["quality"].figures["top1_low"] < found["quality"].figures["top1"] <= 1
    assert found["integrity"].figures["digest"] == candidate.version.tags["onnx.digest"]


def test_what_cannot_be_downloaded_fails_every_gate_and_says_so(candidate: Candidate) -> None:
    nowhere = replace(candidate.version, source="file:///nowhere", version="9")
    with fetched(candidate.params, candidate.root, nowhere) as empty:
        for name in GATES:
            gate = check_gate(name, empty, None)
            assert not gate.passed, name
            assert gate.reason
            assert "\n" not in gate.reason


# ---- integrity ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("file", "words"),
    [
        ("model.onnx", "was changed after its export"),
        ("model_int8.onnx", "was changed after its export"),
        ("golden/000.bin", "was changed after registration"),
        ("golden/golden.json", "sha256"),
        ("parity.json", "parity.json has sha256"),
        ("dvc.lock", "dvc.lock has sha256"),
        ("receipts.json", "receipts.json has sha256"),
        ("manifest.json", "tag dvc.out_md5"),
    ],
)
def test_a_changed_file_fails_integrity(candidate: Candidate, file: str, words: str) -> None:
    path = candidate.folder / file
    path.write_bytes(path.read_bytes() + b"\n")
    gate = check_gate("integrity", candidate, None)
    assert not gate.passed
    assert words in gate.reason


@pytest.mark.parametrize("file", ["model.onnx", "golden/001.bin", "parity.json", "manifest.json"])
def test_a_missing_file_fails_integrity(candidate: Candidate, file: str) -> None:
    (candidate.folder / file).unlink()
    gate = check_gate("integrity", candidate, None)
    assert not gate.passed
    assert Path(file).name in gate.reason


@pytest.mark.parametrize(
    "tags",
    [
        {"onnx.digest": "0" * 64},
        {"onnx.digest": ""},
        {"dvc.out_md5": "0.dir"},
        {"data.digest": "0" * 64},
        {"onnx.opset": "18"},
        {"golden.sha256": "0" * 64},
    ],
)
def test_a_tag_that_claims_something_else_fails_integrity(candidate: Candidate, tags: dict[str, str]) -> None:
    gate = check_gate("integrity", tagged(candidate, **tags), None)
    assert not gate.passed
    assert gate.reason


def test_another_consistent_model_under_the_same_version_is_found(
    candidate: Candidate, workspace: Path
) -> None:
    """Whoever replaces all files of a version still meets its tags."""
    change_export(workspace, edit_head(confuse))
    shutil.copytree(workspace / paths.EXPORT, candidate.folder, dirs_exist_ok=True)
    gate = check_gate("integrity", candidate, None)
    assert not gate.passed
    assert "holds the model with digest" in gate.reason


@pytest.mark.parametrize(
    ("commit", "dirty", "passed"),
    [("abc", "false", True), ("abc", "true", False), ("unknown", "false", False), ("abc", "", False)],
)
def test_a_clean_tree_may_be_asked_for(candidate: Candidate, commit: str, dirty: str, passed: bool) -> None:
    found = tagged(candidate, **{"git.commit": commit, "git.dirty": dirty})
    assert check_gate("integrity", found, None).passed, "not asked for"
    assert check_gate("integrity", limited(found, require_clean_tree=True), None).passed == passed


# ---- parity ------------------------------------------------------------------------------------------------


def test_a_report_outside_the_tolerances_of_now_fails_parity(candidate: Candidate) -> None:
    parity = candidate.params.parity.model_copy(update={"fp32_max_abs_error": 1e-9})
    tight = replace(candidate, params=candidate.params.model_copy(update={"parity": parity}))
    gate = check_gate("parity", tight, None)
    assert not gate.passed
    assert "1e-06 is not <= parity.fp32_max_abs_error 1e-09" in gate.reason


@pytest.mark.parametrize("value", [math.nan, 1.0, None])
def test_a_report_with_a_bad_or_missing_number_fails_parity(
    candidate: Candidate, value: float | None
) -> None:
    path = candidate.folder / "parity.json"
    report = files.read_json(path)
    report["checks"] = [check for check in report["checks"] if check["key"] != "int8_max_mean_error"]
    if value is not None:
        report["checks"].append({"key": "int8_max_mean_error", "value": value})
    path.write_text(json.dumps(report))
    gate = check_gate("parity", candidate, None)
    assert not gate.passed
    assert "is not <= parity.int8_max_mean_error" in gate.reason


def test_a_report_of_another_export_fails_parity(candidate: Candidate) -> None:
    report = files.read_json(candidate.folder / "parity.json")
    files.write_json(candidate.folder / "parity.json", {**report, "digests": {"fp32": "0" * 64}})
    gate = check_gate("parity", candidate, None)
    assert not gate.passed
    assert "another export" in gate.reason


# ---- quality -----------------------------------------------------------------------------------------------


def test_both_are_measured_now_on_the_same_images(candidate: Candidate, confused: Candidate) -> None:
    better = check_gate("quality", candidate, confused.version)
    assert better.passed, better
    assert better.figures["champion_top1"] < 0.7 < 0.85 < better.figures["top1"]
    assert 0 < better.figures["gain_low"] < better.figures["gain"] < better.figures["gain_high"]
    worse = check_gate("quality", confused, candidate.version)
    assert not worse.passed
    assert worse.figures["gain"] == pytest.approx(-better.figures["gain"])
    for words in ("does not exceed promotion.min_gain 0", "min_class_recall 0.3: ", "max_class_drop 0.2: "):
        assert words in worse.reason
    assert {"7", "8", "9"} == {name for name in "0123456789" if f"{name} (-" in worse.reason}, worse.reason


def test_recorded_accuracies_are_not_believed(candidate: Candidate, confused: Candidate) -> None:
    flattered = tagged(confused, **{"metric.test_top1": "0.999"})
    assert not check_gate("quality", flattered, candidate.version).passed
    assert check_gate("quality", candidate, flattered.version).passed


def test_the_first_version_meets_the_floors_only(confused: Candidate) -> None:
    loose = limited(confused, min_class_recall=0.0)
    gate = check_gate("quality", loose, None)
    assert gate.passed
    assert "gain" not in gate.figures
    assert not check_gate("quality", limited(loose, min_top1=0.9), None).passed
    low = check_gate("quality", confused, None)
    assert "recall below promotion.min_class_recall 0.3" in low.reason


def test_equal_models_gain_nothing(candidate: Candidate) -> None:
    same = check_gate("quality", candidate, candidate.version)
    assert not same.passed
    assert same.figures["gain"] == 0.0
    assert check_gate("quality", limited(candidate, min_gain=-0.01), candidate.version).passed, (
        "a bounded loss"
    )


def test_the_lower_end_of_the_interval_may_decide(candidate: Candidate, confused: Candidate) -> None:
    gain = check_gate("quality", candidate, confused.version).figures
    between = {"min_gain": (gain["gain"] + gain["gain_low"]) / 2}
    assert check_gate("quality", limited(candidate, **between), confused.version).passed
    strict = check_gate("quality", limited(candidate, **between, gain_rule="lower"), confused.version)
    assert not strict.passed
    assert "lower end" in strict.reason


def test_classes_are_matched_by_name(workspace: Path, settings: Params) -> None:
    folder = workspace / paths.EXPORT
    before = judge_folder(settings, workspace, folder)
    assert before.top1 > 0.85
    backwards = [str(digit) for digit in reversed(range(10))]
    change_export(workspace, edit_head(lambda value: value[..., ::-1]), labels=backwards)
    np.testing.assert_array_equal(judge_folder(settings, workspace, folder).correct, before.correct)
    change_export(workspace, labels=[str(digit) for digit in range(10)])
    assert judge_folder(settings, workspace, folder).top1 < 0.3, "the order matters"


def test_a_model_is_fed_by_its_own_preprocessing(workspace: Path, settings: Params) -> None:
    folder = workspace / paths.EXPORT
    own: Preprocessing = Manifest.from_dict(files.read_json(folder / "manifest.json")).preprocessing
    change_export(workspace, preprocessing=replace(own, std=(1e6, 1e6, 1e6)))
    assert judge_folder(settings, workspace, folder).top1 < 0.3, "to this model all images are grey"


def test_a_champion_that_cannot_be_compared_stays(
    workspace: Path, settings: Params, candidate: Candidate
) -> None:
    change_export(workspace, labels=["ape", "bee", "cat", "dog", "eel", "fox", "gnu", "hen", "ibis", "jay"])
    stranger = register(settings, workspace)
    gate = check_gate("quality", candidate, stranger)
    assert not gate.passed
    assert f"champion version {stranger.version} cannot be compared: it knows other classes" in gate.reason
    damaged = replace(stranger, tags={**stranger.tags, "onnx.digest": "0" * 64})
    assert "as recorded" in check_gate("quality", candidate, damaged).reason


def test_missing_images_fail_quality(candidate: Candidate, workspace: Path) -> None:
    shutil.rmtree(workspace / paths.DATA)
    moved = replace(candidate, root=workspace)
    assert "artifacts/data" in check_gate("quality", moved, None).reason


# ---- servability -------------------------------------------------------------------------------------------


def test_a_server_that_answers_otherwise_fails(candidate: Candidate, monkeypatch: pytest.MonkeyPatch) -> None:
    """A real server, and golden requests whose recorded answers are not this model's."""
    path = candidate.folder / "golden/golden.json"
    content = files.read_json(path)
    content["requests"][0]["index"] = (content["requests"][0]["index"] + 1) % 10
    content["requests"][1]["confidence"] *= 0.9
    (candidate.folder / "golden/002.bin").write_bytes(b"no image")
    content["requests"][2]["sha256"] = files.sha256_file(candidate.folder / "golden/002.bin")
    files.write_json(path, content)
    gate = check_gate("servability", candidate, None)
    assert not gate.passed
    assert gate.figures["different"] == 3
    assert gate.reason.startswith("3 of 8 golden requests: ")


def test_a_server_that_does_not_start_says_why(candidate: Candidate) -> None:
    absent = replace(candidate, version=replace(candidate.version, version="77"))
    gate = check_gate("servability", absent, None)
    assert not gate.passed
    assert "has no version '77'" in gate.reason


def test_without_golden_requests_nothing_is_proved(candidate: Candidate) -> None:
    shutil.rmtree(candidate.folder / golden.FOLDER)
    gate = check_gate("servability", candidate, None)
    assert not gate.passed
    assert "without golden requests" in gate.reason


# ---- budget ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("limits", "words"),
    [
        ({"max_p95_ms": [60000.0, 0.001]}, "batch 4 takes"),
        ({"max_memory_mb": 0.001}, "promotion.max_memory_mb"),
        ({"max_size_mb": 0.001}, "promotion.max_size_mb"),
    ],
)
def test_each_budget_can_be_exceeded(candidate: Candidate, limits: dict[str, Any], words: str) -> None:
    gate = check_gate("budget", limited(candidate, **limits), None)
    assert not gate.passed
    assert words in gate.reason
    assert "CPU" in gate.reason, "on which machine"


# ---- any gate ----------------------------------------------------------------------------------------------


def test_a_bug_behind_a_gate_is_a_failed_gate(candidate: Candidate, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(root: Path, version: Version) -> Any:
        raise RuntimeError("one\ntwo")

    monkeypatch.setattr(smoke, "server", broken)
    assert check_gate("servability", candidate, None) == Gate(
        "servability", False, "cannot be checked: RuntimeError: one two"
    )
