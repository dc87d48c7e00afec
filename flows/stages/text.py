"""Read the text source, check every document, train a tokenizer, write the tokens of each split.

Files in: `ingest_text.source`. Files out: artifacts/text (flows/text/corpus.py says what). Two passes, so
that memory does not grow with the documents: the first reads every one and keeps its hash and size, from
which the splits follow; the second trains the tokenizer on the training documents and encodes all. Validation
and test have no say in the tokenizer.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from flows import files, paths
from flows.errors import DataError
from flows.params import Params
from flows.stage import Stage, run_stage
from flows.text import tokenizer as tokenizers
from flows.text.corpus import (
    MANIFEST,
    QUARANTINE,
    SplitWriter,
    TextManifest,
    TokenizedDocument,
)
from flows.text.sources import Document, TextSource, UnusableDocument, check_text, open_source
from flows.text.splits import SPLITS, assign_splits


@dataclass(frozen=True)
class Usable:
    """A document that passed, without its text."""

    document: Document
    sha256: str
    bytes: int

    def read(self) -> str:
        """
        Raises:
            DataError: it has changed since it was checked.
        """
        try:
            text = self.document.load()
            if check_text(text) == self.sha256:
                return text
        except UnusableDocument:
            pass
        raise DataError(f"{self.document.name} changed while it was read; start the stage again")


def run(params: Params, stage: Stage) -> None:
    options = params.ingest_text
    source = open_source(options.dataset, Path(options.source), options.max_document_mb)
    usable, unusable, duplicates = inspect_all(source.documents)
    limit_unusable(unusable, len(source.documents), options.max_bad_fraction)
    fractions = {"val": options.val_fraction, "test": options.test_fraction}
    sizes = [(item.document.name, item.bytes) for item in usable]
    members = assign_splits(sizes, fractions, options.split_seed)
    splits = {split: [usable[index] for index in members[split]] for split in SPLITS}
    quarantined = sorted([*unusable, *duplicates])

    tokenizer = tokenizers.train_tokenizer((item.read() for item in splits["train"]), options.vocab_size)
    with files.replace_folder(paths.TEXT) as folder:
        manifest = write_all(folder, source, splits, tokenizer, quarantined)

    metrics = describe(manifest, len(source.documents), len(unusable), len(duplicates))
    files.write_json(paths.METRICS / "text.json", metrics)
    stage.run.log_metrics({name: value for name, value in metrics.items() if name != "data_digest"})
    stage.run.set_tags({"data_digest": manifest.digest, "dataset": manifest.name})
    for name in (MANIFEST, QUARANTINE, tokenizers.FILE):
        stage.run.log_artifact(paths.TEXT / name)
    print_summary(source, manifest, metrics, quarantined)


def inspect_all(
    documents: Iterable[Document],
) -> tuple[list[Usable], list[tuple[str, str]], list[tuple[str, str]]]:
    """What can be used; (name, reason) of what cannot; (name, reason) of what an earlier one repeats."""
    usable: list[Usable] = []
    unusable, duplicates = [], []
    first: dict[str, str] = {}
    for document in documents:
        try:
            text = document.load()
            digest = check_text(text)
        except UnusableDocument as reason:
            unusable.append((document.name, str(reason)))
            continue
        if digest in first:
            duplicates.append((document.name, f"has the same text as {first[digest]}"))
            continue
        first[digest] = document.name
        usable.append(Usable(document, digest, len(text.encode())))
    return usable, unusable, duplicates


def limit_unusable(unusable: list[tuple[str, str]], total: int, max_bad_fraction: float) -> None:
    """
    Raises:
        DataError: too many documents cannot be used.
    """
    if len(unusable) > max_bad_fraction * total or len(unusable) == total:
        shown = "; ".join(f"{name}: {reason}" for name, reason in unusable[:5])
        more = f"; and {len(unusable) - 5} more" if len(unusable) > 5 else ""
        raise DataError(
            f"{len(unusable)} of {total} documents cannot be used, more than ingest_text.max_bad_fraction = "
            f"{max_bad_fraction:g} allows: {shown}{more}; repair or remove them, or raise the limit"
        )


def write_all(
    folder: Path,
    source: TextSource,
    splits: dict[str, list[Usable]],
    tokenizer: Any,
    quarantined: list[tuple[str, str]],
) -> TextManifest:
    tokenizers.save_tokenizer(tokenizer, folder)
    size = int(tokenizer.get_vocab_size())
    token_type: Literal["<u2", "<u4"] = "<u2" if size <= 1 << 16 else "<u4"
    described = {}
    for split, members in splits.items():
        with SplitWriter(folder, split, token_type) as writer:
            for document in encoded(members, tokenizer):
                writer.add(document)
            described[split] = writer.record()
    manifest = TextManifest(
        name=source.name,
        source=source.origin,
        licence=source.licence,
        vocab_size=size,
        token_type=token_type,
        tokenizer_sha256=files.sha256_file(folder / tokenizers.FILE),
        splits=described,
        quarantined=len(quarantined),
    ).sealed()
    files.write_json(folder / MANIFEST, manifest.model_dump(mode="json"))
    files.write_json(folder / QUARANTINE, [{"name": name, "reason": reason} for name, reason in quarantined])
    return manifest


def encoded(members: Iterable[Usable], tokenizer: Any) -> Iterator[TokenizedDocument]:
    for item in members:
        ids = tokenizers.encode_document(tokenizer, item.read())
        yield TokenizedDocument(item.document.name, item.sha256, item.bytes, ids)


def describe(manifest: TextManifest, documents: int, unusable: int, duplicates: int) -> dict[str, Any]:
    """The stage's metrics."""
    found: dict[str, Any] = {"documents": documents, "unusable": unusable, "duplicates": duplicates}
    for split, record in manifest.splits.items():
        found[f"{split}_documents"] = record.documents
        found[f"{split}_bytes"] = record.bytes
        found[f"{split}_tokens"] = record.tokens
    train = manifest.splits["train"]
    found["vocab_size"] = manifest.vocab_size
    found["bytes_per_token"] = round(train.bytes / (train.tokens - 2 * train.documents), 4)
    found["data_digest"] = manifest.digest
    return found


def print_summary(
    source: TextSource, manifest: TextManifest, metrics: dict[str, Any], quarantined: list[tuple[str, str]]
) -> None:
    shares = ", ".join(
        f"{record.documents} {split} ({record.tokens:,} tokens)" for split, record in manifest.splits.items()
    )
    print(
        f"{source.name}: {shares}; {manifest.vocab_size} kinds of token, "
        f"{metrics['bytes_per_token']:.2f} bytes each; {len(quarantined)} quarantined",
        flush=True,
    )
    for name, reason in quarantined[:5]:
        print(f"  {name} {reason}", flush=True)


def main(argv: list[str] | None = None) -> int:
    return run_stage("text", run, argv)


if __name__ == "__main__":
    raise SystemExit(main())
