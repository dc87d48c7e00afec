"""The vision server's routes: conformance to the Open Inference Protocol, and every kind of bad input."""

from __future__ import annotations

import io
import json
import struct
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest.mock import ANY

import httpx
import numpy as np
import pytest
from fastapi.testclient import TestClient
from PIL import EpsImagePlugin, Image, PngImagePlugin
from served_digits import LIMITS, loaded
from serving_workspace import Exported

from flows.imaging import decode, preprocess
from flows.serving import bodies
from flows.serving.bodies import RequestError
from flows.serving.session import Session
from flows.serving.statistics import pixel_statistics
from flows.serving.traffic import TrafficRecorder, read_window, traffic_folder
from flows.serving.vision.app import create_app
from flows.serving.vision.model import softmax

INFER = "/v2/models/digits/infer"


@pytest.fixture(scope="module")
def client(exported: Exported, session: Session) -> Iterator[TestClient]:
    with TestClient(create_app(loaded(exported, session), LIMITS)) as client:
        yield client


def tensor(images: np.ndarray, **changes: Any) -> dict[str, Any]:
    """A request body; `changes` replace keys of its only input, and None removes them."""
    entry = {
        "name": "images",
        "shape": list(images.shape),
        "datatype": "FP32",
        "data": images.ravel().tolist(),
    }
    return {"inputs": [{key: value for key, value in (entry | changes).items() if value is not None}]}


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


def error_of(answer: httpx.Response, status: int) -> str:
    assert answer.status_code == status, answer.text
    body = answer.json()
    assert list(body) == ["error"]
    return str(body["error"])


# ---- Open Inference Protocol: metadata and health ----


def test_server_metadata(client: TestClient) -> None:
    assert client.get("/v2").json() == {
        "name": "trunkline-vision",
        "version": "2",
        "extensions": ["binary_tensor_data", "statistics", "model_configuration"],
    }


def test_health(client: TestClient) -> None:
    assert client.get("/v2/health/live").json() == {"live": True}
    assert client.get("/v2/health/ready").json() == {"ready": True}
    for path in ("/v2/models/digits/ready", "/v2/models/digits/versions/3/ready"):
        assert client.get(path).json() == {"name": "digits", "ready": True}


def test_a_stopping_server_is_alive_but_not_ready(client: TestClient) -> None:
    service = client.app.state.service  # type: ignore[attr-defined]
    service.draining = True
    try:
        assert client.get("/v2/health/live").status_code == 200
        assert client.get("/v2/health/ready").status_code == 503
        assert client.get("/v2/models/digits/ready").status_code == 503
        assert client.get("/healthz").json()["status"] == "stopping"
    finally:
        service.draining = False


@pytest.mark.parametrize("path", ["/v2/models/digits", "/v2/models/digits/versions/3"])
def test_model_metadata(client: TestClient, path: str) -> None:
    assert client.get(path).json() == {
        "name": "digits",
        "versions": ["3"],
        "platform": "onnxruntime_onnx",
        "inputs": [{"name": "images", "datatype": "FP32", "shape": [-1, 3, 16, 16]}],
        "outputs": [{"name": "logits", "datatype": "FP32", "shape": [-1, 10]}],
    }


@pytest.mark.parametrize("suffix", ["", "/ready", "/infer"])
@pytest.mark.parametrize("model", ["other", "digits/versions/2"])
def test_other_models_and_versions_are_unknown(client: TestClient, model: str, suffix: str) -> None:
    method = "POST" if suffix == "/infer" else "GET"
    assert "unknown" in error_of(client.request(method, f"/v2/models/{model}{suffix}"), 404)


def test_unknown_paths_and_methods_answer_in_the_same_form(client: TestClient) -> None:
    assert error_of(client.get("/v3"), 404)
    assert error_of(client.get(INFER), 405)


