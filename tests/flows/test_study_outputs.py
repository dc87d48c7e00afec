"""The folder of a study and the command that fills it."""

from __future__ import annotations

import csv
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from typer.testing import CliRunner

from flows.cli import app
from flows.errors import ConfigError, DataError, ResourceError
from flows.studies import outputs
from flows.studies.analysis import AnalysisSettings
from flows.studies.cells import read_cells, write_cells
from flows.studies.outputs import write_study

PUBLISHED = Path(__file__).parents[2] / "benchmarks/data_scaling/published_cells.csv"
QUICK = AnalysisSettings(draws=50, law_draws=20)


class Page(HTMLParser):
    """Tags of a page, and whether each is closed."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.urls: list[str] = []
        self.ids: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name in ("src", "href", "xlink:href"):
                self.urls.append(value or "")
            if name == "id":
                self.ids.append(value or "")
        if tag not in ("meta", "br", "img", "link", "hr"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if self.open and self.open[-1] == tag:
            self.open.pop()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The published cells with a train loss, one cell left out, and a name that could break a page."""
    path = tmp_path_factory.mktemp("study")
    cells = [
        replace(
            cell,
            train_loss=cell.loss - 0.01,
            validation_loss_crops=1.1 * cell.loss,
            seconds=90.0,
            model="S<script>" if cell.model == "S" else cell.model,
        )
        for cell in read_cells(PUBLISHED).cells
    ]
    cells[20] = replace(cells[20], validation_loss=float("nan"))
    write_cells(path / "cells.csv", cells)
    write_study(path / "cells.csv", path / "out", QUICK)
    return path / "out"


@pytest.fixture
def small_table(tmp_path) -> Path:
    """One model, one length, no accuracy, five cells: as little as can be fitted."""
    table = tmp_path / "cells.csv"
    rows = [f"m,1e6,{images},10,{0.5 - 0.01 * at}," for at, images in enumerate((10, 20, 40, 80, 160))]
    header = "model,parameters,images,iterations,validation_loss,finetuned_top1"
    table.write_text("\n".join([header, *rows]) + "\n")
    return table


def test_every_promised_file_is_there(folder):
    assert {path.name for path in folder.iterdir()} == {
        "analysis.json", "cells.csv", "study.html", "loss_over_data.png", "loss_over_size.png",
        "gap_over_time.png", "accuracy_over_loss.png", "held_out.png",
    }  # fmt: skip
    for path in folder.glob("*.png"):
        assert path.read_bytes().startswith(b"\x89PNG")


def test_page_is_whole_and_asks_for_nothing(folder):
    text = (folder / "study.html").read_text()
    page = Page()
    page.feed(text)
    assert page.open == []
    assert len(page.ids) == len(set(page.ids))
    assert all(url.startswith("#") for url in page.urls)
    assert set(page.urls) <= {f"#{name}" for name in page.ids}
    assert "url(http" not in text
    assert "S<script>" not in text  # names are text
    assert "NaN" not in text
    assert len(re.findall(r"<title>", text)) > 63  # every mark says what it is
    assert text.count("<svg") == 5
    assert "on random crops" in text
    assert "1 h 33 min" in text  # 62 cells of 90 s


def test_table_has_the_verdicts_and_every_row(folder):
    rows = list(csv.DictReader((folder / "cells.csv").open()))
    assert len(rows) == 63
    out = [row for row in rows if row["left_out"]]
    assert len(out) == 1
    assert out[0]["validation_loss"] == "nan"
    overfitted = {(row["model"], row["data"]) for row in rows if row["verdict"] == "overfitted"}
    assert ("H", "IN1K 20%") in overfitted
    assert all(row["in_fit"] == "no" for row in rows if row["verdict"] in ("overfitted", "rising"))


def test_picture_of_an_earlier_table_does_not_stay(small_table, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "gap_over_time.png").write_bytes(b"old")
    (out / "mine.txt").write_text("kept")
    write_study(small_table, out, QUICK)
    assert not (out / "gap_over_time.png").exists()
    assert (out / "mine.txt").read_text() == "kept"


def test_mistake_leaves_earlier_results_as_they_were(folder, tmp_path):
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    wrong = tmp_path / "cells.csv"
    wrong.write_text(PUBLISHED.read_text().replace("0.4751", "abc"))
    with pytest.raises(DataError, match="abc"):
        write_study(wrong, folder, QUICK)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_folder_that_cannot_be_is_one_sentence(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="is a file"):
        write_study(PUBLISHED, tmp_path / "file", QUICK)
    monkeypatch.setattr(outputs, "render", lambda analysis: {})
    with pytest.raises(ResourceError, match="cannot create"):
        write_study(PUBLISHED, tmp_path / "file" / "below", QUICK)


def test_command_prints_the_conclusions(tmp_path):
    result = CliRunner().invoke(
        app,
        [
            "study",
            "analyse",
            str(PUBLISHED),
            "--out",
            str(tmp_path / "out"),
            "--draws",
            "100",
            "--images",
            "256e3",
        ],
        env={"COLUMNS": "300"},
    )
    assert result.exit_code == 0, result.output
    for words in ("−0.79", "−0.90", "−0.89", "+0.23", "H and g on IN1K 50%", "256k images", "study.html"):
        assert words in result.output
    assert json.loads((tmp_path / "out/analysis.json").read_text())["settings"]["images"] == 256_000


def test_smallest_table_that_can_be_fitted_gets_a_page(small_table, tmp_path):
    found = write_study(small_table, tmp_path / "out", QUICK)
    assert found["fit"]["exponents"]["images"]["value"] > 0
    assert found["fit"]["exponents"]["parameters"]["value"] is None
    assert found["held_out"]["errors"] is None
    assert (tmp_path / "out/study.html").stat().st_size > 10_000
