"""The real server process: its port, its start, a classification over the network, its end."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from serving_workspace import ROOT, Exported

from flows import paths
from flows.errors import ConfigError, DataError, ResourceError
from flows.serving.listening import listening_socket
from flows.serving.vision import server
from flows.serving.vision.server import serve

PROGRAM = """
import sys
from pathlib import Path
from flows import params
from flows.errors import TrunklineError
from flows.serving.vision.server import serve
changes = {"port": int(sys.argv[1]), "variant": sys.argv[2], "threads": 1}
settings = params.load().serve.model_copy(update=changes)
try:
    serve(Path("artifacts/export"), settings, version="5", git_commit="c0ffee", max_pixels=10**6)
except TrunklineError as error:
    print(f"error: {error}", file=sys.stderr)
    raise SystemExit(error.exit_code)
"""


def start(folder: Path, port: int, variant: str = "fp32") -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(port), variant],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@contextmanager
def running(folder: Path, variant: str) -> Iterator[tuple[subprocess.Popen[str], str, str]]:
    """The process, its first line and its address."""
    process = start(folder, 0, variant)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        address = re.search(r"http://[\d.:]+", line)
        assert address, (line, process.stderr.read() if process.stderr and process.poll() else "")
        yield process, line, address.group()
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("variant", ["fp32", "int8"])
def test_a_process_serves_a_real_digit_and_stops_on_request(exported: Exported, variant: str) -> None:
    digest = exported.package.variant(variant).digest
    with running(exported.root, variant) as (process, line, address):
        assert f"serving trunkline-vision-digits version 5 ({variant} on CPUExecutionProvider" in line
        with httpx.Client(base_url=address) as client:
            assert client.get("/v2/health/ready").json() == {"ready": True}
            health = client.get("/healthz").json()
            assert (health["digest"], health["git_commit"]) == (digest, "c0ffee")
            file = {"file": ("digit.png", exported.encoded[1], "image/png")}
            answer = client.post("/v1/classify", files=file).json()
            assert answer["label"] in "0123456789"
            assert answer["model"]["digest"] == digest
            too_large = client.post("/v1/classify", content=b"x" * (17 * 1024 * 1024))
            assert too_large.status_code == 413
            assert client.get("/v2/health/live").status_code == 200
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=30)
    assert (process.returncode, errors) == (0, "")


def test_an_occupied_port_is_one_clear_line(exported: Exported) -> None:
    with socket.create_server(("127.0.0.1", 0)) as holder:
        port = holder.getsockname()[1]
        process = start(exported.root, port)
        output, errors = process.communicate(timeout=60)
    assert process.returncode == 74
    assert output == ""
    assert errors == (
        f"error: port {port} on 127.0.0.1 is already in use; choose another one with serve.port or stop the "
        "program that holds it\n"
    )


def test_the_port_is_claimed_before_the_model_is_read(
    exported: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "load_model", None)
    with socket.create_server(("127.0.0.1", 0)) as holder:
        settings = exported.params.serve.model_copy(update={"port": holder.getsockname()[1]})
        with pytest.raises(ResourceError, match="already in use"):
            serve(tmp_path, settings, version="1", git_commit="c0ffee", max_pixels=10**6)


def test_a_damaged_package_frees_the_port_again(workspace: Path, exported: Exported) -> None:
    (paths.EXPORT / "model.onnx").write_bytes(b"")
    settings = exported.params.serve.model_copy(update={"port": free_port()})
    with pytest.raises(DataError, match="was changed after its export"):
        serve(paths.EXPORT, settings, version="1", git_commit="c0ffee", max_pixels=10**6)
    with listening_socket("127.0.0.1", settings.port, "serve"):
        pass


def test_another_model_than_the_registrys_is_refused(exported: Exported) -> None:
    settings = exported.params.serve.model_copy(update={"port": 0})
    with pytest.raises(DataError, match="as recorded"):
        serve(
            exported.root / paths.EXPORT, settings, version="1", git_commit="c", max_pixels=1, digest="0" * 64
        )


def test_a_missing_provider_refuses_to_start(exported: Exported) -> None:
    settings = exported.params.serve.model_copy(update={"port": 0, "providers": ["CUDAExecutionProvider"]})
    import onnxruntime

    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this ONNX Runtime has CUDA")
    with pytest.raises(ResourceError, match="asked for execution provider CUDAExecutionProvider"):
        serve(exported.root / paths.EXPORT, settings, version="1", git_commit="c", max_pixels=10**6)


@pytest.mark.parametrize("host", ["not a host", "203.0.113.7"])
def test_a_wrong_host_is_a_configuration_error(host: str) -> None:
    with pytest.raises(ConfigError, match=r"serve\.host"), listening_socket(host, 0, "serve"):
        pass


def test_clients_wait_while_the_model_loads() -> None:
    with (
        listening_socket("127.0.0.1", 0, "serve") as listener,
        socket.create_connection(listener.getsockname()) as early,
    ):
        accepted, _ = listener.accept()
        with accepted:
            accepted.sendall(b"late but here")
        assert early.recv(100) == b"late but here"


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])
