"""The language track on real text: it learns, resumes bit for bit, and its bundle is judged, registered,
promoted, fetched and traced.

One decoder is trained once and serves all tests, because every part costs seconds.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import language_workspace
import numpy as np
import pytest
import tiny_llama2c
import torch
from safetensors.torch import load_file, save_file

from flows import (
    aliases,
    custody,
    decision,
    files,
    gates,
    language_gates,
    language_registry,
    paths,
    promotion_log,
    rollout,
    serve,
    tracking,
)
from flows.decoders import load_decoder
from flows.errors import DataError, Interrupted
from flows.gates import Candidate, check_gate, fetched
from flows.language_registration import register_bundle
from flows.params import Params
from flows.registry import Version
from flows.report import build_report
from flows.stage import Stage
from flows.stages import language_pretrain
from flows.text.corpus import load_manifest, load_split

transformers = pytest.importorskip("transformers")
WEIGHTS = paths.LANGUAGE_PRETRAIN / "model.safetensors"


class Killed(Exception):
    """Ends a training at once, as SIGKILL does: nothing is saved any more."""


class Watcher(tracking.Run):
    """Does `act` when the log comes to `step`, and keeps what was logged."""

    def __init__(self, step: int = -1, act: Any = None) -> None:
        super().__init__()
        self.step, self.act, self.rows = step, act, []  # type: ignore[var-annotated]

    def log_metrics(self, metrics: Any, step: int = 0) -> None:
        self.rows.append(dict(metrics))
        if step == self.step:
            self.act()


@dataclass
class Track:
    home: Path
    params: Params
    rows: list[dict[str, float]]
    metrics: dict[str, float]
    version: Version


def _kill() -> None:
    raise Killed


@pytest.fixture(scope="module")
def track(empty_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Track]:
    """Text, training, evaluation, export and registration; the current folder of these tests."""
    home = tmp_path_factory.mktemp("track")
    with tiny_llama2c.one_thread(), pytest.MonkeyPatch.context() as patched:
        patched.chdir(home)
        patched.setenv("TRUNKLINE_HOME", str(home))
        patched.setenv("MLFLOW_TRACKING_URI", "")
        patched.setenv("PYTHONPATH", str(language_workspace.ROOT))
        patched.delenv("TRUNKLINE_PARENT_RUN", raising=False)
        shutil.copy(empty_store, home / "mlflow.db")
        language_workspace.link_code(home)
        checked = language_workspace.settings()
        language_workspace.ingest(checked)
        run = Watcher()
        language_pretrain.run(checked, Stage("language_pretrain", run=run))
        language_workspace.evaluate_and_export(checked)
        language_workspace.complete(home)
        version = register(checked, home)
        metrics = files.read_json(paths.METRICS / "language_evaluate.json")
        yield Track(home, checked, run.rows, metrics, version)


@pytest.fixture
def candidate(track: Track, tmp_path: Path) -> Iterator[Candidate]:
    """The registered version, in a folder that the test may change."""
    with fetched(track.params, track.home, track.version) as found:
        shutil.copytree(found.folder, tmp_path / "candidate")
        yield replace(found, folder=tmp_path / "candidate")


def register(checked: Params, root: Path) -> Version:
    with tracking.pipeline_run(checked, "test", {}) as run:
        return register_bundle(checked, root, run)


def limited(candidate: Candidate, section: str, **limits: Any) -> Candidate:
    changed = getattr(candidate.params, section).model_copy(update=limits)
    return replace(candidate, params=candidate.params.model_copy(update={section: changed}))


# ---- training ----------------------------------------------------------------------------------------------


def test_training_beats_counting_tokens_and_random_weights_by_far(track: Track) -> None:
    found = track.metrics
    assert found["bits_per_byte"] < found["bigram_bits_per_byte"] < found["unigram_bits_per_byte"] - 1.0
    assert found["top1"] > found["bigram_top1"] > found["unigram_top1"]
    # random weights know no more than how many kinds of token there are
    untrained = math.log2(load_manifest(paths.TEXT).vocab_size) * found["tokens"] / found["bytes"]
    assert found["bits_per_byte"] < untrained - 2.0
    logged = [row for row in track.rows if "train_loss" in row]
    assert all(row["tokens_per_s"] > 0 for row in logged)
    assert logged[0]["train_loss"] - logged[-1]["train_loss"] > 1.5


def test_a_training_that_was_killed_and_stopped_ends_with_the_same_bits(
    track: Track, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIPELINE_SCRATCH", str(tmp_path / "scratch"))
    undisturbed, listed = WEIGHTS.read_bytes(), (paths.LANGUAGE_PRETRAIN / "curves.csv").read_text()
    before = {row.split(",")[0]: row.split(",")[1] for row in listed.splitlines()}
    shutil.move(paths.LANGUAGE_PRETRAIN, tmp_path / "first")
    try:
        with pytest.raises(Killed):  # after the checkpoint of step 80, so that 20 steps are repeated
            language_pretrain.run(track.params, Stage("language_pretrain", run=Watcher(100, _kill)))
        stage = Stage("language_pretrain")
        stage.run = Watcher(140, stage.request_stop)
        with pytest.raises(Interrupted, match="stopped at step 140"):
            language_pretrain.run(track.params, stage)
        language_pretrain.run(track.params, Stage("language_pretrain"))
        assert WEIGHTS.read_bytes() == undisturbed
        again = (paths.LANGUAGE_PRETRAIN / "curves.csv").read_text()
        assert {row.split(",")[0]: row.split(",")[1] for row in again.splitlines()} == before
    finally:
        shutil.rmtree(paths.LANGUAGE_PRETRAIN, ignore_errors=True)
        shutil.move(tmp_path / "first", paths.LANGUAGE_PRETRAIN)


def test_the_output_is_a_folder_that_transformers_reads(track: Track) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(paths.LANGUAGE_PRETRAIN).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(paths.LANGUAGE_PRETRAIN)
    assert type(model).__name__ == "LlamaForCausalLM"
    decoder, _ = load_decoder(paths.LANGUAGE_PRETRAIN)
    ids = tokenizer("The lambda expression → é", return_tensors="pt").input_ids
    assert ids[0, 0] == model.config.bos_token_id == model.generation_config.bos_token_id == 0
    assert tokenizer.decode(ids[0], skip_special_tokens=True) == "The lambda expression → é"
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, decoder(ids)[0], rtol=0, atol=1e-5)
        said = model.generate(ids, max_new_tokens=12, do_sample=False, pad_token_id=1)
    assert said.tolist() == decoder.generate(ids, 12, end=1).tolist()


def test_bits_per_byte_are_those_that_transformers_finds(track: Track) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(paths.LANGUAGE_PRETRAIN).eval()
    split = load_split(paths.TEXT, load_manifest(paths.TEXT), "test")
    nats = 0.0
    with torch.no_grad():
        for document in range(len(split)):
            ids = torch.from_numpy(split.document(document))
            for begin in range(0, len(ids) - 1, 32):
                row = ids[None, begin : begin + 33]
                nats += float(model(row, labels=row).loss) * (row.shape[1] - 1)
    assert nats / math.log(2) / split.bytes.sum() == pytest.approx(track.metrics["bits_per_byte"], rel=1e-5)


def test_the_report_is_one_page_that_shows_what_was_measured(track: Track) -> None:
    page = build_report(track.home, {"executed": ["text"]}).read_text()
    assert f"{track.metrics['bits_per_byte']:.3f} bits per byte" in page
    for words in ("pydoc_data.topics", "next token right", "A continuation", "<svg", "language_pretrain"):
        assert words in page, words
    for shared in ("http://", "<script"):
        assert shared not in page.replace("http://www.w3.org", "")


# ---- gates, registry, custody ------------------------------------------------------------------------------


def test_a_sound_bundle_passes_every_gate_and_is_served_from_the_registry(track: Track) -> None:
    assert track.version.aliases == ("challenger",)
    assert track.version.name == "trunkline-language-pydoc" == serve.default_model(track.params)
    made = decision.decide(track.params, track.home, track.version)
    assert {gate.name: gate.passed for gate in made.gates} == dict.fromkeys(gates.GATES, True), made.gates
    assert made.promoted
    quality = next(gate for gate in made.gates if gate.name == "quality")
    assert quality.figures["bits_per_byte"] == pytest.approx(track.metrics["bits_per_byte"], rel=1e-4)
    assert quality.figures["bits_per_byte_low"] < quality.figures["bits_per_byte_high"]
    assert promotion_log.read(track.params, track.version.name)[-1].action == "promote"

    here = language_registry.fetch_bundle(track.params)
    folder = here.folder
    assert (here.name, here.version) == (track.version.name, track.version.version)
    assert files.sha256_file(folder / "manifest.json") == track.version.tags["onnx.digest"]
    assert json.loads((folder / "manifest.json").read_text())["name"] == track.version.name
    weights = next(folder.glob("weights_00.data"))
    weights.write_bytes(b"damaged")
    assert language_registry.fetch_bundle(track.params, version="1") == here
    assert weights.stat().st_size > 100, "fetched again"
    assert language_registry.ask_registered(track.params, made.version)["prompts"] == 2
    with pytest.raises(DataError, match="has no alias 'other'"):
        language_registry.fetch_bundle(track.params, alias="other")
    expected = rollout.expectation(track.params, made.version)
    assert isinstance(expected, rollout.ExpectedTexts)
    assert len(expected.golden) == 2
    with pytest.raises(DataError, match="no previous version"):
        aliases.rollback(track.params, track.version.name)


def test_the_chain_of_custody_leads_to_the_tokens(track: Track) -> None:
    digest = track.version.tags["onnx.digest"]
    found = custody.trace(track.params, digest[:16])
    assert [link.name for link in found.links] == [
        "registry", "dvc.lock", "checkpoint", "text manifest", "tokens"
    ]  # fmt: skip
    assert not found.broken, [check for link in found.broken for check in link.checks]
    tokens = paths.TEXT / "val.tokens"
    whole = tokens.read_bytes()
    tokens.write_bytes(whole[:-2] + b"\0\0")
    try:
        assert [link.name for link in custody.trace(track.params, digest).broken] == [
            "text manifest", "tokens"
        ]  # fmt: skip
    finally:
        tokens.write_bytes(whole)


def test_the_same_bundle_is_registered_once(track: Track) -> None:
    assert register(track.params, track.home).version == track.version.version


def test_a_worse_model_is_refused_and_an_equal_one_is_no_gain(track: Track, candidate: Candidate) -> None:
    equal = check_gate("quality", candidate, track.version)
    assert not equal.passed
    assert "+0.0000 does not exceed language_promotion.min_gain" in equal.reason
    floor = check_gate("quality", limited(candidate, "language_promotion", max_bits_per_byte=0.5), None)
    assert "above language_promotion.max_bits_per_byte 0.5" in floor.reason
    # the same graphs, other weights: noise on the embedding
    stored = candidate.folder / "weights_00.data"
    noisy = np.frombuffer(stored.read_bytes(), np.float32).copy()
    noisy += np.random.default_rng(0).normal(0, noisy.std(), noisy.shape).astype(np.float32)
    stored.write_bytes(noisy.tobytes())
    manifest = files.read_json(candidate.folder / "manifest.json")
    entry = next(entry for entry in manifest["weights"] if entry["file"] == stored.name)
    entry["sha256"] = files.sha256_file(stored)
    files.write_json(candidate.folder / "manifest.json", manifest)
    digest = files.sha256_file(candidate.folder / "manifest.json")
    tags = {**candidate.version.tags, "onnx.digest": digest}
    worse = replace(candidate, version=replace(candidate.version, tags=tags))
    found = check_gate("quality", limited(worse, "language_promotion", min_gain=-0.1), track.version)
    assert not found.passed
    assert found.figures["gain_high"] < 0
    assert "dvc.out_md5" in check_gate("integrity", worse, None).reason


@pytest.mark.parametrize(
    ("file", "words"),
    [
        ("manifest.json", "registered was"),
        ("weights_01.data", "weights_01.data"),
        ("golden/golden.json", "golden/golden.json"),
        ("training.json", "training.json has sha256"),
        ("receipts.json", "receipts.json has sha256"),
    ],
)
def test_a_changed_file_fails_integrity(candidate: Candidate, file: str, words: str) -> None:
    path = candidate.folder / file
    path.write_bytes(path.read_bytes() + b" \n")
    gate = check_gate("integrity", candidate, None)
    assert not gate.passed
    assert words in gate.reason
    assert "\n" not in gate.reason


def test_limits_of_parity_budget_and_golden_prompts_hold(
    candidate: Candidate, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = {"tokens": 4, "p50_ms": 1.0, "p95_ms": 9.0, "memory_mb": 7.0}
    monkeypatch.setattr(language_gates, "measure", lambda folder, tokens, threads: measured)
    assert check_gate("budget", candidate, None).passed
    for key, limit in {"max_size_mb": 0.001, "max_token_ms": 8.0, "max_memory_mb": 6.0}.items():
        budget = check_gate("budget", limited(candidate, "language_promotion", **{key: limit}), None)
        assert not budget.passed
        assert f"more than language_promotion.{key} {limit:g}" in budget.reason
    parity = check_gate("parity", limited(candidate, "language_export", max_logit_error=0.0), None)
    assert "more than language_export.max_logit_error 0" in parity.reason
    index = candidate.folder / "golden" / "golden.json"
    content = files.read_json(index)
    content["prompts"][1]["continuation"][3] ^= 1
    files.write_json(index, content)
    assert "1 of 2 golden prompts" in check_gate("servability", candidate, None).reason
    shutil.rmtree(candidate.folder / "golden")
    assert "golden.json is missing" in check_gate("servability", candidate, None).reason


def test_another_state_of_the_text_is_refused_by_the_stages_behind(track: Track) -> None:
    record = paths.LANGUAGE_PRETRAIN / "training.json"
    whole = record.read_text()
    files.write_json(record, {**json.loads(whole), "data_digest": "0" * 64})
    try:
        with pytest.raises(DataError, match="trained on another state of the text"):
            language_workspace.evaluate_and_export(track.params)
    finally:
        record.write_text(whole)
    weights = load_file(WEIGHTS)
    kept = WEIGHTS.read_bytes()
    save_file({name: value for name, value in weights.items() if "layers.0.mlp" not in name}, WEIGHTS)
    try:
        with pytest.raises(DataError, match=r"weights and config\.json do not fit"):
            load_decoder(paths.LANGUAGE_PRETRAIN)
        WEIGHTS.write_bytes(kept[:1000])
        with pytest.raises(DataError, match="is damaged"):
            load_decoder(paths.LANGUAGE_PRETRAIN)
    finally:
        WEIGHTS.write_bytes(kept)
