"""The flow: quiet on held-out digits, an alarm on corrupted ones, one event per cool-down, a real trigger."""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
import pytest
import yaml
from serving_workspace import ROOT, Exported, inside, write_params

from flows import files, params, paths, ports, registry, tracking
from flows import monitor as monitors
from flows.errors import ConfigError, ResourceError
from flows.samples import draw_samples
from flows.serve import open_served
from flows.serving.session import CPU, open_session
from flows.serving.traffic import TrafficRecorder

NAME = "trunkline-vision-digits"
PATIENCE_S = 180.0


class Info:
    name, version, variant = NAME, "1", "fp32"


@pytest.fixture(scope="module")
def clone(exported: Exported, empty_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home whose registry has the exported digits as champion."""
    home = tmp_path_factory.mktemp("clone")
    shutil.copy(empty_store, home / "mlflow.db")
    with inside(home):
        checked = write_params(home, {})
        tags = {"onnx.digest": exported.package.variant("fp32").digest}
        with tracking.pipeline_run(checked, "run", {}) as run:
            version = registry.register_folder(
                checked, run, NAME, exported.root / paths.EXPORT, exported.images[:1], tags
            )
        registry.set_alias(checked, NAME, "champion", version.version)
    return home


@pytest.fixture
def home(clone: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The clone without traffic and reports; also the current directory."""
    for name in ("traffic", "monitor"):
        shutil.rmtree(clone / ".trunkline" / name, ignore_errors=True)
    monkeypatch.chdir(clone)
    for name in ("RANK", "TRUNKLINE_TRACKING", "MLFLOW_TRACKING_URI", "TRUNKLINE_HOME"):
        monkeypatch.delenv(name, raising=False)
    return clone


@pytest.fixture(scope="module")
def held_out(exported: Exported) -> np.ndarray:
    """All test images, as the network sees them."""
    preprocessing = exported.package.manifest.preprocessing
    images, _ = draw_samples(
        exported.root / paths.DATA, "test", 10**6, seed=0, preprocessing=preprocessing, max_pixels=10**6
    )
    return images


@pytest.fixture
def emitted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Runs the flow's body without a Prefect server; events come here."""
    events: list[str] = []
    monkeypatch.setattr(monitors, "get_run_logger", lambda: logging.getLogger("test"))
    monkeypatch.setattr(monitors, "create_table_artifact", lambda table, **rest: None)
    monkeypatch.setattr(monitors, "has_server", lambda: True)
    monkeypatch.setattr(monitors, "emit", lambda event, watched, reasons: events.append(event))
    return events


def serve(images: np.ndarray, exported: Exported, statuses: Callable[[int], int] = lambda row: 200) -> None:
    """What a server of the champion would record of these images, one request each."""
    checked = params.load()
    settings = checked.monitor.model_copy(update={"max_images_per_s": 1e6})
    monitors.fetch(checked, registry.version_of(checked, NAME, "1"))
    session = open_session(exported.package.path("fp32"), [CPU], 1)
    recorder = TrafficRecorder(paths.home(), settings, open_served)
    for start in range(0, len(images), 50):
        batch = images[start : start + 50]
        recorder.on_batch(batch, session.run_all(batch), Info())
        for row in range(len(batch)):
            recorder.on_request(Info(), statuses(start + row), 0.004)
    recorder.close()


def blur(images: np.ndarray) -> np.ndarray:
    return (images + np.roll(images, 1, axis=3) + np.roll(images, 1, axis=2)) / np.float32(3)


def noise(images: np.ndarray) -> np.ndarray:
    return images + 0.3 * np.random.default_rng(0).standard_normal(images.shape).astype(np.float32)


CORRUPTIONS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "noise": noise,
    "blur": blur,
    "dim": lambda images: images * np.float32(0.6),
    "inverted": lambda images: -images,
}


def test_held_out_digits_are_quiet(
    home: Path, exported: Exported, held_out: np.ndarray, emitted: list[str]
) -> None:
    serve(held_out, exported)
    summary = monitors.monitor.fn()
    assert (summary["verdict"], summary["reasons"], summary["unjudged"]) == ("quiet", [], [])
    assert emitted == []
    report = files.read_json(home / ".trunkline/monitor" / NAME / "report.json")
    assert report["recorded"] == report["images"] == report["requests"] == len(held_out)
    assert len(report["tests"]) == 32 + 9 + 1 + 2
    assert 3.9 < report["latency"]["p50_ms"] < 4.3
    assert report["digest"] == exported.package.variant("fp32").digest
    assert report["data_digest"] == exported.package.manifest.data_digest


