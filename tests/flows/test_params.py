"""Every knob is checked before anything runs, and a wrong one is named."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from flows import params
from flows.errors import ConfigError
from flows.params import check, flatten, overlay, parse_setting

ROOT = Path(__file__).resolve().parents[2]


def test_the_shipped_file_is_valid() -> None:
    loaded = params.load(ROOT / "params.yaml")
    assert loaded.ingest.dataset == "digits"
    assert loaded.registered_model("digits") == "trunkline-vision-digits"


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("pretrain.lr=3", "unknown key `pretrain.lr`"),
        ("model.patch_size=5", "patch_size 5 must divide image_size 32"),
        ("model.window_size=abc", "`model.window_size`"),
        ("seed=true", "`seed`"),
        ("seed=-1", "`seed`"),
        ("pretrain.training=3", "`pretrain.training` is a section"),
        ("evaluate.split=train", "'test' or 'val'"),
        ("finetune.layer_decay=.nan", "`finetune.layer_decay`"),
        ("finetune.training.zero_offload=parameters", "needs zero_stage 3"),
        ("finetune.training.attention_chunk=-1", "attention_chunk"),
        ("finetune.training.processes=3", "divisible by processes"),
        ("pretrain.subset=30", "not among scale.percentages"),
        ("pretrain.mask_unit=6", "multiple of model.patch_size"),
        ("pretrain.normalize_target=4", "odd"),
        ("pretrain.training.warmup_steps=5000", "must be below steps"),
        ("scale.percentages=[100, 10]", "ascend"),
        ("ingest.val_fraction=0.9", "below 1"),
        ("parity.providers=[]", "`parity.providers"),
        ("promotion.max_p95_ms=[1.0]", "1 limits for 3 latency_batch_sizes"),
        ("promotion.latency_batch_sizes=[8, 1, 32]", "ascend"),
        ("promotion.gain_rule=both", "'point' or 'lower'"),
        ("promotion.confidence=1", "`promotion.confidence`"),
    ],
)
def test_a_wrong_value_is_named(setting: str, words: str, raw_params: dict[str, Any]) -> None:
    with pytest.raises(ConfigError) as caught:
        check(overlay(raw_params, parse_setting(setting), "--set"), "params.yaml")
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_key_is_named(raw_params: dict[str, Any]) -> None:
    del raw_params["pretrain"]["training"]["lr"]
    with pytest.raises(ConfigError, match=re.escape("missing key `pretrain.training.lr`")):
        check(raw_params, "params.yaml")


def test_a_mistyped_key_is_shown_as_it_was_written(raw_params: dict[str, Any]) -> None:
    raw_params["sead"] = raw_params.pop("seed")
    with pytest.raises(ConfigError, match="unknown key `sead`"):
        check(raw_params, "params.yaml")


@pytest.mark.parametrize("text", ["", "a: [", "- 1\n- 2\n", "\x00"])
def test_a_damaged_file_is_one_line(text: str, tmp_path: Path) -> None:
    path = tmp_path / "params.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        params.load(path)
    assert "\n" not in str(caught.value)


def test_setting_values_are_yaml_and_numbers_in_any_notation() -> None:
    assert parse_setting("a.b=1e-3") == {"a": {"b": 0.001}}
    assert parse_setting("a=[1, 2]") == {"a": [1, 2]}
    assert parse_setting("a=digits") == {"a": "digits"}
    for wrong in ("a", "=1", "a=[1"):
        with pytest.raises(ConfigError):
            parse_setting(wrong)


def test_flatten_is_the_inverse_of_nesting(raw_params: dict[str, Any]) -> None:
    flat = flatten(raw_params)
    assert flat["pretrain.training.lr"] == raw_params["pretrain"]["training"]["lr"]
    rebuilt = raw_params
    for key, value in flat.items():
        rebuilt = overlay(
            rebuilt,
            parse_setting(f"{key}={yaml.safe_dump(value, default_flow_style=True).partition(chr(10))[0]}"),
            "test",
        )
    assert flatten(rebuilt) == flat


def test_every_key_is_read_somewhere(raw_params: dict[str, Any]) -> None:
    """A knob that no code looks at is a lie."""
    readers = (path for path in (ROOT / "flows").rglob("*.py") if path.parent.name != "params")
    code = "\n".join(path.read_text() for path in readers)
    unread = [key for key in flatten(raw_params) if f".{key.rpartition('.')[2]}" not in code]
    assert unread == []
