"""One exported classifier of real digits for all tests of this folder; tests that change files copy it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from serving_workspace import Exported, inside, make_workspace

from flows import paths
from flows.data import ImageDataset
from flows.samples import draw_samples
from flows.serving.package import ModelPackage
from flows.serving.session import Session, open_session
from flows.stage import Stage
from flows.stages import export


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    root = tmp_path_factory.mktemp("exported")
    checked = make_workspace(root)
    with inside(root):
        export.run(checked, Stage("export"))
        preprocessing = ModelPackage.open(paths.EXPORT).manifest.preprocessing
        images, labels = draw_samples(
            paths.DATA, "test", 40, seed=1, preprocessing=preprocessing, max_pixels=10**6
        )
        dataset = ImageDataset(paths.DATA, "test", cache_mb=0, max_pixels=10**6)
        encoded = [dataset.encoded(row) for row in range(12)]
    return Exported(root, checked, images, labels, encoded, [int(label) for label in dataset.labels[:12]])


@pytest.fixture(scope="session")
def session(exported: Exported) -> Session:
    return open_session(exported.package.path("fp32"), ["CPUExecutionProvider"], threads=1)


@pytest.fixture
def workspace(exported: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the exported workspace to change; also the current directory."""
    folder = tmp_path / "workspace"
    shutil.copytree(exported.root, folder)
    monkeypatch.chdir(folder)
    return folder