def test_healthz_says_exactly_what_is_served(client: TestClient, exported: Exported) -> None:
    manifest = exported.package.manifest
    assert client.get("/healthz").json() == {
        "status": "ok",
        "model": "digits",
        "version": "3",
        "variant": "fp32",
        "digest": manifest.variants["fp32"].digest,
        "digests": {name: variant.digest for name, variant in manifest.variants.items()},
        "data_digest": manifest.data_digest,
        "git_commit": "c0ffee",
        "providers": ["CPUExecutionProvider"],
        "threads": 1,
        "max_batch": 8,
        "max_wait_ms": 2.0,
        "placement": None,
        "loaded": ANY,
        "rollout": {"candidate": None, "state": "fixed", "reason": "", "since": ANY},
    }


# ---- Open Inference Protocol: inference ----


@pytest.mark.parametrize("batch", [1, 2, 7])
@pytest.mark.parametrize("nested", [False, True])
def test_json_tensors(
    client: TestClient, exported: Exported, session: Session, batch: int, nested: bool
) -> None:
    images = exported.images[:batch]
    body = tensor(images, data=images.tolist()) if nested else tensor(images)
    answer = client.post(INFER, json=body).json()
    assert (answer["model_name"], answer["model_version"]) == ("digits", "3")
    assert "id" not in answer
    (output,) = answer["outputs"]
    assert (output["name"], output["datatype"], output["shape"]) == ("logits", "FP32", [batch, 10])
    got = np.asarray(output["data"], dtype=np.float32).reshape(batch, 10)
    np.testing.assert_array_equal(got, session.run(images))  # JSON loses no digit


def test_the_id_is_echoed_and_the_version_path_works(client: TestClient, exported: Exported) -> None:
    body = tensor(exported.images[:1]) | {"id": "request 42", "outputs": [{"name": "logits"}]}
    answer = client.post("/v2/models/digits/versions/3/infer", json=body).json()
    assert answer["id"] == "request 42"


def test_integers_are_numbers(client: TestClient, exported: Exported, session: Session) -> None:
    images = np.ones((1, 3, 16, 16), dtype=np.float32)
    answer = client.post(INFER, json=tensor(images, data=[1] * images.size)).json()
    np.testing.assert_array_equal(
        np.asarray(answer["outputs"][0]["data"], dtype=np.float32), session.run(images)[0]
    )


def binary_body(images: np.ndarray, **top: Any) -> tuple[bytes, dict[str, str]]:
    raw = images.astype("<f4").tobytes()
    header = json.dumps(tensor(images, data=None, parameters={"binary_data_size": len(raw)}) | top).encode()
    return header + raw, {"Inference-Header-Content-Length": str(len(header))}


@pytest.mark.parametrize(
    "top",
    [
        {"parameters": {"binary_data_output": True}},
        {"outputs": [{"name": "logits", "parameters": {"binary_data": True}}]},
    ],
)
def test_binary_tensors_both_ways(
    client: TestClient, exported: Exported, session: Session, top: dict[str, Any]
) -> None:
    images = exported.images[:3]
    content, headers = binary_body(images, **top)
    answer = client.post(INFER, content=content, headers=headers)
    length = int(answer.headers["Inference-Header-Content-Length"])
    (output,) = json.loads(answer.content[:length])["outputs"]
    assert output["parameters"] == {"binary_data_size": 3 * 10 * 4}
    assert "data" not in output
    got = np.frombuffer(answer.content[length:], dtype="<f4").reshape(output["shape"])
    np.testing.assert_array_equal(got, session.run(images))


def test_binary_in_and_json_out(client: TestClient, exported: Exported, session: Session) -> None:
    top = {"parameters": {"binary_data_output": True},
           "outputs": [{"name": "logits", "parameters": {"binary_data": False}}]}  # fmt: skip
    content, headers = binary_body(exported.images[:1], **top)
    (output,) = client.post(INFER, content=content, headers=headers).json()["outputs"]
    np.testing.assert_array_equal(
        np.asarray(output["data"], dtype=np.float32), session.run(exported.images[:1])[0]
    )


ONE = np.zeros((1, 3, 16, 16), dtype=np.float32)


