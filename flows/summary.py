"""The last lines of `trunkline run`: what was made, how good it is, where it lies, what to type next."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text


def print_summary(summary: dict[str, Any], console: Console | None = None) -> None:
    """Print `summary` as returned by the pipeline flow."""
    console = console or Console(highlight=False, soft_wrap=True)
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in summary_lines(summary):
        table.add_row(name, Text(value))
    console.rule("[bold]Trunkline", style="dim")
    console.print(table)
    console.rule(style="dim")


def summary_lines(summary: dict[str, Any]) -> list[tuple[str, str]]:
    """Label and text of each line; lines whose stages did not run (unlabelled images) are left out."""
    metrics = summary["metrics"]
    lines = [
        ("data", _data(metrics["ingest"])),
        ("stages", _stages(summary)),
        ("pretrained", _pretrained(metrics["pretrain"])),
    ]
    if "registry" in summary:
        lines += [
            ("accuracy", _accuracy(metrics["evaluate-pretrained"], metrics["evaluate-scratch"])),
            ("export", _export(metrics["parity"], metrics["export"])),
            ("registry", _registry(summary["registry"])),
            ("smoke test", _smoke(summary["smoke"])),
        ]
    else:
        lines.append(("finetuning", "none: the images have no labels"))
    lines += [
        ("report", summary["report"]),
        ("pages", "trunkline ui   (starts both: runs in Prefect, records in MLflow)"),
    ]
    if "registry" in summary:
        lines.append(("serve", f"trunkline serve vision --model {summary['registry']['name']}"))
    return lines


def _data(metrics: dict[str, Any]) -> str:
    return (
        f"{metrics['images']} images "
        f"({metrics['train']} train, {metrics['val']} val, {metrics['test']} test), "
        f"{metrics['classes']} classes, {metrics['quarantined']} quarantined"
    )


def _stages(summary: dict[str, Any]) -> str:
    executed = ", ".join(summary["executed"]) or "none"
    others = len(summary["stages"]) - len(summary["executed"])
    return f"executed: {executed}; {others} up to date; {summary['seconds']:.0f} s in all"


def _pretrained(metrics: dict[str, Any]) -> str:
    return (
        f"{metrics['backbone']}, {metrics['parameters'] / 1e6:.2f} M parameters, "
        f"SimMIM for {metrics['steps']} steps, validation loss {metrics['val_loss']:.4f}"
    )


def _accuracy(pretrained: dict[str, Any], scratch: dict[str, Any]) -> str:
    gain = 100 * (pretrained["top1"] - scratch["top1"])
    return (
        f"test top-1 {100 * pretrained['top1']:.2f} % "
        f"({100 * pretrained['top1_low']:.1f}–{100 * pretrained['top1_high']:.1f}), "
        f"from scratch {100 * scratch['top1']:.2f} %: pretraining is worth {gain:+.2f} points"
    )


def _export(parity: dict[str, Any], export: dict[str, Any]) -> str:
    return (
        f"fp32 within {parity['fp32_max_abs_error']:.1e} of PyTorch "
        f"at {parity['speed_fp32_over_pytorch']:.1f}x its speed; "
        f"int8 agrees on {100 * parity['int8_agreement']:.1f} % "
        f"at {parity['speed_int8_over_fp32']:.1f}x the speed "
        f"and {export['int8_size_ratio']:.2f}x the size of fp32"
    )


def _registry(registry: dict[str, Any]) -> str:
    aliases = ", ".join(registry["aliases"]) or "no alias"
    text = f"{registry['name']} version {registry['version']} ({aliases})"
    failed = [f"{gate['name']}: {gate['reason']}" for gate in registry["gates"] if not gate["passed"]]
    if failed:
        text += f"; not promoted: {'; '.join(failed)}"
    return text


def _smoke(smoke: dict[str, Any]) -> str:
    return (
        f"the server answered {smoke['images']} test images as recorded ({smoke['correct']} of them correct) "
        f"in {smoke['seconds']:.0f} s"
    )
