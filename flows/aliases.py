"""Move `champion`, `challenger` and `previous`, one process at a time, so that a kill at any step is
repaired.

MLflow changes one alias at a time. Before the first move the whole decision is written to a tag of the model
(the intent); after the last one and the line in the log the tag is removed. Whoever comes next and finds the
tag ends what was begun: forward if `champion` has moved already, back if it has not. `champion` itself moves
in a single step and is valid at every moment.

Two locks: a file lock between the processes of this clone and, where a Prefect server is configured, its
concurrency limit `trunkline-promotion` between machines.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from flows import paths, promotion_log, registry
from flows.errors import DataError, ResourceError
from flows.language_champion import open_registered
from flows.language_registration import is_language_model
from flows.params import Params
from flows.promotion_log import Entry
from flows.registry import CHALLENGER, CHAMPION, PREVIOUS, Version
from flows.serving.package import ModelPackage

INTENT = "trunkline.promotion"
ROLLED_BACK = "trunkline.rolled_back"
LIMIT = "trunkline-promotion"
logger = logging.getLogger("trunkline.promotion")


# ---- one at a time -----------------------------------------------------------------------------------------


@contextlib.contextmanager
def exclusive(*, wait: bool = True) -> Iterator[None]:
    """Hold the right to move aliases; short, never while gates run or a person is asked.

    Raises:
        ResourceError: another process holds it and `wait` is false.
    """
    folder = paths.home() / ".trunkline"
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "promotion.lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            raise ResourceError("another process moves the aliases just now; try again in a moment") from None
        with _between_machines():
            yield


@contextlib.contextmanager
def _between_machines() -> Iterator[None]:
    """Prefect's concurrency limit, made by the first who needs it; nothing without a configured server."""
    from prefect.settings import PREFECT_API_URL

    if not PREFECT_API_URL.value():
        yield
        return
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.actions import GlobalConcurrencyLimitCreate
    from prefect.concurrency.sync import concurrency
    from prefect.exceptions import ObjectAlreadyExists, ObjectNotFound

    try:
        with get_client(sync_client=True) as client:
            try:
                client.read_global_concurrency_limit_by_name(LIMIT)
            except ObjectNotFound:
                with contextlib.suppress(ObjectAlreadyExists):
                    client.create_global_concurrency_limit(GlobalConcurrencyLimitCreate(name=LIMIT, limit=1))
    except Exception as error:  # a rollback must work while the Prefect server is down
        logger.warning("the Prefect server cannot be asked (%s): only this clone's lock is held", error)
        yield
        return
    with concurrency(LIMIT, occupy=1, strict=True):
        yield


# ---- moves, under the lock ---------------------------------------------------------------------------------


def move(params: Params, entry: Entry) -> None:
    """Carry out a decision to promote or roll back, and log it."""
    promotion_log.read_local()  # a damaged log is told before anything moves
    registry.set_model_tag(params, entry.model, INTENT, entry.to_json())
    _finish(params, entry)


def _finish(params: Params, entry: Entry) -> None:
    """Every step may have been done already."""
    name = entry.model
    if entry.action == "promote":
        if entry.from_version:
            registry.set_alias(params, name, PREVIOUS, entry.from_version)
        registry.set_alias(params, name, CHAMPION, entry.to_version)
        _remove(params, name, CHALLENGER, entry.to_version)
        promoted = registry.version_of(params, name, entry.to_version)
        if promoted.tags.get(ROLLED_BACK):  # promoted again, on purpose
            registry.tag_version(params, promoted, {ROLLED_BACK: ""})
    else:
        registry.set_alias(params, name, CHAMPION, entry.to_version)
        left = registry.version_of(params, name, entry.from_version)
        registry.tag_version(params, left, {ROLLED_BACK: f"{entry.time} by {entry.by}"})
        _remove(params, name, PREVIOUS, entry.to_version)
    promotion_log.append(params, entry)
    registry.delete_model_tag(params, name, INTENT)


def _remove(params: Params, name: str, alias: str, version: str) -> None:
    """Delete an alias, unless it has come to mean another version."""
    found = registry.alias(params, name, alias)
    if found is not None and found.version == version:
        registry.delete_alias(params, name, alias)