def with_value(value: float) -> list[float]:
    return [value] + [0.0] * (ONE.size - 1)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("not json", "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
        ([1], "must be a JSON object"),
        ({}, "inputs must be a list with one tensor"),
        ({"inputs": []}, "one tensor"),
        ({"inputs": [7]}, "one tensor"),
        ({"inputs": tensor(ONE)["inputs"] * 2}, "one tensor"),
        (tensor(ONE) | {"surprise": 1}, "unknown key 'surprise'"),
        (tensor(ONE) | {"id": 7}, "id must be a string"),
        (tensor(ONE) | {"parameters": []}, "must be an object"),
        (tensor(ONE) | {"parameters": {"sequence_id": 1}}, "'sequence_id' of the request is not supported"),
        (tensor(ONE) | {"parameters": {"binary_data_output": 1}}, "must be true or false"),
        (tensor(ONE, name="pixels"), "must be named 'images', got 'pixels'"),
        (tensor(ONE, name=None), "must be named 'images'"),
        (tensor(ONE, extra=1), "unknown key 'extra'"),
        (tensor(ONE, parameters={"content_type": "np"}), "parameter 'content_type' of tensor 'images'"),
        (tensor(ONE, datatype="FP64"), "datatype of 'images' must be FP32, got 'FP64'"),
        (tensor(ONE, datatype=None), "datatype"),
        (tensor(ONE, shape="1,3,16,16"), "list of integers"),
        (tensor(ONE, shape=[1.0, 3, 16, 16]), "list of integers"),
        (tensor(ONE, shape=[True, 3, 16, 16]), "list of integers"),
        (tensor(ONE, shape=[3, 16, 16]), r"must be [n, 3, 16, 16], got [3, 16, 16]"),
        (tensor(ONE, shape=[1, 3, 16, 17]), "must be [n, 3, 16, 16]"),
        (tensor(ONE, shape=[0, 3, 16, 16], data=[]), "from 1 to 8, got 0"),
        (tensor(ONE, shape=[-1, 3, 16, 16]), "from 1 to 8, got -1"),
        (tensor(ONE, shape=[9, 3, 16, 16]), "from 1 to 8, got 9"),
        (tensor(ONE, shape=[10**15, 3, 16, 16]), "from 1 to 8"),
        (tensor(ONE, shape=[10**30, 3, 16, 16]), "list of integers"),
        (tensor(ONE, data=None), "must be a list of numbers"),
        (tensor(ONE, data="0" * ONE.size), "must be a list of numbers"),
        (tensor(ONE, data=[0.0] * 5), "has 5 values, its shape [1, 3, 16, 16] needs 768"),
        (tensor(ONE, data=[[0.0] * 384] * 2), "nested shape [2, 384]"),
        (tensor(ONE, data=[[0.0], [0.0, 1.0]]), "nested unevenly"),
        (tensor(ONE, data=["0"] * ONE.size), "numbers only"),
        (tensor(ONE, data=[True] * ONE.size), "numbers only"),
        (tensor(ONE, data=[None] * ONE.size), "numbers only"),
        (tensor(ONE, data=[10**400] + [0] * (ONE.size - 1)), "numbers only"),
        (tensor(ONE, data=with_value(float("nan"))), "NaN is not a finite number"),
        (tensor(ONE, data=with_value(float("inf"))), "Infinity is not a finite number"),
        (tensor(ONE, data=with_value(float("-inf"))), "-Infinity is not a finite number"),
        (tensor(ONE, data=with_value(1e39)), "not finite in FP32"),
        (json.dumps(tensor(ONE)).replace("0.0", "1e999", 1), "not finite in FP32"),
        (tensor(ONE) | {"outputs": "logits"}, "outputs must be a list"),
        (tensor(ONE) | {"outputs": [{"name": "boxes"}]}, "one output, 'logits'; asked for 'boxes'"),
        (
            tensor(ONE) | {"outputs": [{"name": "logits", "parameters": {"classification": 3}}]},
            "'classification' of output 'logits' is not supported",
        ),
        (tensor(ONE, data=None, parameters={"binary_data_size": 3072}), "Content-Length is missing"),
    ],
)
def test_bad_tensors_are_refused(client: TestClient, body: Any, message: str) -> None:
    content = body if isinstance(body, str) else json.dumps(body)
    assert message in error_of(client.post(INFER, content=content), 400)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content, length: (content, "x"), "must be a number"),
        (lambda content, length: (content, "-1"), "must be a number"),
        (lambda content, length: (content, str(len(content) + 1)), "must be a number"),
        (lambda content, length: (content, "0"), "not valid JSON"),
        (lambda content, length: (content[:-4], str(length)), "tensor 'images' needs 3072"),
        (lambda content, length: (content + b"more", str(length)), "tensor 'images' needs 3072"),
        (lambda content, length: (content.replace(b"3072", b"3068"), str(length)), "must be 3072 for shape"),
        (
            lambda content, length: (content[:-4] + struct.pack("<f", float("nan")), str(length)),
            "not finite in FP32",
        ),
    ],
)
def test_bad_binary_tensors_are_refused(
    client: TestClient, change: Callable[[bytes, int], tuple[bytes, str]], message: str
) -> None:
    content, headers = binary_body(ONE)
    content, length = change(content, int(headers["Inference-Header-Content-Length"]))
    answer = client.post(INFER, content=content, headers={"Inference-Header-Content-Length": length})
    assert message in error_of(answer, 400)


