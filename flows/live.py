"""What is live, since when, why, and from what: `trunkline status`, as data and as a page for a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from flows import aliases, promotion_log, registry
from flows.errors import DataError, ResourceError
from flows.gates import GATES
from flows.params import Params
from flows.promotion_log import Entry
from flows.registry import CHALLENGER, CHAMPION, PREVIOUS, Version

LOG_LINES = 8


def read_status(params: Params, name: str) -> dict[str, Any]:
    """Champion, challenger and previous of model `name` and the end of the log; repairs what was cut off.

    Raises:
        DataError: the registry has no such model.
    """
    if name not in registry.model_names(params):
        listed = ", ".join(registry.model_names(params)) or "none yet; `make run` registers one"
        raise DataError(f"the registry has no model {name!r}; it has: {listed}")
    notes = _repair(params, name)
    log = promotion_log.read(params, name)
    roles = {role: registry.alias(params, name, role) for role in (CHAMPION, CHALLENGER, PREVIOUS)}
    champion = roles[CHAMPION]
    last = next((entry for entry in reversed(log) if entry.action in ("promote", "rollback")), None)
    known = champion is not None and last is not None and last.to_version == champion.version
    if champion is not None and not known:
        notes.append(
            f"version {champion.version} became champion outside Trunkline: the log does not know of it"
        )
    return {
        "model": name,
        **{role: _describe(version) for role, version in roles.items()},
        "since": last.time if last and known else None,
        "by": last.by if last and known else None,
        "action": last.action if last and known else None,
        "reason": last.reason if last and known else None,
        "versions": len(registry.versions(params, name)),
        "notes": notes,
        "log": [asdict(entry) for entry in log[-LOG_LINES:]],
    }


def _repair(params: Params, name: str) -> list[str]:
    try:
        with aliases.exclusive(wait=False):
            repaired = aliases.repair(params, name)
    except ResourceError as error:
        return [str(error)]
    return [repaired] if repaired else []


def _describe(version: Version | None) -> dict[str, Any] | None:
    if version is None:
        return None
    tags = version.tags
    return {
        "version": version.version,
        "digest": tags.get("onnx.digest", ""),
        "git_commit": tags.get("git.commit", "unknown"),
        "git_dirty": tags.get("git.dirty") == "true",
        "data": tags.get("data.name", ""),
        "data_digest": tags.get("data.digest", ""),
        "rolled_back": tags.get(aliases.ROLLED_BACK, ""),
        "gates": {name: tags[f"gate.{name}"] for name in GATES if f"gate.{name}" in tags},
    }


# ---- for a terminal ----------------------------------------------------------------------------------------


def print_status(status: dict[str, Any], console: Console | None = None) -> None:
    """Two tables: the three roles, and the end of the log; between them why the champion is champion."""
    console = console or Console(highlight=False)
    console.print(
        Text(status["model"], style="bold") + Text(f"  {status['versions']} registered", style="dim")
    )
    roles = Table(box=box.SIMPLE, pad_edge=False)
    for heading in ("role", "version", "digest", "data", "commit"):
        roles.add_column(heading, no_wrap=True)
    for role in (CHAMPION, CHALLENGER, PREVIOUS):
        roles.add_row(role, *_cells(status[role]))
    console.print(roles)
    if status["since"]:
        verb = {"promote": "promoted", "rollback": "rolled back to"}[status["action"]]
        console.print(f"Live since {_moment(status['since'])}: {verb} by {status['by']}; {status['reason']}.")
    if status[CHAMPION]:
        _print_gates(console, status[CHAMPION]["gates"])
    if status[CHALLENGER] and any(v.startswith("failed") for v in status[CHALLENGER]["gates"].values()):
        console.print(f"The challenger, version {status[CHALLENGER]['version']}, was refused:")
        _print_gates(console, status[CHALLENGER]["gates"])
    for note in status["notes"]:
        console.print(Text(f"note: {note}", style="yellow"))
    _print_log(console, [Entry(**entry) for entry in status["log"]])


def _cells(version: dict[str, Any] | None) -> list[str]:
    if version is None:
        return ["–", "", "", ""]
    commit = version["git_commit"][:10] + (" (modified)" if version["git_dirty"] else "")
    return [
        version["version"],
        version["digest"][:12],
        f"{version['data']} {version['data_digest'][:12]}",
        commit,
    ]


def print_gates(gates: Sequence[dict[str, Any]], console: Console | None = None) -> None:
    """The verdicts of one promotion, as the flow returns them."""
    _print_gates(
        console or Console(highlight=False),
        {gate["name"]: f"{'passed' if gate['passed'] else 'failed'}: {gate['reason']}" for gate in gates},
    )


def _print_gates(console: Console, verdicts: dict[str, str]) -> None:
    table = Table(box=None, pad_edge=False, show_header=False, padding=(0, 1))
    for name, verdict in verdicts.items():
        passed, _, reason = verdict.partition(": ")
        mark = Text("✓", style="green") if passed == "passed" else Text("✗", style="red")
        table.add_row(mark, Text(name, style="bold"), Text(reason))
    console.print(table)


def _print_log(console: Console, log: list[Entry]) -> None:
    if not log:
        console.print(Text("Nothing has been promoted yet.", style="dim"))
        return
    table = Table(box=box.SIMPLE, pad_edge=False, title="Log", title_justify="left", title_style="bold")
    for heading in ("time (UTC)", "what", "by", "why"):
        table.add_column(heading, no_wrap=heading != "why")
    for entry in log:
        arrow = f"{entry.from_version or 'none'} → {entry.to_version}"
        what = f"{entry.action} {arrow}" if entry.action != "refused" else f"refused {entry.to_version}"
        table.add_row(_moment(entry.time), what, entry.by, entry.reason)
    console.print(table)


def _moment(time: str) -> str:
    return time[:19].replace("T", " ")
