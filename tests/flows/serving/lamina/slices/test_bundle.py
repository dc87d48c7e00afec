"""A bundle says what the model says; a damaged one is refused; an export is whole or absent."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch

from flows.errors import ConfigError, DataError, GateFailed
from flows.serving.lamina.slices import export, parity
from flows.serving.lamina.slices.bundle import Bundle, read_bundle
from flows.serving.lamina.slices.runner import greedy, open_slices
from models.language import Decoder
from models.language.llama2c import read_checkpoint

PROMPTS = ([1, 270, 9, 281, 44, 270, 12, 260], [1], [1, 261, 262])


def test_greedy_text_is_the_models_in_any_mix_of_rows(bundle: Bundle, imported: Path) -> None:
    """40 tokens after three prompts of different lengths, at once, in chunks of 3; and each prompt alone."""
    config, weights = read_checkpoint((imported.parent / "model.bin").read_bytes())
    decoder = Decoder(config).eval()
    decoder.load_state_dict(weights, strict=False)
    slices = open_slices(bundle, threads=1)
    found = greedy(slices, PROMPTS, 40, chunk_rows=3)
    for prompt, said in zip(PROMPTS, found, strict=True):
        text = decoder.generate(torch.tensor([prompt]), 40)[0]
        expected = text[len(prompt) :].tolist()
        ends = [n for n, token in enumerate(expected) if token in (1, 2)]  # as generation_config.json says
        expected = expected[: ends[0] + 1] if ends else expected
        assert list(said.tokens) == expected
        text = text[: len(prompt) + len(expected)]
        with torch.no_grad():
            logits = decoder(text[None, :-1])[0][0, len(prompt) - 1 :].numpy()
        assert np.abs(logits - said.logits).max() < 1e-4 * max(1.0, np.abs(logits).max())
    (alone,) = greedy(slices, PROMPTS[:1], 40, chunk_rows=100)
    assert alone.tokens == found[0].tokens
    fused = greedy(open_slices(bundle, split=False, threads=1), PROMPTS, 40, chunk_rows=3)
    assert [said.tokens for said in fused] == [said.tokens for said in found]
    with pytest.raises(ConfigError, match="over the model's 96 positions"):
        greedy(slices, [[1] * 90], 7)
    with pytest.raises(ConfigError, match="outside the vocabulary"):
        greedy(slices, [[300]], 7)


def test_manifest_says_what_was_exported(bundle: Bundle) -> None:
    manifest = bundle.manifest
    assert (manifest.layers, manifest.heads, manifest.kv_heads, manifest.head_size) == (3, 4, 2, 4)
    assert (manifest.architecture, manifest.position_scheme) == ("LlamaForCausalLM", "rope:default")
    assert [len(step.programs) for step in manifest.steps] == [2, 2, 2, 1]
    # six graphs for ten programs: layers that are alike share theirs
    kinds = ["kvx", "post", "post_qx", "post_qx_kvx", "qx", "qx_kvx"]
    assert sorted(entry.file.removesuffix(".onnx") for entry in manifest.graphs) == kinds
    names = [tensor.name for tensor in manifest.tensors]
    assert len(names) == len(set(names)), "a tied matrix is stored once"
    assert sum(tensor.bytes for tensor in manifest.tensors) < 4 * (28_000)
    assert manifest.parity.argmax_agreement == 1
    assert manifest.parity.max_abs_error < 1e-4
    assert json.loads((bundle.folder / "parity.json").read_text()) == manifest.parity.model_dump(mode="json")
    assert {entry.file for entry in manifest.tokenizer} >= {"tokenizer.json", "generation_config.json"}


def test_every_graph_is_a_model_of_its_own(bundle: Bundle) -> None:
    for entry in bundle.manifest.graphs:
        onnxruntime.InferenceSession(bundle.folder / entry.file, providers=["CPUExecutionProvider"])


@pytest.fixture
def copy(bundle: Bundle, tmp_path: Path) -> Path:
    return Path(shutil.copytree(bundle.folder, tmp_path / "bundle"))


def change_manifest(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    value = json.loads((folder / "manifest.json").read_text())
    change(value)
    (folder / "manifest.json").write_text(json.dumps(value))


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no manifest": (lambda f: (f / "manifest.json").unlink(), "does not exist"),
    "not json": (lambda f: (f / "manifest.json").write_text('{"a": 1,'), "not a usable manifest"),
    "a vision model": (lambda f: change_manifest(f, lambda m: m.pop("kind")), "of a language model"),
    "other format": (lambda f: change_manifest(f, lambda m: m.update(format=2)), "has format 2"),
    "missing key": (lambda f: change_manifest(f, lambda m: m.pop("heads")), "heads"),
    "sinks": (lambda f: change_manifest(f, lambda m: m["attention"][0].update(sinks=True)), "sinks"),
    "missing graph": (lambda f: (f / "kvx.onnx").unlink(), "kvx.onnx is missing"),
    "changed graph": (lambda f: flip(f / "kvx.onnx"), "kvx.onnx was changed"),
    "changed weights": (lambda f: flip(f / "weights_01.data"), "weights_01.data was changed"),
    "truncated weights": (lambda f: (f / "weights_01.data").write_bytes(b"0" * 99), "_01.data is truncated"),
    "changed tokenizer": (lambda f: flip(f / "tokenizer.json"), "tokenizer.json was changed"),
    "outside": (lambda f: change_manifest(f, lambda m: m["graphs"][0].update(file="../x")), "outside its"),
    "weight beyond its file": (
        lambda f: change_manifest(f, lambda m: m["tensors"][0].update(offset=10**9)), "lies outside"),
    "step left out": (lambda f: change_manifest(f, lambda m: m["steps"].pop(1)), "need 4 steps"),
    "value from nowhere": (
        lambda f: change_manifest(f, lambda m: m["steps"][1]["programs"][0]["inputs"][0].update(name="y")),
        "nothing makes y"),
    "context from nowhere": (
        lambda f: change_manifest(f, lambda m: m["steps"][0]["context"].append("y")), "does not make"),
}  # fmt: skip


@pytest.mark.parametrize("case", DAMAGE)
def test_damaged_bundle_is_refused_in_one_sentence(case: str, copy: Path) -> None:
    damage, words = DAMAGE[case]
    damage(copy)
    with pytest.raises(DataError, match=words) as raised:
        read_bundle(copy)
    assert "\n" not in str(raised.value)
    assert str(copy) in str(raised.value)


def test_failed_parity_leaves_no_bundle(
    imported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder that is wrong is not renamed: here the check is given other logits than the model's."""
    monkeypatch.setattr(
        parity, "replay", lambda slices, texts: np.full((*texts.shape, 300), np.nan, np.float32)
    )
    monkeypatch.setattr(export, "_write_steps", _steps_of_a_finished_export(imported))
    with pytest.raises(GateFailed, match="nothing was written"):
        export.export_bundle(imported, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def _steps_of_a_finished_export(imported: Path) -> Callable[..., Any]:
    """Exporting graphs takes seconds, and this is not about them."""
    finished = read_bundle(imported.parent / "bundle")

    def write(folder: Path, *others: Any) -> Any:
        written = export._Written(folder)
        for entry in (*finished.manifest.graphs, *finished.manifest.weights):
            shutil.copy(finished.folder / entry.file, folder)
        written.steps = list(finished.manifest.steps)
        written.weights.tensors = {tensor.name: tensor for tensor in finished.manifest.tensors}
        written.weights.files = [entry.file for entry in finished.manifest.weights]
        written.graphs = {(entry.file,): entry.file for entry in finished.manifest.graphs}
        return written

    return write


def test_what_a_killed_export_left_goes_and_nothing_else(tmp_path: Path) -> None:
    names = {".out.aaaaaaaa": "kvx.onnx", ".out.bbbbbbbb": "thesis.txt", ".out.cccccccc": "weights_00.data"}
    for folder, file in names.items():
        (tmp_path / folder).mkdir()
        (tmp_path / folder / file).write_text("")
    with export._held(tmp_path / ".out.cccccccc"):  # an export that still runs
        export.remove_abandoned(tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".out.bbbbbbbb", ".out.cccccccc"]


def test_target_is_never_the_model_or_a_strangers_folder(imported: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("")
    for target, force, words in (
        (tmp_path / "mine", False, "--force"),
        (tmp_path / "mine", True, "something else"),
        (imported, True, "the model itself"),
        (imported.parent, True, "the model itself"),
    ):
        with pytest.raises(ConfigError, match=words):
            export.export_bundle(imported, target, force=force)


def test_damaged_model_folder_is_one_error(imported: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(imported, tmp_path / "hf"))
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[:-100])
    with pytest.raises(DataError, match="transformers can load"):
        export.export_bundle(folder, tmp_path / "out")
    (folder / "model.safetensors").unlink()
    with pytest.raises(DataError, match="has no weights"):
        export.export_bundle(folder, tmp_path / "out")
    (folder / "config.json").write_text("{}")
    with pytest.raises(DataError, match="model_type"):
        export.export_bundle(folder, tmp_path / "out")
    (folder / "config.json").unlink()
    with pytest.raises(DataError, match=r"config\.json does not exist"):
        export.export_bundle(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()
