"""A night in the life of an installation, as one command: `make scenario` (docs/operations.md tells it).

    up → scheduled run → promotion → rollout → bad candidate refused → rollback → tracking server killed and
    back → drift alarm → down

Everything is real – servers, worker, schedule, trainings, HTTP traffic – and shortened only in steps and
images. It happens in a clone of this repository in a temporary folder with free ports. While versions change,
a client keeps asking the vision server: not one of its requests may fail. At the end no process, port or
temporary file may be left.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import io
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import httpx
import numpy as np
import psutil
import yaml
from numpy.typing import NDArray
from PIL import Image
from sklearn.datasets import load_digits

ROOT = Path(__file__).resolve().parents[1]
MODEL = "trunkline-vision-digits"
PATIENCE_S = 420.0
EVERY_S = 45  # interval of the schedule under test
MARK = "TRUNKLINE_SCENARIO"
"""In the environment of everything started here, so that what is left over can be found."""

T = TypeVar("T")

SHORT: dict[str, Any] = {
    "pretrain": {"training": {"steps": 60, "warmup_steps": 6, "validate_every": 60}},
    "finetune": {"training": {"steps": 120, "warmup_steps": 12, "validate_every": 120, "log_every": 10}},
    "parity": {
        "samples": 64,
        "latency_batch_sizes": [1, 8],
        "latency_runs": 5,
        "int8_min_agreement": 0.0,  # the bad candidate is to meet the promotion's gates, not earlier ones
        "int8_max_accuracy_drop": 1.0,
    },
    "monitor": {"max_images_per_s": 1000.0},  # the drift comes in seconds, not in hours
    "promotion": {"min_gain": -0.05},  # a bounded loss: the candidate need not be luckier than the champion
}
"""What is shortened. Enough is left for a classifier that a useless one cannot be confused with."""


class Failure(Exception):
    """What the scenario expected did not happen."""


def expect(condition: object, what: str) -> None:
    if not condition:
        raise Failure(what)


def wait_until(look: Callable[[], T], what: str, patience_s: float = PATIENCE_S) -> T:
    """The first true answer of `look`."""
    deadline = time.monotonic() + patience_s
    while time.monotonic() < deadline:
        if answer := look():
            return answer
        time.sleep(0.5)
    raise Failure(f"{what}: not within {patience_s:.0f} s")


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [int(probe.getsockname()[1]) for probe in probes]


# ---- the installation --------------------------------------------------------------------------------------


class Installation:
    """A clone in `folder` with short trainings and ports of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.clone = folder / "clone"
        self.temporary = folder / "tmp"
        self.temporary.mkdir()
        self.prefect_port, self.mlflow_port, self.vision_port = free_ports(3)
        foreign = ("TRUNKLINE_", "PREFECT_", "MLFLOW_", "DVC_")
        inherited = {key: value for key, value in os.environ.items() if not key.startswith(foreign)}
        self.environment = {
            **inherited,
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{inherited['PATH']}",  # dvc runs `python`
            "PYTHONPATH": str(self.clone),
            "TMPDIR": str(self.temporary),
            "TORCHINDUCTOR_CACHE_DIR": str(folder / "cache"),  # torch's own; it is meant to stay
            "NO_COLOR": "1",
            "COLUMNS": "110",
            MARK: str(folder),
        }
        subprocess.run(["git", "clone", "--quiet", str(ROOT), str(self.clone)], check=True)
        services = {"prefect_port": self.prefect_port, "mlflow_port": self.mlflow_port}
        own = {
            "services": services,
            "serve": {"port": self.vision_port, "poll_s": 1.0},
            "rollout": {"servers": [f"http://127.0.0.1:{self.vision_port}"]},
        }
        self.change_params(merge_all(SHORT, own))

    def change_params(self, change: dict[str, Any]) -> None:
        """Edit and commit params.yaml, as a person would."""
        path = self.clone / "params.yaml"
        path.write_text(yaml.safe_dump(merge_all(yaml.safe_load(path.read_text()), change), sort_keys=False))
        identity = ["-c", "user.name=scenario", "-c", "user.email=scenario@localhost"]
        git = ["git", "-C", str(self.clone), *identity]
        subprocess.run([*git, "commit", "--quiet", "--all", "--message", "Change params"], check=True)

    def schedule_nightly(self, schedules: list[dict[str, Any]]) -> None:
        """Give the nightly deployment other schedules, and deploy."""
        path = self.clone / "prefect.yaml"
        content = yaml.safe_load(path.read_text())
        nightly = next(entry for entry in content["deployments"] if entry["name"] == "nightly")
        nightly["schedules"] = schedules
        path.write_text(yaml.safe_dump(content, sort_keys=False))
        self.trunkline("deploy")

    def command(self, *arguments: str) -> list[str]:
        return [sys.executable, "-m", "flows.cli", *arguments]

    def trunkline(self, *arguments: str, codes: tuple[int, ...] = (0,)) -> str:
        """Run `trunkline …` to its end; what it prints for the user."""
        answer = subprocess.run(
            self.command(*arguments),
            cwd=self.clone,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=PATIENCE_S,
        )
        told = f"{answer.stdout[-2000:]}\n{answer.stderr[-4000:]}"
        said = f"trunkline {' '.join(arguments)}: exit code {answer.returncode}\n{told}"
        expect(answer.returncode in codes, said)
        return answer.stdout

    def status(self) -> dict[str, Any]:
        told: dict[str, Any] = json.loads(self.trunkline("status", "--model", MODEL, "--json"))
        return told

    def champion(self) -> str:
        """Version of the champion; empty if there is none."""
        live = self.status().get("champion")
        return str(live["version"]) if live else ""

    def flow_runs(self, **fields: Any) -> list[dict[str, Any]]:
        """Flow runs of the Prefect server whose fields have these values; the newest first."""
        address = f"http://127.0.0.1:{self.prefect_port}/api/flow_runs/filter"
        answer = httpx.post(address, json={"sort": "START_TIME_DESC", "limit": 200}, timeout=30)
        found: list[dict[str, Any]] = answer.raise_for_status().json()
        return [run for run in found if all(run[key] == value for key, value in fields.items())]

    def deployment_id(self, name: str) -> str:
        address = f"http://127.0.0.1:{self.prefect_port}/api/deployments/name/{name}"
        return str(httpx.get(address, timeout=30).raise_for_status().json()["id"])

    def service_pid(self, name: str) -> int:
        """Process id of a service that `trunkline up` keeps running."""
        state = json.loads((self.clone / ".trunkline" / "services" / "state.json").read_text())
        return int(state["services"][name]["pid"])

    def processes(self) -> list[psutil.Process]:
        """Everything started here that still lives."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                is_ours = process.environ().get(MARK) == str(self.folder)
                if is_ours and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found


def merge_all(*changes: dict[str, Any]) -> dict[str, Any]:
    """Nested union; a later value replaces an earlier one."""
    whole: dict[str, Any] = {}
    for change in changes:
        for key, value in change.items():
            nested = isinstance(value, dict) and isinstance(whole.get(key), dict)
            whole[key] = merge_all(whole[key], value) if nested else value
    return whole


# ---- served traffic ----------------------------------------------------------------------------------------


class VisionServer:
    """`trunkline serve vision`, which follows the champion, and a client that never stops asking."""

    def __init__(self, installation: Installation) -> None:
        self.address = f"http://127.0.0.1:{installation.vision_port}"
        self.log = installation.folder / "vision.log"
        with open(self.log, "w") as log:
            self.process = subprocess.Popen(
                installation.command("serve", "vision"),
                cwd=installation.clone,
                env=installation.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        self.answered = 0
        self.failures: list[str] = []
        self.versions: list[str] = []
        self._stop = threading.Event()
        self._client = threading.Thread(target=self._ask, daemon=True)

    def begin(self) -> None:
        def is_ready() -> bool:
            expect(self.process.poll() is None, f"the vision server ended: {self.log.read_text()[-2000:]}")
            with contextlib.suppress(httpx.HTTPError):
                return httpx.get(f"{self.address}/v2/health/ready", timeout=5).status_code == 200
            return False

        wait_until(is_ready, "the vision server is ready")
        self._client.start()

    def _ask(self) -> None:
        """A real digit about every 100 ms, all of them in random order: a fair sample for the monitor;
        whatever is not answered with 200 is a failure."""
        order = np.random.default_rng(0).permutation(len(digits()))
        pictures = [encode(pixels) for pixels in digits()[order]]
        with httpx.Client(base_url=self.address, timeout=60) as client:
            for turn in range(10**9):
                if self._stop.wait(0.1):
                    return
                try:
                    answer = client.post(
                        "/v1/classify", files={"file": ("x.png", pictures[turn % len(pictures)])}
                    )
                except httpx.HTTPError as error:
                    self.failures.append(repr(error))
                    continue
                if answer.status_code != 200:
                    self.failures.append(f"{answer.status_code}: {answer.text[:200]}")
                    continue
                self.answered += 1
                version = answer.json()["model"]["version"]
                if self.versions[-1:] != [version]:
                    self.versions.append(version)

    def health(self) -> dict[str, Any]:
        told: dict[str, Any] = httpx.get(f"{self.address}/healthz", timeout=30).json()
        return told

    def wait_for_version(self, version: str) -> None:
        wait_until(lambda: self.health()["version"] == version, f"the server serves version {version}")

    def send(self, pictures: list[NDArray[np.uint8]]) -> None:
        with httpx.Client(base_url=self.address, timeout=60) as client:
            for pixels in pictures:
                answer = client.post("/v1/classify", files={"file": ("x.png", encode(pixels))})
                expect(answer.status_code == 200, f"classify: {answer.status_code} {answer.text[:200]}")

    def stop_traffic(self) -> None:
        if self._client.is_alive():
            self._stop.set()
            self._client.join(60)

    def stop(self) -> int:
        self.stop_traffic()
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(60)


def digits() -> NDArray[np.uint8]:
    """scikit-learn's handwritten digits, uint8 (1797, 8, 8)."""
    return (load_digits().images * (255 / 16)).astype(np.uint8)


