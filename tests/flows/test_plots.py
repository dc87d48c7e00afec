"""flows/plots: what is drawn, that it is drawn reproducibly, and that no global state is touched."""

from __future__ import annotations

import io
import re
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from PIL import Image

from flows import plots
from models.classification import metrics

HISTORY = plots.History(
    train={"step": [10, 20, 30], "train_loss": [3.0, 2.0, 1.0], "lr": [0.1, 0.2, 0.1]},
    validation={"step": [15, 30], "val_loss": [2.5, 1.5], "val_top1": [0.5, 0.875]},
)


def texts(svg: bytes) -> list[str]:
    """All text elements of a picture; also proves that it is well-formed XML."""
    root = ElementTree.fromstring(svg)
    return ["".join(element.itertext()) for element in root.iter("{http://www.w3.org/2000/svg}text")]


def colours(svg: bytes) -> set[str]:
    return {value.lower() for value in re.findall(r"#[0-9a-fA-F]{6}\b", svg.decode())}


def size(png: bytes) -> tuple[int, int]:
    return Image.open(io.BytesIO(png)).size


def test_curves_draw_the_recorded_panels_only() -> None:
    panels = plots.curve_panels({"pretrain": HISTORY}, "svg")
    assert list(panels) == ["Loss", "Validation accuracy", "Learning rate"]
    assert {"train", "validation", "optimiser step"} <= set(texts(panels["Loss"]))
    together = texts(plots.curves({"a": HISTORY, "b": HISTORY}, "svg"))
    assert {"a: train", "b: validation", "Learning rate"} <= set(together)
    assert "Gradient norm" not in together


def test_accuracy_curve_is_in_percent() -> None:
    labels = texts(plots.curve_panels({"run": HISTORY}, "svg")["Validation accuracy"])
    ticks = [float(label) for label in labels if re.fullmatch(r"[\d.]+", label)]
    assert max(ticks) >= 80


def test_nothing_recorded_is_an_error() -> None:
    with pytest.raises(ValueError, match="no curve"):
        plots.curves({"run": plots.History()})


def test_history_reads_gaps_and_missing_files(tmp_path: Path) -> None:
    (tmp_path / "curves.csv").write_text("step,train_loss,grad_norm\n10,1.5,\n20,1.25,0.5\n")
    history = plots.History.read(tmp_path)
    assert history.train["step"] == [10.0, 20.0]
    assert history.train["train_loss"] == [1.5, 1.25]
    assert np.isnan(history.train["grad_norm"][0])
    assert history.train["grad_norm"][1] == 0.5
    assert history.validation == {}
    assert "Gradient norm" in plots.curve_panels({"run": history})


def test_confusion_shows_names_and_counts() -> None:
    counts = np.array([[40, 2], [7, 31]])
    shown = texts(plots.confusion(counts, ["cat", "dog"], "svg"))
    assert {"40", "2", "7", "31", "actual", "predicted"} <= set(shown)
    assert shown.count("cat") == shown.count("dog") == 2


def test_confusion_grows_to_a_hundred_classes() -> None:
    names = [f"class {index}" for index in range(100)]
    few = size(plots.confusion(np.eye(3, dtype=np.int64), names[:3]))
    many = plots.confusion(np.eye(100, dtype=np.int64) * 7, names, "svg")
    shown = texts(many)
    assert shown.count("class 42") == 2
    assert "7" not in shown  # counts would not be legible
    assert size(plots.confusion(np.eye(100, dtype=np.int64), names))[0] > 3 * few[0]


def test_names_are_not_formulas() -> None:
    """A class called `$` or `a$b$` must neither fail as mathematics nor vanish."""
    names = ["$", r"$\frac{$", "<b>&"]
    shown = texts(plots.confusion(np.eye(3, dtype=np.int64), names, "svg"))
    assert all(shown.count(name) == 2 for name in names)
    image = np.zeros((4, 4, 3), dtype=np.uint8)
    assert plots.image_grid([image], [r"$\frac{$"], title="x").startswith(b"\x89PNG")


def test_reliability_skips_empty_bins() -> None:
    table = metrics.reliability_table(torch.tensor([0.1, 0.95]), torch.tensor([0.0, 1.0]), 10)
    shown = texts(plots.reliability({"one": table, "two": table}, {"one": "(ECE 7.5 %)"}, "svg"))
    assert {"one  (ECE 7.5 %)", "two", "perfect"} <= set(shown)


def test_comparison_labels_values_in_percent() -> None:
    values = {"pretrained": metrics.Interval(0.978, 0.96, 0.99), "scratch": metrics.Interval(0.9, 0.87, 0.93)}
    assert {"97.8", "90.0", "pretrained", "scratch"} <= set(texts(plots.comparison(values, "%", "svg")))


def test_latency_axis_names_the_measured_batch_sizes() -> None:
    lines = [plots.Latency("fp32", [1, 8, 32], [1.0, 6.0, 20.0], [1.5, 7.0, 22.0])]
    shown = texts(plots.latency(lines, "svg"))
    assert {"1", "8", "32", "fp32", "Throughput"} <= set(shown)


