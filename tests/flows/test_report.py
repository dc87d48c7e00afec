"""flows/report.py: the page holds the files' numbers, needs nothing from outside and survives absence."""

from __future__ import annotations

import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import fake_workspace
import pytest

from flows import files, markup, paths, report, results, stage
from flows.errors import DataError
from models.classification.metrics import Interval

VOID = {"meta", "img", "br", "hr", "link", "input"}


class Page(HTMLParser):
    """Checks nesting while parsing, and collects what the tests ask for."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.fixture(scope="module")
def html(finished_workspace: Path) -> str:
    return report.render_report(finished_workspace, fake_workspace.extra())


@pytest.fixture(scope="module")
def page(html: str) -> Page:
    return Page(html)


@pytest.fixture
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blank pictures, for the tests that only read the words: drawing is most of a report's time."""
    blank = b'<svg viewBox="0 0 1 1"></svg>'
    for name in ("confusion", "comparison", "reliability", "latency", "durations"):
        monkeypatch.setattr(report.plots, name, lambda *arguments: blank)
    monkeypatch.setattr(report.plots, "curve_panels", lambda *arguments: {})


@pytest.fixture
def copy(finished_workspace: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished_workspace, tmp_path / "copy"))


@pytest.mark.usefixtures("no_pictures")
def test_report_lies_where_the_pipeline_expects_it(copy: Path) -> None:
    path = report.build_report(copy, {})
    assert path == copy / "artifacts" / "report.html"
    assert path.read_text().lstrip().startswith("<!doctype html>")


def test_page_makes_no_request(html: str, page: Page) -> None:
    for tag, attributes in page.tags:
        assert tag not in {"script", "link", "iframe", "object"}
        for name in ("src", "href", "xlink:href", "data", "poster", "action"):
            value = attributes.get(name)
            assert value is None or value.startswith(("data:image/", "#")), (tag, name, value)
        assert not any(name.startswith("on") for name in attributes), (tag, attributes)
    assert "@import" not in html
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]+)", html))
    assert "default-src 'none'" in html


def test_ids_are_unique_and_references_lead_somewhere(page: Page) -> None:
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    targets = {
        value[1:]
        for _, a in page.tags
        for n in ("href", "xlink:href")
        if (value := a.get(n)) and value[0] == "#"
    }
    assert targets
    assert targets <= set(ids)


def test_every_picture_has_a_text_alternative(page: Page) -> None:
    assert len(page.all("img")) > 40
    assert all(attributes.get("alt") for attributes in page.all("img"))
    assert len(page.all("svg")) > 10
    assert all(a.get("role") == "img" and a.get("aria-label") for a in page.all("svg"))


def test_pictures_follow_the_theme(html: str) -> None:
    svgs = re.findall(r"<svg.*?</svg>", html, flags=re.DOTALL)
    assert all("var(--ink)" in svg for svg in svgs)
    for name in markup.INK_NAMES:
        assert f"--{name}:" in html


def test_headline_numbers_are_those_of_the_files(page: Page, finished_workspace: Path) -> None:
    for cell in results.CELLS:
        metrics = files.read_json(finished_workspace / paths.METRICS / f"evaluate-{cell}.json")
        assert f"Top-1, {cell} {100 * metrics['top1']:.1f} %" in page.text
    gain = results.gain_of_pretraining(results.read_evaluations(finished_workspace))
    assert gain is not None
    assert f"Gain of pretraining {markup.points(gain.value)} points" in page.text
    assert "5 of 5 pass" in page.text
    assert "3.5 × smaller than fp32 (4.65 MB); 1.42 × its speed at batch 32" in page.text
    assert "version 3" in page.text
    assert "champion" in page.text


def test_gain_is_the_difference_of_the_two_accuracies(finished_workspace: Path) -> None:
    evaluations = results.read_evaluations(finished_workspace)
    gain = results.gain_of_pretraining(evaluations)
    assert gain is not None
    difference = evaluations["pretrained"].metrics["top1"] - evaluations["scratch"].metrics["top1"]
    assert gain.value == pytest.approx(difference, abs=2e-6)
    assert gain.value > 0
    assert results.gain_of_pretraining({"pretrained": evaluations["pretrained"]}) is None


def test_gain_needs_the_same_images(finished_workspace: Path) -> None:
    evaluations = results.read_evaluations(finished_workspace)
    shorter = results.Evaluation(
        **{**vars(evaluations["scratch"]), "predictions": evaluations["scratch"].predictions[1:]}
    )
    assert results.gain_of_pretraining({**evaluations, "scratch": shorter}) is None


@pytest.mark.parametrize(
    ("gain", "words"),
    [
        (Interval(0.03, 0.01, 0.05), "Pretraining helps: +3.0 points"),
        (Interval(-0.03, -0.05, -0.01), "Pretraining hurts: −3.0 points"),
        (Interval(0.01, -0.01, 0.03), "no difference that these images can show"),
    ],
)
def test_verdict_follows_the_interval(finished_workspace: Path, gain: Interval, words: str) -> None:
    assert words in report._verdict(False, results.read_evaluations(finished_workspace), gain)


