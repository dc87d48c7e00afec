"""The command line as its user meets it: one line per mistake, exit codes, nothing half done."""

from __future__ import annotations

import errno
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import tiny_clone

from flows import cli, registry, serve, tracking, workspace
from flows.errors import ConfigError, DataError
from flows.params import Params
from flows.registry import Version

ROOT = Path(__file__).resolve().parents[2]
MODEL = "trunkline-vision-digits"


class Answer(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture
def trunkline(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Answer]:
    """Run the command in this process."""

    def run(*arguments: str) -> Answer:
        monkeypatch.setattr(sys, "argv", ["trunkline", *arguments])
        code = 0
        try:
            cli.main()
        except SystemExit as error:
            code = int(error.code or 0)
        captured = capsys.readouterr()
        return Answer(code, captured.out, captured.err)

    return run


@pytest.fixture
def occupied() -> Iterator[int]:
    """A port that something listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield listener.getsockname()[1]


@pytest.fixture
def two_versions(home_params: Params) -> Params:
    """A registry with two versions, the second one champion."""
    connection = tracking.client(home_params)
    connection.create_registered_model(MODEL)
    for _ in range(2):
        connection.create_model_version(
            MODEL, source=Path("nowhere").absolute().as_uri(), tags={"onnx.digest": "abcdef" * 8}
        )
    registry.set_alias(home_params, MODEL, "champion", "2")
    return home_params


def one_line(answer: Answer, code: int, *words: str) -> None:
    assert answer.code == code, answer
    assert answer.err.startswith("error: ")
    assert answer.err.count("\n") == 1, answer.err
    for word in words:
        assert word in answer.err


# ---- mistakes ----


def test_help_names_the_commands(trunkline: Callable[..., Answer]) -> None:
    answer = trunkline("--help")
    assert answer.code == 0
    assert all(word in answer.out for word in ("run", "serve", "monitor", "ui", "report"))
    assert trunkline("run", "--help").code == 0


def test_without_a_command_there_is_help(trunkline: Callable[..., Answer]) -> None:
    answer = trunkline()
    assert answer.code == 2
    assert "Commands" in answer.out + answer.err
    assert "Traceback" not in answer.err


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["--nosuch"], "--nosuch"),
        (["nosuch"], "nosuch"),
        (["run", "--nosuch"], "--nosuch"),
        (["run", "--set"], "--set"),
        (["serve", "nosuch"], "nosuch"),
        (["serve", "vision", "--port", "http"], "--port"),
    ],
)
def test_a_wrong_word_is_one_line(arguments: list[str], word: str, trunkline: Callable[..., Answer]) -> None:
    one_line(trunkline(*arguments), 2, word)


def test_the_installed_command_itself() -> None:
    """As a process: nothing is printed at import, the exit code arrives."""
    answer = subprocess.run(
        [sys.executable, "-m", "flows.cli", "run", "--recipe", "nosuch"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    one_line(Answer(answer.returncode, answer.stdout, answer.stderr), 11, "no recipe `nosuch`", "cifar10")
    assert answer.stdout == ""


@pytest.mark.parametrize("command", [["run"], ["serve", "vision"], ["ui"]])
def test_a_wrong_key_in_params_is_one_line(
    command: list[str], home: Path, trunkline: Callable[..., Answer]
) -> None:
    tiny_clone.build(home)
    text = (home / "params.yaml").read_text()
    (home / "params.yaml").write_text(text.replace("mask_ratio:", "mask_ration:"))
    one_line(trunkline(*command), 11, "params.yaml", "mask_ration")


@pytest.mark.parametrize("command", [["run"], ["serve", "vision"], ["ui"], ["report"]])
def test_another_folder_is_refused(
    command: list[str], in_folder: Path, trunkline: Callable[..., Answer]
) -> None:
    one_line(trunkline(*command), 11, "params.yaml")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--set", "pretrain.mask_ratio=7"], ["pretrain.mask_ratio"]),
        (["--set", "nosuch=7"], ["nosuch"]),
        (["--dataset", "nosuch"], ["nosuch"]),
        (["--set", "ingest.source=gone"], ["ingest.source", "gone"]),
    ],
)
def test_a_wrong_override_is_found_before_anything_starts(
    arguments: list[str], words: list[str], home: Path, trunkline: Callable[..., Answer]
) -> None:
    tiny_clone.build(home)
    one_line(trunkline("run", *arguments), 11, *words)
    assert tiny_clone.executed(home) == []


def test_params_that_are_a_folder_are_named(home: Path, trunkline: Callable[..., Answer]) -> None:
    (home / "params.yaml").unlink()
    (home / "params.yaml").mkdir()
    one_line(trunkline("run"), 11, "params.yaml")


@pytest.mark.parametrize("command", [["run"], ["sweep", "mine.yaml"]])
def test_a_read_only_clone_is_told_before_a_server_starts(
    command: list[str], home: Path, trunkline: Callable[..., Answer], monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_clone.build(home)
    (home / "mine.yaml").write_text("metric: pretrain.top1\ngrid: {seed: [1, 2]}\n")

    def refuse(*arguments: object, **options: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system", str(home))

    monkeypatch.setattr(workspace.tempfile, "TemporaryFile", refuse)
    one_line(trunkline(*command), 74, "read-only", str(home))
    assert tiny_clone.executed(home) == []


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        ([], 2, ["FILE"]),
        (["nosuch"], 11, ["no sweep file `nosuch`"]),
        (["mine.yaml"], 11, ["mine.yaml", "`finetune.lr`"]),
        (["mine.yaml", "--parallel", "-1"], 2, ["parallel"]),
    ],
)
def test_a_mistake_in_a_sweep_is_one_line(
    arguments: list[str], code: int, words: list[str], home: Path, trunkline: Callable[..., Answer]
) -> None:
    tiny_clone.build(home)
    (home / "mine.yaml").write_text("metric: pretrain.top1\ngrid: {finetune.lr: [1]}\n")
    answer = trunkline("sweep", *arguments)
    assert answer.code == code
    assert all(word.lower() in answer.err.lower() for word in words), answer.err
    assert not (home / ".trunkline").exists()


def test_a_dry_run_prints_the_points_and_makes_nothing(home: Path, trunkline: Callable[..., Answer]) -> None:
    tiny_clone.build(home)
    (home / "mine.yaml").write_text("metric: pretrain.top1\ngrid: {seed: [1, 2]}\n")
    answer = trunkline("sweep", "mine.yaml", "--dry-run")
    assert answer.code == 0, answer
    lines = answer.out.splitlines()
    assert lines[1].split()[1:] == ["1", "2:", "ingest,", "pretrain"]
    assert lines[2].split()[1:] == ["2", "1:", "pretrain"], "ingest is the first point's"
    assert "at most 3 stages" in answer.out
    assert not (home / ".trunkline").exists()


# ---- serve ----


def test_an_occupied_port_is_found_before_anything_is_fetched(
    occupied: int, home: Path, trunkline: Callable[..., Answer], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: object) -> None:
        raise AssertionError("the registry was asked")

    monkeypatch.setattr(serve, "find", refuse)
    one_line(trunkline("serve", "vision", "--port", str(occupied)), 74, str(occupied))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--model", "nosuch"], ["no model 'nosuch'", MODEL]),
        (["--model", "it's"], ["no model", MODEL]),
        (["--alias", "previous"], ["no alias 'previous'", "champion"]),
        (["--alias", "Champion"], ["no alias 'Champion'"]),
        (["--alias", "not an alias!"], ["no alias"]),
        (["--version", "7"], ["no version '7'", "1, 2"]),
        (["--variant", "fp64"], ["variant", "fp64"]),
        (["--port", "70000"], ["port", "70000"]),
    ],
)
def test_what_does_not_exist_is_answered_with_what_does(
    arguments: list[str], words: list[str], two_versions: Params, trunkline: Callable[..., Answer]
) -> None:
    port = [] if "--port" in arguments else ["--port", "0"]
    one_line(trunkline("serve", "vision", *arguments, *port), 11, *words)


def test_an_empty_registry_says_what_to_do(home: Path, trunkline: Callable[..., Answer]) -> None:
    one_line(trunkline("serve", "vision", "--port", "0"), 11, MODEL, "make run")


def test_versions_are_found_by_alias_and_number(two_versions: Params) -> None:
    assert serve.find(two_versions, MODEL, "champion", "").version == "2"
    assert serve.find(two_versions, MODEL, "champion", "1").version == "1"
    with pytest.raises(DataError):
        serve.find(two_versions, MODEL, "", "")


def test_a_version_is_fetched_once(two_versions: Params, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fetched: list[str] = []

    def download(params: Params, version: Version, folder: Path) -> None:
        fetched.append(version.version)
        (folder / "model.onnx").write_text("weights")
        if len(fetched) == 1:
            raise ConnectionResetError("in the middle")

    monkeypatch.setattr(registry, "download_version", download)
    version = registry.version_of(two_versions, MODEL, "2")
    with pytest.raises(ConnectionResetError):
        serve.fetch(two_versions, version)
    folder = serve.fetch(two_versions, version)
    assert serve.fetch(two_versions, version) == folder
    assert fetched == ["2", "2"], "a download that broke off is not taken for a whole one"
    assert (folder / "model.onnx").read_text() == "weights"
    assert [path.name for path in folder.parent.iterdir()] == ["2-abcdefabcdef"]


def test_overrides_are_checked(home_params: Params) -> None:
    assert serve.override(home_params.serve, {"port": 1, "host": "::1"}).port == 1
    with pytest.raises(ConfigError, match="--port"):
        serve.override(home_params.serve, {"port": -7})


# ---- ui ----


@pytest.mark.parametrize("which", ["--prefect-port", "--mlflow-port"])
def test_an_occupied_port_of_the_pages_is_one_line(
    which: str, occupied: int, home: Path, trunkline: Callable[..., Answer]
) -> None:
    one_line(trunkline("ui", which, str(occupied)), 74, str(occupied))