def encode(pixels: NDArray[np.uint8]) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def corrupt(pictures: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """What a camera out of order might deliver: little contrast and strong noise."""
    noise = np.random.default_rng(0).normal(0, 60, pictures.shape)
    return np.clip(pictures * 0.4 + 80 + noise, 0, 255).astype(np.uint8)


# ---- the story ---------------------------------------------------------------------------------------------


class Scenario:
    def __init__(self, folder: Path) -> None:
        self.started = time.monotonic()
        self.installation = Installation(folder)
        self.server: VisionServer | None = None

    def say(self, text: str) -> None:
        print(f"[{time.monotonic() - self.started:5.0f} s] {text}", flush=True)

    def play(self) -> None:
        self.bring_up()
        self.await_scheduled_run()
        self.await_promotion()
        server = self.server = VisionServer(self.installation)
        server.begin()
        self.roll_out(server)
        self.refuse_a_bad_candidate(server)
        self.roll_back(server)
        server.stop_traffic()
        expect(not server.failures, f"requests failed: {server.failures[:3]} (of {len(server.failures)})")
        expect(server.versions == ["1", "2", "1"], f"versions that answered: {server.versions}")
        self.say(f"traffic: {server.answered} requests answered while versions changed, none failed")
        self.lose_the_tracking_server()
        self.detect_drift(server)
        self.bring_down(server)

    def bring_up(self) -> None:
        self.installation.trunkline("up")
        self.say("up: Prefect, MLflow, deployments, worker")

    def await_scheduled_run(self) -> None:
        """A run that the schedule made and the worker found; others that fall due meanwhile are cancelled."""
        installation = self.installation
        now = datetime.datetime.now(datetime.UTC).isoformat()
        soon = {"interval": EVERY_S, "anchor_date": now, "slug": "soon", "active": True}
        installation.schedule_nightly([soon])
        nightly = installation.deployment_id("pipeline/nightly")

        def look() -> list[dict[str, Any]]:
            found = installation.flow_runs(deployment_id=nightly, auto_scheduled=True)
            bad = [run["state"] for run in found if run["state_type"] in ("FAILED", "CRASHED")]
            expect(not bad, f"a scheduled run failed: {bad}")
            return [run for run in found if run["state_type"] == "COMPLETED"]

        run = wait_until(look, "a scheduled run completes")[0]
        installation.schedule_nightly([])
        unfinished = ("SCHEDULED", "PENDING", "RUNNING", "CANCELLING")

        def is_quiet() -> bool:
            found = installation.flow_runs(deployment_id=nightly)
            return not [run for run in found if run["state_type"] in unfinished]

        wait_until(is_quiet, "a removed schedule starts nothing more")
        self.say(f"scheduled run: found by the worker, completed in {run['total_run_time']:.0f} s")

    def await_promotion(self) -> None:
        """The event of the registration triggers it."""
        wait_until(lambda: self.installation.champion() == "1", "version 1 becomes champion")
        gates = self.installation.status()["champion"]["gates"]
        expect(set(gates) >= {"integrity", "parity", "quality", "servability", "budget"}, f"gates: {gates}")
        self.say(f"promotion: version 1 is champion; {len(gates)} gates passed")

    def roll_out(self, server: VisionServer) -> None:
        self.installation.change_params({"finetune": {"training": {"steps": 150}}})
        self.installation.trunkline("run")
        expect(
            self.installation.champion() == "2", f"version 2 is not champion: {self.installation.status()}"
        )
        server.wait_for_version("2")
        self.installation.trunkline("rollout")
        self.say("rollout: the server serves version 2")

    def refuse_a_bad_candidate(self, server: VisionServer) -> None:
        before = self.installation.status()
        few = {"steps": 4, "warmup_steps": 2, "validate_every": 4, "log_every": 1}
        self.installation.change_params({"finetune": {"training": few}})
        self.installation.trunkline("run", codes=(0, 10))
        after = self.installation.status()
        expect(after["champion"]["version"] == "2", f"the champion changed: {after}")
        expect(after["previous"] == before["previous"], "a refused candidate changed `previous`")
        verdict = after["challenger"]["gates"]["quality"]
        expect(str(verdict).startswith("failed"), f"the quality gate says {verdict}")
        expect(server.health()["version"] == "2", "the server left version 2")
        self.say(f"bad candidate refused: {verdict}")

    def roll_back(self, server: VisionServer) -> None:
        self.installation.trunkline("rollback", "--model", MODEL)
        expect(self.installation.champion() == "1", "version 1 is not champion again")
        server.wait_for_version("1")
        self.say("rollback: the server serves version 1")

    def lose_the_tracking_server(self) -> None:
        """Killed in mid-training; the training does not notice, and nothing of its record is missing."""
        installation = self.installation
        installation.change_params({"seed": 1, "pretrain": {"training": {"log_every": 2}}})
        address = f"http://127.0.0.1:{installation.mlflow_port}"
        training = subprocess.Popen(
            [sys.executable, "-m", "dvc", "repro", "--single-item", "pretrain"],
            cwd=installation.clone,
            env={**installation.environment, "MLFLOW_TRACKING_URI": address},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert training.stdout
        lines = []
        killed = 0
        for line in training.stdout:
            lines.append(line)
            if " step 10/" in line:
                killed = installation.service_pid("mlflow")
                os.kill(killed, signal.SIGKILL)
        expect(killed, f"training said nothing of step 10:\n{''.join(lines)[-3000:]}")
        expect(training.wait(PATIENCE_S) == 0, f"training failed:\n{''.join(lines)[-3000:]}")

        def answers() -> bool:
            with contextlib.suppress(httpx.HTTPError):
                return httpx.get(f"{address}/health", timeout=5).status_code == 200
            return False

        wait_until(answers, "the tracking server is back")
        expect(installation.service_pid("mlflow") != killed, "the tracking server was not started again")
        installation.trunkline("sync")
        receipt = json.loads((installation.clone / "artifacts/receipts/pretrain.json").read_text())
        steps = metric_steps(installation, address, receipt["run_id"])
        steps_total = SHORT["pretrain"]["training"]["steps"]
        expect(steps == list(range(2, steps_total + 1, 2)), f"steps recorded: {steps}")
        self.say(f"tracking server killed and back: all {len(steps)} logged steps recorded once")

    def detect_drift(self, server: VisionServer) -> None:
        installation = self.installation
        nightly = installation.deployment_id("pipeline/nightly")
        before = {run["id"] for run in installation.flow_runs(deployment_id=nightly)}
        quiet = installation.trunkline("monitor", "--model", MODEL)
        expect("quiet" in quiet, f"the monitor on clean digits said:\n{quiet}")
        server.send(list(corrupt(digits())))
        alarm = installation.trunkline("monitor", "--model", MODEL, codes=(0, 10))
        expect("alarm" in alarm, f"the monitor on corrupted digits said:\n{alarm}")

        def started() -> list[str]:
            runs = installation.flow_runs(deployment_id=nightly, auto_scheduled=False)
            return [run["id"] for run in runs if run["id"] not in before]

        wait_until(started, "the alarm starts the nightly pipeline")
        self.say("drift alarm: quiet on clean digits, alarm on corrupted ones; the pipeline was started")

    def bring_down(self, server: VisionServer) -> None:
        installation = self.installation
        code = server.stop()
        expect(code == 0, f"the vision server ended with {code}: {server.log.read_text()[-2000:]}")
        installation.trunkline("down")
        left = [" ".join(process.cmdline())[:120] for process in installation.processes()]
        expect(not left, f"processes left: {left}")
        for port in (installation.prefect_port, installation.mlflow_port, installation.vision_port):
            with socket.socket() as probe:
                expect(probe.connect_ex(("127.0.0.1", port)) != 0, f"something listens on port {port}")
        files_left = sorted(path.name for path in installation.temporary.iterdir())
        expect(not files_left, f"temporary files left: {files_left}")
        self.say("down: no process, port or temporary file is left")


def metric_steps(installation: Installation, address: str, run_id: str) -> list[int]:
    """Steps at which the training loss of a run is recorded, as often as they are."""
    answer = httpx.get(
        f"{address}/api/2.0/mlflow/metrics/get-history",
        params={"run_id": run_id, "metric_key": "train_loss", "max_results": 10000},
        timeout=30,
    )
    return sorted(int(metric.get("step", 0)) for metric in answer.raise_for_status().json()["metrics"])


@contextlib.contextmanager
def workplace(keep: bool) -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="trunkline-scenario-"))
    try:
        yield folder
    finally:
        if keep:
            print(f"kept: {folder}")
        else:
            shutil.rmtree(folder, ignore_errors=True)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--keep", action="store_true", help="leave the clone, to look at what happened")
    keep = parser.parse_args(argv).keep
    with workplace(keep) as folder:
        scenario = Scenario(folder)
        try:
            scenario.play()
        except Failure as failure:
            print(f"error: {failure}", file=sys.stderr)
            return 1
        finally:
            # also after a failure nothing may stay behind
            for process in scenario.installation.processes():
                with contextlib.suppress(psutil.Error):
                    process.kill()
    print("1 passed, 0 failed")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
