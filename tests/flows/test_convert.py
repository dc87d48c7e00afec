"""`trunkline convert` as its user meets it: what is printed, what is written, and what is left alone."""

from __future__ import annotations

import errno
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import yacs_like
from safetensors import safe_open
from safetensors.torch import load_file

import models
from flows import cli, convert
from models import checkpoints
from models.backbones.swin_v2 import SwinV2Size
from models.classification import Classifier


class Answer(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture
def trunkline(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Answer]:
    def run(*arguments: object) -> Answer:
        monkeypatch.setattr(sys, "argv", ["trunkline", "convert", *map(str, arguments)])
        code = 0
        try:
            cli.main()
        except SystemExit as error:
            code = int(error.code or 0)
        captured = capsys.readouterr()
        return Answer(code, captured.out, captured.err)

    return run


@pytest.fixture(autouse=True)
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder, outside of any workspace: converting needs none."""
    monkeypatch.setitem(models.BACKBONES, "swin_v2_test", SwinV2Size(16, (1, 2), (2, 4)))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def source(workplace: Path) -> Path:
    """A classifier in the official layout, without the buffers that would tell its windows."""
    model = Classifier(models.create("swin_v2_test", image_size=32, window_size=4), 5)
    state = {name.removeprefix("backbone."): value for name, value in model.state_dict().items()}
    path = workplace / "swinv2_test_patch4_window4_32.pth"
    torch.save({"model": state, "epoch": 299}, path)
    return path


SIZES = ("--image-size", "32", "--window-size", "4")


def refused(answer: Answer, code: int, *words: str) -> None:
    assert answer.code == code, answer
    assert answer.err.startswith("error: ")
    assert answer.err.count("\n") == 1
    for word in words:
        assert word in answer.err, answer.err


def test_a_folder_with_weights_and_config_is_written_and_everything_said(
    trunkline: Callable[..., Answer], source: Path
) -> None:
    answer = trunkline(source, "ours", *SIZES)
    assert answer.code == 0, answer
    for words in (
        "official layout, a classifier",
        "swin_v2_test",
        "epoch left aside",
        "does not tell the win",
    ):
        assert words in answer.out, answer.out
    assert sorted(path.name for path in Path("ours").iterdir()) == ["config.json", "model.safetensors"]
    config = json.loads(Path("ours/config.json").read_text())
    assert config["backbone"] == {
        "name": "swin_v2_test", "image_size": 32, "patch_size": 4, "window_size": 4,
    }  # fmt: skip
    assert (config["task"], config["num_classes"]) == ("classification", 5)
    assert config["converted_from"]["layout"] == "official"
    model = Classifier(models.create("swin_v2_test", image_size=32, window_size=4), 5)
    model.load_state_dict(load_file("ours/model.safetensors"))


def test_a_chain_through_every_layout_and_kind_of_file_ends_in_the_same_weights(
    trunkline: Callable[..., Answer], source: Path
) -> None:
    """Sizes are given once; every later step knows them from what is written beside the weights."""
    chain: list[tuple[str, str]] = [
        ("a", "ours"), ("b.safetensors", "timm"), ("c", "transformers"), ("d.safetensors", "official"),
        ("d.pth", "official"), ("e", "ours"),
    ]  # fmt: skip
    last: Path = source
    for target, layout in chain:
        answer = trunkline(last, target, "--to", layout, *(SIZES if last == source else ()))
        assert answer.code == 0, answer
        last = Path(target)
    with safe_open("b.safetensors", framework="pt") as file:
        assert json.loads(file.metadata()["trunkline"])["backbone"]["window_size"] == 4
    first, final = load_file("a/model.safetensors"), load_file("e/model.safetensors")
    assert first.keys() == final.keys()
    assert all(torch.equal(first[name], final[name]) for name in first)
    assert torch.load("d.pth", weights_only=True)["model"].keys() == load_file("d.safetensors").keys()


def test_what_the_checkpoint_was_trained_with_is_kept_for_other_windows(
    trunkline: Callable[..., Answer], source: Path
) -> None:
    assert trunkline(source, "small", *SIZES).code == 0
    assert trunkline("small", "large", "--image-size", 64, "--window-size", 8).code == 0
    config = json.loads(Path("large/config.json").read_text())
    assert config["backbone"]["pretrained_windows"] == [4, 4]
    assert trunkline("large", "larger", "--to", "transformers", "--image-size", 128).code == 0
    config = json.loads(Path("larger/config.json").read_text())
    assert (config["image_size"], config["window_size"]) == (128, 8)
    assert config["pretrained_window_sizes"] == [4, 4]


def test_sizes_that_nothing_tells_are_asked_for_and_the_name_is_taken_as_a_hint(
    trunkline: Callable[..., Answer], source: Path
) -> None:
    answer = trunkline(source, "out")
    refused(answer, 11, "--image-size", "--window-size", "suggests --image-size 32 --window-size 4")
    assert not Path("out").exists()


@pytest.mark.parametrize("target", ["out", "out.safetensors", "out.pth"])
def test_a_refused_conversion_leaves_nothing_behind(
    target: str, trunkline: Callable[..., Answer], source: Path
) -> None:
    content = torch.load(source)
    content["model"]["norm.weight"][0] = float("nan")
    torch.save(content, source)
    before = sorted(Path().iterdir())
    refused(trunkline(source, target, *SIZES), 11, "norm.weight", "not finite")
    content["model"]["surplus"] = content["model"].pop("norm.weight")
    torch.save(content, source)
    refused(trunkline(source, target, *SIZES), 11, "left over: surplus", "missing: norm.weight")
    assert sorted(Path().iterdir()) == before


@pytest.mark.parametrize("target", ["out", "out.safetensors"])
def test_a_full_disk_leaves_the_old_result(
    target: str, trunkline: Callable[..., Answer], source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert trunkline(source, target, *SIZES).code == 0
    files = {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()}

    def full(tensors: Any, path: Path, **_: Any) -> None:
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(convert, "save_file", full)
    refused(trunkline(source, target, *SIZES, "--force"), 74, "disk is full")
    assert {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()} == files


def test_nothing_is_overwritten_unless_told_and_never_a_folder_of_other_things(
    trunkline: Callable[..., Answer], source: Path
) -> None:
    assert trunkline(source, "out", *SIZES).code == 0
    refused(trunkline(source, "out", *SIZES), 11, "exists", "--force")
    assert trunkline(source, "out", *SIZES, "--force").code == 0
    Path("out/notes.txt").write_text("mine")
    refused(trunkline(source, "out", *SIZES, "--force"), 11, "notes.txt")
    refused(trunkline(source, source, *SIZES, "--force"), 11, "is what is converted")
    refused(trunkline("out/model.safetensors", "out", "--force"), 11)
    refused(trunkline(source, ".", *SIZES, "--force"), 11)
    assert Path("out/notes.txt").read_text() == "mine"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--to", "torchvision"), ("--to", "official, timm, transformers")),
        (("--head", "cut"), ("--head", "keep, drop")),
        (("--tables", "linear"), ("--tables", "geometric")),
        (("--model", "resnet50"), ("resnet50", "swin_v2_tiny")),
        (("--model", "swin_v2_tiny"), ("96 channels and blocks 2-2-6-2", "16 channels, blocks 1-2")),
        (("--pretrained-windows", "8;8"), ("8;8", "12,12,12,6")),
        (("--pretrained-windows", "8,8,8"), ("3 pretrained windows", "2 stages")),
        (("--window-size", "3"), ("windows of 3x3",)),
        (("--image-size", "33"), ("33",)),
        (("--max-gb", "0.000001"), ("GiB",)),
    ],
)
def test_wrong_options_are_one_line(
    options: tuple[str, str], words: tuple[str, ...], trunkline: Callable[..., Answer], source: Path
) -> None:
    refused(trunkline(source, "out", *SIZES, *options), 11, *words)
    assert not Path("out").exists()


def test_a_training_checkpoint_with_its_config_object_is_refused_with_the_way_out(
    trunkline: Callable[..., Answer], source: Path
) -> None:
    content = torch.load(source)
    torch.save({**content, "config": yacs_like.CfgNode({"MODEL": {}})}, source)
    answer = trunkline(source, "out", *SIZES)
    refused(answer, 11, "yacs_like.CfgNode", "weights_only=False", "with yacs_like installed")
    # the way out that it names works
    command = answer.err.split('python -c "')[1].split('"')[0]
    exec(command)
    assert trunkline("weights.pth", "out", *SIZES).code == 0


def test_the_head_can_be_left_out(trunkline: Callable[..., Answer], source: Path) -> None:
    answer = trunkline(source, "out", *SIZES, "--head", "drop")
    assert "dropped  2 (the head, as told): head.weight, head.bias" in answer.out
    found = checkpoints.infer_model(Path("out"))
    assert (found.task, found.num_classes) == ("backbone", None)
