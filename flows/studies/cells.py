"""The table of cells: one row per pretraining, as CSV.

Nothing questionable is averaged in: a cell without a finite validation loss is left out and listed with its
reason, a value that is no number stops the reading in one sentence, and a cell given twice is an error that
names both lines. Columns that nobody knows are kept out and named.
"""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from flows import files
from flows.errors import DataError

MAX_BYTES = 8_000_000
MAX_CELLS = 1_000
"""A study has tens of cells; beyond this the file is something else, and resampling it would take long."""


@dataclass(frozen=True)
class Cell:
    """One pretraining. Numbers that are not known are None."""

    model: str
    parameters: float
    """Of the backbone."""
    images: float
    """Different training images."""
    iterations: float
    """Optimiser steps."""
    validation_loss: float | None
    finetuned_top1: float | None = None
    """Percent, 0 to 100."""
    data: str = ""
    """How people call the training images: `IN1K 50%`."""
    train_loss: float | None = None
    batch_size: float | None = None
    flops: float | None = None
    """Of the whole pretraining."""
    images_seen: float | None = None
    """Over all epochs."""
    seconds: float | None = None
    device_hours: float | None = None
    peak_memory_bytes: float | None = None
    validation_loss_drop_path: float | None = None
    validation_loss_crops: float | None = None
    status: str = ""
    run_id: str = ""
    point: str = ""
    experiment: str = ""
    seed: str = ""
    line: int = 0
    """In the file it was read from."""

    @property
    def loss(self) -> float:
        """The validation loss of a cell that is not left out."""
        assert self.validation_loss is not None
        return self.validation_loss

    @property
    def label(self) -> str:
        """`L · IN1K 50% · 125,000`."""
        seed = f" · seed {self.seed}" if self.seed else ""
        return f"{self.model} · {self.data_label} · {self.iterations:,.0f}{seed}"

    @property
    def data_label(self) -> str:
        return self.data or f"{self.images:,.0f} images"

    @property
    def corpus(self) -> str:
        """Where the images come from: `IN1K` of `IN1K 50%`. Empty without a label."""
        return re.sub(r"[\s_:-]*\d+(\.\d+)?\s*%$", "", self.data).strip()

    @property
    def series(self) -> tuple[str, float]:
        """Cells that differ in their length (and seed) only."""
        return self.model, self.images


@dataclass(frozen=True)
class LeftOut:
    """A cell that takes no part, and why."""

    cell: Cell
    reason: str


@dataclass(frozen=True)
class Table:
    """What was read: cells with a loss, cells without, and what a reader should know."""

    cells: tuple[Cell, ...]
    left_out: tuple[LeftOut, ...] = ()
    notes: tuple[str, ...] = ()
    name: str = ""


COLUMNS = tuple(field.name for field in fields(Cell) if field.name != "line")
REQUIRED = ("model", "parameters", "images", "iterations", "validation_loss", "finetuned_top1")
TEXTS = ("model", "data", "status", "run_id", "point", "experiment", "seed")
POSITIVE = ("parameters", "images", "iterations")
NOT_DONE = ("failed", "impossible", "stopped", "waiting")
"""What a sweep calls points that did not come to an end: their numbers, if any, are not results."""


# -------------------------------------------------------------------------------------------- read


def read_cells(path: Path) -> Table:
    """The table in `path`, checked.

    Raises:
        DataError: in one sentence, with the line, if the file cannot be what it should be.
    """
    rows = _read_rows(path)
    if not rows:
        raise DataError(f"{path} is empty; its first line must name the columns: {', '.join(REQUIRED)}")
    header = [name.strip() for name in rows[0][1]]
    _check_header(path, header)
    cells = [_read_cell(path, line, header, values) for line, values in rows[1:]]
    if not cells:
        raise DataError(f"{path} has a header and no cells below it")
    unknown = [name for name in header if name not in COLUMNS]
    notes = [f"columns that the analysis does not know and does not use: {', '.join(unknown)}"] * bool(
        unknown
    )
    return check_cells(cells, path.name, notes)


def check_cells(cells: Sequence[Cell], name: str = "cells", notes: Sequence[str] = ()) -> Table:
    """Cells with a finite loss apart from those without; contradictions between cells are errors."""
    _refuse_contradictions(cells, name)
    kept, left_out = [], []
    for cell in cells:
        if cell.status in NOT_DONE:
            left_out.append(LeftOut(cell, f"its status is {cell.status!r}"))
        elif cell.validation_loss is None:
            left_out.append(LeftOut(cell, "validation_loss is empty"))
        elif not math.isfinite(cell.validation_loss):
            left_out.append(LeftOut(cell, f"validation_loss is {cell.validation_loss}"))
        else:
            kept.append(cell)
    if not kept:
        raise DataError(f"{name}: none of the {len(cells)} cells has a validation loss; nothing to analyse")
    notes = [*notes]
    accuracies = [cell.finetuned_top1 for cell in kept if cell.finetuned_top1 is not None]
    if accuracies and max(accuracies) <= 1.0:
        notes.append("finetuned_top1 is never above 1: it is taken as percent; are these fractions?")
    return Table(tuple(kept), tuple(left_out), tuple(notes), name)


