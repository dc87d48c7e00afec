"""Stage `export`: the finetuned classifier as a package of ONNX files that servers can open without PyTorch.

    in   artifacts/finetune/pretrained    weights, classes, preprocessing
         artifacts/data                   training images that calibrate int8
                                          validation images that say what served ones should look like
    out  artifacts/export                 model.onnx, model_int8.onnx, reference.safetensors, manifest.json
         artifacts/metrics/export.json    sizes

The invariant: equal weights give equal bytes, so that DVC and the registry recognise an unchanged model.
Nothing here depends on the time, the machine's paths or the run.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from flows import files, paths
from flows.classifiers import WEIGHTS, ClassifierConfig, load_classifier
from flows.data import manifest as manifests
from flows.errors import DataError
from flows.exporting import export_onnx, write_onnx
from flows.params import Params
from flows.samples import draw_samples
from flows.serving.package import (
    MANIFEST,
    HashedFile,
    Manifest,
    TensorSpec,
    Variant,
    describe_variant,
    metadata,
)
from flows.serving.quantization import quantize
from flows.serving.reference import FILE as REFERENCE
from flows.serving.reference import Reference, describe_images, write_reference
from flows.serving.session import CPU, FEATURES, LOGITS, open_session
from flows.serving.statistics import Projection
from flows.stage import Stage, run_stage
from models.classification import Classifier, WithFeatures

CELL = "pretrained"
"""The cell of finetune that is exported; `scratch` is only the control."""
FILES = {"fp32": "model.onnx", "int8": "model_int8.onnx"}


def run(params: Params, stage: Stage) -> None:
    folder = paths.FINETUNE / CELL
    model, config = load_classifier(folder)
    data = manifests.load(paths.DATA)
    if data.digest != config.data_digest:
        raise DataError(
            f"{folder} was trained on other data than {paths.DATA} holds; run the finetune stage again"
        )
    draw = partial(
        draw_samples,
        paths.DATA,
        seed=params.seed,
        preprocessing=config.preprocessing,
        max_pixels=params.ingest.max_pixels,
    )
    calibration, _ = draw("train", params.export.int8_calibration_images)
    held_out, _ = draw("val", params.export.reference_images)

    with files.replace_folder(paths.EXPORT) as target:
        variants = write_variants(model, config, calibration, target, params)
        projection = Projection(params.seed, model.head.in_features, params.export.embedding_dims)
        records = {
            # the CPU on every machine: another provider would give other bytes
            name: describe_images(open_session(target / file, [CPU]), held_out, projection)
            for name, file in FILES.items()
        }
        write_reference(target / REFERENCE, Reference(config.data_digest, "val", projection, records))
        manifest = Manifest(
            name=params.registered_model(data.name),
            task="classification",
            opset=params.export.opset,
            inputs=(TensorSpec("images", "FP32", (-1, 3, *2 * [config.preprocessing.image_size])),),
            outputs=(
                TensorSpec(LOGITS, "FP32", (-1, len(config.classes))),
                TensorSpec(FEATURES, "FP32", (-1, model.head.in_features)),
            ),
            max_batch=params.export.dynamic_batch_max,
            preprocessing=config.preprocessing,
            labels=config.classes,
            variants=variants,
            reference=HashedFile(REFERENCE, files.sha256_file(target / REFERENCE)),
            data_digest=config.data_digest,
            source={
                "checkpoint_sha256": files.sha256_file(folder / WEIGHTS),
                "start_sha256": config.start_sha256,
                "backbone": dict(config.backbone),
            },
        )
        files.write_json(target / MANIFEST, manifest.to_dict())

    metrics = export_metrics(variants, parameters=sum(value.numel() for value in model.parameters()))
    files.write_json(paths.METRICS / "export.json", metrics)
    stage.run.log_metrics(metrics)
    stage.run.log_artifact(paths.EXPORT / MANIFEST)
    print(
        f"exported {manifest.name}: fp32 {metrics['fp32_mb']:.2f} MB, int8 {metrics['int8_mb']:.2f} MB "
        f"({metrics['int8_size_ratio']:.0%}), opset {manifest.opset}, {len(held_out)} reference images"
    )


def write_variants(
    model: Classifier,
    config: ClassifierConfig,
    calibration: NDArray[np.float32],
    target: Path,
    params: Params,
) -> dict[str, Variant]:
    """Write both ONNX files into `target` and describe them."""
    annotations = metadata(config.preprocessing, config.classes)
    export_onnx(
        WithFeatures(model),
        target / FILES["fp32"],
        image_size=config.preprocessing.image_size,
        opset=params.export.opset,
        max_batch=params.export.dynamic_batch_max,
        metadata=annotations,
        outputs=(LOGITS, FEATURES),
    )
    write_onnx(quantize(target / FILES["fp32"], calibration), target / FILES["int8"], annotations)
    return {name: describe_variant(target / file) for name, file in FILES.items()}


def export_metrics(variants: dict[str, Variant], parameters: int) -> dict[str, float]:
    fp32, int8 = variants["fp32"], variants["int8"]
    return {
        "parameters": parameters,
        "fp32_mb": round(fp32.bytes / 1e6, 4),
        "int8_mb": round(int8.bytes / 1e6, 4),
        "int8_size_ratio": round(int8.bytes / fp32.bytes, 4),
        "fp32_nodes": fp32.nodes,
        "int8_nodes": int8.nodes,
    }


def main(argv: list[str] | None = None) -> int:
    return run_stage("export", run, argv)


if __name__ == "__main__":
    raise SystemExit(main())