def test_durations_mark_what_was_executed() -> None:
    svg = plots.durations({"ingest": 2.0, "pretrain": 125.0}, ["pretrain"], "svg")
    assert {"2.0 s", "2 min 05 s"} <= set(texts(svg))
    assert b"opacity: 0.35" in svg
    assert b"opacity: 0.35" not in plots.durations({"ingest": 2.0}, None, "svg")


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.04, "0.0 s"), (59.94, "59.9 s"), (60, "1 min 00 s"), (3599.6, "1 h 00 min"), (7620, "2 h 07 min")],
)
def test_durations_read_naturally(seconds: float, text: str) -> None:
    assert plots.format_duration(seconds) == text


def test_svg_uses_the_announced_colours_only() -> None:
    """The report recolours exactly these for its dark theme; any other would stay as it is."""
    table = metrics.reliability_table(torch.rand(50), torch.ones(50), 5)
    pictures = [
        plots.curves({"a": HISTORY, "b": HISTORY}, "svg"),
        plots.reliability({"a": table}, {}, "svg"),
        plots.comparison({"a": metrics.wilson_interval(9, 10)}, "%", "svg"),
        plots.latency([plots.Latency("a", [1, 2], [1.0, 2.0])], "svg"),
        plots.durations({"a": 1.0}, None, "svg"),
    ]
    assert set().union(*map(colours, pictures)) <= set(plots.COLOURS)
    matrix = colours(plots.confusion(np.eye(2, dtype=np.int64), ["a", "b"], "svg"))
    assert matrix - set(plots.COLOURS) <= {"#ffffff"}  # the numbers on dark cells


@pytest.mark.parametrize("format", ["png", "svg"])
def test_equal_input_gives_equal_bytes(format: plots.Format) -> None:
    assert plots.curves({"a": HISTORY}, format) == plots.curves({"a": HISTORY}, format)


def test_reconstructions_keep_their_pixels_and_order() -> None:
    """Constant images of three greys: each must be found in its column."""
    inputs, masked, answers = (np.full((2, 8, 8, 3), grey, dtype=np.uint8) for grey in (10, 90, 170))
    picture = Image.open(io.BytesIO(plots.triple_grid(inputs, masked, answers))).convert("L")
    width, height = picture.size
    row = [picture.getpixel((int(width * x), int(height * 0.75))) for x in (1 / 6, 1 / 2, 5 / 6)]
    assert row == [10, 90, 170]


def test_many_reconstructions_go_into_two_blocks() -> None:
    images = np.zeros((8, 8, 8, 3), dtype=np.uint8)
    width, height = size(plots.triple_grid(images, images, images))
    assert width > height


def test_image_grid_needs_one_caption_per_image() -> None:
    with pytest.raises(ValueError, match="one caption per image"):
        plots.image_grid([np.zeros((2, 2, 3), dtype=np.uint8)], [])
    with pytest.raises(ValueError, match="one caption per image"):
        plots.image_grid([], [])


def test_import_is_light_and_pyplot_is_never_loaded() -> None:
    code = (
        "import sys; from flows import plots; assert 'matplotlib' not in sys.modules;"
        "plots.durations({'a': 1.0}, None); assert 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_traffic_pictures_say_what_they_show() -> None:
    generator = np.random.default_rng(0)
    first, second = (generator.standard_normal(size).astype(np.float32) for size in (300, 90))
    names = ("held-out images", "served images")
    even = np.full(5, 0.25, np.float32)  # a histogram without width
    drawn = plots.distributions({"sharpness": (first, second), "black": (even, even)}, names, "svg")
    assert {"sharpness", "black", "images, %", *names} <= set(texts(drawn))
    assert drawn == plots.distributions({"sharpness": (first, second), "black": (even, even)}, names, "svg")

    rows = [("embedding", 0.02, False), ("pixels", 0.4, True)]
    assert {"embedding", "pixels", "monitor.min_effect"} <= set(texts(plots.effects(rows, 0.1, "svg")))

    shares = np.full(100, 0.01)
    moved = shares.copy()
    moved[[3, 97]] = 0.05, 0.001
    labels = [f"a rather long name of class {index}" for index in range(100)]
    found = texts(plots.class_shares([f"c{index}" for index in range(100)], shares, moved, names, "svg"))
    assert {"c3", "c97"} <= set(found)  # of many classes those that differ
    assert sum(text.startswith("c") for text in found) == plots.MAX_CLASSES
    assert "a rather long nam…" in texts(plots.class_shares(labels[:5], shares[:5], moved[:5], names, "svg"))

    history = plots.traffic_history(
        [2, 1, 0], {"pixels": [0.1, float("nan"), 0.3]}, [5.0] * 3, (0.1, 100), "svg"
    )
    assert {"pixels", "hours ago", "ms"} <= set(texts(history))
    for picture in (drawn, history):
        assert colours(picture) <= {colour.lower() for colour in plots.COLOURS}