def test_both_kinds_of_data_at_once_are_refused(client: TestClient) -> None:
    header = json.dumps(tensor(ONE, parameters={"binary_data_size": 3072})).encode()
    headers = {"Inference-Header-Content-Length": str(len(header))}
    answer = client.post(INFER, content=header + ONE.tobytes(), headers=headers)
    assert "both data and binary_data_size" in error_of(answer, 400)
    header = json.dumps(tensor(ONE)).encode()
    headers = {"Inference-Header-Content-Length": str(len(header))}
    answer = client.post(INFER, content=header + b"rest", headers=headers)
    assert "has no binary_data_size" in error_of(answer, 400)


# ---- classification of image files ----


def test_real_digits_are_classified_as_evaluated(
    client: TestClient, exported: Exported, session: Session
) -> None:
    right = 0
    manifest = exported.package.manifest
    for data, label in zip(exported.encoded, exported.encoded_labels, strict=True):
        answer = client.post("/v1/classify", files={"file": ("digit.png", data, "image/png")}).json()
        expected = softmax(
            session.run(preprocess(decode(data, max_pixels=10**6), manifest.preprocessing)[None])[0]
        )
        assert answer["index"] == expected.argmax()
        assert answer["label"] == manifest.labels[answer["index"]]
        assert answer["confidence"] == pytest.approx(expected.max(), abs=1e-12)
        assert [entry["index"] for entry in answer["top"]] == np.argsort(-expected)[:5].tolist()
        assert answer["model"] == {
            "name": "digits", "version": "3", "variant": "fp32", "digest": manifest.variants["fp32"].digest,
        }  # fmt: skip
        right += answer["index"] == label
    assert right >= 9  # of 12


@pytest.mark.parametrize("content_type", ["image/png", "application/octet-stream", None,
                                          "application/x-www-form-urlencoded"])  # fmt: skip
def test_a_bare_image_is_enough(client: TestClient, exported: Exported, content_type: str | None) -> None:
    data = exported.encoded[0]
    form = client.post("/v1/classify", files={"file": data}).json()
    headers = {"Content-Type": content_type} if content_type else {}
    assert client.post("/v1/classify", content=data, headers=headers).json() == form


def test_large_photos_are_resized_and_other_formats_work(client: TestClient, exported: Exported) -> None:
    digit = Image.open(io.BytesIO(exported.encoded[0]))
    expected = client.post("/v1/classify", content=exported.encoded[0]).json()["index"]
    buffer = io.BytesIO()
    digit.resize((160, 160), Image.Resampling.BICUBIC).convert("CMYK").save(buffer, format="JPEG", quality=95)
    assert client.post("/v1/classify", content=buffer.getvalue()).json()["index"] == expected


