"""A file or folder of weights → tensors by name, without running anything that is written in it.

Files are recognised by their first bytes, whatever they are called: safetensors, the zip files of
``torch.save`` and its older pickles, indexed shards of either, and folders as Hugging Face publishes them. Of
a pickle only tensors and plain containers are accepted: one that names any other class is refused, because
rebuilding an object means calling code that its author chose.

The one invariant: sizes are checked against the bytes of the file before anything is allocated for them.
"""

from __future__ import annotations

import json
import pickle
import re
import sys
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from models.checkpoints.errors import CheckpointError, listed

MAX_BYTES = 128 * 2**30
"""Of all files of one checkpoint together: ten times the largest published one (3 B parameters in fp32)."""
MAX_JSON_BYTES = 64 * 2**20
ENTRIES = ("model", "state_dict", "module")
"""Where training scripts put the weights, beside optimiser and epoch."""
METADATA_KEY = "trunkline"
"""Of a safetensors header, or an entry beside ``model``: the JSON that ``trunkline convert`` leaves there."""
FOLDER_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)


@dataclass(frozen=True)
class Weights:
    """What a checkpoint holds: its tensors, what is written beside them, and what was left aside."""

    tensors: dict[str, Tensor]
    config: Mapping[str, Any] = field(default_factory=dict)
    source: str = "state dict"
    notes: tuple[str, ...] = ()


def read(path: Path | str, max_bytes: int = MAX_BYTES) -> Weights:
    """Read a weights file, an index of shards, or a folder with one of them and a ``config.json``.

    Raises:
        CheckpointError: it is missing, too large, damaged, not a checkpoint, or needs code to be read.
    """
    path = Path(path)
    config: Mapping[str, Any] = {}
    notes: tuple[str, ...]
    if path.is_dir():
        config = _read_config(path / "config.json")
        path = _weights_of(path)
    elif path.is_file() and path.name != "config.json":
        # Beside the usual names only: the config of a folder of many files says nothing about one of them.
        config = _read_config(path.parent / "config.json") if path.name in FOLDER_FILES else {}
    if not path.is_file():
        raise CheckpointError(f"{path} does not exist or is not a file.")
    if path.name.endswith(".index.json"):
        tensors, notes = _read_shards(path, max_bytes), (f"read from the shards of {path.name}",)
    else:
        _check_size(path, path.stat().st_size, max_bytes)
        value, header = _read_file(path)
        tensors, notes = pick_tensors(value, str(path))
        config = config or header
    return Weights(tensors, config, str(path), notes)


def pick_tensors(value: object, source: str) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """The state dict inside what a file held, and notes on what lay beside it.

    Raises:
        CheckpointError: there is none, or something in it is not an ordinary tensor.
    """
    if not isinstance(value, Mapping) or not value:
        raise CheckpointError(f"{source} holds no state dict but {_kind(value)}.")
    found: Mapping[Any, Any] = value
    notes: list[str] = []
    while not any(isinstance(item, Tensor) for item in found.values()):
        entry = next((name for name in ENTRIES if isinstance(found.get(name), Mapping)), None)
        if entry is None or len(notes) > 2:  # deeper, it may go round in circles
            raise CheckpointError(
                f"{source} holds no weights: none of its entries is a tensor or a state dict named "
                f"{', '.join(ENTRIES)}; it has: {listed(map(str, found)) or 'nothing'}."
            )
        beside = [str(name) for name in found if name != entry]
        notes.append(f"entry {entry!r} read" + (f", {listed(beside)} left aside" if beside else ""))
        found = found[entry]
    strange = [
        str(name) for name, item in found.items() if not isinstance(item, Tensor) or not isinstance(name, str)
    ]
    if strange:
        raise CheckpointError(
            f"{source} mixes tensors with other things, so it is no state dict: {listed(strange)}."
        )
    tensors = {name: item.detach() for name, item in found.items()}
    for name, tensor in tensors.items():
        _check_tensor(name, tensor, source)
    return tensors, tuple(notes)


# ------------------------------------------------------------------------------------------------------------
# Files
# ------------------------------------------------------------------------------------------------------------


def _read_file(path: Path) -> tuple[object, Mapping[str, Any]]:
    """What a single file holds, and the JSON in its header if it has one."""
    with open(path, "rb") as file:
        start = file.read(64)
    if start[:4] == b"PK\x03\x04":
        _check_zip(path)
        return _with_header(_unpickle(path, mmap=True))
    if start[8:9] == b"{":
        return _read_safetensors(path)
    if start[:1] == b"\x80":
        return _unpickle(path, mmap=False), {}
    if start.startswith(b"version https://git-lfs"):
        raise CheckpointError(f"{path} is only the pointer of a Git LFS file: fetch it with `git lfs pull`.")
    if start.lstrip()[:1] == b"<":
        raise CheckpointError(f"{path} is a web page, not weights: the download did not reach the file.")
    what = "is empty" if not start else "is neither a safetensors file nor one of torch.save"
    raise CheckpointError(f"{path} {what}: it is not a checkpoint, or its beginning is lost.")


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], Mapping[str, Any]]:
    try:
        with safe_open(path, framework="pt") as file:
            header = (file.metadata() or {}).get(METADATA_KEY, "{}")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # not a dict
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{path} is damaged or cut off: {error}.") from None
    return tensors, _parse_header(header)


def _with_header(value: object) -> tuple[object, Mapping[str, Any]]:
    if not isinstance(value, dict) or not isinstance(value.get(METADATA_KEY), str):
        return value, {}
    rest = {name: item for name, item in value.items() if name != METADATA_KEY}
    return rest, _parse_header(value[METADATA_KEY])