@pytest.mark.parametrize("corruption", CORRUPTIONS)
def test_corrupted_digits_alarm(
    home: Path, exported: Exported, held_out: np.ndarray, emitted: list[str], corruption: str
) -> None:
    serve(CORRUPTIONS[corruption](held_out[:150]), exported)
    summary = monitors.monitor.fn()
    assert summary["verdict"] == "alarm"
    assert emitted == summary["emitted"] == [monitors.ALARM]
    page = Path(summary["report"]).read_text()
    assert summary["reasons"][0] in page.replace("&#39;", "'")
    assert "http://" not in page.replace("http://www.w3.org/", "")  # it asks nothing of anybody
    assert "https://" not in page
    assert "<script" not in page


def test_the_record_is_in_the_tracker(
    home: Path, exported: Exported, held_out: np.ndarray, emitted: list[str]
) -> None:
    serve(noise(held_out[:150]), exported)
    monitors.monitor.fn(model=NAME, hours=2.0)
    connection = tracking.client(params.load())
    experiment = connection.get_experiment_by_name("trunkline/monitor")
    run = connection.search_runs([experiment.experiment_id], max_results=1)[0]
    assert run.data.tags["trunkline.verdict"] == "alarm"
    assert run.data.metrics["recorded"] == 150
    assert run.data.metrics["pixels.effect"] > 0.1
    assert run.data.params["monitor.hours"] == "2.0"
    assert {entry.path for entry in connection.list_artifacts(run.info.run_id)} == {
        "report.html",
        "report.json",
    }


