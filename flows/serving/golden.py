"""Golden requests: a few encoded images in the registered folder, with the answers recorded at registration.

    golden/golden.json    name, file, sha256, class and confidence of each
    golden/000.bin …      the image files as a client would send them

Whoever opens the folder later (the promotion gate, a server that switches versions) sends them and compares:
the model that answers must be the one that was registered, on whatever machine and runtime it runs now. The
invariant: nothing is compared before the bytes are those that were recorded.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flows import files
from flows.errors import DataError

FORMAT = 1
FOLDER = "golden"
INDEX = "golden.json"


@dataclass(frozen=True)
class Golden:
    """One request and the answer of variant fp32 at registration."""

    name: str  # the image's key in the data set
    data: bytes  # an encoded image file
    index: int  # of the most probable class
    confidence: float  # its softmax probability, 0–1


def write_golden(
    folder: Path, images: Sequence[tuple[str, bytes]], classify: Callable[[bytes], tuple[int, float]]
) -> None:
    """Answer `images` (name, encoded file) with `classify`; requests and answers replace `folder`/golden.

    Args:
        classify: gives the most probable class and its confidence; the session code that serves.

    Raises:
        ValueError: no images, or a confidence that is not a probability.
    """
    if not images:
        raise ValueError("golden requests need at least one image")
    with files.replace_folder(folder / FOLDER) as target:
        requests = []
        for number, (name, data) in enumerate(images):
            index, confidence = classify(data)
            if not 0.0 <= confidence <= 1.0:  # also false for NaN
                raise ValueError(f"the confidence for {name} is {confidence}, not a probability")
            file = f"{number:03d}.bin"
            files.write_bytes(target / file, data)
            requests.append(
                {
                    "name": name,
                    "file": file,
                    "sha256": hashlib.sha256(data).hexdigest(),
                    "index": int(index),
                    "confidence": float(confidence),
                }
            )
        files.write_json(target / INDEX, {"format": FORMAT, "requests": requests})


def read_golden(folder: Path) -> list[Golden]:
    """The requests in `folder`/golden; empty when the folder was registered without any.

    Raises:
        DataError: an unreadable index, or a file that is missing or was changed.
    """
    index = folder / FOLDER / INDEX
    if not (folder / FOLDER).exists():
        return []
    try:
        content = files.read_json(index)
        if content["format"] != FORMAT:
            raise ValueError(f"format {content['format']!r} is not {FORMAT}, the one this version reads")
        return [_read(folder / FOLDER, entry) for entry in content["requests"]]
    except FileNotFoundError:
        raise DataError(f"{index} is missing; download the model again") from None
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        reason = f"key {error} is missing" if isinstance(error, KeyError) else str(error)
        raise DataError(f"{index} is not usable: {reason}; download the model again") from None


def _read(folder: Path, entry: dict[str, Any]) -> Golden:
    file, confidence = entry["file"], float(entry["confidence"])
    if Path(file).name != file:
        raise DataError(f"{folder / INDEX} names a file outside its folder: {file!r}")
    if not 0.0 <= confidence <= 1.0:
        raise ValueError(f"the confidence of {entry['name']} is {confidence}, not a probability")
    path = folder / file
    if not path.is_file():
        raise DataError(f"{path} is missing although {INDEX} lists it; download the model again")
    data = path.read_bytes()
    if hashlib.sha256(data).hexdigest() != entry["sha256"]:
        raise DataError(f"{path} was changed after registration; download the model again")
    return Golden(str(entry["name"]), data, int(entry["index"]), confidence)


def compare(golden: Golden, index: int, confidence: float, tolerance: float) -> str | None:
    """None if an answer is the recorded one, else the reason as one sentence.

    Args:
        tolerance: largest absolute difference of the confidences, 0–1.
    """
    if index != golden.index:
        recorded = f"{golden.index} ({golden.confidence:.4f})"
        return f"{golden.name}: class {index} ({confidence:.4f}) instead of {recorded}"
    difference = abs(confidence - golden.confidence)
    if not math.isfinite(difference) or difference > tolerance:
        return (
            f"{golden.name}: confidence {confidence:.4f} instead of {golden.confidence:.4f}, "
            f"more than {tolerance:g} apart"
        )
    return None
