"""`trunkline serve language` as its user meets it: settings from everywhere, mistakes found before anything
starts, and one real service."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import yaml

from flows import cli, lamina
from flows.errors import ConfigError, DataError, ResourceError
from flows.lamina import Registered, check_division, read_settings, serve_language, settings_of
from flows.serving.lamina.cluster.cluster_file import read_cluster_file

ROOT = Path(__file__).resolve().parents[2]
GROUP = {"kv_mb": 64}


@pytest.fixture
def workspace(in_folder: Path, raw_params: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> Path:
    raw_params["lamina"]["http"]["port"] = 0
    (in_folder / "params.yaml").write_text(yaml.safe_dump(raw_params))
    for name in list(os.environ):
        if name.startswith(lamina.ENVIRONMENT):
            monkeypatch.delenv(name)
    return in_folder


def cluster_file(folder: Path, **values: Any) -> Path:
    path = folder / "cluster.yaml"
    path.write_text(yaml.safe_dump({"address": "local", "workers": [GROUP], **values}))
    return path


def test_flags_count_more_than_set_than_the_environment_than_the_file(
    workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LAMINA__KV__MB_PER_WORKER", "11")
    monkeypatch.setenv("LAMINA__HTTP__PORT", "12")
    monkeypatch.setenv("LAMINA__CLUSTER__SPARES", "3")
    found = read_settings(["lamina.http.port=13", "lamina.cluster.spares=4"], {"cluster.spares": 5}).lamina
    assert (found.kv.mb_per_worker, found.http.port, found.cluster.spares) == (11, 13, 5)


@pytest.mark.parametrize(
    ("environment", "change", "flags", "message"),
    [
        ({"LAMINA__KV__PAGES": "1"}, [], {}, r"LAMINA__KV__PAGES: unknown key `lamina\.kv\.pages`"),
        ({}, ["lamina.kv.pages=1"], {}, r"--set lamina\.kv\.pages=1: unknown key"),
        ({}, ["lamina.kv.mb_per_worker=many"], {}, r"lamina\.kv\.mb_per_worker.*found 'many'"),
        ({}, ["lamina.kv"], {}, "key=value"),
        ({}, [], {"cluster.partition": "thirds"}, r"lamina\.cluster\.partition.*'thirds'"),
        ({}, [], {"cluster.attention_workers": 65}, r"lamina\.cluster\.attention_workers.*65"),
    ],
)
def test_a_wrong_setting_is_named_with_its_origin(
    environment: dict[str, str],
    change: list[str],
    flags: dict[str, Any],
    message: str,
    workspace: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=message):
        read_settings(change, flags)


def test_the_port_is_looked_at_before_the_bundle_and_the_bundle_before_any_process(
    workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lamina, "run_folder", lambda: pytest.fail("a process would have been started"))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ResourceError, match=rf"port {port} .* lamina\.http\.port"):
            serve_language(workspace / "nowhere", [], {"http.port": port})
    with pytest.raises(DataError, match="is not an exported language model"):
        serve_language(workspace / "nowhere", [], {})


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"cluster.attention_workers": 5}, "4 heads .* cannot be shared among 5"),
        ({"cluster.attention_workers": 0, "cluster.spares": 1}, "no attention workers that spares"),
        ({"cluster.weights": [1.0, 2.0, 3.0]}, "3 entries for 2 attention workers"),
        ({"kv.redundancy": "parity", "cluster.partition": "request"}, "parity needs attention workers"),
        ({"kv.mb_per_worker": 1}, r"lamina\.kv\.mb_per_worker: .* less than one block"),
        (
            {"kv.mb_per_worker": 1, "cluster.attention_workers": 0, "cluster.partition": "sequence"},
            "one block",
        ),
    ],
)
def test_a_model_that_does_not_divide_is_refused(
    flags: dict[str, Any], message: str, workspace: Path
) -> None:
    bundle: Any = SimpleNamespace(manifest=SimpleNamespace(kv_heads=4, layers=5, head_size=64))
    with pytest.raises(ConfigError, match=message):
        check_division(read_settings([], flags).lamina, bundle)
    check_division(
        read_settings([], {"cluster.attention_workers": 5, "cluster.partition": "request"}).lamina, bundle
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("lamina.kv.mb_per_worker=100000000", "for 2 processes is more than the [0-9]+ MB"),
        ("lamina.http.api_key_file=nowhere", "'nowhere' cannot be read"),
    ],
)
def test_what_can_be_known_before_anything_starts_is_an_error_then(
    change: str, message: str, workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lamina, "listening_socket", lambda *_: pytest.fail("it would have gone on"))
    with pytest.raises(ConfigError, match=message):
        serve_language(workspace / "nowhere", [change], {})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"adress": "x"}, "unknown key `adress`"),
        ({"address": "somewhere"}, "`address`"),
        ({"workers": []}, "`workers`"),
        ({"workers": [{"count": 2}]}, "missing key `workers.0.kv_mb`"),
        ({"workers": [{**GROUP, "device": "cuda"}]}, "needs gpus"),
        ({"workers": [{**GROUP, "cpus": 0.0}]}, "reserve something"),
        ({"workers": [{**GROUP, "weight": 2.0}, GROUP]}, "for all groups of workers or for none"),
        ({"ports": [20, 10]}, "from low to high"),
        ({"workers": [{**GROUP, "kv_mb": "64"}]}, "kv_mb"),
    ],
)
def test_a_wrong_cluster_file_is_named_with_its_key(
    values: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        read_cluster_file(cluster_file(tmp_path, **values))


def test_the_cluster_file_says_how_many_workers_there_are_and_what_each_takes(workspace: Path) -> None:
    groups = [{"count": 2, "kv_mb": 64, "weight": 3.0}, {"kv_mb": 32, "weight": 1.0}]
    file = read_cluster_file(cluster_file(workspace, workers=groups))

    def found(**flags: Any) -> dict[str, Any]:
        given = {name.replace("__", "."): value for name, value in flags.items()}
        return settings_of(file, given, read_settings([], given).lamina)

    assert found() == {
        "cluster.attention_workers": 3, "kv.mb_per_worker": 32, "cluster.weights": [3.0, 3.0, 1.0],
    }  # fmt: skip
    assert found(cluster__spares=1)["cluster.weights"] == [3.0, 3.0]
    assert found(cluster__spares=1, kv__redundancy="parity")["cluster.attention_workers"] == 1
    with pytest.raises(ConfigError, match="nobody is left to attend"):
        found(cluster__spares=3)
    with pytest.raises(ConfigError, match="exclude each other"):
        found(cluster__attention_workers=1)


def test_a_registered_model_is_fetched_by_name(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def fetch_bundle(checked: Any, model: str, alias: str, version: str) -> Any:
        asked.append((model, alias, version))
        return SimpleNamespace(folder=workspace / "fetched")

    registry = SimpleNamespace(fetch_bundle=fetch_bundle)
    monkeypatch.setitem(sys.modules, "flows.language_registry", registry)
    with pytest.raises(DataError, match="fetched is not an exported"):
        serve_language(Registered("stories", "champion", ""), [], {})
    assert asked == [("stories", "champion", "")]


@pytest.mark.parametrize("arguments", [[], ["somewhere", "--model", "stories"]])
def test_either_a_bundle_or_a_model(
    arguments: list[str], workspace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["trunkline", "serve", "language", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == ConfigError.exit_code
    assert "--model with the name" in capsys.readouterr().err


# --- the command, with a worker and an HTTP server that are real and an engine that is not


def serve(folder: Path, engine: str, bundle: Path, workers: int) -> subprocess.Popen[str]:
    script = ROOT / "tests" / "flows" / "serving" / "lamina" / "cluster" / "served.py"
    command = [sys.executable, str(script), engine, "serve", "language", str(bundle), "--port", "0"]
    return subprocess.Popen(
        [*command, "--attention-workers", str(workers), "--set", "lamina.kv.mb_per_worker=16"],
        cwd=folder,
        env={**os.environ, "TMPDIR": str(folder), "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def write_tokenizer(folder: Path) -> Path:
    sys.path.insert(0, str(ROOT / "tests" / "flows" / "serving" / "lamina" / "api"))
    try:
        from served_texts import write_byte_level
    finally:
        del sys.path[0]
    return Path(write_byte_level(folder))


def ask(url: str) -> Any:
    body = json.dumps({"model": "tiny", "prompt": "say", "max_tokens": 40}).encode()
    request = urllib.request.Request(f"{url}/v1/completions", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)["choices"][0]["text"]


def run_folders(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if "lamina-" in path.name]


def test_a_service_outlives_its_processes_and_leaves_nothing(workspace: Path) -> None:
    pytest.importorskip("tokenizers")
    service = serve(workspace, "answering_engine.py", write_tokenizer(workspace / "bundle"), workers=1)
    try:
        assert service.stdout is not None
        url = next(line for line in service.stdout if line.startswith("ready: ")).split()[-1]
        assert "1 attention worker" in service.stdout.readline()
        assert f"curl -N {url}/v1/completions" in service.stdout.readline()
        assert ask(url) == "hello world"
        before = psutil.Process(service.pid).children()
        for child in before:
            child.kill()
        psutil.wait_procs(before, 20)
        assert ask(url) == "hello world"
        children = psutil.Process(service.pid).children()
        assert len(run_folders(workspace)) == 1
        service.send_signal(signal.SIGTERM)
        assert service.wait(60) == 0
        assert psutil.wait_procs(children, 10)[1] == []
        assert run_folders(workspace) == []
    finally:
        service.kill()
        service.communicate()


def test_an_engine_that_cannot_load_its_bundle_ends_the_command_with_its_error(workspace: Path) -> None:
    pytest.importorskip("tokenizers")
    service = serve(workspace, "stand_in_engine.py", write_tokenizer(workspace / "exit:11"), workers=0)
    try:
        _, errors = service.communicate(timeout=60)
    finally:
        service.kill()
        service.wait()
    assert service.returncode == DataError.exit_code
    assert errors.splitlines()[-1] == "error: the stand-in cannot load its bundle"
    assert run_folders(workspace) == []
