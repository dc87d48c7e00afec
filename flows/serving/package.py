"""A model package: the folder that the export stage writes, the registry keeps and servers open.

    manifest.json           what the network is, its inputs and outputs, preprocessing, labels, all hashes
    model.onnx              variant fp32; beside it model.onnx.data when the weights do not fit into one file
    model_int8.onnx         variant int8
    reference.safetensors   what served images should look like (flows/serving/reference.py)

Two hashes per variant. `sha256` is of the file's bytes and finds damage. `digest` is of the content (nodes
and initializers in name order) and survives the registry, which rewrites files: it is the one that health
pages, registry tags and the manifest share. The invariant: nothing is used before both match.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import onnx
from onnx import numpy_helper

from flows import files
from flows.errors import DataError
from flows.imaging import Preprocessing

FORMAT = 1
MANIFEST = "manifest.json"
METADATA_PREPROCESSING = "trunkline.preprocessing"
METADATA_LABELS = "trunkline.labels"


@dataclass(frozen=True)
class TensorSpec:
    """One input or output; -1 in `shape` is the free batch dimension."""

    name: str
    datatype: str  # Open Inference Protocol name: FP32
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Variant:
    """One precision of the network."""

    file: str
    sha256: str
    bytes: int  # of all its files
    digest: str
    nodes: int
    external: tuple[dict[str, Any], ...] = ()  # {"file", "sha256"} of weights kept beside the graph


@dataclass(frozen=True)
class HashedFile:
    """Another file of the folder."""

    file: str
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """The content of manifest.json. Nothing in it depends on when or by which run it was written."""

    name: str
    task: str
    opset: int
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    max_batch: int
    preprocessing: Preprocessing
    labels: tuple[str, ...]
    variants: Mapping[str, Variant]
    data_digest: str
    source: Mapping[str, Any]
    reference: HashedFile | None = None  # absent from exports made before there was a monitor

    def to_dict(self) -> dict[str, Any]:
        plain: dict[str, Any] = json.loads(
            json.dumps(
                {
                    "format": FORMAT,
                    "name": self.name,
                    "task": self.task,
                    "opset": self.opset,
                    "inputs": [asdict(spec) for spec in self.inputs],
                    "outputs": [asdict(spec) for spec in self.outputs],
                    "max_batch": self.max_batch,
                    "preprocessing": self.preprocessing.to_dict(),
                    "labels": self.labels,
                    "variants": {name: asdict(variant) for name, variant in self.variants.items()},
                    "data_digest": self.data_digest,
                    "source": dict(self.source),
                    "reference": asdict(self.reference) if self.reference else None,
                }
            )
        )
        return plain

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> Manifest:
        """
        Raises:
            KeyError, TypeError, ValueError: not a manifest of this format.
        """
        if value["format"] != FORMAT:
            raise ValueError(f"format {value['format']!r} is not {FORMAT}, the one this version reads")
        if value["task"] != "classification":
            raise ValueError(f"task {value['task']!r} is not one this version serves (classification)")
        return cls(
            name=value["name"],
            task=value["task"],
            opset=value["opset"],
            inputs=_tensor_specs(value["inputs"]),
            outputs=_tensor_specs(value["outputs"]),
            max_batch=value["max_batch"],
            preprocessing=Preprocessing.from_dict(value["preprocessing"]),
            labels=tuple(value["labels"]),
            variants={
                name: Variant(**{**variant, "external": tuple(variant["external"])})
                for name, variant in value["variants"].items()
            },
            data_digest=value["data_digest"],
            source=value["source"],
            reference=HashedFile(**value["reference"]) if value.get("reference") else None,
        )


def _tensor_specs(values: list[dict[str, Any]]) -> tuple[TensorSpec, ...]:
    return tuple(TensorSpec(value["name"], value["datatype"], tuple(value["shape"])) for value in values)


@dataclass(frozen=True)
class ModelPackage:
    """A verified folder. `open` is the only way in."""

    folder: Path
    manifest: Manifest

    @classmethod
    def open(
        cls, folder: Path, *, variants: tuple[str, ...] | None = None, digest: str | None = None
    ) -> ModelPackage:
        """Read the manifest and verify the files of `variants` (default: all).

        Args:
            digest: content digest that variant fp32 must have, as recorded in the model registry.

        Raises:
            DataError: no manifest, unknown format, a missing or changed file, or another model than was asked
            for.
        """
        path = folder / MANIFEST
        try:
            manifest = Manifest.from_dict(files.read_json(path))
        except (FileNotFoundError, NotADirectoryError):
            raise DataError(f"{path} does not exist; {folder} is not an exported model") from None
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            reason = f"key {error} is missing" if isinstance(error, KeyError) else str(error)
            raise DataError(f"{path} is not a usable manifest: {reason}") from None
        package = cls(folder, manifest)
        for name in manifest.variants if variants is None else variants:
            package._verify(name)
        if manifest.reference is not None:
            package._verify_hashes({manifest.reference.file: manifest.reference.sha256})
        if digest is not None and digest != (found := package.variant("fp32").digest):
            raise DataError(
                f"{folder} holds the model with digest {found[:12]}…, not {digest[:12]}… as recorded; "
                "download the model again"
            )
        return package

    def file_names(self) -> list[str]:
        """Every file that the export stage wrote into the folder; a registered one holds more."""
        manifest = self.manifest
        names = [MANIFEST, *([manifest.reference.file] if manifest.reference else [])]
        for variant in manifest.variants.values():
            names += [variant.file, *(str(part["file"]) for part in variant.external)]
        return names

    def variant(self, name: str) -> Variant:
        """
        Raises:
            DataError: there is no such variant.
        """
        try:
            return self.manifest.variants[name]
        except KeyError:
            known = ", ".join(self.manifest.variants)
            raise DataError(f"{self.folder} has no variant {name!r}, only {known}") from None

    def output(self, name: str) -> TensorSpec:
        """The output `name` of every variant.

        Raises:
            DataError: there is no such output.
        """
        for spec in self.manifest.outputs:
            if spec.name == name:
                return spec
        known = ", ".join(spec.name for spec in self.manifest.outputs)
        raise DataError(f"{self.folder} has no output {name!r}, only {known}; export the model again")

    def path(self, name: str) -> Path:
        """The ONNX file of a variant."""
        return self.folder / self.variant(name).file

    def _verify(self, name: str) -> None:
        variant = self.variant(name)
        hashes = {variant.file: variant.sha256} | {part["file"]: part["sha256"] for part in variant.external}
        self._verify_hashes(hashes)
        model = load_onnx(self.path(name))
        digest = content_digest(model)
        if digest != variant.digest:
            raise DataError(
                f"{self.path(name)} has content digest {digest[:12]}…, {MANIFEST} says "
                f"{variant.digest[:12]}…; export or download the model again"
            )
        if read_metadata(model) != (self.manifest.preprocessing, self.manifest.labels):
            raise DataError(
                f"preprocessing or labels in {self.folder / MANIFEST} differ from those inside "
                f"{variant.file}; export or download the model again"
            )

    def _verify_hashes(self, hashes: Mapping[str, str]) -> None:
        for file, expected in hashes.items():
            if Path(file).name != file:
                raise DataError(f"{self.folder / MANIFEST} names a file outside its folder: {file!r}")
            path = self.folder / file
            if not path.is_file():
                raise DataError(
                    f"{path} is missing although {MANIFEST} lists it; export or download the model again"
                )
            found = files.sha256_file(path)
            if found != expected:
                raise DataError(
                    f"{path} was changed after its export: sha256 {found[:12]}…, {MANIFEST} says "
                    f"{expected[:12]}…; export or download the model again"
                )


def load_onnx(path: Path) -> onnx.ModelProto:
    """Parse a model with all its weights.

    Raises:
        DataError: not an ONNX file, or external weights that cannot be used.
    """
    try:
        return onnx.load(path)
    except FileNotFoundError:
        raise DataError(f"{path} does not exist") from None
    except Exception as error:  # protobuf's and onnx's own exception types share no base class
        raise DataError(f"{path} is not a usable ONNX model: {' '.join(str(error).split())[:200]}") from None


def content_digest(model: onnx.ModelProto) -> str:
    """sha256 over what the network computes and how to feed it, independent of how the file stores it.

    Covered: operator sets, inputs and outputs, nodes in order, initializers in name order (name, type, shape,
    bytes) and Trunkline's metadata. Not covered: where weights are stored, documentation strings, the
    producer's version.
    """
    digest = hashlib.sha256()

    def add(data: bytes) -> None:
        digest.update(len(data).to_bytes(8, "little"))
        digest.update(data)

    for opset in sorted((entry.domain, entry.version) for entry in model.opset_import):
        add(repr(opset).encode())
    for value in (*model.graph.input, *model.graph.output):
        add(repr((value.name, _type_of(value))).encode())
    for node in model.graph.node:
        add(repr((node.domain, node.op_type, list(node.input), list(node.output))).encode())
        for attribute in sorted(node.attribute, key=lambda entry: entry.name):
            add(attribute.SerializeToString(deterministic=True))
    for tensor in sorted(model.graph.initializer, key=lambda entry: entry.name):
        add(repr((tensor.name, tensor.data_type, list(tensor.dims))).encode())
        add(numpy_helper.to_array(tensor).tobytes())
    for function in sorted(model.functions, key=lambda entry: (entry.domain, entry.name)):
        add(function.SerializeToString(deterministic=True))
    for key, text in sorted((entry.key, entry.value) for entry in model.metadata_props):
        if key.startswith("trunkline."):
            add(repr((key, text)).encode())
    return digest.hexdigest()


def _type_of(value: onnx.ValueInfoProto) -> tuple[int, list[int | str]]:
    tensor = value.type.tensor_type
    return tensor.elem_type, [dim.dim_param or dim.dim_value for dim in tensor.shape.dim]


def metadata(preprocessing: Preprocessing, labels: tuple[str, ...]) -> dict[str, str]:
    """What the ONNX file itself carries, so that a lost manifest does not lose the meaning of the model."""
    return {
        METADATA_PREPROCESSING: json.dumps(preprocessing.to_dict(), sort_keys=True),
        METADATA_LABELS: json.dumps(labels, ensure_ascii=False),
    }


def read_metadata(model: onnx.ModelProto) -> tuple[Preprocessing, tuple[str, ...]] | None:
    """Inverse of `metadata`; None when the model carries none."""
    found = {entry.key: entry.value for entry in model.metadata_props}
    try:
        preprocessing = Preprocessing.from_dict(json.loads(found[METADATA_PREPROCESSING]))
        return preprocessing, tuple(json.loads(found[METADATA_LABELS]))
    except (KeyError, TypeError, ValueError):
        return None


def describe_variant(path: Path) -> Variant:
    """Hash the file at `path` and its external weights.

    Raises:
        DataError: not an ONNX model.
    """
    structure = onnx.load(path, load_external_data=False)
    locations = sorted(
        {
            entry.value
            for tensor in structure.graph.initializer
            for entry in tensor.external_data
            if entry.key == "location"
        }
    )
    external = tuple({"file": name, "sha256": files.sha256_file(path.parent / name)} for name in locations)
    return Variant(
        file=path.name,
        sha256=files.sha256_file(path),
        bytes=sum((path.parent / name).stat().st_size for name in [path.name, *locations]),
        digest=content_digest(load_onnx(path)),
        nodes=len(structure.graph.node),
        external=external,
    )