def repair(params: Params, name: str) -> str | None:
    """End what a killed process had begun; one sentence about it, or None when there was nothing.

    Call it under the lock: the intent of a process that lives is never seen.
    """
    text = registry.model_tag(params, name, INTENT)
    if text is None:
        return None
    entry = Entry.from_json(text)
    champion = registry.alias(params, name, CHAMPION)
    now = champion.version if champion else ""
    began = f"a {entry.action} to version {entry.to_version} of {name} was cut off at {entry.time}"
    if now == entry.to_version:
        _finish(params, entry)
        return f"{began}; it is finished now"
    if now == entry.from_version:
        if entry.action == "promote" and entry.previous:
            registry.set_alias(params, name, PREVIOUS, entry.previous)
        elif entry.action == "promote":
            _remove(params, name, PREVIOUS, entry.from_version)
        registry.delete_model_tag(params, name, INTENT)
        return f"{began} before the champion changed; it is undone"
    reason = f"cut off, and champion is version {now or 'none'} since"
    promotion_log.append(params, replace(entry, action="abandoned", reason=reason))
    registry.delete_model_tag(params, name, INTENT)
    return f"{began}, and somebody has made version {now or 'none'} champion since; it is given up"


def rollback(params: Params, name: str, why: str = "asked for by a person") -> Entry:
    """`champion` back to `previous`, whose files are verified first; the version left is not promoted again
    by itself, and `previous` is removed, so that a second rollback does not bring it back.

    Raises:
        DataError: no such model, no champion, no previous version, or its files are damaged.
    """
    with exclusive():
        if repaired := repair(params, name):
            logger.warning("%s", repaired)
        champion, target = (registry.alias(params, name, alias) for alias in (CHAMPION, PREVIOUS))
        if champion is None:
            raise DataError(f"{name} has no champion, so there is nothing to roll back")
        if target is None:
            raise DataError(_no_previous(params, name, champion))
        _verify_files(params, target)
        entry = describe("rollback", champion, target, why, previous=target.version)
        move(params, entry)
    return entry


def _verify_files(params: Params, version: Version) -> None:
    """
    Raises:
        DataError: the registered files cannot be fetched or are not those that were registered.
    """
    with tempfile.TemporaryDirectory() as folder:
        try:
            registry.download_version(params, version, Path(folder))
            digest = version.tags.get("onnx.digest")
            if is_language_model(version):
                open_registered(Path(folder), digest)
            else:
                ModelPackage.open(Path(folder), digest=digest)
        except Exception as error:  # MLflow's stores raise errors of their own for what is missing
            reason = " ".join(str(error).split())[:300].replace(f"{folder}/", "")
            raise DataError(
                f"version {version.version} of {version.name} cannot be served: {reason}; "
                "champion stays as it is"
            ) from None


def _no_previous(params: Params, name: str, champion: Version) -> str:
    """Why there is nothing to go back to, and what else one can do."""
    last = next(reversed(promotion_log.read(params, name)), None)
    text = f"{name} has no previous version to roll back to; champion stays version {champion.version}"
    if last and last.action == "rollback" and last.to_version == champion.version:
        text += (
            f" (the last rollback, {last.time}, came here from version {last.from_version}; "
            f"to go there again: trunkline promote --model {name} --version {last.from_version} --again)"
        )
    return text


def describe(
    action: promotion_log.Action,
    champion: Version | None,
    version: Version,
    reason: str,
    *,
    gates: dict[str, str] | None = None,
    previous: str = "",
) -> Entry:
    """The entry for a decision about `version` while `champion` is live."""
    return Entry(
        action=action,
        model=version.name,
        from_version=champion.version if champion else "",
        to_version=version.version,
        from_digest=champion.tags.get("onnx.digest", "") if champion else "",
        to_digest=version.tags.get("onnx.digest", ""),
        git_commit=version.tags.get("git.commit", "unknown"),
        reason=reason,
        gates=gates or {},
        data_digest=version.tags.get("data.digest", ""),
        previous=previous,
    )
