"""What served images should look like: `reference.safetensors` in the exported folder.

The export stage describes validation images with both variants of the network; the monitor compares what is
served with the same variant's records, because int8 answers a little differently from fp32. Validation
images, not training images: on those the network is surer of itself than on any image it has not seen, and
clean traffic would look like a shift.

The file holds numbers only (no pickles), its bytes depend on nothing but the images, the weights and the
params, and the package's manifest knows its hash.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from flows import files
from flows.errors import DataError
from flows.serving.session import FEATURES, LOGITS, Session
from flows.serving.statistics import Projection, Records, describe, from_tensors, is_finite, to_tensors

FORMAT = 1
FILE = "reference.safetensors"
BATCH = 64


@dataclass(frozen=True)
class Reference:
    """The content of `reference.safetensors`."""

    data_digest: str  # digest of the data manifest the images came from
    split: str
    projection: Projection
    records: Mapping[str, Records]  # by variant


def describe_images(session: Session, images: NDArray[np.float32], projection: Projection) -> Records:
    """Records of preprocessed images (n, 3, S, S), through the session that serves."""
    matrix = projection.matrix()
    parts = []
    for start in range(0, len(images), BATCH):
        batch = images[start : start + BATCH]
        answers = session.run_all(batch)
        parts.append(describe(batch, answers[LOGITS], answers[FEATURES], matrix))
    return Records.concatenate(parts)


def write_reference(path: Path, reference: Reference) -> None:
    """
    Raises:
        DataError: the network's answers to the reference images are not finite.
    """
    tensors: dict[str, NDArray[np.generic]] = {}
    for variant, records in reference.records.items():
        if not is_finite(records):
            raise DataError(f"variant {variant} gives answers that are not finite; train the model again")
        tensors |= to_tensors(records, variant)
    head = {
        "format": FORMAT,
        "data_digest": reference.data_digest,
        "split": reference.split,
        "projection": asdict(reference.projection),
        "variants": sorted(reference.records),
    }
    # one entry, because safetensors writes several in random order
    files.write_bytes(path, save(tensors, {"trunkline": json.dumps(head, sort_keys=True)}))


def read_reference(path: Path) -> Reference:
    """
    Raises:
        DataError: missing, damaged or of another format.
    """
    try:
        with safe_open(path, framework="numpy") as file:
            head: dict[str, Any] = json.loads((file.metadata() or {})["trunkline"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # not a mapping
        if head["format"] != FORMAT:
            raise ValueError(f"format {head['format']!r} is not {FORMAT}")
        return Reference(
            data_digest=head["data_digest"],
            split=head["split"],
            projection=Projection(**head["projection"]),
            records={variant: from_tensors(tensors, variant) for variant in head["variants"]},
        )
    except FileNotFoundError:
        raise DataError(f"{path} does not exist; export the model again") from None
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise DataError(f"{path} is damaged: {error}; export or download the model again") from None
