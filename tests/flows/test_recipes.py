"""Every recipe fits params.yaml, builds its model, says true arithmetic, and shrinks to a smoke run."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import tiny_clone
import torch

import models
from flows import params, recipes, workspace
from flows.errors import ConfigError
from flows.params import Model, Params, Training
from models.classification import Classifier
from models.pretext.simmim import SimMIM

ROOT = Path(__file__).resolve().parents[2]
NAMES = sorted(recipes.known(ROOT))
PUBLISHED = [name for name in NAMES if name.startswith("imagenet/")]
FILES = sorted(path for path in (ROOT / "recipes/imagenet").rglob("*.yaml"))
IMAGES = {"in22k": 14_197_122}  # by the end of a recipe's name; else ImageNet-1K
ROW = re.compile(
    r"^\| (\w+) \| (none|\d+ epochs at \d+) \| (\d+) epochs at (\d+) \| ([\d.]+|–) \|", re.MULTILINE
)


@cache
def shipped() -> dict[str, Any]:
    """params.yaml; reading it takes longer than all that is done with it here."""
    return params.read(ROOT / "params.yaml")


@cache
def loaded(name: str) -> Params:
    return params.check(recipes.apply(shipped(), name, ROOT), name)


@cache
def network(size: Model) -> models.Backbone:
    """On the meta device."""
    arguments = size.model_dump()
    with torch.device("meta"):
        return models.create(arguments.pop("backbone"), **arguments, pretraining=True)


@pytest.mark.parametrize("name", NAMES)
def test_every_recipe_is_a_valid_overlay_that_changes_something(name: str) -> None:
    assert loaded(name) != params.check(shipped(), "params.yaml")
    assert all(change for _, change in recipes.layers(name, ROOT))


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_published_recipe_builds_its_networks(name: str) -> None:
    """On the meta device: sizes fit, at pretraining and at finetuning, and the head gets its classes."""
    checked = loaded(name)
    size, tuned = checked.model, checked.finetune_model()
    with torch.device("meta"):
        if checked.pretrain.pretext == "simmim":
            model = SimMIM(network(size), checked.pretrain.mask_unit, checked.pretrain.normalize_target)
            assert model.mask_grid == size.image_size // 32
        classifier = Classifier(network(tuned), 1000)
    assert classifier.head.out_features == 1000
    assert classifier.backbone.image_size == tuned.image_size
    assert checked.ingest.dataset == "folder"
    assert checked.evaluate.split == "val"


# ---- what the files say ------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_the_arithmetic_beside_the_values_is_true(path: Path) -> None:
    """`steps: 62500  # = 100 epochs · (1281167 // 2048)` and `lr: 8.0e-4  # = 2.0e-4 · 2048 / 512`."""
    for line in path.read_text().splitlines():
        key, _, rest = line.strip().partition(":")
        value, _, comment = rest.partition("#")
        comment = comment.removeprefix(" inferred:").strip().removeprefix("= ")
        if key in ("steps", "warmup_steps"):
            epochs, images, batch = re.fullmatch(r"(\d+) epochs · \((\d+) // (\d+)\)", comment).groups()  # type: ignore[union-attr]
            assert int(value) == int(epochs) * (int(images) // int(batch)), line
        elif key in ("lr", "warmup_lr", "min_lr") and "/ 512" in comment:
            base, batch = re.match(r"([\d.e-]+) · (\d+) / 512", comment).groups()  # type: ignore[union-attr]
            assert float(value) == pytest.approx(float(base) * int(batch) / 512), line
        if "inferred" in line:
            assert re.search(r"# inferred: \w.{5,}", line), f"no reason: {line}"


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_head_of_a_recipe_states_the_published_result_and_its_source(name: str) -> None:
    text = (ROOT / "recipes" / f"{name}.yaml").read_text()
    head = " ".join(line.lstrip("# ") for line in text.splitlines() if line.startswith("#"))
    assert re.search(r"Published: (\d\d\.\d+ % top-1 on ImageNet-1K \(the authors' |no accuracy)", head)


def test_the_page_lists_every_recipe_with_its_epochs_and_batch() -> None:
    """Steps · batch are the stated epochs, the learning rates follow the linear rule, results agree."""
    rows = ROW.findall((ROOT / "docs/recipes.md").read_text())
    assert sorted(f"imagenet/{row[0]}" for row in rows) == PUBLISHED
    for name, pretraining, epochs, batch, result in rows:
        checked = loaded(f"imagenet/{name}")
        images = next((count for end, count in IMAGES.items() if name.endswith(end)), 1_281_167)
        assert_epochs(checked.finetune.training, int(epochs), int(batch), images)
        if pretraining == "none":
            assert checked.pretrain.pretext == "none"
        else:
            epochs, batch = re.findall(r"\d+", pretraining)
            assert_epochs(checked.pretrain.training, int(epochs), int(batch), images)
        if result != "–":
            assert f"Published: {result} %" in (ROOT / f"recipes/imagenet/{name}.yaml").read_text()


def assert_epochs(training: Training, epochs: int, batch: int, images: int) -> None:
    assert training.batch_size == batch
    assert training.steps == epochs * (images // batch)
    assert training.warmup_steps in {count * (images // batch) for count in (5, 10, 20)}


# ---- bases -------------------------------------------------------------------------------------------------


@pytest.fixture
def clone(in_folder: Path) -> Path:
    return tiny_clone.build(in_folder)


def test_a_recipe_lies_over_its_base(clone: Path) -> None:
    (clone / "recipes/below.yaml").write_text("seed: 1\npretrain: {mask_ratio: 0.5, flip: true}\n")
    (clone / "recipes/above.yaml").write_text("base: below\npretrain: {mask_ratio: 0.4}\n")
    checked = workspace.prepare("", "above").params
    assert (checked.seed, checked.pretrain.flip, checked.pretrain.mask_ratio) == (1, True, 0.4)


@pytest.mark.parametrize(
    ("above", "words"),
    [
        ("base: nosuch", "`base` is 'nosuch', but there is no recipes/nosuch.yaml"),
        ("base: [cifar10]", "`base` is ['cifar10']"),
        ("base: ../params", "unknown key `nosuchkey`"),
        ("base: above", "has a base itself (`above`), but one level is the most"),
        ("base: second", "has a base itself (`cifar10`), but one level is the most"),
        ("base: typo", "typo.yaml: unknown key `modle`"),
    ],
)
def test_a_base_that_cannot_be_is_named(above: str, words: str, clone: Path) -> None:
    (clone / "recipes/above.yaml").write_text(f"{above}\nseed: 1\nnosuchkey: 1\n")
    (clone / "recipes/second.yaml").write_text("base: cifar10\n")
    (clone / "recipes/typo.yaml").write_text("modle: {image_size: 32}\n")
    with pytest.raises(ConfigError) as caught:
        workspace.prepare("", "above")
    assert words in str(caught.value)


def test_a_file_name_is_enough_where_it_is_unique(clone: Path) -> None:
    (clone / "recipes/imagenet/cifar10.yaml").write_text("seed: 1\n")
    (clone / "recipes/mine").mkdir()
    (clone / "recipes/mine/twin.yaml").write_text("seed: 1\n")
    (clone / "recipes/imagenet/twin.yaml").write_text("seed: 2\n")
    assert recipes.find("simmim_swin_base_800ep", clone).parent.name == "imagenet"
    assert recipes.find("cifar10", clone) == clone / "recipes/cifar10.yaml", "a whole name comes first"
    with pytest.raises(ConfigError, match="recipe `twin` could be imagenet/twin or mine/twin"):
        recipes.find("twin", clone)
    for hidden in ("smoke", "imagenet/base/simmim", "sweeps/learning_rates"):
        assert hidden not in recipes.known(clone)


# ---- data sets and smoke runs ------------------------------------------------------------------------------


def test_a_recipe_for_a_folder_asks_for_it(clone: Path) -> None:
    with pytest.raises(ConfigError, match="trains on a folder of images: name it with DATASET="):
        workspace.prepare("", "simmim_swin_base_800ep")
    (clone / "images").mkdir()
    by_name = workspace.prepare("images", "simmim_swin_base_800ep").params
    by_setting = workspace.prepare("", "simmim_swin_base_800ep", [f"ingest.source={clone}/images"]).params
    assert by_name.ingest == by_setting.ingest
    assert by_name.ingest.source == str(clone / "images")
    assert workspace.prepare("digits", "simmim_swin_base_800ep").params.ingest.dataset == "digits"


@pytest.mark.parametrize("name", NAMES)
def test_every_recipe_shrinks_and_keeps_its_switches(name: str) -> None:
    values = recipes.apply(shipped(), name, ROOT)
    full, small = loaded(name), params.check(recipes.shrink(values, ROOT), f"smoke {name}")
    size = small.finetune_model()
    assert sum(parameter.numel() for parameter in network(size).parameters()) < 2e6
    assert small.model.backbone.rsplit("_", 1)[0] == full.model.backbone.rsplit("_", 1)[0]
    for training in (small.pretrain.training, small.finetune.training):
        assert training.steps <= 6
        assert training.batch_size <= 16
    assert small.registered_model("digits") == "trunkline-smoke-digits"
    assert small.registered_model("digits") != full.registered_model("digits")
    for switch in ("pretext", "normalize_target", "moby.views", "simmim.head", "drop_path"):
        assert part(small.pretrain, switch) == part(full.pretrain, switch), switch
    for switch in ("task", "rand_augment", "random_erasing", "mixup", "cutmix", "layer_decay", "drop_path"):
        assert part(small.finetune, switch) == part(full.finetune, switch), switch
    assert (size != small.model) == (full.finetune_model() != full.model)


def part(section: object, path: str) -> object:
    for name in path.split("."):
        section = getattr(section, name)
    return section


def test_a_smoke_run_takes_the_digits_unless_told_otherwise(clone: Path) -> None:
    (clone / "images").mkdir()
    place = workspace.prepare("", "simmim_swin_base_800ep", smoke=True)
    assert place.params.ingest.dataset == "digits"
    assert place.root.name.startswith("smoke-simmim_swin_base_800ep-")
    assert workspace.prepare("images", "cifar10", smoke=True).params.ingest.dataset == "folder"
    assert workspace.prepare("", "", smoke=True).params.pretrain.training.steps == 4
    longer = workspace.prepare("", "", ["pretrain.training.steps=5"], smoke=True)
    assert longer.params.pretrain.training.steps == 5, "settings come last"


@pytest.mark.parametrize(
    ("rules", "words"),
    [
        ("backbones: {}\nset: {}\n", "needs the sections backbones, set and at_most"),
        (
            "backbones: {vit: vit_pico}\nset: {}\nat_most: {}\n",
            "no small backbone is known for `swin_v2_pico`",
        ),
        ("backbones: {swin_v2: swin_v2_pico}\nset: {a.b: 1}\nat_most: {}\n", "unknown key `a`"),
        ("backbones: {swin_v2: swin_v2_pico}\nset: {}\nat_most: {seeds: 1}\n", "`seeds` is not a number"),
    ],
)
def test_a_wrong_list_of_what_shrinks_is_named(rules: str, words: str, clone: Path) -> None:
    (clone / "recipes/smoke.yaml").write_text(rules)
    with pytest.raises(ConfigError) as caught:
        workspace.prepare("", "", smoke=True)
    assert words in str(caught.value)
