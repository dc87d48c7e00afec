"""The parity gate passes a faithful export, names what fails, and measures what it says."""

from __future__ import annotations

import csv
import dataclasses
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from PIL import Image
from serving_workspace import Exported, write_params

from flows import files, paths
from flows.classifiers import build_classifier, load_config, save_classifier
from flows.errors import ConfigError, DataError, GateFailed, Interrupted
from flows.exporting import write_onnx
from flows.params import Params
from flows.serving import measure
from flows.serving.comparison import Check, compare, cosine_similarity, run_in_batches, worst
from flows.serving.measure import Measurement
from flows.serving.package import METADATA_LABELS, METADATA_PREPROCESSING, describe_variant, load_onnx
from flows.serving.session import CPU
from flows.stage import Stage
from flows.stages import parity

ROOT = Path(__file__).resolve().parents[3]
LIMITS = {
    "fp32_max_abs_error": 1e-4,
    "int8_max_mean_error": 0.5,
    "int8_min_agreement": 0.9,
    "int8_max_accuracy_drop": 0.05,
}


def cheap(params: Params, **changes: object) -> Params:
    """The same params with other values in section parity."""
    section = params.parity.model_copy(update=LIMITS | changes)
    return params.model_copy(update={"parity": section})


def perturb(variant: str, amount: float) -> None:
    """Add `amount` to the logit of class 3 and make the package consistent again: only parity can notice."""
    path = paths.EXPORT / {"fp32": "model.onnx", "int8": "model_int8.onnx"}[variant]
    model = load_onnx(path)
    kept = {entry.key: entry.value for entry in model.metadata_props}
    final = next(node for node in model.graph.node if "logits" in node.output)
    final.output[0] = "unperturbed"
    offset = np.zeros(10, dtype=np.float32)
    offset[3] = amount
    model.graph.initializer.append(numpy_helper.from_array(offset, "offset"))
    model.graph.node.append(onnx.helper.make_node("Add", ["unperturbed", "offset"], ["logits"]))
    write_onnx(model, path, {key: kept[key] for key in (METADATA_LABELS, METADATA_PREPROCESSING)})
    manifest = files.read_json(paths.EXPORT / "manifest.json")
    manifest["variants"][variant] = dataclasses.asdict(describe_variant(path))
    files.write_json(paths.EXPORT / "manifest.json", manifest)


def eager_here(folder: Path, batch_sizes: list[int], runs: int, threads: int) -> list[Measurement]:
    """In this process, the only one that knows the small test backbone."""
    rows = measure.time_runner(measure.eager_opener(folder, 1), batch_sizes, runs)
    return [Measurement(provider="PyTorch eager CPU", variant="pytorch", **row) for row in rows]