def _read_rows(path: Path) -> list[tuple[int, list[str]]]:
    """(line, values) of all lines that are not blank."""
    if path.is_dir():
        raise DataError(f"{path} is a folder; give the CSV file with the cells")
    if not path.exists():
        raise DataError(f"{path} does not exist")
    if (size := path.stat().st_size) > MAX_BYTES:
        raise DataError(
            f"{path} has {size / 1e6:.0f} MB; a table of cells has at most {MAX_BYTES / 1e6:.0f} MB"
        )
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 (byte {error.start}); save it as CSV in UTF-8") from None
    rows: list[tuple[int, list[str]]] = []
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        for values in reader:
            if any(value.strip() for value in values):
                rows.append((reader.line_num, values))
            if len(rows) > MAX_CELLS + 1:
                raise DataError(
                    f"{path} has more than {MAX_CELLS:,} cells, which no analysis here is made for"
                )
    except csv.Error as error:
        raise DataError(f"{path}, line {reader.line_num}: not CSV ({error})") from None
    return rows


def _check_header(path: Path, header: Sequence[str]) -> None:
    missing = [name for name in REQUIRED if name not in header]
    if missing:
        alien = next((sign for sign in (";", "\t") if len(header) == 1 and sign in header[0]), "")
        hint = f"; the columns must be separated by commas, not by {alien!r}" if alien else ""
        found = ", ".join("".join(c if c.isprintable() else "?" for c in name[:40]) for name in header[:20])
        raise DataError(f"{path}: no column {', '.join(missing)}; the first line names: {found}{hint}")
    twice = sorted({name for name in header if name and header.count(name) > 1})
    if twice:
        raise DataError(f"{path}: column {', '.join(twice)} is given twice")


def _read_cell(path: Path, line: int, header: Sequence[str], values: Sequence[str]) -> Cell:
    if len(values) != len(header):
        raise DataError(f"{path}, line {line}: {len(values)} values, the header names {len(header)} columns")
    found: dict[str, Any] = {"line": line}
    for name, value in zip(header, (value.strip() for value in values), strict=True):
        if name in TEXTS:
            found[name] = value
        elif name in COLUMNS:
            found[name] = _read_number(path, line, name, value)
    if not found["model"]:
        raise DataError(f"{path}, line {line}: `model` is empty")
    return Cell(**found)


def _read_number(path: Path, line: int, name: str, text: str) -> float | None:
    where = f"{path}, line {line}: `{name}`"
    if not text:
        if name in POSITIVE:
            raise DataError(f"{where} is empty; it must be a number above 0")
        return None
    try:
        value = float(text)
    except ValueError:
        raise DataError(f"{where} must be a number, found {text[:40]!r}") from None
    if name == "validation_loss":
        if value <= 0:
            raise DataError(f"{where} must be above 0, found {text}")
        return value  # one that is not finite is left out with its reason
    if name in POSITIVE and not (math.isfinite(value) and value > 0):
        raise DataError(f"{where} must be a number above 0, found {text}")
    if not math.isfinite(value):
        return None
    if name == "finetuned_top1" and not 0 <= value <= 100:
        raise DataError(f"{where} must be a percentage from 0 to 100, found {text}")
    if value < 0:
        raise DataError(f"{where} must not be negative, found {text}")
    return value


def _refuse_contradictions(cells: Sequence[Cell], name: str) -> None:
    seen: dict[tuple[Any, ...], Cell] = {}
    sizes: dict[str, Cell] = {}
    for cell in cells:
        key = (cell.model, cell.images, cell.iterations, cell.seed)
        if key in seen:
            raise DataError(
                f"{name}: lines {seen[key].line} and {cell.line} are the same cell ({cell.label}); keep one, "
                "or tell repetitions apart by a column `seed`"
            )
        seen[key] = cell
        first = sizes.setdefault(cell.model, cell)
        if first.parameters != cell.parameters:
            raise DataError(
                f"{name}: model {cell.model!r} has {first.parameters:,.0f} parameters in line {first.line} "
                f"and {cell.parameters:,.0f} in line {cell.line}"
            )


# ------------------------------------------------------------------------------------------- write


def write_cells(path: Path, cells: Sequence[Cell]) -> None:
    """CSV with the required columns and those others that any cell fills; read back, it is equal."""
    others = [name for name in COLUMNS if name not in REQUIRED]
    shown = [
        *REQUIRED,
        *(name for name in others if any(getattr(cell, name) not in ("", None) for cell in cells)),
    ]
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(shown)
    table.writerows([write_value(getattr(cell, name)) for name in shown] for cell in cells)
    files.write_text(path, text.getvalue())


def write_value(value: Any) -> Any:
    """Whole numbers without a point, numbers that are not known as nothing."""
    if value is None:
        return ""
    return int(value) if isinstance(value, float) and value.is_integer() and value < 1e15 else value
