"""Decide about a version: gates, perhaps a person, then the aliases. The logic of the promotion flow, without
Prefect.

Gates and people take minutes, so they are asked without the lock. Under the lock the champion is read once
more; if another promotion has changed it, the comparison with it is made again. A refusal changes no alias.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from flows import aliases, files, paths, promotion_log, registry
from flows.aliases import ROLLED_BACK
from flows.errors import DataError
from flows.gates import Candidate, Gate, check_gate, fetched, gates_of
from flows.params import Params
from flows.params import load as load_params
from flows.registry import CHALLENGER, CHAMPION, PREVIOUS, Version

VERDICT_LETTERS = 1000  # of a reason in a tag
Checker = Callable[[str, Candidate, Version | None], Gate]
Approver = Callable[[Version, Sequence[Gate]], str | None]
"""Asks a person; None is yes, a text is the reason of a no."""
logger = logging.getLogger("trunkline.promotion")


@dataclass(frozen=True)
class Decision:
    """What became of a version."""

    version: Version  # with the aliases it has afterwards
    gates: tuple[Gate, ...]  # empty if none had to be asked
    promoted: bool
    champion: Version | None  # afterwards
    reason: str

    @property
    def refused(self) -> bool:
        """False also for a version that is champion already."""
        return self.champion is None or self.champion.version != self.version.version

    def to_dict(self) -> dict[str, Any]:
        return {
            "name": self.version.name,
            "version": self.version.version,
            "aliases": list(self.version.aliases),
            "promoted": self.promoted,
            "refused": self.refused,
            "reason": self.reason,
            "champion": self.champion.version if self.champion else None,
            "gates": [asdict(gate) for gate in self.gates],
            "digest": self.version.tags.get("onnx.digest", ""),
        }


def decide(
    params: Params,
    root: Path,
    version: Version,
    *,
    again: bool = False,
    check: Checker = check_gate,
    approve: Approver | None = None,
) -> Decision:
    """Promote `version` if every gate passes; the old champion becomes `previous`. Doing it twice changes
    nothing.

    Args:
        root: workspace whose evaluation images or texts judge it.
        again: also when the version was rolled back before.
        check: runs one gate; the flow makes a task of each.
        approve: asks a person after the gates have passed.
    """
    champion = _begin(params, version)
    version = registry.version_of(params, version.name, version.version)
    if champion is not None and champion.version == version.version:
        return Decision(champion, (), False, champion, "it is champion already")
    if (when := version.tags.get(ROLLED_BACK)) and not again:
        reason = f"it was rolled back ({when}); to promote it again on purpose, say --again"
        return _refuse(params, version, champion, (), reason)
    with fetched(params, root, version) as candidate:
        gates = {name: check(name, candidate, champion) for name in gates_of(version)}
        while True:
            _tag(params, version, gates)
            verdicts = tuple(gates.values())
            if failed := [gate for gate in verdicts if not gate.passed]:
                reason = "; ".join(f"{gate.name}: {gate.reason}" for gate in failed)
                return _refuse(params, version, champion, verdicts, reason)
            if approve is not None and (refusal := approve(version, verdicts)):
                return _refuse(params, version, champion, verdicts, refusal)
            moved, champion = _move(params, version, champion, verdicts)
            if moved or (champion is not None and champion.version == version.version):
                break
            now = champion.version if champion else "none"
            logger.warning("version %s became champion meanwhile; comparing again", now)
            gates["quality"] = check("quality", candidate, champion)
    live = registry.version_of(params, version.name, version.version)
    reason = "all gates passed" if moved else "another process promoted it"
    return Decision(live, verdicts, moved, live, reason)


def _begin(params: Params, version: Version) -> Version | None:
    """Repair what was cut off, and the present champion; a champion does not challenge itself."""
    with aliases.exclusive():
        if repaired := aliases.repair(params, version.name):
            logger.warning("%s", repaired)
        champion = registry.alias(params, version.name, CHAMPION)
        if champion is not None and CHALLENGER in champion.aliases:
            registry.delete_alias(params, version.name, CHALLENGER)
            champion = registry.version_of(params, version.name, champion.version)
    return champion


def _tag(params: Params, version: Version, gates: dict[str, Gate]) -> None:
    tags = {f"gate.{name}": gate.verdict[:VERDICT_LETTERS] for name, gate in gates.items()}
    registry.tag_version(params, version, tags)


def _move(
    params: Params, version: Version, compared: Version | None, gates: Sequence[Gate]
) -> tuple[bool, Version | None]:
    """Promote if the champion still is the one that `version` was compared with; else the champion of now."""
    with aliases.exclusive():
        if repaired := aliases.repair(params, version.name):
            logger.warning("%s", repaired)
        champion = registry.alias(params, version.name, CHAMPION)
        if (champion.version if champion else "") != (compared.version if compared else ""):
            return False, champion
        previous = registry.alias(params, version.name, PREVIOUS)
        entry = aliases.describe(
            "promote",
            champion,
            version,
            "all gates passed",
            gates=_verdicts(gates),
            previous=previous.version if previous else "",
        )
        aliases.move(params, entry)
    return True, None


def _refuse(
    params: Params, version: Version, champion: Version | None, gates: Sequence[Gate], reason: str
) -> Decision:
    entry = aliases.describe("refused", champion, version, reason, gates=_verdicts(gates))
    with aliases.exclusive():
        promotion_log.append(params, entry)
    return Decision(
        registry.version_of(params, version.name, version.version),
        tuple(gates),
        False,
        registry.alias(params, version.name, CHAMPION),
        reason,
    )


def _verdicts(gates: Sequence[Gate]) -> dict[str, str]:
    return {gate.name: gate.verdict[:VERDICT_LETTERS] for gate in gates}


# ---- which version, which data ---------------------------------------------------------------------------


def choose(params: Params, name: str, version: str) -> Version | None:
    """The version with that number; without a number the challenger, or None when there is none.

    Raises:
        DataError: no such model or version.
    """
    known = registry.versions(params, name)
    if not known:
        listed = ", ".join(registry.model_names(params)) or "none yet; `make run` registers one"
        raise DataError(f"the registry has no model {name!r}; it has: {listed}")
    if not version:
        return next((entry for entry in known if CHALLENGER in entry.aliases), None)
    found = next((entry for entry in known if entry.version == version), None)
    if found is None:
        numbers = ", ".join(entry.version for entry in known)
        raise DataError(f"{name} has no version {version!r}; it has {numbers}")
    return found


def workspace_of(params: Params, version: Version) -> tuple[Params, Path]:
    """The workspace whose data `version` was made from, with its own limits; else the current one."""
    here = Path.cwd()
    for root in (here, paths.home(), *sorted(paths.workspaces().glob("*"))):
        for data in (paths.DATA, paths.TEXT):
            try:
                digest = files.read_json(root / data / "manifest.json")["digest"]
            except (OSError, ValueError, KeyError, TypeError):
                continue
            if digest == version.tags.get("data.digest"):
                return (params if root == here else load_params(root / "params.yaml")), root
    return params, here