def test_a_damaged_form_is_refused(client: TestClient, exported: Exported) -> None:
    data = exported.encoded[0]
    assert "no file field named `file`" in error_of(client.post("/v1/classify", files={"image": data}), 400)
    boundary = {"Content-Type": "multipart/form-data; boundary=b"}
    field = b'--b\r\nContent-Disposition: form-data; name="file"\r\n\r\nabc\r\n--b--\r\n'
    assert "no file field" in error_of(client.post("/v1/classify", content=field, headers=boundary), 400)
    for content in (b"no parts here", b"--b\r\nbroken"):
        answer = client.post("/v1/classify", content=content, headers=boundary)
        assert error_of(answer, 400), content
    answer = client.post("/v1/classify", content=field, headers={"Content-Type": "multipart/form-data"})
    assert "cannot be read" in error_of(answer, 400)
    two = [("file", ("a.png", data)), ("file", ("b.png", data))]
    assert "Too many files" in error_of(client.post("/v1/classify", files=two), 400)


def test_other_content_types_are_refused(client: TestClient) -> None:
    assert "file field `file`" in error_of(client.post("/v1/classify", json={"file": "x"}), 415)
    text = client.post("/v1/classify", content=b"this is not an image", headers={"Content-Type": "image/png"})
    assert "not an image" in error_of(text, 415)


def test_postscript_reaches_no_interpreter(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *_, **__: pytest.fail("was interpreted"))
    program = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n%%EOF\n"
    assert Image.open(io.BytesIO(program)).format == "EPS"  # Pillow would take it
    assert "not an image" in error_of(client.post("/v1/classify", content=program), 415)


