"""A Hugging Face folder → a bundle, checked against the model before anyone sees it.

The folder appears whole or not at all: it is built beside its place, read back as a server would read it,
compared with the model, and then renamed. What a killed export left beside its place is removed by the next.
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from flows import files
from flows.errors import ConfigError, DataError
from flows.serving.lamina.slices import bundle as bundles
from flows.serving.lamina.slices import cutting, programs, tracing
from flows.serving.lamina.slices.bundle import (
    Bundle,
    HashedFile,
    LayerAttention,
    Manifest,
    Parity,
    TensorSpec,
)
from flows.serving.lamina.slices.loading import TOKENIZER_FILES, Decoder, load_decoder
from flows.serving.lamina.slices.onnx_graphs import WeightFiles, export_program, write_graph
from flows.serving.lamina.slices.parity import measure_parity
from flows.serving.lamina.slices.tracing import Trace

OPSET = 20
TOLERANCE = 1e-4
EXPORTERS = ("torch", "transformers", "onnx", "onnxscript", "onnxruntime", "trunkline")


def export_bundle(
    source: Path,
    target: Path,
    *,
    name: str = "",
    opset: int = OPSET,
    tolerance: float = TOLERANCE,
    force: bool = False,
    say: Callable[[str], None] = lambda line: None,
) -> Bundle:
    """Slice the decoder in `source` and write the bundle `target`.

    Args:
        name: what the bundle is called in its manifest; empty: as `target`.
        tolerance: most that a logit may differ from the model's.
        say: gets a line per thing done.

    Raises:
        ConfigError: `target` exists, or is where the model is.
        DataError: `source` is damaged or not supported; nothing was written.
        GateFailed: the slices do not compute what the model computes; nothing was written.
    """
    check_target(source, target, force)
    decoder = load_decoder(source)
    say(f"{source}: {type(decoder.model).__name__}, {decoder.layers} layers, "
        f"{decoder.model.num_parameters():,} parameters")  # fmt: skip
    try:
        trace = tracing.trace(decoder.model, decoder.layers)
    except DataError as error:
        raise DataError(f"{source}: {error}") from None
    boundaries = cutting.cut(trace)
    steps = programs.build_steps(trace, boundaries)
    remove_abandoned(target)
    with files.replace_folder(target) as folder, _held(folder):
        written = _write_steps(folder, trace, steps, opset, say)
        described = _describe(source, name or target.name, decoder, trace, steps, written, opset, folder)
        unchecked = Parity(samples=0, tokens=0, longest_context=0, max_abs_error=0.0, max_relative_error=0.0,
                           argmax_agreement=0.0, tolerance=tolerance, covers_windows=False)  # fmt: skip
        _write_manifest(folder, described, unchecked)
        parity = measure_parity(bundles.read_bundle(folder), decoder.model, tolerance)
        _write_manifest(folder, described, parity)
        files.write_json(folder / bundles.PARITY, parity.model_dump(mode="json"))
    say(
        f"parity: {parity.tokens} positions, logits differ by at most {parity.max_abs_error:.1e} "
        f"({tolerance:g} allowed), same greedy token at {parity.argmax_agreement:.2%}"
    )
    if not parity.covers_windows:
        say(
            f"not checked: contexts beyond a sliding window; {parity.longest_context} tokens were the longest"
        )
    return bundles.read_bundle(target)


def check_target(source: Path, target: Path, force: bool) -> None:
    """
    Raises:
        ConfigError: writing to `target` would destroy something, or was not allowed.
    """
    if not target.exists():
        return
    if target.resolve() == source.resolve() or target.resolve() in source.resolve().parents:
        raise ConfigError(f"{target} is or holds the model itself; give another place to write to")
    if not target.is_dir() or not force:
        raise ConfigError(f"{target} exists; give another place, or --force to replace it")
    if any(target.iterdir()) and not (target / bundles.MANIFEST).is_file():
        raise ConfigError(f"{target} holds something else than a bundle; give another place")


def remove_abandoned(target: Path) -> None:
    """Remove the half-made bundles that killed exports to `target` left; not those still being made."""
    for folder in target.parent.glob(f".{target.name}.????????"):
        if folder.is_dir() and not folder.is_symlink() and all(map(_is_ours, folder.iterdir())):
            with suppress(BlockingIOError), _held(folder):
                shutil.rmtree(folder, ignore_errors=True)


def _is_ours(path: Path) -> bool:
    own = re.fullmatch(r"(post_)?(qx|kvx|qx_kvx)(_\d+)?\.onnx|post(_\d+)?\.onnx|weights_\d+\.data", path.name)
    return bool(own) or path.name in (bundles.MANIFEST, bundles.PARITY, *TOKENIZER_FILES)


@contextmanager
def _held(folder: Path) -> Iterator[None]:
    """Hold a folder for this process; the system lets go of it when the process is killed.

    Raises:
        BlockingIOError: another process holds it.
    """
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(handle)


class _Written:
    """What went into the folder, for the manifest."""

    def __init__(self, folder: Path) -> None:
        self.weights = WeightFiles(folder)
        self.graphs: dict[tuple[Any, ...], str] = {}
        self.steps: list[bundles.Step] = []


def _write_steps(
    folder: Path, trace: Trace, steps: list[programs.Step], opset: int, say: Callable[[str], None]
) -> _Written:
    written = _Written(folder)
    for step in steps:
        described = {}
        for program in filter(None, (step.first, step.kvx, step.fused)):
            names = [trace.names[node] for node in program.weights]
            weights = {trace.names[node]: trace.weights[node] for node in program.weights}
            written.weights.store(step.layer, weights)
            if program.signature not in written.graphs:
                taken = sum(signature[0] == program.kind for signature in written.graphs)
                name = f"{program.kind}{f'_{taken}' if taken else ''}.onnx"
                model = export_program(program, opset)
                write_graph(model, folder / name, [written.weights.tensors[key] for key in names])
                written.graphs[program.signature] = name
                say(f"{name}: {len(model.graph.node)} operators, first used by step {step.layer}")
            described[program] = bundles.Program(
                kind=program.kind,  # type: ignore[arg-type]  # checked by pydantic
                graph=written.graphs[program.signature],
                inputs=tuple(map(_spec, program.inputs)),
                outputs=tuple(map(_spec, program.outputs)),
                weights=tuple(names),
            )
        kept = step.boundary.bytes if step.boundary else 0
        naive = step.boundary.naive_bytes if step.boundary else 0
        written.steps.append(
            bundles.Step(
                layer=step.layer,
                programs=tuple(described[program] for program in (step.first, step.kvx) if program),
                fused=described[step.fused] if step.fused else None,
                context=tuple(value.name for value in step.context),
                context_bytes_per_row=kept / cutting.NOMINAL_ROWS,
                naive_bytes_per_row=naive / cutting.NOMINAL_ROWS,
            )
        )
    return written


def _spec(value: programs.Value) -> TensorSpec:
    return TensorSpec(name=value.name, shape=value.shape(), dtype=value.dtype)


def _describe(
    source: Path,
    name: str,
    decoder: Decoder,
    trace: Trace,
    steps: list[programs.Step],
    written: _Written,
    opset: int,
    folder: Path,
) -> dict[str, Any]:
    first = trace.markers[0]
    shapes = {(marker.heads, marker.kv_heads, marker.head_size) for marker in trace.markers}
    if len(shapes) > 1:
        raise DataError(
            f"{source} has layers with different heads, which Lamina does not serve: {sorted(shapes)}"
        )
    tokenizer = []
    for file in TOKENIZER_FILES:
        if (source / file).is_file():
            shutil.copyfile(source / file, folder / file)
            tokenizer.append(_hash(folder, file))
    config = decoder.config
    end = decoder.model.generation_config.eos_token_id
    end = config.eos_token_id if end is None else end
    return {
        "format": bundles.FORMAT,
        "kind": "lamina",
        "name": name,
        "architecture": type(decoder.model).__name__,
        "source_sha256": decoder.source_sha256,
        "dtype": "float32",
        "opset": opset,
        "vocab_size": int(trace.logits.meta["val"].shape[-1]),
        "hidden_size": int(config.hidden_size),
        "layers": decoder.layers,
        "heads": first.heads,
        "kv_heads": first.kv_heads,
        "head_size": first.head_size,
        "max_context": decoder.max_context,
        "position_scheme": decoder.position_scheme,
        "bos_token_id": config.bos_token_id,
        "eos_token_ids": tuple(end if isinstance(end, list) else [] if end is None else [end]),
        "attention": tuple(
            LayerAttention(
                layer=marker.layer, scale=marker.scale, window=marker.window, soft_cap=marker.soft_cap
            )
            for marker in trace.markers
        ),
        "steps": tuple(written.steps),
        "tensors": tuple(written.weights.tensors.values()),
        "graphs": tuple(_hash(folder, file) for file in written.graphs.values()),
        "weights": tuple(_hash(folder, file) for file in written.weights.files),
        "tokenizer": tuple(tokenizer),
        "exporter": {package: found for package in EXPORTERS if (found := _version(package))},
    }


def _hash(folder: Path, name: str) -> HashedFile:
    path = folder / name
    return HashedFile(file=name, sha256=files.sha256_file(path), bytes=path.stat().st_size)


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def _write_manifest(folder: Path, described: dict[str, Any], parity: Parity) -> None:
    files.write_json(folder / bundles.MANIFEST, Manifest(parity=parity, **described).to_dict())
