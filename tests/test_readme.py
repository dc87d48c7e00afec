"""The README's commands, files and diagram exist."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from flows.cli import app

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```(?:sh|bash)\n(.*?)```", README, re.DOTALL)
COMMANDS = [line.strip() for block in BLOCKS for line in block.splitlines() if line.strip()]


def test_there_are_commands() -> None:
    assert any(command.startswith("make run") for command in COMMANDS)
    assert any(command.startswith("make test") for command in COMMANDS)


@pytest.mark.parametrize("target", sorted({m for c in COMMANDS for m in re.findall(r"^make ([a-z]+)", c)}))
def test_make_targets_exist(target: str) -> None:
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE)


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("trunkline ")])
def test_trunkline_commands_parse(command: str) -> None:
    words = command.split("#")[0].split()[1:]
    named = [word for word in words if not word.startswith("-")][:2]
    runner = CliRunner()
    depth = 2 if named[0] in ("serve", "study", "plan", "import", "export") else 1
    answer = runner.invoke(app, [*named[:depth], "--help"])
    assert answer.exit_code == 0
    for option in (word for word in words if word.startswith("--")):
        assert option.split("=")[0] in answer.output, option


def test_linked_files_exist() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        if "://" not in target:
            assert (ROOT / target).exists(), target


def test_the_diagram_is_the_graph_of_dvc_yaml() -> None:
    drawn = subprocess.run(
        [sys.executable, "-m", "dvc", "dag", "--mermaid"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout

    def edges(text: str) -> set[tuple[str, str]]:
        names = dict(re.findall(r'(node\d+)\["([^"]+)"\]', text))
        return {(names[a], names[b]) for a, b in re.findall(r"(node\d+)-->(node\d+)", text)}

    assert edges(README) == edges(drawn)
    assert edges(drawn)
