"""The model registry of MLflow: versions, their tags, the aliases that say what is live.

Aliases only (`challenger`, `champion`, `previous`), never registry stages. Who moves them and when is
`flows.aliases`'s business.
"""

from __future__ import annotations

import importlib.metadata
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flows.params import Params
from flows.tracking import Run, client

CHALLENGER, CHAMPION, PREVIOUS = "challenger", "champion", "previous"


@dataclass(frozen=True)
class Version:
    """One version of a registered model."""

    name: str
    version: str
    aliases: tuple[str, ...]
    tags: Mapping[str, str]
    source: str


def _version(found: Any) -> Version:
    return Version(
        found.name, str(found.version), tuple(sorted(found.aliases)), dict(found.tags), found.source
    )


def find_version(params: Params, name: str, digest: str) -> Version | None:
    """The newest version of model `name` that holds the export with this content digest."""
    found = client(params).search_model_versions(f"name = '{name}' and tags.`onnx.digest` = '{digest}'")
    newest = max(found, key=lambda version: int(version.version), default=None)
    return version_of(params, name, str(newest.version)) if newest else None


def version_of(params: Params, name: str, version: str) -> Version:
    return _version(client(params).get_model_version(name, version))


def versions(params: Params, name: str) -> list[Version]:
    """All versions of model `name`, oldest first; empty when there is no such model."""
    found = client(params).search_model_versions(f"name = '{name}'")
    numbers = sorted(int(version.version) for version in found)
    # one by one: a search does not fill in the aliases
    return [version_of(params, name, str(number)) for number in numbers]


def model_names(params: Params) -> list[str]:
    return sorted(model.name for model in client(params).search_registered_models())


def alias(params: Params, name: str, alias_name: str) -> Version | None:
    """The version that `alias_name` points at, or None."""
    from mlflow.exceptions import MlflowException

    try:
        return _version(client(params).get_model_version_by_alias(name, alias_name))
    except MlflowException as error:
        if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            return None
        raise


def set_alias(params: Params, name: str, alias_name: str, version: str) -> None:
    client(params).set_registered_model_alias(name, alias_name, version)


def delete_alias(params: Params, name: str, alias_name: str) -> None:
    client(params).delete_registered_model_alias(name, alias_name)


def model_tag(params: Params, name: str, key: str) -> str | None:
    """A tag of the model itself, not of one of its versions; None when there is no such tag or model."""
    from mlflow.exceptions import MlflowException

    try:
        tags: Mapping[str, str] = client(params).get_registered_model(name).tags
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return None
        raise
    return tags.get(key)


def set_model_tag(params: Params, name: str, key: str, value: str) -> None:
    client(params).set_registered_model_tag(name, key, value)


def delete_model_tag(params: Params, name: str, key: str) -> None:
    client(params).delete_registered_model_tag(name, key)


def tag_version(params: Params, version: Version, tags: Mapping[str, str]) -> None:
    for key, value in tags.items():
        client(params).set_model_version_tag(version.name, version.version, key, value)


def register_folder(
    params: Params, run: Run, name: str, folder: Path, example: Any, tags: Mapping[str, str]
) -> Version:
    """Store the exported folder, byte for byte, as a new version of `name` with signature and input example.

    `folder` holds model.onnx; `example` is the input array of one real sample, float32 (1, 3, S, S). MLflow's
    own `log_model` would rewrite the weights under another file name, so its MLmodel is made first and our
    files replace its.
    """
    import mlflow.onnx
    import numpy as np
    import onnx
    from mlflow.models.signature import ModelSignature
    from mlflow.types import Schema, TensorSpec

    client(params)  # tells MLflow where the store is
    model = onnx.load(folder / "model.onnx")
    images = model.graph.input[0].name
    widths = {output.name: output.type.tensor_type.shape.dim[-1].dim_value for output in model.graph.output}
    float32 = np.dtype("float32")
    signature = ModelSignature(
        inputs=Schema([TensorSpec(float32, (-1, *example.shape[1:]), images)]),
        outputs=Schema([TensorSpec(float32, (-1, width), name) for name, width in widths.items()]),
    )
    with tempfile.TemporaryDirectory() as temporary:
        package = Path(temporary) / "model"
        mlflow.onnx.save_model(
            model,
            str(package),
            signature=signature,
            input_example={images: example},
            onnx_execution_providers=["CPUExecutionProvider"],
            pip_requirements=[f"onnxruntime=={importlib.metadata.version('onnxruntime')}", "numpy"],
        )
        for stray in package.glob("model.onnx*"):
            stray.unlink()
        shutil.copytree(folder, package, dirs_exist_ok=True)
        return _store(params, run, name, package, tags, "onnx")


def register_bundle(params: Params, run: Run, name: str, folder: Path, tags: Mapping[str, str]) -> Version:
    """Store a language model's bundle, byte for byte, as a new version of `name`. MLflow has no flavour for
    it: the version is a folder with a description, which Lamina opens."""
    from mlflow.models import Model

    with tempfile.TemporaryDirectory() as temporary:
        package = Path(temporary) / "model"
        shutil.copytree(folder, package)
        Model(metadata={"served_by": "trunkline serve language"}).save(str(package / "MLmodel"))
        return _store(params, run, name, package, tags, "lamina")


def _store(params: Params, run: Run, name: str, package: Path, tags: Mapping[str, str], kind: str) -> Version:
    """Make the folder `package`, which holds MLflow's MLmodel, a new version of `name`."""
    from mlflow.exceptions import MlflowException

    connection = client(params)
    experiment = connection.get_run(run.run_id).info.experiment_id
    logged = connection.create_logged_model(
        experiment, name=name, source_run_id=run.run_id, tags=dict(tags), model_type=kind
    )
    connection.log_model_artifacts(logged.model_id, str(package))
    connection.finalize_logged_model(logged.model_id, "READY")
    try:
        connection.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    created = connection.create_model_version(
        name, source=logged.model_uri, run_id=run.run_id, model_id=logged.model_id, tags=dict(tags)
    )
    return _version(created)


def download_version(params: Params, version: Version, folder: Path) -> None:
    """Copy the registered folder of `version` into the existing `folder`."""
    import mlflow.artifacts

    client(params)
    mlflow.artifacts.download_artifacts(version.source, dst_path=str(folder))
