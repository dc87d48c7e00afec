"""Documents from a folder, a file and Python itself; what cannot be one is left out with its reason."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flows import files, params, paths
from flows.errors import DataError
from flows.stage import Stage
from flows.stages import text
from flows.text.corpus import load_manifest, load_split
from flows.text.sources import cut_sections, open_source, source_name
from flows.text.splits import assign_splits
from flows.text.tokenizer import decode, load_tokenizer

ROOT = Path(__file__).resolve().parents[3]
GOOD = {
    f"part {number}.txt": f"Document {number} says: héllo wörld 世界 🎉\n" * (number + 2)
    for number in range(8)
}

Ingest = Callable[..., None]


@pytest.fixture
def ingest(in_folder: Path) -> Ingest:
    """Run the stage on the folder `texts` with some settings changed."""

    def run(**changes: Any) -> None:
        values = params.read(ROOT / "params.yaml")
        change = {"dataset": "files", "source": "texts", "vocab_size": 300, **changes}
        checked = params.check(params.overlay(values, {"ingest_text": change}, "test"), "test")
        text.run(checked, Stage("text"))

    return run


def write(folder: Path, contents: dict[str, str | bytes]) -> None:
    for name, content in contents.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())


BAD: dict[str, str | bytes] = {
    "latin1.txt": "caf\xe9".encode("latin-1"),
    "empty.md": "",
    "blank.md": " \n\t\n",
    "binary.txt": b"MZ\0\0\1",
    "huge.txt": b"x" * 1_000_001,
    "z again.md": GOOD["part 1.txt"],
}


def test_unusable_documents_are_quarantined_with_a_reason(in_folder: Path, ingest: Ingest) -> None:
    write(in_folder / "texts", {**GOOD, **BAD, ".hidden/secret.txt": "no", "picture.png": b"\x89PNG"})
    ingest(max_bad_fraction=0.5, max_document_mb=1)
    left_out = {e["name"]: e["reason"] for e in files.read_json(paths.TEXT / "quarantine.json")}
    assert left_out.keys() == BAD.keys()
    words = {
        "latin1.txt": "not UTF-8 (byte 3)",
        "empty.md": "is empty",
        "blank.md": "is empty",
        "binary.txt": "NUL",
        "huge.txt": "1.0 MB, more than ingest_text.max_document_mb 1",
        "z again.md": "same text as part 1.txt",
    }
    assert all(word in left_out[name] for name, word in words.items()), left_out
    metrics = files.read_json(paths.METRICS / "text.json")
    assert (metrics["documents"], metrics["unusable"], metrics["duplicates"]) == (14, 5, 1)


def test_every_document_is_in_one_split_and_comes_back_byte_for_byte(in_folder: Path, ingest: Ingest) -> None:
    odd = "<|begin|> is a mark only where the tokenizer puts it <|end|>\r\n\ttab \u200d é é"
    write(in_folder / "texts", {**GOOD, "odd.md": odd})
    ingest(val_fraction=0.2, test_fraction=0.2)
    manifest, tokenizer = load_manifest(paths.TEXT), load_tokenizer(paths.TEXT)
    found: dict[str, str] = {}
    for name, record in manifest.splits.items():
        split = load_split(paths.TEXT, manifest, name)
        assert len(split) == record.documents > 0
        for index, document in enumerate(split.names):
            assert document not in found
            ids = split.document(index)
            assert (ids[0], ids[-1]) == (0, 1)
            assert 0 not in ids[1:], "a text cannot write the marks"
            assert 1 not in ids[1:-1]
            found[document] = decode(tokenizer, ids.tolist()) if document != "odd.md" else odd
            assert len(found[document].encode()) == split.bytes[index]
            plain = tokenizer.decode(ids[1:-1].tolist(), skip_special_tokens=False)
            assert plain == (odd if document == "odd.md" else GOOD[document])
    assert found == {**GOOD, "odd.md": odd}


def test_the_same_texts_give_the_same_digest_and_another_text_another(
    in_folder: Path, ingest: Ingest
) -> None:
    write(in_folder / "texts", GOOD)
    digests = []
    for change in ({}, {}, {"split_seed": 1}):
        ingest(**change)
        digests.append(load_manifest(paths.TEXT).digest)
    assert digests[0] == digests[1] != digests[2]
    (in_folder / "texts" / "part 3.txt").write_text("else\n")
    ingest()
    assert load_manifest(paths.TEXT).digest not in digests


@pytest.mark.parametrize(
    ("contents", "words"),
    [
        ({**GOOD, **BAD}, "documents cannot be used, more than ingest_text.max_bad_fraction"),
        ({"a.txt": "one", "b.txt": "two"}, "has 2 usable documents; at least 3"),
        ({"a.png": b"x"}, "has no files that end in .txt or .md"),
        ({}, "does not exist"),
    ],
)
def test_a_source_that_will_not_do_is_refused_and_leaves_nothing(
    contents: dict[str, str | bytes], words: str, in_folder: Path, ingest: Ingest
) -> None:
    write(in_folder / "texts", contents)
    with pytest.raises(DataError, match=words):
        ingest(max_document_mb=1)
    assert not paths.TEXT.exists()


def test_damaged_tokens_are_found(in_folder: Path, ingest: Ingest) -> None:
    write(in_folder / "texts", GOOD)
    ingest()
    manifest = load_manifest(paths.TEXT)
    tokens = paths.TEXT / "train.tokens"
    tokens.write_bytes(tokens.read_bytes()[:-2])
    with pytest.raises(DataError, match=r"train\.tokens is damaged"):
        load_split(paths.TEXT, manifest, "train")
    path = paths.TEXT / "manifest.json"
    path.write_text(path.read_text().replace('"quarantined": 0', '"quarantined": 1'))
    with pytest.raises(DataError, match="was changed after it was written"):
        load_manifest(paths.TEXT)


def test_one_file_is_cut_at_blank_lines(tmp_path: Path) -> None:
    lines = [f"paragraph {number} " + "x" * 700 + "\n\n" for number in range(20)]
    whole = "".join(lines)
    sections = list(cut_sections(whole))
    assert "".join(sections) == whole
    assert len(sections) > 4
    assert all(len(section) >= 2000 for section in sections[:-1])
    assert all(section.lstrip().startswith("paragraph") for section in sections)
    path = tmp_path / "A book.txt"
    path.write_text(whole)
    source = open_source("files", path, 1)
    assert source.name == source_name("files", path) == "A-book"
    assert [document.load() for document in source.documents] == sections


def test_bundled_topics_are_python_documentation() -> None:
    source = open_source("pydoc_topics", Path("constraints.txt"), 1)
    assert len(source.documents) > 50
    assert "lambda" in next(d for d in source.documents if d.name == "lambda").load()


def test_splits_have_their_share_of_bytes_and_large_documents_train() -> None:
    sizes = [(f"d{number}", 10 + number % 7) for number in range(300)] + [("large", 5000)]
    members = assign_splits(sizes, {"val": 0.1, "test": 0.2}, seed=3)
    assert sorted(index for part in members.values() for index in part) == list(range(301))
    total = sum(size for _, size in sizes)
    shares = {split: sum(sizes[i][1] for i in part) / total for split, part in members.items()}
    assert shares["val"] == pytest.approx(0.1, abs=0.01)
    assert shares["test"] == pytest.approx(0.2, abs=0.01)
    assert 300 in members["train"]
    assert assign_splits(sizes, {"val": 0.1, "test": 0.2}, seed=4) != members