def test_truncated_and_empty_images_are_refused(client: TestClient, exported: Exported) -> None:
    whole = png(Image.effect_noise((64, 64), 80))
    assert "not a readable image" in error_of(
        client.post("/v1/classify", content=whole[: len(whole) // 2]), 422
    )
    assert "empty" in error_of(client.post("/v1/classify", content=b""), 422)


def bomb(width: int, height: int) -> bytes:
    """A PNG header that promises this many pixels, with next to no data."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b""))
        + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("size", [(50_000, 50_000), (201, 200), (2**31 - 1, 2**31 - 1)])
def test_bombs_are_refused_before_decoding(
    client: TestClient, monkeypatch: pytest.MonkeyPatch, size: tuple[int, int]
) -> None:
    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", lambda self: pytest.fail("was decoded"))
    answer = client.post("/v1/classify", content=bomb(*size))
    assert "limit" in error_of(answer, 422)  # ours, or beyond 179 million pixels already Pillow's own


def test_a_strip_that_would_grow_when_resized_is_refused(client: TestClient) -> None:
    assert "differ too much" in error_of(
        client.post("/v1/classify", content=png(Image.new("L", (1, 2000)))), 422
    )
    assert client.post("/v1/classify", content=png(Image.new("L", (1, 100)))).status_code == 200


# ---- limits and concurrency ----


@pytest.mark.parametrize("path", [INFER, "/v1/classify"])
def test_large_bodies_are_refused_while_they_stream(client: TestClient, path: str) -> None:
    def endless() -> Iterator[bytes]:
        for _ in range(100):
            yield b"x" * 50_000

    announced = client.post(path, content=b"x" * 200_001)
    assert "larger than the limit of 200000 bytes" in error_of(announced, 413)
    assert announced.headers["Connection"] == "close"
    expecting = client.post(path, content=b"x" * 200_001, headers={"Expect": "100-continue"})
    assert "larger than the limit" in error_of(expecting, 413)
    assert error_of(client.post(path, content=b"x", headers={"Content-Length": "-5"}), 400)
    streamed = client.post(path, content=endless())  # chunked: no Content-Length to go by
    assert "larger than the limit" in error_of(streamed, 413)


def test_a_body_that_never_ends_times_out(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    async def receive() -> dict[str, Any]:
        import asyncio

        await asyncio.sleep(3600)
        raise AssertionError

    async def ask() -> None:
        from starlette.requests import Request

        scope = {"type": "http", "headers": [], "method": "POST", "path": "/"}
        with pytest.raises(RequestError) as caught:
            await bodies.read_body(Request(scope, receive), 100)
        assert caught.value.status == 408

    import anyio

    monkeypatch.setattr(bodies, "BODY_TIMEOUT_S", 0.01)
    anyio.run(ask)


def test_too_many_requests_at_once_are_turned_away(
    client: TestClient, exported: Exported, monkeypatch: pytest.MonkeyPatch
) -> None:
    service = client.app.state.service  # type: ignore[attr-defined]
    monkeypatch.setattr(service, "in_flight", service.limits.max_requests)
    answer = client.post("/v1/classify", content=exported.encoded[0])
    assert "try again" in error_of(answer, 429)
    assert int(answer.headers["Retry-After"]) >= 1
    assert client.get("/v2/health/ready").status_code == 200  # health is answered under load
    monkeypatch.undo()
    assert client.post("/v1/classify", content=exported.encoded[0]).status_code == 200


def test_a_refused_request_gives_its_place_back(client: TestClient, exported: Exported) -> None:
    service = client.app.state.service  # type: ignore[attr-defined]
    for content in (b"", b"x", b"x" * 300_000):
        assert client.post("/v1/classify", content=content).status_code >= 400
    assert (service.in_flight, service.batcher.approaching) == (0, 0)


def test_parallel_requests_get_the_answers_of_sequential_ones(client: TestClient, exported: Exported) -> None:
    """Batched with strangers: the same rows for the right request, within what parity allows."""
    bodies = [tensor(exported.images[i : i + 1 + i % 3]) | {"id": str(i)} for i in range(24)]
    sequential = [client.post(INFER, json=body).json() for body in bodies]
    with ThreadPoolExecutor(8) as pool:
        parallel = list(pool.map(lambda body: client.post(INFER, json=body).json(), bodies))
        classified = list(
            pool.map(lambda data: client.post("/v1/classify", content=data).json(), exported.encoded * 2)
        )
    for mine, alone in zip(parallel, sequential, strict=True):
        assert mine["id"] == alone["id"]
        (got,), (expected,) = mine["outputs"], alone["outputs"]
        assert got["shape"] == expected["shape"]
        np.testing.assert_allclose(got["data"], expected["data"], rtol=0, atol=1e-5)
    assert [answer["index"] for answer in classified[:12]] == [answer["index"] for answer in classified[12:]]


def test_a_bug_is_answered_without_its_details(
    exported: Exported, session: Session, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(images: np.ndarray) -> np.ndarray:
        raise RuntimeError("secret detail")

    monkeypatch.setattr(session, "run_all", broken)
    with TestClient(create_app(loaded(exported, session), LIMITS)) as client:
        message = error_of(client.post("/v1/classify", content=exported.encoded[0]), 500)
    assert "secret" not in message
    assert "secret detail" in caplog.text


def test_traffic_of_both_routes_is_recorded_by_the_model_that_answered(
    exported: Exported, session: Session, tmp_path: Path
) -> None:
    """What the monitor reads: images as the network saw them, statuses of inference requests only."""
    settings = exported.params.monitor.model_copy(update={"max_images_per_s": 1e6})
    recorder = TrafficRecorder(tmp_path, settings, lambda name, version: exported.package)
    app = create_app(
        loaded(exported, session), LIMITS, on_batch=recorder.on_batch, on_request=recorder.on_request
    )
    with TestClient(app) as client:
        for data in exported.encoded:
            assert client.post("/v1/classify", content=data).status_code == 200
        assert client.post(INFER, json=tensor(exported.images[:5])).status_code == 200
        assert client.post("/v1/classify", content=b"no image").status_code == 415
        assert client.post("/v2/models/other/infer", json={}).status_code == 404
        client.get("/healthz")
    recorder.close()

    package = exported.package
    assert package.manifest.reference is not None
    digest = package.variant("fp32").digest
    window = read_window(
        traffic_folder(tmp_path, "digits", "3", digest), 0, 1e12, package.manifest.reference.sha256
    )
    assert window.images == len(exported.encoded) + 5
    assert window.statuses == {200: len(exported.encoded) + 1, 415: 1, 404: 1}
    assert 0 < window.latency_ms(0.5) < 60_000
    assert window.records is not None
    preprocessing = package.manifest.preprocessing
    images = np.stack(
        [preprocess(decode(data, max_pixels=10**6), preprocessing) for data in exported.encoded]
    )
    served = window.records.pixels[: len(images)]
    np.testing.assert_allclose(served, pixel_statistics(images), rtol=1e-5, atol=1e-6)
    assert window.records.predicted.tolist()[-5:] == session.run(exported.images[:5]).argmax(axis=1).tolist()
