"""A Lamina server follows its alias: the command, a registry and tiny models, all real; and the flow that
watches it."""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
import pytest
import tiny_llama2c
from serving_workspace import ROOT, write_params

from flows import files, kill_test, registry, rollout, serve, tracking
from flows.errors import ConfigError, GateFailed
from flows.golden_prompts import GoldenPrompt, write_golden
from flows.golden_texts import GoldenText, ask_texts, read_texts
from flows.language_registration import KIND, LANGUAGE
from flows.params import Params
from flows.serving.lamina.slices.bundle import MANIFEST, Bundle, read_bundle
from flows.serving.lamina.slices.runner import greedy, open_slices

pytest.importorskip("tokenizers")
NAME = "tiny"
PROMPTS = [(1, 5, 7), (1, 299, 12, 40)]
SETTINGS: dict[str, Any] = {
    "objective": "causal_lm",
    "serve.poll_s": 0.1,
    "serve.retry_s": 1000.0,
    "rollout.wait_s": 120.0,
    "rollout.poll_s": 0.1,
    "lamina.http.port": 0,
    "lamina.model.threads": 1,
    "lamina.model.split": False,
    "lamina.sched.micro_batches": 1,
    "lamina.kv.mb_per_worker": 16,
    "lamina.cluster.attention_workers": 1,
}


