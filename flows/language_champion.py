"""Judge a registered language model now, on the texts of a workspace, by the slices that serve it.

Two models may have different tokens, so what is compared is nats per document against the bytes of its text.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from flows import decoders, files, paths, registry
from flows.errors import DataError
from flows.params import Params
from flows.registry import Version
from flows.serving.lamina.slices.bundle import MANIFEST, Bundle, LayerAttention, read_bundle
from flows.serving.lamina.slices.runner import Floats, Slices, open_slices
from flows.text.corpus import load_manifest, load_split
from flows.text.tokenizer import decode, encode_document, load_tokenizer


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
    nats = []
    for ids in split.documents():
        own = encode_document(tokenizer, decode(written_with, ids.tolist()))
        nats.append(document_nats(slices, own, context))
    found = TextVerdicts(np.array(nats), split.bytes)
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


def document_nats(slices: Slices, ids: Sequence[int], context: int) -> float:
    """−log p of all tokens but the first, in rows as `flows.text.batches.eval_batches` cuts them."""
    total = 0.0
    for begin in range(0, len(ids) - 1, context):
        piece = np.array(ids[begin : begin + context + 1], np.int64)
        inputs, targets = piece[:-1], torch.from_numpy(piece[1:])
        attention = WholeText(slices.bundle.manifest.attention)
        logits = slices.run(inputs, np.arange(len(inputs), dtype=np.int64), attention)
        scores = torch.from_numpy(logits).double()
        total += float(F.cross_entropy(scores, targets, reduction="sum"))
    return total


class WholeText:
    """Attention of one text whose rows all run at once."""

    def __init__(self, properties: Sequence[LayerAttention]) -> None:
        self._properties = properties
        self._q: Floats = np.empty((0, 0, 0), np.float32)
        self._kv: tuple[Floats, Floats] = (self._q, self._q)

    def send_q(self, layer: int, q: Floats) -> None:
        self._q = q

    def send_kv(self, layer: int, k: Floats, v: Floats) -> None:
        self._kv = (k, v)

    def receive(self, layer: int) -> Floats:
        properties = self._properties[layer]
        q = torch.from_numpy(self._q).transpose(0, 1)  # (H, rows, hd)
        k, v = (torch.from_numpy(part).transpose(0, 1) for part in self._kv)
        group = q.shape[0] // k.shape[0]
        k, v = k.repeat_interleave(group, 0), v.repeat_interleave(group, 0)
        scores = q @ k.transpose(1, 2) * properties.scale
        if properties.soft_cap:
            scores = properties.soft_cap * torch.tanh(scores / properties.soft_cap)
        rows = torch.arange(q.shape[1])
        distance = rows[:, None] - rows
        hidden = distance < 0
        if properties.window:
            hidden |= distance >= properties.window
        mixed = scores.masked_fill(hidden, -math.inf).softmax(-1) @ v
        answer: Floats = mixed.transpose(0, 1).contiguous().numpy()
        return answer
