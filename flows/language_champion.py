"""Judge a registered language model now, on the texts of a workspace, by the slices that serve it.

Two models may have different tokens, so what is compared is nats per document against the bytes of its text.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from flows import decoders, files, paths, registry
from flows.errors import DataError
from flows.params import Params
from flows.registry import Version
from flows.serving.lamina.slices.bundle import MANIFEST, Bundle, LayerAttention, read_bundle
from flows.serving.lamina.slices.runner import Floats, Slices, open_slices
from flows.text.corpus import load_manifest, load_split
from flows.text.tokenizer import decode, encode_document, load_tokenizer

ROWS = 2048
"""Tokens run at once."""


@dataclass(frozen=True)
class TextVerdicts:
    """One model on one split, document by document."""

    nats: NDArray[np.float64]  # (documents,)
    bytes: NDArray[np.int64]  # (documents,)

    @property
    def bits_per_byte(self) -> float:
        return float(self.nats.sum() / math.log(2) / self.bytes.sum())


def judge_version(params: Params, root: Path, version: Version) -> TextVerdicts:
    """The registered `version` on the texts of `root`."""
    with tempfile.TemporaryDirectory() as temporary:
        registry.download_version(params, version, Path(temporary))
        return judge_folder(params, root, Path(temporary), version.tags.get("onnx.digest"))


def judge_folder(params: Params, root: Path, folder: Path, digest: str | None) -> TextVerdicts:
    """The bundle in `folder` on the split `language_evaluate.split` of `root`/artifacts/text.

    Raises:
        DataError: the files are not those that were registered.
    """
    bundle = open_registered(folder, digest)
    tokenizer = load_tokenizer(folder)
    record = json.loads((folder / decoders.TRAINING).read_text())
    context = min(int(record["context"]), bundle.manifest.max_context)
    manifest = load_manifest(root / paths.TEXT)
    split = load_split(root / paths.TEXT, manifest, params.language_evaluate.split)
    written_with = load_tokenizer(root / paths.TEXT)
    slices = open_slices(bundle, split=False)
    texts = (decode(written_with, ids.tolist()) for ids in split.documents())
    documents = [encode_document(tokenizer, text) for text in texts]
    found = TextVerdicts(document_nats(slices, documents, context), split.bytes)
    if not np.isfinite(found.nats).all():
        raise DataError("it answers with values that are not finite")
    return found


def open_registered(folder: Path, digest: str | None) -> Bundle:
    """
    Raises:
        DataError: damaged, or not what was registered.
    """
    bundle = read_bundle(folder)
    found = files.sha256_file(folder / MANIFEST)
    if digest is not None and found != digest:
        raise DataError(f"{folder / MANIFEST} has sha256 {found[:12]}, registered was {digest[:12]}")
    return bundle


def document_nats(slices: Slices, documents: Sequence[Sequence[int]], context: int) -> NDArray[np.float64]:
    """−log p of all tokens of each document but the first, in pieces as `flows.text.batches.eval_batches`
    cuts them; many pieces run at once, because a run costs more than its rows."""
    pieces = [
        (number, np.array(ids[begin : begin + context + 1], np.int64))
        for number, ids in enumerate(documents)
        for begin in range(0, len(ids) - 1, context)
    ]
    nats = np.zeros(len(documents))
    for first, last in _grouped([len(piece) - 1 for _, piece in pieces]):
        together = pieces[first:last]
        lengths = [len(piece) - 1 for _, piece in together]
        logits = slices.run(
            np.concatenate([piece[:-1] for _, piece in together]),
            np.concatenate([np.arange(length, dtype=np.int64) for length in lengths]),
            WholeTexts(slices.bundle.manifest.attention, lengths),
        )
        targets = torch.from_numpy(np.concatenate([piece[1:] for _, piece in together]))
        lost = F.cross_entropy(torch.from_numpy(logits).double(), targets, reduction="none").numpy()
        np.add.at(nats, np.repeat([number for number, _ in together], lengths), lost)
    return nats


def _grouped(lengths: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Ranges of pieces with up to ROWS rows together, or a single longer one."""
    first, rows = 0, 0
    for place, length in enumerate(lengths):
        if place > first and rows + length > ROWS:
            yield first, place
            first, rows = place, 0
        rows += length
    if lengths:
        yield first, len(lengths)


class WholeTexts:
    """Attention of texts whose rows all run at once, one text after the other."""

    def __init__(self, properties: Sequence[LayerAttention], lengths: Sequence[int]) -> None:
        self._properties = properties
        self._lengths = list(lengths)
        self._q: Floats = np.empty((0, 0, 0), np.float32)
        self._kv: tuple[Floats, Floats] = (self._q, self._q)

    def send_q(self, layer: int, q: Floats) -> None:
        self._q = q

    def send_kv(self, layer: int, k: Floats, v: Floats) -> None:
        self._kv = (k, v)

    def receive(self, layer: int) -> Floats:
        properties = self._properties[layer]
        q, k, v = (self._padded(rows) for rows in (self._q, *self._kv))  # (texts, heads, rows, hd)
        group = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        rows = torch.arange(q.shape[2])
        distance = rows[:, None] - rows
        seen = distance >= 0
        if properties.window:
            seen &= distance < properties.window
        if properties.soft_cap:
            scores = q @ k.transpose(2, 3) * properties.scale
            scores = properties.soft_cap * torch.tanh(scores / properties.soft_cap)
            mixed = scores.masked_fill(~seen, -math.inf).softmax(-1) @ v
        else:
            mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=properties.scale)
        # what stands behind a text's end has seen it, but nothing of it is kept
        kept = [text[:, :length] for text, length in zip(mixed, self._lengths, strict=True)]
        answer: Floats = torch.cat(kept, 1).transpose(0, 1).contiguous().numpy()
        return answer

    def _padded(self, rows: Floats) -> Tensor:
        parts = torch.split(torch.from_numpy(rows), self._lengths)
        return torch.nn.utils.rnn.pad_sequence(list(parts), batch_first=True).transpose(1, 2)