def _parse_header(text: str) -> Mapping[str, Any]:
    """Empty if it is none of ours: it only tells sizes, which can be given as well."""
    try:
        config = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return config if isinstance(config, dict) else {}


def _unpickle(path: Path, mmap: bool) -> object:
    try:
        if path.suffix == ".safetensors":  # torch would believe the name
            with open(path, "rb") as file:
                return torch.load(file, map_location="cpu", weights_only=True)
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except pickle.UnpicklingError as error:
        if names := _refused_names(path, error):
            raise CheckpointError(_needs_code(path, names)) from None
        raise CheckpointError(f"{path} is damaged: {_first_line(error)}") from None
    except MemoryError:
        raise
    except Exception as error:  # a damaged pickle fails in every way there is
        raise CheckpointError(f"{path} is damaged or cut off: {_first_line(error)}") from None


def _refused_names(path: Path, error: Exception) -> list[str]:
    """Classes and functions that the pickle names and that are no tensors or containers."""
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(str(path))
    except Exception:  # an old-style pickle: only the message tells
        names = []
    return sorted(set(names) or set(re.findall(r"GLOBAL ([\w.]+)", str(error))))


def _needs_code(path: Path, names: list[str]) -> str:
    packages = sorted({name.split(".")[0] for name in names if "." in name} - sys.stdlib_module_names)
    installed = f" (with {listed(packages)} installed)" if packages else ""
    return (
        f"{path} holds more than tensors ({listed(names)}), and reading those runs code that the file "
        "chooses, so it is refused. If you trust it, convert it once, where nothing is at stake: "
        f"python -c \"import torch; c = torch.load('{path.name}', map_location='cpu', weights_only=False); "
        f"torch.save({{'model': c.get('model', c.get('state_dict', c))}}, 'weights.pth')\"{installed}, "
        "then give weights.pth."
    )


def _check_zip(path: Path) -> None:
    """torch.save stores without compression: a zip that inflates is not from there, and could be a bomb."""
    try:
        with zipfile.ZipFile(path) as archive:
            inflated = [entry for entry in archive.infolist() if entry.file_size > entry.compress_size]
            total = sum(entry.file_size for entry in archive.infolist())
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        raise CheckpointError(f"{path} is damaged or cut off: {error}.") from None
    if inflated or total > path.stat().st_size:
        raise CheckpointError(f"{path} is a compressed archive, which torch.save does not write: refused.")


def _check_size(path: Path, size: int, max_bytes: int) -> None:
    if size > max_bytes:
        raise CheckpointError(
            f"{path} has {size / 2**30:.1f} GiB, more than the {max_bytes / 2**30:g} GiB that are read."
        )


# ------------------------------------------------------------------------------------------------------------
# Folders and shards
# ------------------------------------------------------------------------------------------------------------


def _weights_of(folder: Path) -> Path:
    for name in FOLDER_FILES:
        if (folder / name).is_file():
            return folder / name
    raise CheckpointError(f"{folder} holds no weights: none of {', '.join(FOLDER_FILES)} is in it.")


def _read_config(path: Path) -> Mapping[str, Any]:
    if not path.is_file():
        return {}
    value = _read_json(path)
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds no object, but {_kind(value)}.")
    return value


def _read_json(path: Path) -> object:
    _check_size(path, path.stat().st_size, MAX_JSON_BYTES)
    try:
        return json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not JSON: {error}.") from None


def _read_shards(index: Path, max_bytes: int) -> dict[str, Tensor]:
    value = _read_json(index)
    places = value.get("weight_map") if isinstance(value, dict) else None
    if not isinstance(places, dict) or not places or not all(isinstance(n, str) for n in places.values()):
        raise CheckpointError(f"{index} has no weight_map from names to files.")
    shards = sorted(set(places.values()))
    outside = [name for name in shards if Path(name).name != name]
    if outside:
        raise CheckpointError(f"{index} points outside its own folder: {listed(outside)}.")
    absent = [name for name in shards if not (index.parent / name).is_file()]
    if absent:
        raise CheckpointError(f"{index} names shards that are not beside it: {listed(absent)}.")
    total = sum((index.parent / name).stat().st_size for name in shards)
    _check_size(index, total, max_bytes)
    tensors: dict[str, Tensor] = {}
    for shard in shards:
        found, _ = pick_tensors(_read_file(index.parent / shard)[0], str(index.parent / shard))
        wrong = sorted({name for name in places if places[name] == shard} ^ found.keys())
        if wrong:
            raise CheckpointError(
                f"{index} and {shard} disagree about what is in that shard: {listed(wrong)}; "
                "is it of another checkpoint?"
            )
        tensors |= found
    return tensors


# ------------------------------------------------------------------------------------------------------------


def _check_tensor(name: str, tensor: Tensor, source: str) -> None:
    if tensor.layout is not torch.strided or tensor.is_quantized or tensor.is_complex():
        raise CheckpointError(
            f"{name} in {source} is {tensor.layout}, {tensor.dtype}; only plain real tensors are read."
        )
    if tensor.is_meta:
        raise CheckpointError(f"{name} in {source} has a shape but no values (meta device).")
    if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        raise CheckpointError(f"{name} in {source} claims {tuple(tensor.shape)}, more than the file holds.")


def _kind(value: object) -> str:
    return f"an empty {type(value).__name__}" if value in ({}, [], ()) else f"a {type(value).__name__}"


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:200]