def test_a_lasting_shift_is_raised_once_per_cool_down(
    home: Path, exported: Exported, held_out: np.ndarray, emitted: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    serve(noise(held_out[:150]), exported)
    first = monitors.monitor.fn()
    second = monitors.monitor.fn()
    assert (first["emitted"], second["emitted"]) == ([monitors.ALARM], [])
    assert second["verdict"] == "alarm"
    assert "not raised again before" in second["action"]
    times = home / ".trunkline/monitor" / NAME / "alarms.json"
    day_ago = files.read_json(times)[monitors.ALARM] - 24.1 * 3600
    files.write_json(times, {monitors.ALARM: day_ago})
    assert monitors.monitor.fn()["emitted"] == [monitors.ALARM]
    times.write_text("{")  # damaged: rather one alarm too many
    assert monitors.monitor.fn()["emitted"] == [monitors.ALARM]
    assert files.read_json(times)[monitors.ALARM] > day_ago
    history = (home / ".trunkline/monitor" / NAME / "history.jsonl").read_text().splitlines()
    assert len(history) == 4


def test_without_a_server_nothing_is_emitted_and_no_cool_down_begins(
    home: Path, exported: Exported, held_out: np.ndarray, emitted: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody who looks by hand must not silence the scheduled monitor for a day."""
    serve(noise(held_out[:150]), exported)
    with monkeypatch.context() as patch:
        patch.setattr(monitors, "has_server", lambda: False)
        summary = monitors.monitor.fn()
    assert (summary["verdict"], summary["emitted"], emitted) == ("alarm", [], [])
    assert "no Prefect server" in summary["action"]
    assert monitors.monitor.fn()["emitted"] == [monitors.ALARM]


def test_failing_answers_are_another_event(
    home: Path, exported: Exported, held_out: np.ndarray, emitted: list[str]
) -> None:
    serve(held_out, exported, statuses=lambda row: 500 if row % 10 == 0 else 200)
    summary = monitors.monitor.fn()
    assert summary["emitted"] == emitted == [monitors.DEGRADED]
    assert summary["reasons"][0].startswith("errors: 36 of 359")


def test_an_event_that_cannot_be_sent_keeps_the_report_and_is_tried_again(
    home: Path, exported: Exported, held_out: np.ndarray, emitted: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: Any) -> None:
        raise httpx.ConnectError("nobody listens")

    serve(noise(held_out[:150]), exported)
    with monkeypatch.context() as patch:
        patch.setattr(monitors, "emit", fail)
        with pytest.raises(ResourceError, match="could not be sent to Prefect: ConnectError: nobody listens"):
            monitors.monitor.fn()
    assert files.read_json(home / ".trunkline/monitor" / NAME / "report.json")["verdict"] == "alarm"
    assert monitors.monitor.fn()["emitted"] == [monitors.ALARM]


def test_without_traffic_or_champion_there_is_nothing_to_say(home: Path, emitted: list[str]) -> None:
    assert monitors.monitor.fn()["verdict"] == "too little traffic"
    page = (home / ".trunkline/monitor" / NAME / "report.html").read_text()
    assert "0 recorded images, monitor.min_images is 100" in page
    assert "No request was answered" in page
    nothing = monitors.monitor.fn(model="unheard-of")
    assert nothing["verdict"] == "nothing served"
    assert "unheard-of" in nothing["unjudged"][0]
    with pytest.raises(ConfigError, match="hours"):
        monitors.monitor.fn(hours=-1.0)


# ---- with a real server ----


@pytest.fixture
def prefect_api(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A Prefect server of its own, with everything that automations need."""
    port = ports.free_port()
    url = f"http://127.0.0.1:{port}/api"
    environment = {
        **os.environ,
        "PREFECT_HOME": str(tmp_path / "prefect"),
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    }
    environment.pop("PREFECT_API_URL", None)
    command = [sys.executable, "-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port)]
    with open(tmp_path / "server.log", "wb") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, cwd=tmp_path)
    try:
        wait_for(lambda: answers(f"{url}/health"), "the server does not answer", process)
        yield url
    finally:
        family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
        process.terminate()
        for left in psutil.wait_procs(family, timeout=20)[1]:
            left.kill()


def wait_for(
    condition: Callable[[], Any], complaint: str, process: subprocess.Popen[bytes] | None = None
) -> Any:
    deadline = time.monotonic() + PATIENCE_S
    while not (found := condition()):
        assert process is None or process.poll() is None, "it ended by itself"
        assert time.monotonic() < deadline, complaint
        time.sleep(0.2)
    return found


def answers(address: str) -> bool:
    try:
        return httpx.get(address, timeout=5).status_code == 200
    except httpx.TransportError:
        return False


def triggers_of_nightly() -> list[dict[str, Any]]:
    """Those of prefect.yaml."""
    deployments = yaml.safe_load((ROOT / "prefect.yaml").read_text())["deployments"]
    (nightly,) = [entry for entry in deployments if entry["name"] == "nightly"]
    return [{**trigger} for trigger in nightly["triggers"]]


def test_drift_starts_the_pipeline_through_its_trigger(
    home: Path, exported: Exported, held_out: np.ndarray, prefect_api: str
) -> None:
    """Command, event, automation, flow run: nothing is replaced but the flow that would be started."""
    import prefect.settings
    from prefect.client.orchestration import get_client
    from prefect.events import DeploymentEventTrigger

    with (
        prefect.settings.temporary_settings({prefect.settings.PREFECT_API_URL: prefect_api}),
        get_client(sync_client=True) as client,
    ):
        deployment = client.create_deployment(client.create_flow_from_name("tiny"), "nightly")
        for snippet in triggers_of_nightly():
            trigger = DeploymentEventTrigger(**snippet)
            trigger.set_deployment_id(deployment)
            client.create_automation(trigger.as_automation())

        def runs() -> list[Any]:
            return [run for run in client.read_flow_runs() if run.deployment_id == deployment]

        def command() -> str:
            environment = {**os.environ, "PREFECT_API_URL": prefect_api, "PYTHONPATH": str(ROOT)}
            answer = subprocess.run(
                [sys.executable, "-m", "flows.cli", "monitor"],
                cwd=home, env=environment, capture_output=True, text=True,
            )  # fmt: skip
            assert answer.returncode == 0, answer.stderr
            return answer.stdout

        serve(held_out, exported)
        assert command().startswith("quiet")
        shutil.rmtree(home / ".trunkline/traffic")
        serve(noise(held_out[:150]), exported)
        assert f"Emitted {monitors.ALARM}" in command()
        wait_for(runs, "the automation created no flow run")
        tables = client.request("POST", "/artifacts/latest/filter", json={}).json()
        assert [table["key"] for table in tables] == ["monitor"]
        assert len(runs()) == 1
