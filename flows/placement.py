"""Which form of a model runs on which device: decided from the measured table of stage `parity`.

For every execution provider that was measured: which variant, how many images at once, how long to wait for
them, so that the latency budget holds at the best throughput. The decision is `placement.json` in the
registered folder, beside `parity.json`: versioned with the model and bound by digests to the weights and to
the table it was made from. A server reads it when `serve.variant` is `auto`, and refuses one that was made
for something else.

A request on a busy server waits for the batch that runs, at most `max_wait_ms` for company, and for its own
batch: two batches and the wait have to fit into the budget.
"""

from __future__ import annotations

import csv
import hashlib
import io
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from flows import files
from flows.errors import DataError
from flows.params import Placement as Limits

FORMAT = 1
FILE = "placement.json"
VARIANTS = ("fp32", "int8")


@dataclass(frozen=True)
class Row:
    """One measured combination of the latency table."""

    provider: str
    variant: str
    batch: int
    p50_ms: float
    p95_ms: float
    images_per_s: float
    peak_memory_mb: float


@dataclass(frozen=True)
class Choice:
    """How a provider runs the model."""

    provider: str
    variant: str
    threads: int  # as measured
    max_batch: int
    max_wait_ms: float
    p95_ms: float  # of one batch
    images_per_s: float
    peak_memory_mb: float


@dataclass(frozen=True)
class Rejected:
    provider: str
    variant: str
    batch: int
    reason: str


def choose(
    rows: Sequence[Row], limits: Limits, threads: int, accurate: Mapping[str, bool]
) -> tuple[list[Choice], list[Rejected]]:
    """One choice per provider that has any; every other row with the reason why not.

    Args:
        threads: that the rows were measured with.
        accurate: variant → whether its accuracy was within the limits of `parity`.
    """
    chosen: list[Choice] = []
    rejected: list[Rejected] = []
    for provider in dict.fromkeys(row.provider for row in rows):
        fit = []
        for row in (row for row in rows if row.provider == provider):
            if reason := _problem(row, limits, accurate):
                rejected.append(Rejected(provider, row.variant, row.batch, reason))
            else:
                fit.append(row)
        if not fit:
            continue
        # equal throughput: the exact variant, then the smaller batch
        best = max(fit, key=lambda row: (row.images_per_s, row.variant == "fp32", -row.batch))
        rejected += [
            Rejected(
                provider, row.variant, row.batch, f"{row.images_per_s:g} images/s, the chosen row has more"
            )
            for row in fit
            if row is not best
        ]
        wait_ms = min(limits.max_wait_ms, round(limits.max_latency_ms - 2 * best.p95_ms, 3))
        chosen.append(
            Choice(
                provider,
                best.variant,
                threads,
                best.batch,
                wait_ms,
                best.p95_ms,
                best.images_per_s,
                best.peak_memory_mb,
            )
        )
    return chosen, rejected


def _problem(row: Row, limits: Limits, accurate: Mapping[str, bool]) -> str | None:
    if not accurate.get(row.variant, False):
        return f"{row.variant} is not within the accuracy limits of parity"
    if 2 * row.p95_ms > limits.max_latency_ms:
        return f"two batches of {row.p95_ms:g} ms (p95) exceed max_latency_ms {limits.max_latency_ms:g}"
    if row.peak_memory_mb > limits.max_memory_mb:
        return f"{row.peak_memory_mb:g} MB exceed max_memory_mb {limits.max_memory_mb:g}"
    return None


# ---- the file ----


def place(folder: Path, table: Path, limits: Limits) -> None:
    """`write_placement` for a registration, which does not fail for want of it: only `serve.variant: auto`
    needs a placement, and `check_placement` says that it is missing."""
    try:
        write_placement(folder, table, limits)
    except (DataError, OSError, KeyError) as error:
        logging.getLogger("trunkline.placement").warning("no placement is registered: %s", error)


