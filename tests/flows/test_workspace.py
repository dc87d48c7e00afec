"""Overrides get a folder of their own: merged params, mirrored code, the clone's cache, kept results."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import tiny_clone
import yaml

from flows import dvc_stage, params, paths, workspace
from flows.errors import ConfigError, DataError


@pytest.fixture
def clone(in_folder: Path) -> Path:
    return tiny_clone.build(in_folder)


def test_without_overrides_it_is_the_clone_itself(clone: Path) -> None:
    place = workspace.prepare()
    assert (place.root, place.settings) == (clone, ())
    assert place.params == params.load(clone / "params.yaml")
    assert not paths.workspaces().exists()


@pytest.mark.parametrize("settings", [["seed=0"], ["model.image_size=32", "pretrain.mask_ratio=0.6"]])
def test_overrides_that_change_nothing_are_the_clone_too(settings: list[str], clone: Path) -> None:
    assert workspace.prepare("digits", "", settings).root == clone


def test_data_set_then_recipe_then_settings(clone: Path, tmp_path: Path) -> None:
    (clone / "images").mkdir()
    (clone / "recipes/mine.yaml").write_text(
        "model: {image_size: 128}\npretrain: {mask_ratio: 0.5, flip: false}\n"
    )
    place = workspace.prepare("images", "mine", ["pretrain.mask_ratio=0.4"])
    merged = place.params
    assert (merged.ingest.dataset, merged.ingest.source) == ("folder", str(clone / "images"))
    assert merged.model.window_size == 8, "from recipes/folder.yaml, which comes with the data set"
    assert merged.model.image_size == 128, "the recipe comes after it"
    assert merged.pretrain.flip is False
    assert merged.pretrain.mask_ratio == 0.4, "settings come last"
    assert merged == params.load(place.root / "params.yaml")
    assert "pretrain.mask_ratio=0.4" in place.settings
    assert not any(setting.startswith("seed=") for setting in place.settings)


@pytest.mark.parametrize(
    ("recipe", "settings", "words"),
    [
        ("nosuch", [], "no recipe `nosuch`; there are cifar10"),
        ("", ["pretrain.lr=1"], "unknown key `pretrain.lr`"),
        ("", ["pretrain.mask_ratio=2"], "pretrain.mask_ratio"),
        ("", ["pretrain.mask_ratio"], "key=value"),
        ("bad.yaml", [], "unknown key `modle`"),
        ("list.yaml", [], "list.yaml must hold sections"),
        ("recipes", [], "no recipe `recipes`"),
    ],
)
def test_a_mistake_is_named(recipe: str, settings: list[str], words: str, clone: Path) -> None:
    (clone / "bad.yaml").write_text("modle: {image_size: 32}\n")
    (clone / "list.yaml").write_text("- seed\n")
    with pytest.raises(ConfigError) as caught:
        workspace.prepare("", recipe, settings)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not paths.workspaces().exists(), "nothing is made for a mistake"


def test_an_unknown_data_set_is_named(clone: Path) -> None:
    with pytest.raises(DataError, match="nosuch is neither"):
        workspace.prepare("nosuch")


@pytest.mark.parametrize("name", ["a b'c#d,e.yaml", "ünï.yaml", "..yaml", "x" * 200 + ".yaml"])
def test_odd_recipe_paths_give_a_plain_folder(name: str, clone: Path, tmp_path: Path) -> None:
    folder = tmp_path / "elsewhere; rm -rf"
    folder.mkdir()
    (folder / name).write_text("seed: 5\n")
    root = workspace.prepare("", str(folder / name)).root
    assert root.parent == paths.workspaces()
    assert all(letter.isascii() and (letter.isalnum() or letter in "-_") for letter in root.name)
    assert len(root.name) <= 60
    assert root.name[0].isalnum()
    assert params.load(root / "params.yaml").seed == 5


def test_equal_overrides_share_a_folder_others_do_not(clone: Path) -> None:
    first = workspace.prepare("", "", ["seed=1", "scale.subset_seed=2"]).root
    assert workspace.prepare("", "", ["scale.subset_seed=2", "seed=1"]).root == first
    assert workspace.prepare("", "", ["seed=2", "scale.subset_seed=2"]).root != first


def test_code_is_mirrored_and_results_stay(clone: Path) -> None:
    before = (clone / "params.yaml").read_bytes()
    root = workspace.prepare("", "", ["seed=1"]).root
    assert (clone / "params.yaml").read_bytes() == before
    assert (root / "flows/inner/one.py").read_text() == "ONE = 1\n"
    unchanged = (root / "models/net.py").stat().st_mtime_ns

    (root / "dvc.lock").write_text("schema: '2.0'\n")
    (root / "artifacts/data").mkdir(parents=True)
    (root / "artifacts/data/manifest.json").write_text("{}")
    (clone / "flows/stage.sh").write_text("changed\n")
    (clone / "flows/inner/one.py").unlink()
    (clone / "flows/inner").rmdir()
    (clone / "flows/new").mkdir()
    (clone / "flows/new/two.py").write_text("TWO = 2\n")
    (clone / "flows/new/__pycache__").mkdir()
    (clone / "flows/new/__pycache__/two.pyc").write_bytes(b"x")
    assert workspace.prepare("", "", ["seed=1"]).root == root

    assert (root / "flows/stage.sh").read_text() == "changed\n"
    assert (root / "flows/new/two.py").read_text() == "TWO = 2\n"
    assert not (root / "flows/inner").exists()
    assert not (root / "flows/new/__pycache__").exists()
    assert (root / "models/net.py").stat().st_mtime_ns == unchanged, "an unchanged file is not touched"
    assert (root / "dvc.lock").is_file()
    assert (root / "artifacts/data/manifest.json").is_file()


def test_the_clone_is_found_from_inside(clone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = workspace.prepare("", "", ["seed=1"]).root
    monkeypatch.delenv("TRUNKLINE_HOME")
    monkeypatch.chdir(root)
    assert paths.home() == clone
    assert workspace.prepare("", "", ["seed=1"]).root == root


@pytest.mark.parametrize("name", ["plain", "odd # name, 'x'"])
def test_dvc_works_inside_and_shares_the_cache(
    name: str, in_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clone = tiny_clone.build(in_folder / name)
    monkeypatch.setenv("TRUNKLINE_HOME", str(clone))
    monkeypatch.chdir(clone)
    said: list[str] = []
    assert dvc_stage.run_stage(clone, "ingest", {}, said.append)[0] == "executed"
    root = workspace.prepare("", "", ["pretrain.mask_ratio=0.5"]).root
    stages = {info.name: info for info in dvc_stage.read_graph(root)}
    assert set(stages) == {"ingest", "pretrain", "finetune@scratch", "parity"}
    assert stages["pretrain"].needs == ("ingest",)
    assert dvc_stage.run_stage(root, "ingest", {}, said.append)[0] == "restored", "equal stages run once"
    assert tiny_clone.executed(root) == []
    assert (root / "artifacts/data/result.txt").read_text() == "ingest\n"
    assert not (root / ".dvc/cache").exists()
    lock = yaml.safe_load((root / "dvc.lock").read_text())
    assert set(lock["stages"]) == {"ingest"}
    assert os.path.samefile(clone / ".dvc/cache", paths.home() / ".dvc/cache")


def test_a_recipe_that_names_a_data_set_finds_it(
    clone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "data" / "cifar10"
    folder.mkdir(parents=True)
    for name in ("train.zip", "test.zip", "classes.txt"):
        (folder / name).touch()
    monkeypatch.setenv("TRUNKLINE_DATA", str(tmp_path / "data"))
    ingest = workspace.prepare(recipe="cifar10").params.ingest
    assert (ingest.dataset, Path(ingest.source)) == ("cifar10", folder)


def test_on_the_language_track_a_data_set_is_text_and_names_the_workspace(clone: Path) -> None:
    texts = clone / "My texts"
    texts.mkdir()
    (texts / "a.txt").write_text("a text")
    chosen = ["objective=causal_lm"]
    place = workspace.prepare("My texts", settings=chosen)
    assert place.params.ingest_text.dataset == "files"
    assert place.params.ingest_text.source == str(texts)
    assert place.params.ingest == workspace.prepare().params.ingest, "images stay as they are"
    assert place.root.name.startswith("My-texts-")
    assert workspace.prepare(settings=chosen).root.name.startswith("pydoc-")
    assert workspace.prepare(str(texts / "a.txt"), settings=chosen).root != place.root
    with pytest.raises(DataError, match=r"DATASET=nothing does not exist.*folder of \.txt and \.md"):
        workspace.prepare("nothing", settings=chosen)
    with pytest.raises(ConfigError, match="dataset files needs a source"):
        workspace.prepare(settings=[*chosen, "ingest_text.dataset=files"])