@pytest.fixture(scope="module")
def bundles(bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Versions 1 and 2 say different things; 3 is 2 with golden prompts that it does not continue so."""
    root = tmp_path_factory.mktemp("bundles")
    found = {version: root / version for version in ("1", "2", "3")}
    with tiny_llama2c.one_thread():
        shutil.copytree(bundle.folder, found["1"])
        shutil.copytree(found["1"], found["2"])
        change_weights(found["2"])
        for version in ("1", "2"):
            answers = greedy(open_slices(read_bundle(found[version])), PROMPTS, 24)
            golden = [
                GoldenPrompt(str(number), prompt, answer.tokens)
                for number, (prompt, answer) in enumerate(zip(PROMPTS, answers, strict=True))
            ]
            write_golden(found[version], golden)
    shutil.copytree(found["2"], found["3"])
    write_golden(found["3"], [GoldenPrompt("0", PROMPTS[0], (9, 9, 9))])
    return found


def change_weights(folder: Path) -> None:
    """Another model of the same shape, without another export."""
    manifest = files.read_json(folder / MANIFEST)
    for entry in manifest["weights"]:
        path = folder / entry["file"]
        numbers = np.frombuffer(path.read_bytes(), np.float32)
        path.write_bytes((numbers * np.linspace(0.5, 1.5, len(numbers), dtype=np.float32)).tobytes())
        entry["sha256"] = files.sha256_file(path)
    files.write_json(folder / MANIFEST, manifest)


@pytest.fixture
def registered(home: Path, bundles: dict[str, Path]) -> Params:
    settings = write_params(home, SETTINGS)
    with tracking.pipeline_run(settings, "test", {}) as run:
        for folder in bundles.values():
            tags = {KIND: LANGUAGE, "onnx.digest": files.sha256_file(folder / MANIFEST)}
            registry.register_bundle(settings, run, NAME, folder, tags)
    registry.set_alias(settings, NAME, "champion", "1")
    return settings


@pytest.fixture
def watch(registered: Params, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """The flow's body, without Prefect's server."""
    monkeypatch.setattr(rollout, "create_table_artifact", lambda rows, **_: None)
    monkeypatch.setattr(rollout, "get_run_logger", lambda: logging.getLogger("test"))
    monkeypatch.setattr(rollout, "check_servers", rollout.check_servers.fn)
    return lambda *servers: rollout.rollout.fn(NAME, list(servers) or None)


@pytest.fixture
def service(home: Path, registered: Params) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """`trunkline serve language --model` and its address."""
    process = subprocess.Popen(
        [sys.executable, "-m", "flows.cli", "serve", "language", "--model", NAME],
        cwd=home,
        env={**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(home)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line.startswith("ready: tiny "), (line, process.stderr.read() if process.stderr else "")
        yield process, line.split()[-1]
    finally:
        process.kill()
        process.communicate()


class Load:
    """One request after the other, in a thread; every answer is kept."""

    def __init__(self, url: str, golden: GoldenText) -> None:
        self.answers: list[tuple[int, str]] = []
        self._url, self._body = url, golden.body(NAME)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Load:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        with httpx.Client(base_url=self._url, timeout=60) as client:
            while not self._stop.is_set():
                answer = client.post("/v1/completions", json=self._body)
                self.answers.append((answer.status_code, answer.json()["choices"][0]["text"]))


def test_a_server_follows_the_champion_and_refuses_what_does_not_say_what_it_has_to(
    home: Path,
    registered: Params,
    bundles: dict[str, Path],
    service: tuple[subprocess.Popen[str], str],
    watch: Callable[..., Any],
    wait_until: Callable[..., None],
) -> None:
    process, url = service
    golden = {version: read_texts(bundles[version])[0] for version in ("1", "2")}
    digests = {version: files.sha256_file(bundles[version] / MANIFEST) for version in ("1", "2")}
    with httpx.Client(base_url=url, timeout=60) as client, Load(url, golden["1"]) as load:
        wait_until(lambda: len(load.answers) > 3)
        before = psutil.Process(process.pid).children()
        registry.set_alias(registered, NAME, "champion", "2")
        (check,) = watch(url)["servers"]
        assert (check["passed"], check["version"]) == (True, "2"), check
        switched = len(load.answers)
        wait_until(lambda: len(load.answers) > switched + 3)
        assert {status for status, _ in load.answers} == {200}
        texts = [text for _, text in load.answers]
        first_new = texts.index(golden["2"].text)
        assert set(texts[:first_new]) == {golden["1"].text}
        assert set(texts[first_new:]) == {golden["2"].text}
        (model,) = client.get("/v1/models").json()["data"]
        assert (model["id"], model["version"], model["digest"]) == (NAME, "2", digests["2"])
        metrics = client.get("/metrics").text
        assert f'trunkline_model_info{{digest="{digests["2"]}",name="tiny",version="2"}} 1.0' in metrics
        assert metrics.count("trunkline_model_info{") == 1
        assert 'trunkline_switches_total{result="switched"} 1.0' in metrics
        assert psutil.wait_procs(before, 30)[1] == [], "the processes of version 1 have ended"
        kill_test.kill_in_the_middle(client, process.pid, NAME, read_texts(bundles["2"]), workers=1)

        write_params(
            home, SETTINGS | {"rollout.rollback_on_failure": True, "rollout.language_servers": [url]}
        )
        registry.set_alias(registered, NAME, "previous", "2")
        registry.set_alias(registered, NAME, "champion", "3")
        with pytest.raises(
            GateFailed, match=r"serves version 2 .*it refused the new one: golden prompt 0.*again"
        ):
            watch()
        assert serve.find(registered, NAME, "champion", "").version == "2"
        wait_until(lambda: client.get("/healthz").json()["rollout"]["state"] == "current")
        assert 'trunkline_switches_total{result="failed"} 1.0' in client.get("/metrics").text
        assert ask_texts(client, NAME, read_texts(bundles["2"])) == ""
        assert {text for _, text in load.answers[first_new:]} == {golden["2"].text}
    children = psutil.Process(process.pid).children()
    assert len(children) == 2, "an engine and an attention worker"
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert psutil.wait_procs(children, 10)[1] == []
    assert [path for path in home.iterdir() if "lamina-" in path.name] == []
    said = [line for line in errors.splitlines() if "version" in line and ":" not in line.split()[0]]
    assert [line.split(" (")[0] for line in said[:1]] == ["serving version 2"], errors
    assert "version 3 is not served, version 2 stays: golden prompt 0" in said[1]


def test_without_a_server_of_this_kind_there_is_one_clear_error(watch: Callable[..., Any]) -> None:
    with pytest.raises(ConfigError, match=r"rollout\.language_servers"):
        watch()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"choices": [{"text": "something else"}]}, "differs from the recorded one at character 0"),
        ({"usage": {"completion_tokens": 1}}, "1 tokens instead of the recorded 24"),
        ({"choices": []}, "golden prompt 0: "),
    ],
)
def test_wrong_answers_are_found(bundles: dict[str, Path], change: dict[str, Any], reason: str) -> None:
    (golden, _) = texts = read_texts(bundles["1"])

    def answer(request: httpx.Request) -> httpx.Response:
        asked = json.loads(request.content)
        assert (asked["temperature"], asked["prompt"]) == (0, list(golden.prompt))
        right = {"choices": [{"text": golden.text}], "usage": {"completion_tokens": golden.tokens}}
        return httpx.Response(200, json=right | change)

    with httpx.Client(transport=httpx.MockTransport(answer), base_url="http://server") as client:
        assert reason in ask_texts(client, NAME, texts)


def killed(monkeypatch: pytest.MonkeyPatch, golden: GoldenText, text: str, recovered: list[int]) -> None:
    """The kill test against a server that answers `text`, and says how many recoveries that took."""
    lines = [{"choices": [{"text": part}]} for part in (text[:3], text[3:])]
    body = "".join(f"data: {json.dumps(line)}\n\n" for line in lines) + "data: [DONE]\n\n"
    counts = iter(recovered)
    killed: list[int] = []

    def answer(request: httpx.Request) -> httpx.Response:
        if request.url.path == "/metrics":
            return httpx.Response(200, text=f"trunkline_request_recoveries_sum {next(counts)}.0\n")
        return httpx.Response(200, text=body)

    monkeypatch.setattr(kill_test, "worker_pid", lambda server, workers, attempt: 1000 + attempt)
    monkeypatch.setattr(kill_test.os, "kill", lambda pid, sig: killed.append(pid))
    with httpx.Client(transport=httpx.MockTransport(answer), base_url="http://server") as client:
        taken = kill_test.kill_in_the_middle(client, 1, NAME, [golden], 2)
    assert killed == [1000 + attempt for attempt in range(taken)], "once in each answer"


def test_the_kill_test_goes_on_until_an_answer_was_hit_and_judges_every_one(
    bundles: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    golden = read_texts(bundles["1"])[0]
    killed(monkeypatch, golden, golden.text, [0, 0, 0, 1])
    with pytest.raises(GateFailed, match=r"killed attention worker: golden prompt 0: .* at character 3"):
        killed(monkeypatch, golden, golden.text[:3], [0, 1])
    with pytest.raises(GateFailed, match=r"12 answers were over .* raise language_promotion\.golden_tokens"):
        killed(monkeypatch, golden, golden.text, [0] * 24)


def test_a_server_that_does_not_start_fails_the_kill_test_with_its_reason(
    home: Path, registered: Params, bundles: dict[str, Path]
) -> None:
    with pytest.raises(GateFailed, match=r"(?s)did not get ready:.*is not an exported language model"):
        kill_test.server(home, home / "nowhere", "head").__enter__()
