"""A bundle: the folder that `trunkline export language` writes and Lamina opens.

    manifest.json                what the decoder is, its steps, every file's hash, the parity report
    qx.onnx kvx.onnx post_qx.onnx post.onnx …   graphs, shared by the layers that are alike
    weights_00.data …            tensors, one after the other, as numbers in the byte order of ONNX (little)
    parity.json                  the parity report again, for `dvc metrics`
    tokenizer.json …             copied from the model

A graph holds no weights. A program is a graph with the names of its weights and with names for its inputs and
outputs; equal names are the same value, so a runner needs no more than a dictionary. The invariant: nothing
is used before every size and every hash has been found as the manifest says.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from flows import files
from flows.errors import DataError

FORMAT = 1
MANIFEST = "manifest.json"
PARITY = "parity.json"
MAX_MANIFEST_BYTES = 256 * 2**20
AGAIN = "export the model again"

FileName = str


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class HashedFile(_Strict):
    file: FileName
    sha256: str
    bytes: int = Field(ge=0)


class StoredTensor(_Strict):
    """Where the bytes of one weight are."""

    name: str
    file: FileName
    offset: int = Field(ge=0)
    shape: tuple[int, ...] = Field(strict=False)
    dtype: Literal["float32", "int64", "int32", "bool"]

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize


class TensorSpec(_Strict):
    """A value at a border; "rows" in the shape is the number of token rows."""

    name: str
    shape: tuple[int | str, ...] = Field(strict=False)
    dtype: str


class Program(_Strict):
    """One run of a graph: its inputs x0…, outputs y0… and weights w0… by name, in that order."""

    kind: Literal["qx", "kvx", "qx_kvx", "post_qx", "post_qx_kvx", "post"]
    graph: FileName
    inputs: tuple[TensorSpec, ...] = Field(strict=False)
    outputs: tuple[TensorSpec, ...] = Field(strict=False)
    weights: tuple[str, ...] = Field(strict=False)


class Step(_Strict):
    """What the model worker does between two attentions."""

    layer: int  # whose q, k and v it makes; the number of layers for the last one
    programs: tuple[Program, ...] = Field(strict=False, min_length=1, max_length=2)
    fused: Program | None  # instead of two programs, where there are two
    context: tuple[str, ...] = Field(strict=False)  # values that have to outlive the attention
    context_bytes_per_row: float  # at 64 rows
    naive_bytes_per_row: float  # what would be carried without computing anything again

    def chosen(self, split: bool) -> tuple[Program, ...]:
        """The programs to run: Q as early as it can be, or as few runs as possible."""
        return self.programs if split or self.fused is None else (self.fused,)


class LayerAttention(_Strict):
    """What an attention worker has to know of one layer."""

    layer: int
    scale: float
    window: int = Field(ge=0)  # tokens a query sees, itself included; 0: all
    soft_cap: float = Field(ge=0.0)  # c·tanh(s/c) of a score; 0: none
    sinks: Literal[False] = False


class Parity(_Strict):
    """Logits of the slices against those of the model itself, every position of every sample."""

    samples: int
    tokens: int
    longest_context: int
    max_abs_error: float
    max_relative_error: float
    argmax_agreement: float
    tolerance: float
    covers_windows: bool  # whether contexts were longer than every sliding window


class Manifest(_Strict):
    """The content of manifest.json. Nothing in it depends on when or where it was written."""

    format: Literal[1]
    kind: Literal["lamina"]
    name: str
    architecture: str
    source_sha256: str
    dtype: Literal["float32"]
    opset: int
    vocab_size: int
    hidden_size: int
    layers: int = Field(ge=1)
    heads: int = Field(ge=1)
    kv_heads: int = Field(ge=1)
    head_size: int = Field(ge=1)
    max_context: int = Field(ge=1)
    position_scheme: str
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...] = Field(strict=False)
    attention: tuple[LayerAttention, ...] = Field(strict=False)
    steps: tuple[Step, ...] = Field(strict=False)
    tensors: tuple[StoredTensor, ...] = Field(strict=False)
    graphs: tuple[HashedFile, ...] = Field(strict=False)
    weights: tuple[HashedFile, ...] = Field(strict=False)
    tokenizer: tuple[HashedFile, ...] = Field(strict=False)
    parity: Parity
    exporter: dict[str, str]

    def to_dict(self) -> dict[str, Any]:
        return self.model_dump(mode="json")


@dataclass(frozen=True)
class Bundle:
    """A verified folder. `read_bundle` is the only way in."""

    folder: Path
    manifest: Manifest

    def tensor(self, name: str) -> NDArray[Any]:
        """A weight, mapped from its file: read when it is used, never written."""
        stored = self._stored[name]
        return _map(self.folder / stored.file, stored)

    @cached_property
    def _stored(self) -> dict[str, StoredTensor]:
        return {tensor.name: tensor for tensor in self.manifest.tensors}


def read_bundle(folder: Path) -> Bundle:
    """Read the manifest and verify every file that it lists.

    Raises:
        DataError: no manifest, another format, contradictions, a missing, truncated or changed file.
    """
    path = folder / MANIFEST
    manifest = _read_manifest(path)
    for entry in (*manifest.graphs, *manifest.weights, *manifest.tokenizer):
        _verify_file(folder, entry)
    _check_consistent(manifest, path)
    return Bundle(folder, manifest)


def _read_manifest(path: Path) -> Manifest:
    try:
        if path.stat().st_size > MAX_MANIFEST_BYTES:
            raise DataError(f"{path} is larger than any manifest; {path.parent} is not a bundle")
        value = files.read_json(path)
    except (FileNotFoundError, NotADirectoryError):
        raise DataError(f"{path} does not exist; {path.parent} is not an exported language model") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not a usable manifest: {error}; {AGAIN}") from None
    if not isinstance(value, dict) or value.get("kind") != "lamina":
        raise DataError(
            f"{path} is not the manifest of a language model; make one: trunkline export language"
        )
    if value.get("format") != FORMAT:
        raise DataError(
            f"{path} has format {value.get('format')!r}, this version reads {FORMAT}; {AGAIN} with it"
        )
    try:
        return Manifest.model_validate(value)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise DataError(f"{path} is not a usable manifest: {where}: {first['msg']}; {AGAIN}") from None


def _verify_file(folder: Path, entry: HashedFile) -> None:
    if Path(entry.file).name != entry.file or entry.file in ("", ".", ".."):
        raise DataError(f"{folder / MANIFEST} names a file outside its folder: {entry.file!r}")
    path = folder / entry.file
    if not path.is_file():
        raise DataError(f"{path} is missing although {MANIFEST} lists it; {AGAIN}")
    if (found := path.stat().st_size) != entry.bytes:
        what = "truncated" if found < entry.bytes else "too long"
        raise DataError(f"{path} is {what}: {found} bytes, {MANIFEST} says {entry.bytes}; {AGAIN}")
    if (digest := files.sha256_file(path)) != entry.sha256:
        raise DataError(
            f"{path} was changed after its export: sha256 {digest[:12]}…, {MANIFEST} says "
            f"{entry.sha256[:12]}…; {AGAIN}"
        )


def _check_consistent(manifest: Manifest, path: Path) -> None:
    """What a hash cannot tell: a manifest that contradicts itself."""

    def refuse(what: str) -> None:
        raise DataError(f"{path} contradicts itself: {what}; {AGAIN}")

    sizes = {entry.file: entry.bytes for entry in manifest.weights}
    for tensor in manifest.tensors:
        if min(tensor.shape, default=1) < 0 or tensor.offset + tensor.bytes > sizes.get(tensor.file, -1):
            refuse(f"weight {tensor.name} lies outside {tensor.file}")
    if [layer.layer for layer in manifest.attention] != list(range(manifest.layers)):
        refuse(f"attention of other than its {manifest.layers} layers")
    if [step.layer for step in manifest.steps] != list(range(manifest.layers + 1)):
        refuse(f"{manifest.layers} layers need {manifest.layers + 1} steps")
    if manifest.heads % manifest.kv_heads:
        refuse(f"{manifest.heads} heads do not share {manifest.kv_heads} kv heads evenly")
    graphs = {entry.file for entry in manifest.graphs}
    tensors = {tensor.name for tensor in manifest.tensors}
    for split in (True, False):
        known = {"input_ids", "position_ids"}
        for step in manifest.steps:
            for program in step.chosen(split):
                if program.graph not in graphs or not tensors.issuperset(program.weights):
                    refuse(f"step {step.layer} uses a graph or a weight that is not listed")
                if missing := {value.name for value in program.inputs} - known:
                    refuse(f"nothing makes {', '.join(sorted(missing))} before step {step.layer}")
                known |= {value.name for value in program.outputs}
            if step.layer == manifest.layers:
                break
            heads = (f"{name}_{step.layer}" for name in "qkv")
            if not known.issuperset((*heads, *step.context)):
                refuse(f"step {step.layer} does not make its q, k, v and context")
            known = {f"attention_{step.layer}", *step.context}
        if "logits" not in known:
            refuse("no step makes the logits")


def _map(path: Path, stored: StoredTensor) -> NDArray[Any]:
    if not math.prod(stored.shape):
        return np.zeros(stored.shape, stored.dtype)
    mapped = np.memmap(path, np.uint8, "r", stored.offset, (stored.bytes,))
    return mapped.view(stored.dtype).reshape(stored.shape)
