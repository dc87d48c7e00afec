"""A trace for a terminal: one block per link, its digest, its checks, the run that made the bytes."""

from __future__ import annotations

from rich.console import Console
from rich.text import Text

from flows.custody import Trace
from flows.custody_links import State

MARKS: dict[State, tuple[str, str]] = {"ok": ("✓", "green"), "broken": ("✗", "red"), "open": ("–", "yellow")}


def print_trace(trace: Trace, console: Console | None = None) -> None:
    console = console or Console(highlight=False, soft_wrap=True)
    owner = f"{trace.model} version {trace.version}" if trace.version else "an export that is not registered"
    console.print(Text(trace.digest, style="bold") + Text(f"  {trace.found_as}, {owner}"))
    console.print(Text(f"workspace: {trace.workspace or 'none here; only the registry'}", style="dim"))
    for link in trace.links:
        mark, style = MARKS[link.state]
        run = f"  run {link.run_id}" if link.run_id else ""
        console.print()
        console.print(
            Text(f"{mark} ", style=style)
            + Text(f"{link.name:<19}", style="bold")
            + Text(link.digest)
            + Text(run, style="dim")
        )
        for check in link.checks:
            sign, colour = MARKS[check.state]
            console.print(
                Text(f"    {sign} ", style=colour)
                + Text(check.text, style="" if check.state == "ok" else colour)
            )