def test_a_faithful_export_passes_and_leaves_a_report(
    workspace: Path,
    exported: Exported,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(parity, "measure_eager", eager_here)
    parity.run(cheap(exported.params), Stage("parity"))

    report = files.read_json(paths.PARITY / "parity.json")
    manifest = exported.package.manifest
    assert report["passed"] is True
    assert report["digests"] == {name: variant.digest for name, variant in manifest.variants.items()}
    assert report["samples"] == 100
    assert {(row["variant"], row["batch_size"]) for row in report["comparisons"]} == {
        (variant, size) for variant in ("fp32", "int8") for size in (1, 2, 7)
    }
    assert {check["key"] for check in report["checks"]} == {
        name for name in type(exported.params.parity).model_fields if name.startswith(("fp32_", "int8_"))
    }

    with open(paths.PARITY / "latency.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == [
        "provider", "variant", "batch", "p50_ms", "p95_ms", "p99_ms", "images_per_s", "peak_memory_mb",
    ]  # fmt: skip
    measured = {(row["variant"], int(row["batch"])) for row in rows}
    assert measured == {(variant, size) for variant in ("pytorch", "fp32", "int8") for size in (1, 4)}
    assert all(0 < float(row["p50_ms"]) <= float(row["p95_ms"]) <= float(row["p99_ms"]) for row in rows)
    assert all(1 < float(row["peak_memory_mb"]) < 1000 for row in rows if row["variant"] != "pytorch")

    metrics = files.read_json(paths.METRICS / "parity.json")
    assert metrics["fp32_agreement"] == 1.0
    assert metrics["fp32_top1"] == metrics["pytorch_top1"] == report["accuracy"]["pytorch"] > 0.8
    assert {"speed_int8_over_fp32", "speed_fp32_over_pytorch"} <= set(metrics)
    for name in ("errors.png", "latency.png"):
        assert min(Image.open(paths.PARITY / name).size) > 300
    assert capsys.readouterr().out.count(" ok") == 6


@pytest.mark.parametrize(
    ("variant", "amount", "message"),
    [
        ("fp32", 2e-3, r"fp32 largest logit error .* is above parity\.fp32_max_abs_error 0\.0001"),
        (
            "int8",
            20.0,
            r"int8 mean logit error .* above .*; int8 top-1 agreement .* below .*; int8 accuracy drop",
        ),
    ],
)
def test_a_perturbed_export_fails_by_name(
    workspace: Path,
    exported: Exported,
    capsys: pytest.CaptureFixture[str],
    variant: str,
    amount: float,
    message: str,
) -> None:
    perturb(variant, amount)
    with pytest.raises(GateFailed, match=message):
        parity.run(cheap(exported.params, batch_sizes=[50]), Stage("parity"))
    assert "FAILED" in capsys.readouterr().out  # the table is printed although the stage keeps no outputs
    assert not paths.PARITY.exists()


def test_the_command_ends_with_the_gates_exit_code(
    workspace: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRUNKLINE_TRACKING", "off")  # a new store announces itself on stderr
    write_params(workspace, {"parity.fp32_max_abs_error": 0.0, "parity.samples": 10})
    assert parity.main([]) == 10
    error = capsys.readouterr().err
    assert error.startswith("error: parity: fp32 largest logit error")
    assert error.count("\n") == 1


def test_an_export_of_another_model_is_refused(workspace: Path, exported: Exported) -> None:
    config = paths.FINETUNE / "pretrained/config.json"
    files.write_json(config, files.read_json(config) | {"classes": list("abcdefghij")})
    with pytest.raises(DataError, match="exported from another model"):
        parity.run(exported.params, Stage("parity"))


def test_an_unknown_provider_stops_the_stage(workspace: Path, exported: Exported) -> None:
    with pytest.raises(ConfigError, match="TPUExecutionProvider"):
        parity.run(cheap(exported.params, providers=["TPUExecutionProvider"]), Stage("parity"))


def test_a_stop_request_ends_it_as_resumable(workspace: Path, exported: Exported) -> None:
    stage = Stage("parity")
    stage.request_stop()
    with pytest.raises(Interrupted):
        parity.run(cheap(exported.params), stage)
    assert not paths.PARITY.exists()


def test_comparison_agrees_with_a_loop() -> None:
    generator = np.random.default_rng(0)
    reference = generator.standard_normal((20, 5)).astype(np.float32)
    logits = reference + 0.3 * generator.standard_normal((20, 5)).astype(np.float32)
    labels = generator.integers(0, 5, 20)
    result = compare(reference, logits, labels, variant="int8", provider=CPU, batch_size=4)

    errors = [abs(float(a) - float(b)) for a, b in zip(reference.ravel(), logits.ravel(), strict=True)]
    cosines = [
        sum(float(a) * float(b) for a, b in zip(x, y, strict=True))
        / math.sqrt(sum(float(a) ** 2 for a in x) * sum(float(b) ** 2 for b in y))
        for x, y in zip(reference, logits, strict=True)
    ]
    assert result.max_abs_error == pytest.approx(max(errors))
    assert result.mean_abs_error == pytest.approx(sum(errors) / len(errors))
    assert result.min_cosine == pytest.approx(min(cosines))
    assert result.mean_cosine == pytest.approx(sum(cosines) / len(cosines))
    assert result.agreement == sum(max(range(5), key=lambda i: x[i]) == max(range(5), key=lambda i: y[i])
                                   for x, y in zip(reference, logits, strict=True)) / 20  # fmt: skip
    assert (
        result.accuracy == sum(row.argmax() == label for row, label in zip(logits, labels, strict=True)) / 20
    )
    with pytest.raises(ValueError, match="cannot be compared"):
        compare(reference, logits[:3], labels, variant="int8", provider=CPU, batch_size=4)


def test_zero_rows_have_a_cosine() -> None:
    rows = np.array([[0, 0], [0, 0], [1, 0]], dtype=np.float32)
    other = np.array([[0, 0], [1, 0], [2, 0]], dtype=np.float32)
    assert cosine_similarity(rows, other).tolist() == [1.0, 0.0, 1.0]


def test_the_worst_provider_decides_and_nan_never_passes() -> None:
    reference, labels = np.eye(4, dtype=np.float32), np.arange(4)
    good = compare(reference, reference, labels, variant="fp32", provider=CPU, batch_size=1)
    bad = compare(
        reference, -reference, labels, variant="fp32", provider="CUDAExecutionProvider", batch_size=1
    )
    folded = worst([good, bad], "fp32")
    assert (folded.agreement, folded.max_abs_error, folded.min_cosine) == (0.0, 2.0, -1.0)

    broken = compare(reference, reference * np.nan, labels, variant="fp32", provider=CPU, batch_size=2)
    error = worst([good, broken], "fp32").max_abs_error
    assert math.isnan(error)
    assert not Check("error", error, "<=", 1.0, "key").passed
    assert not Check("agreement", error, ">=", 0.0, "key").passed


def test_batches_cover_every_sample_once() -> None:
    seen: list[int] = []

    def double(images: np.ndarray) -> np.ndarray:
        seen.append(len(images))
        return images.reshape(len(images), -1) * 2

    images = np.arange(10, dtype=np.float32).reshape(10, 1, 1, 1)
    assert run_in_batches(double, images, 4).ravel().tolist() == [2.0 * i for i in range(10)]
    assert seen == [4, 4, 2]


def test_speed_ratios_come_from_the_same_batch_and_the_cpu() -> None:
    def row(provider: str, variant: str, batch: int, p50_ms: float) -> Measurement:
        return Measurement(provider, variant, batch, p50_ms, p50_ms, p50_ms, 1.0, 1.0)

    rows = [
        row("PyTorch eager CPU", "pytorch", 1, 6.0),
        row(CPU, "fp32", 1, 4.0),
        row(CPU, "int8", 1, 1.0),
        row("CUDAExecutionProvider", "fp32", 1, 0.1),
        row(CPU, "fp32", 8, 10.0),
    ]
    assert parity.speed_ratios(rows) == {"int8_over_fp32": {"1": 4.0}, "fp32_over_pytorch": {"1": 1.5}}


def test_pytorch_is_measured_in_a_process_of_its_own(workspace: Path) -> None:
    backbone = {"name": "swin_v2_pico", "image_size": 16, "window_size": 2, "patch_size": 4}
    config = dataclasses.replace(load_config(paths.FINETUNE / "pretrained"), backbone=backbone)
    save_classifier(Path("pico"), build_classifier(config), config)
    rows = measure.measure_eager(Path("pico"), [2, 1], runs=2, threads=1)
    assert [(row.provider, row.variant, row.batch) for row in rows] == [
        ("PyTorch eager CPU", "pytorch", 1),
        ("PyTorch eager CPU", "pytorch", 2),
    ]
    assert all(row.p50_ms > 0 and row.images_per_s > 0 and row.peak_memory_mb > 1 for row in rows)


def test_a_failing_measurement_shows_why(workspace: Path) -> None:
    with pytest.raises(RuntimeError, match=r"(?s)measuring fp32 on .* failed:.*gone\.onnx does not exist"):
        measure.measure_variant(Path("gone.onnx"), "fp32", CPU, [1], runs=1, threads=1)


GROWING = """
import json
import numpy as np
from flows.serving import measure

def open_runner():
    weights = np.ones(60_000_000, dtype=np.uint8)
    return lambda images: int(np.ones(40_000_000, dtype=np.uint8)[-1]) + int(weights[-1]), (3, 2, 2)

measure.reset_peak()
print(json.dumps(measure.time_runner(open_runner, [1, 2], runs=2)))
"""


def test_memory_is_the_growth_of_the_peak() -> None:
    """A network that holds 60 MB, and 40 MB more for a moment, costs about 100 MB (in a fresh process, as
    always: in this one, threads of other tests come and go)."""
    answer = subprocess.run([sys.executable, "-c", GROWING], cwd=ROOT, capture_output=True, check=True)
    rows = json.loads(answer.stdout)
    assert [row["batch"] for row in rows] == [1, 2]
    assert all(90 < row["peak_memory_mb"] < 140 for row in rows)
