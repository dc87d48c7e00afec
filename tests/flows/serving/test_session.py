"""Sessions run where they were asked to run, or not at all."""

from __future__ import annotations

import math
import os
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from serving_workspace import Exported

from flows import paths
from flows.classifiers import load_classifier
from flows.errors import ConfigError, DataError, ResourceError
from flows.serving import session as sessions
from flows.serving.session import CPU, Session, available_threads, open_session, working_providers


@pytest.mark.parametrize("batch", [1, 2, 7, 40])
def test_every_batch_size_is_exact(exported: Exported, session: Session, batch: int) -> None:
    """The graph was traced at batch 2; a size that leaked into it as a constant would show here."""
    model, _ = load_classifier(exported.root / paths.FINETUNE / "pretrained")
    images = exported.images[:batch]
    with torch.inference_mode():
        expected = model(torch.from_numpy(images)).numpy()
    np.testing.assert_allclose(session.run(images), expected, rtol=0, atol=5e-5)


def test_all_outputs_are_those_of_the_network_and_logits_stay_the_same(
    exported: Exported, session: Session
) -> None:
    model, _ = load_classifier(exported.root / paths.FINETUNE / "pretrained")
    answers = session.run_all(exported.images)
    assert list(answers) == ["logits", "features"]
    np.testing.assert_array_equal(answers["logits"], session.run(exported.images))
    with torch.inference_mode():
        features = model.features(torch.from_numpy(exported.images))
        np.testing.assert_allclose(answers["features"], features.numpy(), rtol=0, atol=5e-5)
        # the head on the features gives the logits: they are what it reads, not a copy of something else
        logits = model.head(torch.from_numpy(answers["features"])).numpy()
    np.testing.assert_allclose(logits, answers["logits"], rtol=0, atol=5e-5)


def test_an_image_does_not_depend_on_its_neighbours_even_in_int8(exported: Exported) -> None:
    quantized = open_session(exported.package.path("int8"), [CPU], threads=1)
    together = quantized.run(exported.images[:16])
    alone = np.concatenate([quantized.run(exported.images[i : i + 1]) for i in range(16)])
    np.testing.assert_allclose(alone, together, rtol=0, atol=1e-4)


def test_a_provider_that_is_not_installed_is_refused(exported: Exported) -> None:
    absent = next(
        p for p in onnxruntime.get_all_providers() if p not in onnxruntime.get_available_providers()
    )
    with pytest.raises(ResourceError, match=f"asked for execution provider {absent}"):
        open_session(exported.package.path("fp32"), [absent])


def test_a_provider_that_silently_falls_back_is_refused(
    exported: Exported, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What ONNX Runtime does when CUDA's libraries are missing: it lists the provider, then uses the CPU."""
    real = onnxruntime.InferenceSession
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider", CPU])
    monkeypatch.setattr(
        onnxruntime, "InferenceSession", lambda path, options, providers: real(path, options, providers=[CPU])
    )
    path = exported.package.path("fp32")
    with pytest.raises(ResourceError, match=f"asked for CUDAExecutionProvider, got {CPU}"):
        open_session(path, ["CUDAExecutionProvider"])
    assert open_session(path, "auto").providers == (CPU,)
    assert working_providers(path) == [CPU]


@pytest.mark.parametrize("providers", [["TPUExecutionProvider"], []])
def test_unknown_providers_are_a_configuration_error(exported: Exported, providers: list[str]) -> None:
    with pytest.raises(ConfigError, match="provider"):
        open_session(exported.package.path("fp32"), providers)


def test_auto_takes_a_provider_that_works(exported: Exported) -> None:
    path = exported.package.path("fp32")
    assert open_session(path).provider == working_providers(path)[0]


def test_files_that_are_not_models_are_refused(tmp_path: Path) -> None:
    (tmp_path / "text.onnx").write_text("no model")
    with pytest.raises(DataError, match="cannot load"):
        open_session(tmp_path / "text.onnx")
    with pytest.raises(DataError, match="does not exist"):
        open_session(tmp_path / "missing.onnx")


def test_other_shapes_and_types_are_refused(session: Session) -> None:
    size = session.image_shape[-1]
    for images in (
        np.zeros((1, 3, size, size)),
        np.zeros((3, size, size), dtype=np.float32),
        np.zeros((1, 3, size, size + 1), dtype=np.float32),
        np.zeros((0, 3, size, size), dtype=np.float32),
    ):
        with pytest.raises(ValueError, match="expected float32"):
            session.run(images)


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({"cpu.max": "150000 100000"}, 1.5),
        ({"cpu.max": "max 100000"}, math.inf),
        ({"cpu/cpu.cfs_quota_us": "300000", "cpu/cpu.cfs_period_us": "100000"}, 3.0),
        ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, math.inf),
        ({"cpu.max": "nonsense"}, math.inf),
        ({}, math.inf),
    ],
)
def test_the_containers_quota_is_read(tmp_path: Path, files: dict[str, str], cores: float) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert sessions._cgroup_cores(tmp_path) == cores


@pytest.mark.parametrize(("quota", "threads"), [(0.5, 1), (1.9, 1), (2.0, 2), (math.inf, 4)])
def test_threads_follow_affinity_and_quota(
    monkeypatch: pytest.MonkeyPatch, quota: float, threads: int
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2, 3}, raising=False)
    monkeypatch.setattr(sessions, "_cgroup_cores", lambda: quota)
    assert available_threads() == threads
