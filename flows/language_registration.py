"""From an exported bundle to a registered version with the alias `challenger`: what `flows.registration` is
for classifiers.

The registered folder is the bundle and beside it golden prompts, training.json (which text it was trained on)
and `dvc.lock` with `receipts.json`. The tag `onnx.digest` holds the sha256 of the bundle's manifest, which
lists the sha256 of every other file.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from flows import decoders, files, golden_prompts, paths, registry
from flows.dvc_hash import file_md5, tree_md5
from flows.errors import DataError
from flows.params import Params
from flows.registration import LOCK, PARITY, RECEIPTS, SEALED, origin_tags, read_receipts
from flows.registry import CHALLENGER, CHAMPION, Version
from flows.serving.lamina.slices.bundle import MANIFEST, Bundle, read_bundle
from flows.text.corpus import load_manifest, load_split
from flows.tracking import MlflowRun

KIND = "model.kind"
LANGUAGE = "language"
LANGUAGE_SEALED = {**SEALED, "training.sha256": decoders.TRAINING}
"""Tags that hold the sha256 of files which the bundle's manifest does not list."""


def is_language_model(version: Version) -> bool:
    return version.tags.get(KIND) == LANGUAGE


def register_bundle(params: Params, root: Path, run: MlflowRun) -> Version:
    """Register `root`/artifacts/language_export; one registered already is found by its digest.

    Raises:
        DataError: an output in the workspace is missing, damaged, or of another state of the text.
    """
    manifest = load_manifest(root / paths.TEXT)
    name = params.registered_language_model(manifest.name)
    digest = files.sha256_file(root / paths.LANGUAGE_EXPORT / MANIFEST)
    version = registry.find_version(params, name, digest)
    if version is None or not LANGUAGE_SEALED.keys() <= version.tags.keys():
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary) / "bundle"
            bundle = fill_folder(params, root, folder)
            tags = {
                KIND: LANGUAGE,
                "onnx.digest": digest,
                "onnx.opset": str(bundle.manifest.opset),
                **origin_tags(
                    root,
                    export=paths.LANGUAGE_EXPORT,
                    data=paths.TEXT,
                    trained_by="language_pretrain",
                ),
                **{tag: files.sha256_file(folder / file) for tag, file in LANGUAGE_SEALED.items()},
            }
            version = registry.register_bundle(params, run, name, folder, tags)
    registry.tag_version(params, version, measurement_tags(params, root))
    if CHAMPION not in version.aliases:
        registry.set_alias(params, name, CHALLENGER, version.version)
    return registry.version_of(params, name, version.version)


def fill_folder(params: Params, root: Path, folder: Path) -> Bundle:
    """Copy what is registered into the new `folder`."""
    shutil.copytree(root / paths.LANGUAGE_EXPORT, folder)
    shutil.copy(root / paths.LANGUAGE_PRETRAIN / decoders.TRAINING, folder / decoders.TRAINING)
    shutil.copy(root / "dvc.lock", folder / LOCK)
    files.write_json(folder / RECEIPTS, read_receipts(root))
    bundle = read_bundle(folder)
    decoder, record = decoders.load_decoder(root / paths.LANGUAGE_PRETRAIN)
    manifest = load_manifest(root / paths.TEXT)
    if record.data_digest != manifest.digest:
        raise DataError(
            f"{root / paths.LANGUAGE_PRETRAIN} was trained on another state of the text; run the pipeline "
            "again"
        )
    split = load_split(root / paths.TEXT, manifest, params.language_evaluate.split)
    limits = params.language_promotion
    prompts = golden_prompts.make_golden(decoder, split, limits.golden_prompts, limits.golden_tokens)
    golden_prompts.write_golden(folder, prompts)
    return bundle


def measurement_tags(params: Params, root: Path) -> dict[str, str]:
    """Bits per byte found by language_evaluate and the text they are of; the gates measure again."""
    found = files.read_json(root / paths.METRICS / "language_evaluate.json")["bits_per_byte"]
    return {
        "metric.bits_per_byte": repr(float(found)),
        "metric.data_digest": load_manifest(root / paths.TEXT).digest,
        "metric.split": params.language_evaluate.split,
    }


def bundle_md5(bundle: Bundle) -> str:
    """What dvc.lock holds for the export stage's folder, from the registered files."""
    manifest = bundle.manifest
    listed = [entry.file for entry in (*manifest.graphs, *manifest.weights, *manifest.tokenizer)]
    names = [MANIFEST, PARITY, *listed]
    return tree_md5({name: file_md5(bundle.folder / name) for name in names})
