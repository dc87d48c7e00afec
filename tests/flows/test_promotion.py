"""Registration and the way to `champion` (conventions, section 10)."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import yaml
from onnx import numpy_helper
from serving_workspace import Exported

from flows import files, paths, promotion, registry, tracking
from flows.champion import measure_folder, measure_version
from flows.errors import DataError
from flows.exporting import write_onnx
from flows.imaging import Preprocessing
from flows.params import Params
from flows.promotion import Decision, decide, register_export
from flows.registry import Version
from flows.serving.package import Manifest, describe_variant, metadata

NAME = "trunkline-vision-digits"


@pytest.fixture
def workspace(home: Path, exported: Exported) -> Path:
    """A clone whose stages have run up to parity, with a real export; also the current directory."""
    shutil.copytree(exported.root, home, dirs_exist_ok=True)
    outputs = {"export": paths.EXPORT, "ingest": paths.DATA}
    stages = {
        stage: {"outs": [{"path": path.as_posix(), "md5": f"{stage}.dir"}]} for stage, path in outputs.items()
    }
    (home / "dvc.lock").write_text(yaml.safe_dump({"schema": "2.0", "stages": stages}))
    files.write_json(paths.PARITY / "parity.json", {"passed": True})
    files.write_json(paths.RECEIPTS / "finetune-pretrained.json", {"run_id": "training"})
    measure(0.9)
    return home


@pytest.fixture
def settings(workspace: Path, exported: Exported) -> Params:
    return exported.params


def measure(top1: float) -> None:
    """What the evaluate stage would have found."""
    files.write_json(paths.METRICS / "evaluate-pretrained.json", {"top1": top1})


def register(settings: Params, root: Path) -> Version:
    with tracking.pipeline_run(settings, "test", {}) as run:
        return register_export(settings, root, run)


def add_version(settings: Params, top1: float, alias: str = "challenger") -> Version:
    """A version as `register_export` leaves it, without files, measured on the present data."""
    measure(top1)
    connection = tracking.client(settings)
    if NAME not in registry.model_names(settings):
        connection.create_registered_model(NAME)
    tags = promotion.measurement_tags(settings, Path())
    made = connection.create_model_version(NAME, source=Path("nowhere").absolute().as_uri(), tags=tags)
    registry.set_alias(settings, NAME, alias, made.version)
    return registry.version_of(settings, NAME, str(made.version))


def aliases(settings: Params) -> dict[str, str]:
    return {
        alias: version.version for version in registry.versions(settings, NAME) for alias in version.aliases
    }


def limited(settings: Params, **limits: object) -> Params:
    return settings.model_copy(update={"registry": settings.registry.model_copy(update=limits)})


def reason(decision: Decision, name: str) -> str:
    return next(gate.reason for gate in decision.gates if gate.name == name)


# ---- registration ----


def test_a_registered_export_leads_back_to_its_origin(workspace: Path, settings: Params) -> None:
    version = register(settings, workspace)
    manifest = files.read_json(workspace / paths.EXPORT / "manifest.json")
    assert version.name == NAME
    assert version.aliases == ("challenger",)
    expected = {
        "onnx.digest": manifest["variants"]["fp32"]["digest"],
        "onnx.opset": "20",
        "dvc.out_md5": "export.dir",
        "data.md5": "ingest.dir",
        "data.name": "digits",
        "data.digest": manifest["data_digest"],
        "train.run_id": "training",
        "metric.test_top1": "0.9",
        "metric.data_digest": manifest["data_digest"],
        "metric.split": "test",
        "git.commit": "unknown",
        "params.sha256": files.sha256_file(workspace / "params.yaml"),
    }
    assert {key: version.tags.get(key) for key in expected} == expected
    assert version.tags["license"]

    folder = workspace / "fetched"
    folder.mkdir()
    registry.download_version(settings, version, folder)
    assert files.read_json(folder / "parity.json") == {"passed": True}
    assert files.sha256_file(folder / "model.onnx") == manifest["variants"]["fp32"]["sha256"]


def test_the_same_export_is_one_version(workspace: Path, settings: Params) -> None:
    first = register(settings, workspace)
    measure(0.95)  # the evaluation may change while the weights stay
    second = register(settings, workspace)
    assert (first.version, second.version) == ("1", "1")
    assert second.tags["metric.test_top1"] == "0.95"
    assert len(registry.versions(settings, NAME)) == 1

    assert decide(settings, workspace, second).promoted
    again = register(settings, workspace)
    assert again.aliases == ("champion",), "a champion does not challenge itself"


# ---- gates ----


def test_the_first_version_needs_the_floors_only(workspace: Path, settings: Params) -> None:
    version = add_version(settings, top1=0.6)
    decision = decide(settings, workspace, version)
    assert decision.promoted
    assert decision.champion == decision.version
    assert decision.version.aliases == ("champion",)
    assert aliases(settings) == {"champion": "1"}
    assert [(gate.name, gate.passed) for gate in decision.gates] == [
        ("accuracy", True),
        ("parity", True),
        ("champion", True),
    ]
    tags = registry.version_of(settings, NAME, "1").tags
    assert tags["gate.accuracy"] == "passed: test top-1 0.6000, at least 0.5"
    assert tags["gate.champion"] == "passed: there is no champion yet"


@pytest.mark.parametrize("gate", ["accuracy", "parity"])
def test_a_failed_gate_changes_no_alias(gate: str, workspace: Path, settings: Params) -> None:
    decide(settings, workspace, add_version(settings, top1=0.6))
    challenger = add_version(settings, top1=0.8)
    if gate == "accuracy":
        settings = limited(settings, min_test_top1=0.9)
    else:
        files.write_json(paths.PARITY / "parity.json", {"passed": False})
    before = aliases(settings)
    decision = decide(settings, workspace, challenger)
    assert not decision.promoted
    assert decision.champion
    assert decision.champion.version == "1"
    assert aliases(settings) == before == {"champion": "1", "challenger": "2"}
    tags = registry.version_of(settings, NAME, "2").tags
    assert tags[f"gate.{gate}"].startswith("failed: ")
    others = {"accuracy", "parity", "champion"} - {gate}
    assert all(tags[f"gate.{other}"].startswith("passed: ") for other in others)


def test_parity_may_be_waived(workspace: Path, settings: Params) -> None:
    files.write_json(paths.PARITY / "parity.json", {"passed": False})
    assert decide(
        limited(settings, require_parity=False), workspace, add_version(settings, top1=0.6)
    ).promoted


def test_a_better_version_takes_the_place_and_the_old_one_is_kept(workspace: Path, settings: Params) -> None:
    for top1 in (0.80, 0.81, 0.82):
        assert decide(settings, workspace, add_version(settings, top1)).promoted
    assert aliases(settings) == {"champion": "3", "previous": "2"}


@pytest.mark.parametrize(
    ("top1", "min_gain", "promoted"),
    [
        (0.97, 0.0, False),  # equal
        (0.96, 0.0, False),  # worse
        (0.98, 0.01, False),  # not more than the gain asked for, whatever 0.98 - 0.97 is in binary
        (0.981, 0.01, True),
        (0.96, -0.02, True),  # a bounded loss is allowed
    ],
)
def test_the_gain_over_the_champion_decides(
    top1: float, min_gain: float, promoted: bool, workspace: Path, settings: Params
) -> None:
    decide(settings, workspace, add_version(settings, top1=0.97))
    decision = decide(limited(settings, min_gain=min_gain), workspace, add_version(settings, top1))
    assert decision.promoted == promoted
    assert aliases(settings) == (
        {"champion": "2", "previous": "1"} if promoted else {"champion": "1", "challenger": "2"}
    )
    assert "the same images" in reason(decision, "champion")


def test_deciding_twice_changes_nothing(workspace: Path, settings: Params) -> None:
    decide(settings, workspace, add_version(settings, top1=0.8))
    version = add_version(settings, top1=0.9)
    first = decide(settings, workspace, version)
    before = aliases(settings)
    second = decide(settings, workspace, version)
    assert (first.promoted, second.promoted) == (True, False)
    assert second.champion
    assert second.champion.version == "2"
    assert aliases(settings) == before == {"champion": "2", "previous": "1"}


def test_a_promotion_that_was_cut_off_is_finished(workspace: Path, settings: Params) -> None:
    version = add_version(settings, top1=0.8)
    registry.set_alias(settings, NAME, "champion", "1")  # … and then the machine went down
    decision = decide(settings, workspace, version)
    assert decision.version.aliases == ("champion",)
    assert aliases(settings) == {"champion": "1"}


# ---- a champion measured on other images ----


def change_export(
    folder: Path,
    edit: Callable[[onnx.ModelProto], None] = lambda model: None,
    *,
    labels: Sequence[str] | None = None,
    preprocessing: Preprocessing | None = None,
) -> None:
    """Another consistent fp32 model in the exported folder."""
    manifest = Manifest.from_dict(files.read_json(folder / "manifest.json"))
    names = tuple(labels or manifest.labels)
    feeding = preprocessing or manifest.preprocessing
    model = onnx.load(folder / "model.onnx")
    edit(model)
    write_onnx(model, folder / "model.onnx", metadata(feeding, names))
    variants = {**manifest.variants, "fp32": describe_variant(folder / "model.onnx")}
    changed = replace(manifest, labels=names, preprocessing=feeding, variants=variants)
    files.write_json(folder / "manifest.json", changed.to_dict())


def edit_head(change: Callable[[np.ndarray], np.ndarray]) -> Callable[[onnx.ModelProto], None]:
    """Apply `change` along the classes (the last axis) of whatever computes the logits."""

    def edit(model: onnx.ModelProto) -> None:
        head = next(node for node in model.graph.node if "logits" in node.output)
        tensors = {tensor.name: tensor for tensor in model.graph.initializer}
        found = [tensors[name] for name in head.input if name in tensors]
        assert len(found) == 2, "weights and bias"
        for tensor in found:
            value = numpy_helper.to_array(tensor)
            axis = value.shape.index(10)
            changed = np.moveaxis(change(np.moveaxis(value, axis, -1)), -1, axis)
            tensor.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(changed), tensor.name))

    return edit


def confuse(value: np.ndarray) -> np.ndarray:
    """Three digits are answered as others."""
    return value[..., [0, 1, 2, 3, 4, 5, 6, 8, 9, 7]]


def test_classes_are_matched_by_name(workspace: Path, settings: Params) -> None:
    folder = workspace / paths.EXPORT
    before = measure_folder(settings, workspace, folder)
    assert before > 0.85
    backwards = [str(digit) for digit in reversed(range(10))]
    change_export(folder, edit_head(lambda value: value[..., ::-1]), labels=backwards)
    assert measure_folder(settings, workspace, folder) == before
    change_export(folder, labels=[str(digit) for digit in range(10)])
    assert measure_folder(settings, workspace, folder) < 0.3, "the order matters"


def test_a_model_is_fed_by_its_own_preprocessing(workspace: Path, settings: Params) -> None:
    folder = workspace / paths.EXPORT
    own = Manifest.from_dict(files.read_json(folder / "manifest.json")).preprocessing
    change_export(folder, preprocessing=replace(own, std=(1e6, 1e6, 1e6)))
    assert measure_folder(settings, workspace, folder) < 0.3, "to this model all images are grey"


@pytest.mark.parametrize("stale", [{"metric.data_digest": "older"}, {"metric.split": "val"}])
def test_a_worse_champion_measured_elsewhere_is_measured_now_and_beaten(
    stale: dict[str, str], workspace: Path, settings: Params
) -> None:
    good = workspace / "good"
    shutil.copytree(workspace / paths.EXPORT, good)
    change_export(workspace / paths.EXPORT, edit_head(confuse))
    measure(0.99)  # on those easier images
    champion = register(settings, workspace)
    decide(settings, workspace, champion)
    registry.tag_version(settings, champion, stale)

    shutil.rmtree(workspace / paths.EXPORT)
    shutil.move(good, workspace / paths.EXPORT)
    measure(0.9)
    decision = decide(settings, workspace, register(settings, workspace))
    assert decision.promoted
    assert aliases(settings) == {"champion": "2", "previous": "1"}
    assert "both measured now" in reason(decision, "champion")
    best = measure_version(settings, workspace, registry.version_of(settings, NAME, "1"))
    assert 0.5 < best < 0.8
    assert f"({best:.4f}, both" in reason(decision, "champion")


def test_a_better_champion_measured_elsewhere_stays(workspace: Path, settings: Params) -> None:
    measure(0.6)  # on those harder images
    champion = register(settings, workspace)
    decide(settings, workspace, champion)
    registry.tag_version(settings, champion, {"metric.data_digest": "older"})
    change_export(workspace / paths.EXPORT, edit_head(confuse))
    measure(0.7)
    decision = decide(settings, workspace, register(settings, workspace))
    assert not decision.promoted
    assert aliases(settings) == {"champion": "1", "challenger": "2"}
    assert registry.version_of(settings, NAME, "2").tags["gate.champion"].startswith("failed: gain -0.")


def test_a_champion_of_other_classes_is_not_compared(workspace: Path, settings: Params) -> None:
    animals = ["ape", "bee", "cat", "dog", "eel", "fox", "gnu", "hen", "ibis", "jay"]
    pristine = workspace / "pristine"
    shutil.copytree(workspace / paths.EXPORT, pristine)
    change_export(workspace / paths.EXPORT, labels=animals)
    champion = register(settings, workspace)
    decide(settings, workspace, champion)
    registry.tag_version(settings, champion, {"metric.data_digest": "older"})
    shutil.rmtree(workspace / paths.EXPORT)
    shutil.move(pristine, workspace / paths.EXPORT)
    decision = decide(settings, workspace, register(settings, workspace))
    assert not decision.promoted
    assert aliases(settings) == {"champion": "1", "challenger": "2"}
    assert "version 1 cannot be compared: it knows other classes" in reason(decision, "champion")


def test_a_damaged_champion_is_not_compared(workspace: Path, settings: Params) -> None:
    champion = register(settings, workspace)
    wrong = replace(champion, tags={**champion.tags, "onnx.digest": "0" * 64})
    with pytest.raises(DataError, match="as recorded"):
        measure_version(settings, workspace, wrong)
