"""The examples of docs/cluster/ do what they say, as far as it can be tried without a cluster: their lines
start a training on two hosts, between stand-ins for srun, scontrol, ssh and dvc."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import network
import pytest
import training_workspace as workspaces
import yaml
from network import Host, Network

ROOT = Path(__file__).resolve().parents[3]
EXAMPLES = ROOT / "docs" / "cluster"
SHORT = {"steps": 4, "warmup_steps": 1, "log_every": 2, "validate_every": 4, "checkpoint_every": 2}
PATIENCE_S = 300


@pytest.fixture
def clone(ingested: Path, tmp_path: Path) -> Path:
    """One clone that both hosts see."""
    return workspaces.copy(ingested, tmp_path / "clone", {"pretrain": {"training": SHORT}})


@pytest.fixture
def hosts(tmp_path: Path) -> Any:
    if reason := network.why_not():
        pytest.skip(reason)
    with Network(2) as joined:
        yield joined.hosts


def stand_in(folder: Path, name: str, *lines: str) -> None:
    """A command of that name in `folder`."""
    folder.mkdir(exist_ok=True)
    (folder / name).write_text("\n".join(["#!/usr/bin/env bash", *lines]) + "\n")
    (folder / name).chmod(0o755)


def environment(clone: Path, commands: Path, **variables: str) -> dict[str, str]:
    own = workspaces.environment(clone, **variables)
    return {**own, "PATH": f"{commands}:{Path(sys.executable).parent}:{os.environ['PATH']}"}


def run(command: list[str], clone: Path, variables: dict[str, str]) -> tuple[int, str]:
    """Exit code and output."""
    process = subprocess.Popen(
        command,
        cwd=clone,
        env=variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=PATIENCE_S)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    return process.returncode, output


def assert_trained_by_two(clone: Path, output: str) -> None:
    assert workspaces.curves(clone)["validation"][-1][0] == SHORT["steps"], output
    assert output.count("pretrain: scratch: random weights") == 1, output
    receipt = (clone / "artifacts" / "receipts" / "pretrain.json").read_text()
    assert '"stage": "pretrain"' in receipt


def on(host: Host, command: str) -> str:
    return f"{' '.join(host.command)} {command}"


def test_the_slurm_script_trains_on_two_nodes_and_tells_dvc(
    clone: Path, hosts: list[Host], tmp_path: Path
) -> None:
    commands = tmp_path / "bin"
    stand_in(commands, "scontrol", f'[ "$1" = show ] && printf "%s\\n" {hosts[0].address} {hosts[1].address}')
    stand_in(commands, "dvc", f'echo "$@" > {tmp_path}/dvc')
    stand_in(
        commands,
        "srun",
        "while [[ $1 == --* ]]; do shift; done",
        f"SLURM_NODEID=0 {on(hosts[0], chr(34) + '$@' + chr(34))} & one=$!",
        f"SLURM_NODEID=1 {on(hosts[1], chr(34) + '$@' + chr(34))} & two=$!",
        "wait $one; a=$?; wait $two; b=$?; exit $((a > b ? a : b))",
    )
    variables = environment(
        clone, commands, SLURM_JOB_ID="4711", SLURM_JOB_NODELIST="host[0-1]", SLURM_NNODES="2"
    )
    code, output = run([str(EXAMPLES / "slurm.sh")], clone, variables)
    assert code == 0, output
    assert_trained_by_two(clone, output)
    assert (tmp_path / "dvc").read_text() == "commit --force pretrain\n"


def test_the_ssh_script_starts_its_part_on_every_machine_of_the_list(tmp_path: Path) -> None:
    clone = tmp_path / "a clone"
    clone.mkdir()
    commands = tmp_path / "bin"
    stand_in(commands, "ssh", 'bash -c "$2" | sed "s/^/$1: /"; exit ${PIPESTATUS[0]}')
    stand_in(
        commands,
        "python3",
        f'echo "$PWD|$TRUNKLINE_TORCHRUN|$*"; exit $(cat {tmp_path}/code 2> /dev/null || echo 0)',
    )
    (tmp_path / "hosts.txt").write_text("# name processes\nnode-a 2\n\nnode-b 1\n")
    variables = environment(clone, commands, SSH="ssh", PYTHON="python3", PORT="29555")
    script = str(EXAMPLES / "hosts.sh")
    code, output = run(
        [script, str(tmp_path / "hosts.txt"), "finetune", "--cell", "scratch"], clone, variables
    )
    assert code == 0, output
    assert sorted(output.splitlines()) == [
        f"node-{name}: {clone}|--nnodes 2 --node-rank {rank} --nproc-per-node {count} --master-addr node-a "
        "--master-port 29555|-m flows.launch finetune --cell scratch"
        for rank, (name, count) in enumerate((("a", 2), ("b", 1)))
    ]
    (tmp_path / "code").write_text("12")
    assert run([script, str(tmp_path / "hosts.txt"), "pretrain"], clone, variables)[0] == 12
    assert run([script], clone, variables)[0] == 64


def test_the_kubernetes_job_is_valid_and_its_command_trains(clone: Path, hosts: list[Host]) -> None:
    service, job = manifest()
    (container,) = job["spec"]["template"]["spec"]["containers"]
    given = {entry["name"]: entry["value"] for entry in container["env"]}
    assert given["MACHINES"] == str(job["spec"]["completions"]) == str(job["spec"]["parallelism"])
    name = job["metadata"]["name"]
    assert given["MASTER"] == f"{name}-0.{service['metadata']['name']}"
    assert service["spec"]["selector"] == {"job-name": name}
    own = {"PIPELINE_SCRATCH": str(clone / "scratch"), "MASTER": hosts[0].address, "PROCESSES": "1"}
    pods = [
        subprocess.Popen(
            [*host.command, *container["command"], *container["args"]],
            cwd=clone,
            env=environment(clone, clone, **{**given, **own, "JOB_COMPLETION_INDEX": str(index)}),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for index, host in enumerate(hosts)
    ]
    try:
        output = "".join(pod.communicate(timeout=PATIENCE_S)[0] for pod in pods)
        assert [pod.returncode for pod in pods] == [0, 0], output
    finally:
        for pod in pods:
            pod.kill()
    assert_trained_by_two(clone, output)


def manifest() -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((EXAMPLES / "kubernetes.yaml").read_text()))


def test_the_kubernetes_manifest_has_the_published_shape() -> None:
    kubernetes_validate = pytest.importorskip("kubernetes_validate")
    for document in manifest():
        kubernetes_validate.validate(document, "1.31", strict=True)
        misspelt = {**document, "spec": {**document["spec"], "selecter": {}}}
        with pytest.raises(kubernetes_validate.ValidationError):
            kubernetes_validate.validate(misspelt, "1.31", strict=True)


@pytest.mark.parametrize("script", sorted(EXAMPLES.glob("*.sh")), ids=lambda path: path.name)
def test_scripts_are_sound(script: Path) -> None:
    assert subprocess.run(["bash", "-n", str(script)]).returncode == 0
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed; bash -n found nothing")
    answer = subprocess.run(["shellcheck", str(script)], capture_output=True, text=True)
    assert answer.returncode == 0, answer.stdout
