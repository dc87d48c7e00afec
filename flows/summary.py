"""The last lines of `trunkline run`: what was made, how good it is, where it lies, what to type next."""

from __future__ import annotations

import os
import sys
import textwrap
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

LABEL_WIDTH = 12
MAX_WIDTH = 100
SMOKE_RUN = "sizes and steps of recipes/smoke.yaml; the figures below mean nothing, nothing was promoted"
PRETEXTS = {"simmim": "SimMIM", "moby": "MoBY"}


def print_summary(summary: dict[str, Any], console: Console | None = None) -> None:
    """Print `summary` as returned by the pipeline flow. Paths and commands are never broken into two."""
    console = console or Console(highlight=False, soft_wrap=True)
    width = min(console.width, MAX_WIDTH)
    rule = Text("─" * width, style="dim")
    console.print(rule)
    for name, value in summary_lines(summary):
        pieces = textwrap.wrap(value, width - LABEL_WIDTH, break_long_words=False, break_on_hyphens=False)
        for label, piece in zip([name, *[""] * (len(pieces) - 1)], pieces, strict=True):
            console.print(Text(f"{label:<{LABEL_WIDTH}}", style="bold") + Text(piece, style="not bold"))
    console.print(rule)


def summary_lines(summary: dict[str, Any]) -> list[tuple[str, str]]:
    """Label and text of each line; lines whose stages did not run (unlabelled images) are left out."""
    if summary.get("objective") == "causal_lm":
        return _language_lines(summary)
    metrics = summary["metrics"]
    lines = [
        *([("smoke run", SMOKE_RUN)] if summary.get("smoke_run") else []),
        ("data", _data(metrics["ingest"])),
        ("stages", _stages(summary)),
        ("pretrained", _pretrained(metrics["pretrain"])),
    ]
    if "registry" in summary:
        lines += [
            ("accuracy", _accuracy(metrics["evaluate-pretrained"], metrics.get("evaluate-scratch"))),
            ("export", _export(metrics["parity"], metrics["export"])),
            ("registry", _registry(summary["registry"])),
            *([("gates", _gates(summary["registry"]))] if summary["registry"]["gates"] else []),
            ("smoke test", _smoke(summary["smoke"])),
        ]
    else:
        lines.append(("finetuning", "none: the images have no labels"))
    lines += [
        ("report", summary["report"]),
        ("pages", f"{_command()} ui (starts both: runs in Prefect, records in MLflow)"),
    ]
    if "registry" in summary:
        lines.append(("serve", _serve(summary["registry"])))
    return lines


def _language_lines(summary: dict[str, Any]) -> list[tuple[str, str]]:
    metrics, registry = summary["metrics"], summary["registry"]
    text, trained, judged = (metrics[name] for name in ("text", "language_pretrain", "language_evaluate"))
    export, golden = metrics["language_export"], summary["smoke"]
    return [
        *([("smoke run", SMOKE_RUN)] if summary.get("smoke_run") else []),
        (
            "text",
            f"{text['train_documents']} train, {text['val_documents']} val, {text['test_documents']} test "
            f"documents, {text['train_tokens']:,} tokens to train on; {text['unusable']} unusable, "
            f"{text['duplicates']} repeated",
        ),
        ("stages", _stages(summary)),
        (
            "pretrained",
            f"decoder, {trained['parameters'] / 1e6:.2f} M parameters, {trained['steps']} steps, "
            f"validation loss {trained['val_loss']:.4f}",
        ),
        (
            "quality",
            f"{judged['bits_per_byte']:.3f} bits per byte of test text (bigram "
            f"{judged['bigram_bits_per_byte']:.3f}, unigram {judged['unigram_bits_per_byte']:.3f}), next "
            f"token right {100 * judged['top1']:.1f} % (bigram {100 * judged['bigram_top1']:.1f} %)",
        ),
        (
            "export",
            f"{export['steps']} steps from {export['graphs']} graphs, logits within "
            f"{export['max_logit_error']:.1e} of the model",
        ),
        ("registry", _registry(registry)),
        *([("gates", _gates(registry))] if registry["gates"] else []),
        ("golden", f"{golden['prompts']} prompts continued as recorded, {golden['tokens']} tokens"),
        ("report", summary["report"]),
        ("pages", f"{_command()} ui (starts both: runs in Prefect, records in MLflow)"),
        ("serve", _serve(registry, "language")),
    ]


