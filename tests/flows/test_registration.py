"""A registered version carries what is needed to judge it, to serve it and to trace it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from promotion_workspace import NAME, aliases_of, all_pass, complete, register, settings_of
from serving_workspace import Exported

from flows import dvc_hash, files, paths, registry
from flows.decision import decide
from flows.params import Params
from flows.registration import SEALED
from flows.serving.golden import read_golden


@pytest.fixture
def workspace(home: Path, exported: Exported) -> Path:
    """A clone whose stages have run up to parity, with a real export; also the current directory."""
    shutil.copytree(exported.root, home, dirs_exist_ok=True)
    complete(home)
    return home


@pytest.fixture
def settings(workspace: Path, exported: Exported) -> Params:
    return settings_of(workspace, exported.params, golden_requests=3)


def test_a_registered_export_leads_back_to_its_origin(workspace: Path, settings: Params) -> None:
    version = register(settings, workspace)
    manifest = files.read_json(workspace / paths.EXPORT / "manifest.json")
    assert version.name == NAME
    assert version.aliases == ("challenger",)
    expected = {
        "onnx.digest": manifest["variants"]["fp32"]["digest"],
        "onnx.opset": "20",
        "dvc.out_md5": dvc_hash.folder_md5(workspace / paths.EXPORT),
        "dvc.lock_sha256": files.sha256_file(workspace / "dvc.lock"),
        "data.md5": dvc_hash.folder_md5(workspace / paths.DATA),
        "data.name": "digits",
        "data.digest": manifest["data_digest"],
        "train.run_id": "run-of-finetune@pretrained",
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
    assert files.sha256_file(folder / "model.onnx") == manifest["variants"]["fp32"]["sha256"]
    for tag, file in SEALED.items():
        assert files.sha256_file(folder / file) == version.tags[tag]
    assert (folder / "dvc.lock").read_bytes() == (workspace / "dvc.lock").read_bytes()
    assert files.read_json(folder / "receipts.json")["export"]["run_id"] == "run-of-export"


def test_golden_requests_are_images_of_the_split_with_the_answers_of_the_session(
    workspace: Path, settings: Params, exported: Exported
) -> None:
    version = register(settings, workspace)
    folder = workspace / "fetched"
    folder.mkdir()
    registry.download_version(settings, version, folder)
    requests = read_golden(folder)
    assert len(requests) == 3
    assert len({request.name for request in requests}) == 3
    assert requests[0].data == exported.encoded[0]
    assert all(0.1 < request.confidence <= 1 for request in requests)


def test_the_same_export_is_one_version(workspace: Path, settings: Params) -> None:
    first = register(settings, workspace)
    # the evaluation may change while the weights stay
    files.write_json(paths.METRICS / "evaluate-pretrained.json", {"top1": 0.95})
    second = register(settings, workspace)
    assert (first.version, second.version) == ("1", "1")
    assert second.tags["metric.test_top1"] == "0.95"
    assert len(registry.versions(settings, NAME)) == 1

    assert decide(settings, workspace, second, check=all_pass).promoted
    again = register(settings, workspace)
    assert again.aliases == ("champion",), "a champion does not challenge itself"


def test_a_version_registered_without_golden_requests_is_registered_again(
    workspace: Path, settings: Params
) -> None:
    first = register(settings, workspace)
    from flows import tracking

    tracking.client(settings).delete_model_version_tag(NAME, first.version, "golden.sha256")
    assert register(settings, workspace).version == "2"
    assert aliases_of(settings) == {"challenger": "2"}
