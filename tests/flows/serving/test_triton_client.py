"""NVIDIA's official HTTP client, unmodified, against a real server process."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator

import numpy as np
import pytest
from serving_workspace import ROOT, Exported
from test_vision_server import PROGRAM

from flows.serving.session import Session

httpclient = pytest.importorskip("tritonclient.http", reason="tritonclient[http] is not installed")
from tritonclient.utils import InferenceServerException  # noqa: E402

NAME = "trunkline-vision-digits"


@pytest.fixture(scope="module")
def client(exported: Exported) -> Iterator[object]:
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, "0", "fp32"],
        cwd=exported.root,
        env={"PYTHONPATH": str(ROOT), "PATH": ""},
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        found = re.search(r"http://([\d.:]+)", process.stdout.readline())
        assert found
        with httpclient.InferenceServerClient(found.group(1), concurrency=4) as client:
            yield client
    finally:
        process.terminate()
        process.communicate(timeout=60)


def inputs(images: np.ndarray, binary: bool) -> list[object]:
    tensor = httpclient.InferInput("images", list(images.shape), "FP32")
    tensor.set_data_from_numpy(images, binary_data=binary)
    return [tensor]


def test_health_and_metadata(client: object) -> None:
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready(NAME)
    assert client.is_model_ready(NAME, "5")
    assert not client.is_model_ready("other")
    assert client.get_server_metadata()["name"] == "trunkline-vision"
    metadata = client.get_model_metadata(NAME)
    assert metadata["inputs"] == [{"name": "images", "datatype": "FP32", "shape": [-1, 3, 16, 16]}]
    assert client.get_model_config(NAME)["max_batch_size"] >= 1


@pytest.mark.parametrize("binary_in", [False, True])
@pytest.mark.parametrize("binary_out", [False, True, None])
def test_infer(
    client: object, exported: Exported, session: Session, binary_in: bool, binary_out: bool | None
) -> None:
    images = exported.images[:3]
    outputs = None
    if binary_out is not None:
        outputs = [httpclient.InferRequestedOutput("logits", binary_data=binary_out)]
    answer = client.infer(NAME, inputs(images, binary_in), outputs=outputs, request_id="7", timeout=10**7)
    np.testing.assert_allclose(answer.as_numpy("logits"), session.run(images), rtol=0, atol=1e-5)
    assert answer.get_response()["id"] == "7"
    assert answer.get_response()["model_version"] == "5"


def test_asynchronous_requests_are_all_answered(client: object, exported: Exported, session: Session) -> None:
    waiting = [client.async_infer(NAME, inputs(exported.images[i : i + 2], True)) for i in range(12)]
    for i, request in enumerate(waiting):
        expected = session.run(exported.images[i : i + 2])
        np.testing.assert_allclose(request.get_result().as_numpy("logits"), expected, rtol=0, atol=1e-5)


def test_statistics(client: object, exported: Exported) -> None:
    before = client.get_inference_statistics(NAME)["model_stats"][0]
    client.infer(NAME, inputs(exported.images[:4], True))
    after = client.get_inference_statistics()["model_stats"][0]
    assert after["inference_count"] == before["inference_count"] + 4
    assert after["execution_count"] == before["execution_count"] + 1
    assert after["inference_stats"]["success"]["count"] == before["inference_stats"]["success"]["count"] + 1
    assert after["inference_stats"]["compute_infer"]["ns"] > before["inference_stats"]["compute_infer"]["ns"]


def test_mistakes_become_its_exceptions(client: object, exported: Exported) -> None:
    with pytest.raises(InferenceServerException, match="unknown model 'other'"):
        client.infer("other", inputs(exported.images[:1], True))
    with pytest.raises(InferenceServerException, match="unknown version '9'"):
        client.infer(NAME, inputs(exported.images[:1], True), model_version="9")
    with pytest.raises(InferenceServerException, match=r"must be \[n, 3, 16, 16\]"):
        client.infer(NAME, inputs(exported.images[:1, :, :8], True))
    with pytest.raises(InferenceServerException, match="asked for 'boxes'"):
        client.infer(
            NAME, inputs(exported.images[:1], True), outputs=[httpclient.InferRequestedOutput("boxes")]
        )
    with pytest.raises(InferenceServerException, match="Content-Encoding 'gzip' is not supported"):
        client.infer(NAME, inputs(exported.images[:1], True), request_compression_algorithm="gzip")