def _command() -> str:
    """`trunkline`, with its folder when the shell would not find it."""
    folder = Path(sys.executable).parent
    if str(folder) in os.environ.get("PATH", "").split(os.pathsep):
        return "trunkline"
    return str(folder / "trunkline")


def _data(metrics: dict[str, Any]) -> str:
    splits = ", ".join(f"{metrics[split]} {split}" for split in ("train", "val", "test") if split in metrics)
    classes = f"{metrics['classes']} classes" if metrics["classes"] else "no labels"
    return f"{metrics['images']} images ({splits}), {classes}, {metrics['quarantined']} quarantined"


def _stages(summary: dict[str, Any]) -> str:
    executed, count = summary["executed"], len(summary["stages"])
    if not executed:
        text = f"none executed, all {count} up to date"
    elif len(executed) == count:
        text = f"all {count} executed"
    else:
        text = f"executed {', '.join(executed)}; {count - len(executed)} up to date"
    return f"{text}; {summary['seconds']:.0f} s in all"


def _pretrained(metrics: dict[str, Any]) -> str:
    if not metrics["steps"]:
        return (
            f"{metrics['backbone']}, {metrics['parameters'] / 1e6:.2f} M parameters, not pretrained here: "
            + (
                f"weights of {metrics['initialized_from']}"
                if metrics["initialized_from"]
                else "random weights"
            )
        )
    return (
        f"{metrics['backbone']}, {metrics['parameters'] / 1e6:.2f} M parameters, "
        f"{PRETEXTS[metrics.get('pretext', 'simmim')]} for {metrics['steps']} steps, "
        f"validation loss {metrics['val_loss']:.4f}"
    )


def _accuracy(pretrained: dict[str, Any], scratch: dict[str, Any] | None) -> str:
    text = (
        f"test top-1 {100 * pretrained['top1']:.2f} % "
        f"({100 * pretrained['top1_low']:.1f}–{100 * pretrained['top1_high']:.1f})"
    )
    if scratch is None:
        return f"{text}; no control was trained (pipeline.control)"
    gain = 100 * (pretrained["top1"] - scratch["top1"])
    return f"{text}, from scratch {100 * scratch['top1']:.2f} %: pretraining is worth {gain:+.2f} points"


def _export(parity: dict[str, Any], export: dict[str, Any]) -> str:
    """Speeds are measured on the CPU; a machine may have been told to measure elsewhere only."""
    fp32, int8 = (parity.get(f"speed_{name}") for name in ("fp32_over_pytorch", "int8_over_fp32"))
    return (
        f"fp32 within {parity['fp32_max_abs_error']:.1e} of PyTorch"
        + (f" at {fp32:.1f}x its speed" if fp32 else "")
        + f"; int8 agrees on {100 * parity['int8_agreement']:.1f} % at "
        + (f"{int8:.1f}x the speed and " if int8 else "")
        + f"{export['int8_size_ratio']:.2f}x the size of fp32"
    )


def _registry(registry: dict[str, Any]) -> str:
    aliases = ", ".join(registry["aliases"]) or "no alias"
    text = f"{registry['name']} version {registry['version']} ({aliases})"
    if registry.get("refused"):
        text += f"; not promoted: {registry['reason']}"
    return text


def _gates(registry: dict[str, Any]) -> str:
    """Names of the gates by verdict; the reasons of failed ones stand in the line above."""
    passed = [gate["name"] for gate in registry["gates"] if gate["passed"]]
    failed = [gate["name"] for gate in registry["gates"] if not gate["passed"]]
    parts = [
        f"{', '.join(names)} {verdict}"
        for names, verdict in ((passed, "passed"), (failed, "failed"))
        if names
    ]
    return "; ".join(parts)


def _serve(registry: dict[str, Any], kind: str = "vision") -> str:
    """Without a version the champion is served, which may be an earlier run's."""
    command = f"{_command()} serve {kind} --model {registry['name']}"
    return command if "champion" in registry["aliases"] else f"{command} --version {registry['version']}"


def _smoke(smoke: dict[str, Any]) -> str:
    return (
        f"the server answered {smoke['images']} test images as recorded ({smoke['correct']} of them correct) "
        f"in {smoke['seconds']:.0f} s"
    )
