"""Stage `language_export`: the trained decoder as a bundle of slices that Lamina serves.

    in   artifacts/language_pretrain
    out  artifacts/language_export    the bundle (docs/lamina.md), checked against the model: parity.json
         artifacts/metrics/language_export.json

The invariant: equal weights and versions give equal bytes, so that DVC and the registry recognise an
unchanged model. Slices that do not compute what the model computes fail the stage (exit code 10).
"""

from __future__ import annotations

import os

from flows import files, paths
from flows.decoders import load_decoder
from flows.errors import DataError
from flows.params import Params
from flows.stage import Stage, run_stage
from flows.text.corpus import load_manifest


def run(params: Params, stage: Stage) -> None:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    from flows.serving.lamina.slices import bundle as bundles
    from flows.serving.lamina.slices.export import export_bundle

    settings, source = params.language_export, paths.LANGUAGE_PRETRAIN
    _, record = load_decoder(source)
    manifest = load_manifest(paths.TEXT)
    if record.data_digest != manifest.digest:
        raise DataError(f"{source} was trained on another state of the text; run language_pretrain again")
    bundle = export_bundle(
        source,
        paths.LANGUAGE_EXPORT,
        name=params.registered_language_model(manifest.name),
        opset=settings.opset,
        tolerance=settings.max_logit_error,
        force=True,
        say=lambda line: print(line, flush=True),
    )
    parity = bundle.manifest.parity
    metrics = {
        "bytes": sum(path.stat().st_size for path in bundle.folder.iterdir()),
        "graphs": len(bundle.manifest.graphs),
        "steps": len(bundle.manifest.steps),
        "context_bytes_per_row": max(step.context_bytes_per_row for step in bundle.manifest.steps),
        "max_logit_error": parity.max_abs_error,
        "argmax_agreement": parity.argmax_agreement,
    }
    files.write_json(paths.METRICS / "language_export.json", metrics)
    stage.run.log_metrics(metrics)
    for name in (bundles.MANIFEST, bundles.PARITY):
        stage.run.log_artifact(bundle.folder / name)


def main(argv: list[str] | None = None) -> int:
    return run_stage("language_export", run, argv)


if __name__ == "__main__":
    raise SystemExit(main())