def write_placement(folder: Path, table: Path, limits: Limits) -> dict[str, Any]:
    """Decide for the exported model in `folder` (manifest.json, parity.json) from `table` (latency.csv).

    Raises:
        DataError: the table or the report cannot be read, or belong to another model.
    """
    parity, digests = _read(folder / "parity.json"), _digests(folder)
    if parity.get("digests") != digests:
        raise DataError(f"{folder / 'parity.json'} was made for another model; run the parity stage again")
    text = table.read_bytes()
    threads = int(parity["machine"]["threads"])
    chosen, rejected = choose(read_table(text.decode()), limits, threads, accuracy(parity))
    placement = {
        "format": FORMAT,
        "model_digests": digests,
        "table_sha256": hashlib.sha256(text).hexdigest(),
        "hardware": {"processor": parity["machine"]["processor"], "threads": threads},
        "limits": limits.model_dump(),
        "chosen": [asdict(choice) for choice in chosen],
        "rejected": [asdict(row) for row in rejected],
    }
    files.write_json(folder / FILE, placement)
    files.write_bytes(folder / table.name, text)  # the table travels along: its digest can be checked
    return placement


def read_table(text: str) -> list[Row]:
    """The measured rows of served variants; PyTorch's are for comparison only.

    Raises:
        DataError: not such a table.
    """
    try:
        return [
            Row(
                line["provider"],
                line["variant"],
                int(line["batch"]),
                float(line["p50_ms"]),
                float(line["p95_ms"]),
                float(line["images_per_s"]),
                float(line["peak_memory_mb"]),
            )
            for line in csv.DictReader(io.StringIO(text))
            if line["variant"] in VARIANTS
        ]
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"the latency table is not usable: {error!r}; run the parity stage again") from None


def accuracy(parity: Mapping[str, Any]) -> dict[str, bool]:
    """Variant → whether every check of it in parity.json passed; without any check it did not."""
    verdicts: dict[str, bool] = {}
    for check in parity.get("checks", []):
        variant = str(check["name"]).split()[0]
        verdicts[variant] = verdicts.get(variant, True) and bool(check["passed"])
    return verdicts


def read_placement(folder: Path) -> dict[str, Any] | None:
    """The decision in `folder`, or None without one.

    Raises:
        DataError: it is damaged, or was made for another model or from another table.
    """
    if not (folder / FILE).exists():
        return None
    placement = _read(folder / FILE)
    if problem := _mismatch(folder, placement):
        raise DataError(f"{folder / FILE} {problem}; register the model again")
    return placement


def check_placement(folder: Path) -> str | None:
    """None if the registered `folder` has a usable placement, else the reason: for the promotion's gates."""
    try:
        placement = read_placement(folder)
    except DataError as error:
        return str(error)
    if placement is None:
        return f"{FILE} is missing"
    if not placement["chosen"]:
        reasons = "; ".join(dict.fromkeys(row["reason"] for row in placement["rejected"]))
        return f"no variant fits the limits on any provider: {reasons}"
    return None


def pick(placement: Mapping[str, Any], providers: Sequence[str]) -> Choice | None:
    """The choice for the first of `providers`, best first, that was measured."""
    choices = {entry["provider"]: Choice(**entry) for entry in placement["chosen"]}
    return next((choices[provider] for provider in providers if provider in choices), None)


def _mismatch(folder: Path, placement: Mapping[str, Any]) -> str | None:
    try:
        if placement["format"] != FORMAT:
            return f"has format {placement['format']!r}, not {FORMAT}"
        if placement["model_digests"] != _digests(folder):
            return "was made for another model"
        table = folder / "latency.csv"
        if not table.is_file() or files.sha256_file(table) != placement["table_sha256"]:
            return "was made from another table than the latency.csv beside it"
        for entry in placement["chosen"]:
            Choice(**entry)
    except (KeyError, TypeError) as error:
        return f"is not usable ({error!r})"
    return None


def _digests(folder: Path) -> dict[str, str]:
    manifest = _read(folder / "manifest.json")
    return {name: str(variant["digest"]) for name, variant in manifest["variants"].items()}


def _read(path: Path) -> dict[str, Any]:
    try:
        value = files.read_json(path)
    except FileNotFoundError:
        raise DataError(f"{path} does not exist") from None
    except ValueError as error:
        raise DataError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise DataError(f"{path} must be a JSON object")
    return value
