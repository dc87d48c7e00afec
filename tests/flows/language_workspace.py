"""A workspace of the language track: Python's documentation topics, and a decoder small enough for tests."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from flows import dvc_hash, files, params, paths
from flows.params import Params
from flows.stage import Stage
from flows.stages import language_evaluate, language_export, text

ROOT = Path(__file__).resolve().parents[2]
STEPS = 180
TINY: Mapping[str, Any] = {
    "objective": "causal_lm",
    "ingest_text": {"vocab_size": 320, "test_fraction": 0.02, "val_fraction": 0.02},
    "decoder": {
        "hidden_size": 48,
        "intermediate_size": 96,
        "layers": 1,
        "heads": 4,
        "head_size": 16,
        "max_context": 64,
        "tie_embeddings": False,
    },
    "language_pretrain": {
        "context": 32,
        "training": {
            "steps": STEPS,
            "batch_size": 32,
            "threads": 1,
            "precision": "fp32",
            "lr": 1.5e-2,
            "warmup_steps": 10,
            "log_every": 10,
            "validate_every": STEPS,
            "checkpoint_every": 80,
        },
    },
    "language_promotion": {
        "golden_prompts": 2,
        "golden_tokens": 8,
        "max_token_ms": 60000.0,
        "timed_tokens": 4,
    },
    "lamina": {"model": {"threads": 1}},
}
OUTPUTS = {
    "text": paths.TEXT,
    "language_pretrain": paths.LANGUAGE_PRETRAIN,
    "language_evaluate": paths.LANGUAGE_EVALUATE,
    "language_export": paths.LANGUAGE_EXPORT,
}


def settings(change: Mapping[str, Any] | None = None) -> Params:
    """The shipped params made tiny, also in the params.yaml of the current folder; paths beside the code's
    are absolute."""
    values = params.overlay(params.read(ROOT / "params.yaml"), TINY, "test")
    values = params.overlay(values, {"ingest_text": {"source": str(ROOT / "constraints.txt")}}, "test")
    values = params.overlay(values, change or {}, "test")
    Path("params.yaml").write_text(yaml.safe_dump(values))
    return params.load()


def link_code(folder: Path) -> None:
    """What the fingerprint of a training hashes."""
    for name in ("flows", "models"):
        (folder / name).symlink_to(ROOT / name)


def ingest(checked: Params) -> None:
    text.run(checked, Stage("text"))


def evaluate_and_export(checked: Params) -> None:
    language_evaluate.run(checked, Stage("language_evaluate"))
    language_export.run(checked, Stage("language_export"))


def complete(root: Path) -> None:
    """The receipts and the lock that DVC and the stages leave."""
    stages: dict[str, Any] = {}
    for stage, path in OUTPUTS.items():
        cost = {"duration_s": 1.0, "device_hours": 0.001}
        receipt = {"stage": stage, "run_id": f"run-of-{stage}", "git": "unknown", **cost}
        files.write_json(root / paths.RECEIPTS / f"{stage}.json", receipt)
        out = {"path": path.as_posix(), "md5": dvc_hash.md5_of(root / path)}
        stages[stage] = {"cmd": f"python -m flows.stages.{stage}", "outs": [out]}
    (root / "dvc.lock").write_text(yaml.safe_dump({"schema": "2.0", "stages": stages}))
