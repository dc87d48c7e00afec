"""One DVC stage as a child process: what happened, why it failed, what is left running."""

from __future__ import annotations

import subprocess
import sys
import textwrap
import threading
from pathlib import Path
from typing import Any

import psutil
import pytest

from flows import dvc_stage
from flows.dvc_stage import StageFailed, read_graph, read_receipt, run_stage, terminate_tree
from flows.errors import TrunklineError

pytestmark = pytest.mark.usefixtures("in_folder")


def write_pipeline(root: Path, stages: str) -> None:
    """A DVC root without git whose stages are `stages` (YAML)."""
    for folder in (".dvc", "artifacts/receipts"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    (root / ".dvc" / "config").write_text("[core]\n    no_scm = true\n    analytics = false\n")
    (root / "dvc.yaml").write_text("stages:\n" + textwrap.indent(textwrap.dedent(stages), "  "))


def run(root: Path, stage: str, **environment: str) -> tuple[str, dict[str, Any], list[str]]:
    lines: list[str] = []
    status, receipt = run_stage(root, stage, environment, lines.append)
    return status, receipt, lines


MAKE = r"""
make:
  cmd: printf '{"run_id":"%s"}' $RUN > artifacts/receipts/make.json && cat word > made
  deps: [word]
  outs: [made, artifacts/receipts/make.json]
"""


def test_a_stage_is_executed_then_unchanged_then_restored(in_folder: Path) -> None:
    write_pipeline(in_folder, MAKE)
    (in_folder / "word").write_text("first")
    assert run(in_folder, "make", RUN="1")[:2] == ("executed", {"run_id": "1"})
    assert run(in_folder, "make", RUN="2")[:2] == ("unchanged", {"run_id": "1"})
    (in_folder / "word").write_text("second")
    assert run(in_folder, "make", RUN="3")[:2] == ("executed", {"run_id": "3"})
    (in_folder / "word").write_text("first")
    status, receipt, _ = run(in_folder, "make", RUN="4")
    assert (status, receipt) == ("restored", {"run_id": "1"}), "the receipt tells who really made the bytes"
    assert (in_folder / "made").read_text() == "first"


def test_lost_outputs_come_back_from_the_cache(in_folder: Path) -> None:
    write_pipeline(in_folder, MAKE)
    (in_folder / "word").write_text("first")
    run(in_folder, "make", RUN="1")
    (in_folder / "made").unlink()
    (in_folder / "artifacts/receipts/make.json").unlink()
    assert run(in_folder, "make", RUN="2")[:2] == ("restored", {"run_id": "1"})


@pytest.mark.parametrize(
    ("command", "exit_code", "can_retry"),
    [
        ("exit 10", 10, False),
        ("exit 11", 11, False),
        ("exit 12", 12, False),
        ("exit 74", 74, False),
        ("exit 75", 75, True),
        ("kill -KILL $$", 137, True),
        ("sh -c 'kill -KILL $$'; exit $?", 137, True),
        ("no-such-command", 127, False),
    ],
)
def test_the_exit_code_of_the_command_is_found(
    command: str, exit_code: int, can_retry: bool, in_folder: Path
) -> None:
    write_pipeline(in_folder, f"make:\n  cmd: {command}\n")
    with pytest.raises(StageFailed) as caught:
        run(in_folder, "make")
    assert (caught.value.exit_code, caught.value.can_retry) == (exit_code, can_retry)


def test_a_failure_says_the_stage_own_words_and_how_to_repeat_it(in_folder: Path) -> None:
    write_pipeline(
        in_folder,
        """
        make:
          cmd: 'echo first; echo "it exited with 3 apples"; echo "error: make: too few images" >&2; exit 11'
        """,
    )
    with pytest.raises(StageFailed) as caught:
        run(in_folder, "make")
    message, repeat = str(caught.value).splitlines()
    assert message == "make: too few images"
    assert repeat.strip() == f"repeat: cd {in_folder} && dvc repro --single-item make"
    assert caught.value.exit_code == 11


def test_an_interrupted_stage_needs_no_advice(in_folder: Path) -> None:
    write_pipeline(in_folder, "make:\n  cmd: 'echo \"error: make: stopped\"; exit 75'\n")
    with pytest.raises(StageFailed) as caught:
        run(in_folder, "make")
    assert str(caught.value) == "make: stopped"


def test_a_failure_without_words_shows_the_last_lines(in_folder: Path) -> None:
    write_pipeline(in_folder, "make:\n  cmd: 'seq 1 100; echo Traceback; exit 1'\n")
    with pytest.raises(StageFailed) as caught:
        run(in_folder, "make")
    shown = str(caught.value).splitlines()
    assert shown[0] == "make failed:"
    assert {"99", "100", "Traceback"} <= set(shown)
    assert "50" not in shown


def test_what_dvc_itself_refuses_is_said_in_its_words(in_folder: Path) -> None:
    write_pipeline(in_folder, "make:\n  cmd: 'true'\n  deps: [absent]\n")
    with pytest.raises(StageFailed, match="'absent' does not exist") as caught:
        run(in_folder, "make")
    assert not caught.value.can_retry


def test_lines_arrive_while_the_stage_runs_and_without_colours(in_folder: Path) -> None:
    """The command waits for a file that only the reader of its first line makes."""
    write_pipeline(
        in_folder,
        r"""
        make:
          cmd: printf '\033[31mred\033[0m\n'; until test -e seen; do sleep 0.05; done; echo "$WORD"
        """,
    )
    lines: list[str] = []

    def hear(line: str) -> None:
        lines.append(line)
        if line == "red":
            (in_folder / "seen").touch()

    status, _ = run_stage(in_folder, "make", {"WORD": "passed on"}, hear)
    assert status == "executed"
    assert "passed on" in lines


def test_a_reader_that_fails_leaves_no_process(in_folder: Path) -> None:
    write_pipeline(in_folder, "make:\n  cmd: 'echo begun; sleep 1000'\n")

    def fail(line: str) -> None:
        if line == "begun":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_stage(in_folder, "make", {}, fail)
    assert not [child for child in psutil.Process().children(recursive=True) if "sleep" in child.name()]


def test_a_held_lock_is_waited_for(in_folder: Path) -> None:
    write_pipeline(in_folder, "make:\n  cmd: 'true'\n")
    holder = """
import sys
from dvc.lock import make_lock
with make_lock(".dvc/tmp/lock", tmp_dir=".dvc/tmp", friendly=False):
    print("held", flush=True)
    sys.stdin.readline()
"""
    (in_folder / ".dvc" / "tmp").mkdir()
    process = subprocess.Popen(
        [sys.executable, "-c", holder], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdin
    assert process.stdout
    assert process.stdout.readline() == "held\n"
    outcome: list[str] = []
    waiting = threading.Thread(target=lambda: outcome.append(run(in_folder, "make")[0]))
    waiting.start()
    waiting.join(6)  # DVC without the switch gives up after 3 s
    assert waiting.is_alive()
    assert outcome == []
    process.communicate("\n")
    waiting.join(60)
    assert outcome == ["executed"]


def test_a_stage_that_another_process_runs_can_be_tried_again(in_folder: Path) -> None:
    write_pipeline(
        in_folder,
        """
        make:
          cmd: 'echo begun; until test -e seen; do sleep 0.05; done; touch made'
          outs: [made]
        """,
    )
    refused: list[StageFailed] = []

    def start_another(line: str) -> None:
        if line == "begun":
            try:
                run(in_folder, "make")
            except StageFailed as error:
                refused.append(error)
            finally:
                (in_folder / "seen").touch()

    run_stage(in_folder, "make", {}, start_another)
    assert refused[0].can_retry


TREE = """
import subprocess, sys, time
depth = int(sys.argv[1])
if depth:
    child = subprocess.Popen([sys.executable, "-c", sys.argv[2], str(depth - 1), sys.argv[2]])
print(depth, flush=True)
time.sleep(1000)
"""


@pytest.mark.parametrize("deaf", [False, True], ids=["obedient", "deaf"])
def test_a_tree_of_processes_ends_with_its_grandchildren(deaf: bool) -> None:
    ignore = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)\n" if deaf else ""
    program = ignore + TREE
    root = subprocess.Popen([sys.executable, "-c", program, "2", program], stdout=subprocess.PIPE, text=True)
    assert root.stdout
    assert sorted(root.stdout.readline() for _ in range(3)) == ["0\n", "1\n", "2\n"]
    family = [*psutil.Process(root.pid).children(recursive=True), psutil.Process(root.pid)]
    assert len(family) == 3
    terminate_tree(root.pid, patience_s=0.5 if deaf else 30)
    root.wait(30)
    _, alive = psutil.wait_procs(family, timeout=30)
    assert alive == []
    terminate_tree(root.pid)  # what is gone already is no error


def test_the_graph_tells_needs_and_sections(in_folder: Path) -> None:
    write_pipeline(
        in_folder,
        """
        alone:
          cmd: 'true'
        second:
          cmd: 'true'
          deps: [made]
          params: [seed, model.size]
        first:
          cmd: touch made
          outs: [made]
        """,
    )
    (in_folder / "params.yaml").write_text("seed: 0\nmodel: {size: 1}\n")
    alone, first, second = sorted(read_graph(in_folder), key=lambda info: info.name)
    assert [info.name for info in read_graph(in_folder)] == ["alone", "first", "second"], (
        "as written, needs first"
    )
    assert (alone.name, alone.needs) == ("alone", ())
    assert (first.name, first.needs, first.sections) == ("first", (), ())
    assert (second.name, second.needs) == ("second", ("first",))
    assert set(second.sections) == {"seed", "model.size"}


def test_a_broken_graph_is_one_sentence(in_folder: Path) -> None:
    write_pipeline(in_folder, "a: {cmd: 'true', outs: [x]}\nb: {cmd: 'true', outs: [x]}\n")
    with pytest.raises(TrunklineError, match="DVC cannot read the pipeline"):
        read_graph(in_folder)


def test_a_stage_without_receipt_has_an_empty_one(in_folder: Path) -> None:
    assert read_receipt(in_folder, "finetune@scratch") == {}
    assert dvc_stage.StageInfo("finetune@scratch", (), ()).family == "finetune"
