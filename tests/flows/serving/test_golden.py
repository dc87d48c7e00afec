"""Golden requests travel with the registered folder, and damage to them is found."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from flows import files
from flows.errors import DataError
from flows.serving.golden import Golden, compare, read_golden, write_golden

IMAGES = [("first-1a", b"one"), ("second-2b", b"two!")]


def classify(data: bytes) -> tuple[int, float]:
    return len(data), 0.1 * len(data)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_golden(tmp_path, IMAGES, classify)
    return tmp_path


def test_what_was_written_is_read(folder: Path) -> None:
    assert read_golden(folder) == [
        Golden("first-1a", b"one", 3, pytest.approx(0.3)),
        Golden("second-2b", b"two!", 4, pytest.approx(0.4)),
    ]


def test_equal_requests_give_equal_bytes(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    other = tmp_path_factory.mktemp("other")
    write_golden(other, IMAGES, classify)
    for path in sorted((folder / "golden").iterdir()):
        assert path.read_bytes() == (other / "golden" / path.name).read_bytes()


def test_a_folder_without_any(tmp_path: Path) -> None:
    assert read_golden(tmp_path) == []


@pytest.mark.parametrize("content", [b"", b"onf", b"one "])
def test_a_changed_request_is_found(folder: Path, content: bytes) -> None:
    (folder / "golden/000.bin").write_bytes(content)
    with pytest.raises(DataError, match=r"000\.bin was changed"):
        read_golden(folder)


@pytest.mark.parametrize("name", ["000.bin", "golden.json"])
def test_a_missing_file_is_found(folder: Path, name: str) -> None:
    (folder / "golden" / name).unlink()
    with pytest.raises(DataError, match="is missing"):
        read_golden(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"file": "../../etc/passwd"}, "outside its folder"),
        ({"confidence": 1.5}, "not a probability"),
        ({"confidence": "high"}, "not usable"),
        ({"index": None}, "not usable"),
    ],
)
def test_a_wrong_index_is_refused(folder: Path, change: dict[str, object], message: str) -> None:
    content = files.read_json(folder / "golden/golden.json")
    content["requests"][0] |= change
    files.write_json(folder / "golden/golden.json", content)
    with pytest.raises(DataError, match=message):
        read_golden(folder)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"format": 2, "requests": []}', '{"format": 1}'])
def test_an_index_that_is_none(folder: Path, text: str) -> None:
    (folder / "golden/golden.json").write_text(text)
    with pytest.raises(DataError, match="not usable"):
        read_golden(folder)


def test_an_answer_that_is_no_probability_is_not_recorded(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not a probability"):
        write_golden(tmp_path, IMAGES, lambda data: (0, math.nan))
    assert not (tmp_path / "golden").exists()
    with pytest.raises(ValueError, match="at least one"):
        write_golden(tmp_path, [], classify)


@pytest.mark.parametrize(
    ("index", "confidence", "reason"),
    [
        (3, 0.9, None),
        (3, 0.904, None),
        (3, 0.92, "confidence 0.9200 instead of 0.9000"),
        (3, math.nan, "confidence nan"),
        (4, 0.9, r"class 4 \(0.9000\) instead of 3"),
    ],
)
def test_class_and_confidence_are_compared(index: int, confidence: float, reason: str | None) -> None:
    import re

    found = compare(Golden("a", b"", 3, 0.9), index, confidence, 5e-3)
    assert found is None if reason is None else found and re.search(reason, found)