@pytest.mark.usefixtures("no_pictures")
def test_executed_and_cached_stages_are_told_apart(page: Page, copy: Path) -> None:
    assert "2 of 9 stages were executed in this run" in page.text
    assert page.text.count("from cache") >= 7
    nothing = Page(report.render_report(copy, {"executed": []}))
    assert "Nothing was executed in this run" in nothing.text
    unknown = Page(report.render_report(copy, {}))
    assert "in this run" not in unknown.text.split("Cost")[-1].split("Provenance")[0]


def test_provenance_and_parameters_are_complete(page: Page, finished_workspace: Path) -> None:
    data = results.read_data(finished_workspace)
    assert data is not None
    lock = files.sha256_file(finished_workspace / "dvc.lock")
    for value in (
        data.manifest.digest,
        lock,
        "a" * 64,
        "b" * 64,
        "finetune.training.lr",
        "uncommitted changes",
    ):
        assert value in page.text
    assert "git checkout 4e6ab4c0ffee4e6ab4c0ffee4e6ab4c0ffee4e6a" in page.text


def test_names_from_outside_are_escaped(page: Page, html: str) -> None:
    """The quarantine of the fake workspace lists a file in a folder called <odd>."""
    assert "&lt;odd&gt;/1.png" in html
    assert "<odd>/1.png" in page.text


def test_hostile_class_names_do_not_break_the_page(tmp_path: Path) -> None:
    names = ["<script>alert(1)</script>", "$x$", 'quote "', "日本", *(f"class {i}" for i in range(6))]
    workspace = tmp_path
    shutil.copy(fake_workspace.ROOT / "params.yaml", workspace)
    fake_workspace.write_data(workspace / paths.DATA, classes=names)
    fake_workspace.write_evaluation(workspace, "pretrained", 1.0)
    page = Page(report.render_report(workspace, {}))
    assert not page.all("script")
    assert "<script>alert(1)</script>" in page.text


@pytest.mark.usefixtures("no_pictures")
def test_unlabelled_data_give_a_report_of_pretraining_only(tmp_path: Path) -> None:
    workspace = fake_workspace.build(tmp_path / "w", labelled=False)
    page = Page(report.render_report(workspace, {"executed": ["ingest", "scale", "pretrain"]}))
    assert "Pretraining only: the images have no labels" in page.text
    assert page.text.count("No finetuning: the images have no labels") == 1
    assert "Every stage was executed in this run" in page.text
    assert "SimMIM on swin_v2_pico" in page.text
    assert "Top-1, pretrained" not in page.text


def test_an_empty_workspace_gives_a_report_too(tmp_path: Path) -> None:
    shutil.copy(fake_workspace.ROOT / "params.yaml", tmp_path)
    page = Page(report.render_report(tmp_path, {}))
    assert "No classifier has been evaluated yet." in page.text
    assert "No data: the stage ingest has left no results in this workspace." in page.text
    assert "No receipts" in page.text


def test_receipts_are_read_as_stages_write_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    stage._write_receipt(stage.Stage("finetune", "scratch", device_hours=0.25), 3.5)
    (found,) = results.read_receipts(tmp_path)
    assert (found.stage, found.duration_s, found.device_hours) == ("finetune@scratch", 3.5, 0.25)
    assert found.peak_memory_bytes > 0


@pytest.mark.usefixtures("no_pictures")
def test_a_single_cell_is_reported_without_comparison(copy: Path) -> None:
    shutil.rmtree(copy / paths.EVALUATE / "scratch")
    page = Page(report.render_report(copy, {}))
    assert "The pretrained classifier answers" in page.text
    assert "Gain of pretraining" not in page.text


@pytest.mark.usefixtures("no_pictures")
def test_a_failed_check_is_shown_as_such(copy: Path) -> None:
    path = copy / paths.PARITY / "parity.json"
    value = files.read_json(path)
    value["checks"][2] |= {"value": 0.9, "passed": False}
    files.write_json(path, value)
    page = Page(report.render_report(copy, {}))
    assert "4 of 5 pass" in page.text
    assert "✗ fail" in page.text


@pytest.mark.usefixtures("no_pictures")
def test_a_damaged_file_is_one_clear_error(copy: Path) -> None:
    path = copy / paths.PARITY / "parity.json"
    path.write_text("{")
    with pytest.raises(DataError, match=r"parity\.json is damaged"):
        report.render_report(copy, {})


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (3.1e-6, "3.1e-06"),
        (1e-4, "0.0001"),
        (0.5, "0.5"),
        (1143232, "1,143,232"),
        (45678.9, "45,679"),
        ("x", "x"),
    ],
)
def test_numbers_read_naturally(value: object, text: str) -> None:
    assert markup.format_number(value) == text
