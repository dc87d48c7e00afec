"""The lines at the end of a run, with every part and without those that do not always exist."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
from rich.console import Console

from flows.summary import print_summary

STAGES = ["ingest", "scale", "pretrain", "finetune@pretrained", "finetune@scratch", "evaluate@pretrained"]
STAGES += ["evaluate@scratch", "export", "parity"]
REPORT = "/home/somebody/projects/trunkline/.trunkline/workspaces/cifar10-1a2b3c4d/artifacts/report.html"
LABELLED: dict[str, Any] = {
    "stages": [{"stage": stage, "status": "executed", "seconds": 10.0} for stage in STAGES],
    "executed": STAGES,
    "seconds": 412.3,
    "report": REPORT,
    "metrics": {
        "ingest": {
            "images": 1797,
            "train": 1168,
            "val": 269,
            "test": 360,
            "classes": 10,
            "quarantined": 2,
        },
        "pretrain": {
            "backbone": "swin_v2_pico",
            "parameters": 1_143_232,
            "steps": 500,
            "val_loss": 0.11719,
        },
        "evaluate-pretrained": {"top1": 0.983333, "top1_low": 0.964, "top1_high": 0.9924},
        "evaluate-scratch": {"top1": 0.961111, "top1_low": 0.936, "top1_high": 0.977},
        "parity": {
            "fp32_max_abs_error": 3.1e-6,
            "int8_agreement": 0.992,
            "speed_int8_over_fp32": 1.42,
            "speed_fp32_over_pytorch": 1.9,
        },
        "export": {"int8_size_ratio": 0.2817},
    },
    "smoke": {"images": 8, "correct": 8, "seconds": 6.2},
    "registry": {
        "name": "trunkline-vision-digits",
        "version": "3",
        "aliases": ["champion"],
        "promoted": True,
        "refused": False,
        "reason": "all gates passed",
        "gates": [{"name": "parity", "passed": True, "reason": "fine"}],
    },
}


@pytest.fixture
def summary() -> dict[str, Any]:
    """A run of everything, for the test to change."""
    return copy.deepcopy(LABELLED)


def shown(summary: dict[str, Any], width: int = 80) -> str:
    console = Console(file=io.StringIO(), width=width, highlight=False, soft_wrap=True)
    print_summary(summary, console)
    return str(console.file.getvalue())  # type: ignore[attr-defined]


def flat(text: str) -> str:
    return " ".join(text.split())


def test_everything_is_told(summary: dict[str, Any]) -> None:
    text = flat(shown(summary))
    for words in (
        "1797 images (1168 train, 269 val, 360 test), 10 classes, 2 quarantined",
        "412 s in all",
        "swin_v2_pico, 1.14 M parameters, SimMIM for 500 steps, validation loss 0.1172",
        "98.33 % (96.4–99.2)",
        "from scratch 96.11 %",
        "+2.22 points",
        "fp32 within 3.1e-06 of PyTorch at 1.9x its speed",
        "int8 agrees on 99.2 % at 1.4x the speed and 0.28x the size of fp32",
        "trunkline-vision-digits version 3 (champion)",
        "8 test images as recorded (8 of them correct)",
        REPORT,
        "trunkline ui",
        "trunkline serve vision --model trunkline-vision-digits",
    ):
        assert words in text, words
    assert "not promoted" not in text
    assert "gates parity passed" in text


@pytest.mark.parametrize("width", [60, 80, 200])
def test_lines_fit_and_what_one_copies_is_whole(width: int, summary: dict[str, Any]) -> None:
    lines = shown(summary, width).splitlines()
    assert [line for line in lines if len(line) > width and REPORT not in line] == []
    assert any(line.endswith(REPORT) for line in lines), "a path in two pieces cannot be clicked"
    assert not any(line != line.rstrip() for line in lines)


def test_a_run_that_executed_nothing(summary: dict[str, Any]) -> None:
    summary["executed"] = []
    assert "none executed, all 9 up to date" in flat(shown(summary))


def test_a_run_of_everything_does_not_list_all_names(summary: dict[str, Any]) -> None:
    assert "all 9 executed" in flat(shown(summary))
    summary["executed"] = ["export", "parity"]
    assert "executed export, parity; 7 up to date" in flat(shown(summary))


def test_why_a_version_was_not_promoted(summary: dict[str, Any]) -> None:
    summary["registry"] |= {"aliases": ["challenger"], "promoted": False, "champion": "1"}
    summary["registry"] |= {"refused": True, "reason": "quality: gain -0.0100 over version 1"}
    summary["registry"]["gates"].append({"name": "quality", "passed": False, "reason": "gain -0.0100 …"})
    text = flat(shown(summary))
    assert "version 3 (challenger); not promoted: quality: gain -0.0100 over version 1" in text
    assert "parity passed; quality failed" in text
    assert "--version 3" in text, "the champion is another model than this run's"


def test_without_control_pretraining_or_meaning(summary: dict[str, Any]) -> None:
    del summary["metrics"]["evaluate-scratch"]
    summary["metrics"]["pretrain"].update(steps=0, initialized_from="")
    summary["smoke_run"] = True
    text = flat(shown(summary))
    assert "test top-1 98.33 % (96.4–99.2); no control was trained" in text
    assert "not pretrained here: random weights" in text
    assert "the figures below mean nothing, nothing was promoted" in text
    summary["metrics"]["pretrain"]["initialized_from"] = "/weights/in22k.safetensors"
    assert "weights of /weights/in22k.safetensors" in flat(shown(summary))


def test_without_labels(summary: dict[str, Any]) -> None:
    for key in ("registry", "smoke"):
        del summary[key]
    for key in ("evaluate-pretrained", "evaluate-scratch", "parity", "export"):
        del summary["metrics"][key]
    summary["metrics"]["ingest"]["classes"] = 0
    text = flat(shown(summary))
    assert "no labels" in text
    assert "0 classes" not in text
    assert "serve" not in text
    assert REPORT in text


def test_optional_numbers_may_be_missing(summary: dict[str, Any]) -> None:
    """No test split in the data; no CPU among the providers of parity."""
    del summary["metrics"]["ingest"]["test"]
    for key in ("speed_int8_over_fp32", "speed_fp32_over_pytorch"):
        del summary["metrics"]["parity"][key]
    text = flat(shown(summary))
    assert "(1168 train, 269 val)" in text
    assert "fp32 within 3.1e-06 of PyTorch; int8 agrees on 99.2 % at 0.28x the size" in text


def test_markup_in_names_is_shown_as_it_is(summary: dict[str, Any]) -> None:
    summary["report"] = "/home/[bold]me[/bold]/report.html"
    assert "/home/[bold]me[/bold]/report.html" in shown(summary)


def test_a_language_model_has_lines_of_its_own() -> None:
    judged = {"bits_per_byte": 1.65, "bigram_bits_per_byte": 1.96, "unigram_bits_per_byte": 3.0}
    summary = {
        **LABELLED,
        "objective": "causal_lm",
        "registry": {**LABELLED["registry"], "name": "trunkline-language-pydoc"},
        "smoke": {"prompts": 4, "tokens": 96, "seconds": 1.0},
        "metrics": {
            "text": {
                "train_documents": 42,
                "val_documents": 10,
                "test_documents": 26,
                "train_tokens": 118_668,
                "unusable": 0,
                "duplicates": 1,
            },
            "language_pretrain": {"parameters": 869_504, "steps": 450, "val_loss": 3.76},
            "language_evaluate": {**judged, "top1": 0.31, "bigram_top1": 0.18},
            "language_export": {"steps": 5, "graphs": 6, "max_logit_error": 8.6e-6},
        },
    }
    console = Console(file=io.StringIO(), width=100, soft_wrap=True, highlight=False)
    print_summary(summary, console)
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    for words in (
        "118,668 tokens to train on",
        "0.87 M parameters, 450 steps",
        "1.650 bits per byte of test text (bigram 1.960",
        "logits within 8.6e-06",
        "4 prompts continued as recorded, 96 tokens",
        "serve language --model trunkline-language-pydoc",
    ):
        assert words in " ".join(shown.split()), words
