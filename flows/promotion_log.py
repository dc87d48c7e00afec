"""The append-only log of promotions, rollbacks and refusals: MLflow keeps no history of aliases, so we do.

One JSON object a line. Every entry is the artifact of a finished MLflow run of its own in the experiment
`<prefix>/promotion` (its table reads as the log, and no two machines ever write the same file); a local
copy, `.trunkline/promotions.jsonl` in the clone, answers without the tracking store. Reading gives the union
of both by entry id, so either may be lost. Appending happens under the lock of `flows.aliases`.
"""

from __future__ import annotations

import contextlib
import getpass
import json
import os
import socket
import tempfile
import uuid
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from flows import paths, tracking
from flows.errors import DataError
from flows.params import Params

ARTIFACT = "promotion.jsonl"
ID_TAG = "trunkline.promotion_id"
EXPERIMENT = "promotion"

Action = Literal["promote", "rollback", "refused", "abandoned"]
"""`abandoned`: begun by a process that was killed, and the aliases have been moved by somebody else since."""


@dataclass(frozen=True)
class Entry:
    """One decision. `from_version` was champion before, `to_version` is the one it is about."""

    action: Action
    model: str
    from_version: str  # empty: there was no champion
    to_version: str
    from_digest: str
    to_digest: str
    git_commit: str  # of the code that made `to_version`
    reason: str
    gates: Mapping[str, str] = field(default_factory=dict)  # name: "passed: …" or "failed: …"
    data_digest: str = ""
    previous: str = ""  # what the alias `previous` pointed at before
    time: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="milliseconds"))
    by: str = field(default_factory=lambda: who())
    id: str = field(default_factory=lambda: uuid.uuid4().hex)

    def to_json(self) -> str:
        return json.dumps(asdict(self), ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str) -> Entry:
        """
        Raises:
            ValueError, TypeError: not an entry.
        """
        return cls(**json.loads(text))


def who() -> str:
    """`user@host` of this process; a container may have a user without a name."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):
        user = str(os.getuid())
    return f"{user}@{socket.gethostname()}"


def local_path() -> Path:
    return paths.home() / ".trunkline" / "promotions.jsonl"


def append(params: Params, entry: Entry) -> None:
    """Write `entry` to MLflow, then to the local copy; one that is in either already is written to the other
    only."""
    if entry.id not in _recorded_runs(params, entry.model):
        tags = {
            ID_TAG: entry.id,
            "trunkline.model": entry.model,
            "trunkline.action": entry.action,
            "trunkline.from_version": entry.from_version,
            "trunkline.to_version": entry.to_version,
            "trunkline.by": entry.by,
            **{f"gate.{name}": verdict for name, verdict in entry.gates.items()},
        }
        name = f"{entry.action} {entry.model} {entry.to_version}"
        with (
            tracking.pipeline_run(params, name, tags, experiment=EXPERIMENT) as run,
            tempfile.TemporaryDirectory() as folder,
        ):
            (Path(folder) / ARTIFACT).write_text(entry.to_json() + "\n")
            run.log_artifact(Path(folder) / ARTIFACT)
    if all(known.id != entry.id for known in read_local()):
        _append_local(entry)


def read(params: Params, model: str) -> list[Entry]:
    """All entries of `model`, oldest first; ones that only MLflow has are fetched and added to the local
    copy."""
    local = read_local()
    known = {entry.id for entry in local}
    for identifier, run_id in _recorded_runs(params, model).items():
        if identifier not in known and (fetched := _fetch(params, run_id)):
            with contextlib.suppress(OSError):  # reading must work where nothing can be written
                _append_local(fetched)
            local.append(fetched)
    return sorted((entry for entry in local if entry.model == model), key=lambda entry: entry.time)


def read_local() -> list[Entry]:
    """The local copy. A last line that was cut off when the machine went down is left out: MLflow has it
    whole.

    Raises:
        DataError: a line inside the file is damaged.
    """
    try:
        lines = local_path().read_text().splitlines()
    except FileNotFoundError:
        return []
    entries = []
    for number, line in enumerate(lines, 1):
        try:
            entries.append(Entry.from_json(line))
        except (ValueError, TypeError):
            if number < len(lines) and line.strip():
                raise DataError(
                    f"line {number} of {local_path()} is damaged; delete the file, MLflow has all entries"
                ) from None
    return entries


def _append_local(entry: Entry) -> None:
    path = local_path()
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "ab+") as file:
        end = file.seek(0, os.SEEK_END)
        if end:
            file.seek(end - 1)
            if file.read(1) != b"\n":  # the rest of a line that was cut off must not swallow this one
                _drop_last_line(file)
        file.write(entry.to_json().encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def _drop_last_line(file: Any) -> None:
    file.seek(0)
    file.truncate(file.read().rfind(b"\n") + 1)


def _recorded_runs(params: Params, model: str) -> dict[str, str]:
    """Finished entries in the tracking store: entry id to run id."""
    connection = tracking.client(params)
    experiment = connection.get_experiment_by_name(f"{params.tracking.experiment}/{EXPERIMENT}")
    if experiment is None:
        return {}
    found: dict[str, str] = {}
    token: str | None = None
    while True:
        page = connection.search_runs(
            [experiment.experiment_id],
            f"tags.`trunkline.model` = '{model}' and attributes.status = 'FINISHED'",
            max_results=1000,
            page_token=token,
        )
        found |= {run.data.tags[ID_TAG]: run.info.run_id for run in page if ID_TAG in run.data.tags}
        token = page.token
        if not token:
            return found


def _fetch(params: Params, run_id: str) -> Entry | None:
    """The entry of a run; None when somebody has deleted its artifact."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            path = tracking.client(params).download_artifacts(run_id, ARTIFACT, folder)
            return Entry.from_json(Path(path).read_text())
        except Exception:  # MLflow's stores raise errors of their own for a missing file
            return None
