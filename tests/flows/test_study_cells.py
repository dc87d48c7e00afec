"""The table of a study: what is read, what is left out, what is refused in one sentence."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from flows.errors import DataError
from flows.studies.cells import MAX_BYTES, MAX_CELLS, REQUIRED, Cell, check_cells, read_cells, write_cells

PUBLISHED = Path(__file__).parents[2] / "benchmarks/data_scaling/published_cells.csv"
HEADER = ",".join(REQUIRED)
ROW = "S,49e6,1000,500,0.5,80"


def write(tmp_path: Path, *rows: str, header: str = HEADER) -> Path:
    path = tmp_path / "cells.csv"
    path.write_text("\n".join([header, *rows]) + "\n")
    return path


def test_published_table_is_the_papers():
    cells = read_cells(PUBLISHED).cells
    assert len(cells) == 63
    per_model = {name: sum(cell.model == name for cell in cells) for name in "SBLHg"}
    assert per_model == {"S": 12, "B": 15, "L": 15, "H": 12, "g": 9}
    assert {cell.model: cell.parameters for cell in cells} == {
        "S": 49e6, "B": 87e6, "L": 195e6, "H": 655e6, "g": 1.06e9,
    }  # fmt: skip
    assert {cell.data: cell.images for cell in cells} == {
        "IN1K 10%": 128_000, "IN1K 20%": 256_000, "IN1K 50%": 641_000,
        "IN1K 100%": 1_281_167, "IN22K 100%": 14_200_000,
    }  # fmt: skip
    found = {(c.model, c.data, c.iterations): (c.loss, c.finetuned_top1) for c in cells}
    assert {iterations for _, _, iterations in found} == {125_000, 250_000, 500_000}
    assert found["S", "IN1K 10%", 500_000] == (0.5115, 83.17)
    assert found["S", "IN1K 100%", 125_000] == (0.4728, 82.92)
    assert found["B", "IN1K 20%", 250_000] == (0.4679, 84.37)
    assert found["B", "IN22K 100%", 500_000] == (0.4614, 85.11)
    assert found["L", "IN1K 20%", 500_000] == (0.4960, 84.59)
    assert found["L", "IN1K 50%", 125_000] == (0.4622, 84.78)
    assert found["H", "IN1K 20%", 125_000] == (0.4789, 84.35)
    assert found["H", "IN1K 100%", 500_000] == (0.4416, 86.34)
    assert found["g", "IN1K 50%", 500_000] == (0.4719, 85.51)
    assert found["g", "IN22K 100%", 500_000] == (0.4416, 86.53)


def test_written_table_reads_back_equal(tmp_path):
    cells = [
        Cell("a, b", 1e6, 10.0, 5.0, 0.123456789, None, data='Ünïcode "50%"', flops=1.5e18, seed="0"),
        Cell("a, b", 1e6, 10.0, 5.0, None, 12.5, status="failed", seed="1"),
    ]
    write_cells(tmp_path / "t.csv", cells)
    table = read_cells(tmp_path / "t.csv")
    assert [replace(cell, line=0) for cell in table.cells] == [cells[0]]
    assert [replace(found.cell, line=0) for found in table.left_out] == [cells[1]]


@pytest.mark.parametrize("loss", ["", "nan", "NaN", "inf"])
def test_cell_without_loss_is_left_out_with_its_reason(tmp_path, loss):
    table = read_cells(write(tmp_path, ROW, f"S,49e6,1000,900,{loss},81"))
    assert [cell.loss for cell in table.cells] == [0.5]
    assert table.left_out[0].cell.line == 3
    assert "validation_loss" in table.left_out[0].reason


def test_cell_that_did_not_end_is_no_result(tmp_path):
    table = read_cells(
        write(tmp_path, ROW + ",done", "B,87e6,1000,500,0.4,81,failed", header=HEADER + ",status")
    )
    assert [cell.model for cell in table.cells] == ["S"]
    assert "failed" in table.left_out[0].reason


def test_unknown_column_is_named_and_not_used(tmp_path):
    table = read_cells(write(tmp_path, ROW + ",x", header=HEADER + ",colour"))
    assert any("colour" in note for note in table.notes)


def test_mark_of_byte_order_and_windows_line_ends_are_read(tmp_path):
    path = tmp_path / "cells.csv"
    path.write_bytes(b"\xef\xbb\xbf" + f"{HEADER}\r\n{ROW}\r\n\r\n".encode())
    assert read_cells(path).cells[0].loss == 0.5


def test_fractions_taken_for_percent_are_noted(tmp_path):
    assert any("percent" in note for note in read_cells(write(tmp_path, "S,49e6,1000,500,0.5,0.8")).notes)


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        (["S,49e6,1000,500,abc,80"], "line 2: `validation_loss` must be a number, found 'abc'"),
        (["S,49e6,1000,500,0.5,high"], "`finetuned_top1` must be a number"),
        (["S,49e6,1000,500,-0.5,80"], "above 0"),
        (["S,nan,1000,500,0.5,80"], "`parameters` must be a number above 0"),
        (["S,49e6,0,500,0.5,80"], "`images` must be a number above 0"),
        (["S,49e6,1000,,0.5,80"], "`iterations` is empty"),
        (["S,49e6,1000,500,0.5,101"], "percentage from 0 to 100"),
        ([",49e6,1000,500,0.5,80"], "`model` is empty"),
        ([ROW, ROW], "lines 2 and 3 are the same cell"),
        ([ROW, "S,50e6,1000,900,0.5,80"], "parameters in line 2"),
        ([ROW + ",7"], "line 2: 7 values, the header names 6"),
        (['S,49e6,1000,500,"0.5,80'], "not CSV"),
        (["S,49e6,1000,500,,80"], "none of the 1 cells has a validation loss"),
        ([], "no cells below"),
    ],
)
def test_questionable_row_is_one_sentence(tmp_path, rows, said):
    with pytest.raises(DataError) as caught:
        read_cells(write(tmp_path, *rows))
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", REQUIRED)
def test_missing_column_is_named(tmp_path, name):
    with pytest.raises(DataError, match=f"no column {name}"):
        read_cells(write(tmp_path, ROW, header=HEADER.replace(name, "other")))


def test_alien_files_are_refused(tmp_path):
    path = tmp_path / "cells.csv"
    path.write_text(HEADER.replace(",", ";"))
    with pytest.raises(DataError, match="separated by commas"):
        read_cells(path)
    path.write_text(f"{HEADER},model\n")
    with pytest.raises(DataError, match="given twice"):
        read_cells(path)
    path.write_bytes(f"{HEADER}\nS\xe9".encode("latin-1"))
    with pytest.raises(DataError, match="UTF-8"):
        read_cells(path)
    path.write_bytes(b"")
    with pytest.raises(DataError, match="empty"):
        read_cells(path)
    path.write_bytes(b"x" * (MAX_BYTES + 1))
    with pytest.raises(DataError, match="MB"):
        read_cells(path)
    path.write_text("\n".join([HEADER, *(f"S,49e6,1000,{at + 1},0.5,80" for at in range(MAX_CELLS + 1))]))
    with pytest.raises(DataError, match="more than"):
        read_cells(path)
    with pytest.raises(DataError, match="folder"):
        read_cells(tmp_path)
    with pytest.raises(DataError, match="does not exist"):
        read_cells(tmp_path / "absent.csv")


def test_repetitions_need_a_seed():
    once = Cell("S", 1.0, 1.0, 1.0, 0.5)
    assert len(check_cells([replace(once, seed="0"), replace(once, seed="1")]).cells) == 2
