"""Where documents come from: Python's bundled documentation topics, a folder of text files, or one file.

A document is read when it is needed, so memory does not grow with the source. What cannot be one is rejected
with a reason, never repaired: bytes that are not UTF-8, nothing but blanks, NUL characters (binary data under
a text's name), more than `max_document_mb`.
"""

from __future__ import annotations

import hashlib
import platform
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from flows.errors import DataError

SUFFIXES = (".txt", ".md")
SECTION_BYTES = 2000
"""A single file becomes documents of at least so many bytes, cut at blank lines."""
MEGABYTE = 1_000_000


class UnusableDocument(Exception):
    """Why a document cannot be used."""


@dataclass(frozen=True)
class Document:
    """One text by name; `load` reads it from where it lies."""

    name: str
    load: Callable[[], str]


@dataclass(frozen=True)
class TextSource:
    name: str
    origin: str
    licence: str
    documents: tuple[Document, ...]


def source_name(dataset: str, source: Path) -> str:
    """What the text is called, also as part of a registered model's name."""
    if dataset == "pydoc_topics":
        return "pydoc"
    stem = source.stem if source.is_file() else source.resolve().name
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", stem).strip("-.") or "text"


def open_source(dataset: str, source: Path, max_document_mb: int) -> TextSource:
    """
    Raises:
        DataError: there is nothing to read at `source`.
    """
    if dataset == "pydoc_topics":
        return _bundled_topics()
    limit = max_document_mb * MEGABYTE
    if source.is_dir():
        return _folder(source, limit)
    if source.is_file():
        return _single_file(source, limit)
    raise DataError(f"`ingest_text.source`: {source} does not exist; give a folder of .txt and .md files")


def _bundled_topics() -> TextSource:
    from pydoc_data import topics

    texts: dict[str, str] = topics.topics
    documents = tuple(Document(name, lambda name=name: texts[name]) for name in sorted(texts))  # type: ignore[misc]
    version = platform.python_version()
    return TextSource(
        source_name("pydoc_topics", Path()), f"pydoc_data.topics of Python {version}", "PSF-2.0", documents
    )


def _folder(folder: Path, limit: int) -> TextSource:
    found = sorted(
        path
        for path in folder.rglob("*")
        if path.suffix.lower() in SUFFIXES and path.is_file() and not _is_hidden(path, folder)
    )
    if not found:
        raise DataError(f"{folder} has no files that end in {' or '.join(SUFFIXES)}")
    documents = tuple(
        Document(path.relative_to(folder).as_posix(), lambda path=path: read_text(path, limit))  # type: ignore[misc]
        for path in found
    )
    return TextSource(source_name("files", folder), str(folder), "unknown", documents)


def _is_hidden(path: Path, folder: Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(folder).parts)


def _single_file(path: Path, limit: int) -> TextSource:
    try:
        sections = tuple(cut_sections(read_text(path, limit)))
    except UnusableDocument as reason:
        raise DataError(f"{path} cannot be used: {reason}") from None
    documents = tuple(
        Document(f"{path.name}#{number}", lambda text=text: text)  # type: ignore[misc]
        for number, text in enumerate(sections)
    )
    return TextSource(source_name("files", path), str(path), "unknown", documents)


def cut_sections(text: str) -> Iterator[str]:
    """Pieces of at least SECTION_BYTES (the last may be shorter) that end where a blank line does; together
    they are `text`."""
    section = ""
    for part in re.split(r"(?<=\n)(?=[ \t]*\n)", text):
        section += part
        if len(section.encode()) >= SECTION_BYTES:
            yield section
            section = ""
    if section:
        yield section


def read_text(path: Path, limit: int) -> str:
    """
    Raises:
        UnusableDocument: too large, unreadable, or not UTF-8.
    """
    try:
        size = path.stat().st_size
        if size > limit:
            raise UnusableDocument(
                f"has {size / MEGABYTE:.1f} MB, more than ingest_text.max_document_mb {limit // MEGABYTE}"
            )
        with open(path, "rb") as file:
            content = file.read(limit + 1)  # it may have grown meanwhile
    except OSError as error:
        raise UnusableDocument(f"cannot be read: {error.strerror}") from None
    if len(content) > limit:
        raise UnusableDocument(f"has more than ingest_text.max_document_mb {limit // MEGABYTE}")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UnusableDocument(f"is not UTF-8 (byte {error.start})") from None


def check_text(text: str) -> str:
    """sha256 of a document that can be used.

    Raises:
        UnusableDocument: blank, or binary.
    """
    if not text.strip():
        raise UnusableDocument("is empty")
    if "\0" in text:
        raise UnusableDocument("holds NUL characters, so it is no text")
    return hashlib.sha256(text.encode()).hexdigest()
