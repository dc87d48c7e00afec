"""A loaded model: verified files, an open session, and what its answers have cost so far.

`load_model` is the only way from a folder to something that answers, at the start of a server and at each
switch to a new version: verify, open, warm up, replay the golden requests. Whatever fails there raises, and
nothing has been changed.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from flows.errors import DataError
from flows.imaging import ImageError, decode, preprocess
from flows.params import Serve
from flows.placement import pick, read_placement
from flows.serving.golden import Golden, compare, read_golden
from flows.serving.package import Manifest, ModelPackage, TensorSpec
from flows.serving.session import LOGITS, Session, available_threads, open_session, working_providers


@dataclass(frozen=True)
class ServedModel:
    """Which model of the registry the package is."""

    name: str
    version: str
    variant: str  # fp32 | int8
    git_commit: str  # of the run that trained it


@dataclass(frozen=True)
class Release:
    """A version that can be loaded: a folder, and what the registry says about it."""

    folder: Path
    version: str
    git_commit: str
    name: str | None = None  # of the registered model; None: the package's own
    digest: str | None = None  # content digest that variant fp32 must have


@dataclass
class Counts:
    """Totals of one model since it was loaded, in the units of the protocol's statistics extension."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    images: int = 0
    batches: int = 0
    success: int = 0  # requests
    failures: int = 0
    last_inference_ms: int = 0  # Unix time
    queue_ns: int = 0
    input_ns: int = 0  # parsing and decoding
    infer_ns: int = 0
    by_batch_size: dict[int, tuple[int, int]] = field(default_factory=dict)  # images: (batches, ns)

    def add_batch(self, images: int, seconds: float) -> None:
        with self.lock:
            self.images += images
            self.batches += 1
            self.last_inference_ms = int(time.time() * 1e3)
            batches, before_ns = self.by_batch_size.get(images, (0, 0))
            self.by_batch_size[images] = (batches + 1, before_ns + int(seconds * 1e9))

    def add_request(self, input_s: float, queue_s: float, infer_s: float) -> None:
        with self.lock:
            self.success += 1
            self.input_ns += int(input_s * 1e9)
            self.queue_ns += int(queue_s * 1e9)
            self.infer_ns += int(infer_s * 1e9)

    def add_failure(self) -> None:
        with self.lock:
            self.failures += 1


class LoadedModel:
    """A model that answers. Requests hold on to the one they were prepared for until they are answered."""

    def __init__(
        self,
        package: ModelPackage,
        session: Session,
        info: ServedModel,
        *,
        max_batch: int,
        max_wait_ms: float,
        placement: Mapping[str, Any] | None = None,
    ) -> None:
        self.manifest: Manifest = package.manifest
        self.image: TensorSpec = self.manifest.inputs[0]
        self.logits: TensorSpec = package.output(LOGITS)
        self.digest = package.variant(info.variant).digest
        self.session = session
        self.info = info
        self.max_batch = min(max_batch, self.manifest.max_batch)
        self.max_wait_s = max_wait_ms / 1e3
        self.placement = placement
        self.loaded = time.time()
        self.counts = Counts()

    def run(self, images: NDArray[np.float32]) -> dict[str, NDArray[np.float32]]:
        return self.session.run_all(images)

    def identity(self) -> dict[str, str]:
        return {
            "name": self.info.name,
            "version": self.info.version,
            "digest": self.digest,
            "variant": self.info.variant,
        }


def load_model(release: Release, settings: Serve, max_pixels: int) -> LoadedModel:
    """Everything between a folder and its first answer.

    Raises:
        DataError: the package is damaged, is not the one that was asked for, or answers its golden requests
            otherwise than was recorded.
        ResourceError: an execution provider is missing.
    """
    package = ModelPackage.open(release.folder, digest=release.digest)
    plan = plan_for(release.folder, package, settings)
    variant = plan.variant
    session = open_session(package.path(variant), plan.providers, plan.threads)
    manifest = package.manifest
    if session.image_shape != manifest.inputs[0].shape[1:]:
        raise DataError(f"{session.path} takes images {session.image_shape}, its manifest says otherwise")
    model = LoadedModel(
        package,
        session,
        ServedModel(release.name or manifest.name, release.version, variant, release.git_commit),
        max_batch=plan.max_batch,
        max_wait_ms=plan.max_wait_ms,
        placement=plan.placement,
    )
    session.warm_up(sorted({1, model.max_batch}))
    replay_golden(model, read_golden(release.folder), settings, max_pixels)
    return model


@dataclass(frozen=True)
class Plan:
    """How a model is run: as params.yaml says, or its placement."""

    variant: str
    providers: Literal["auto"] | list[str]
    threads: int
    max_batch: int
    max_wait_ms: float
    placement: Mapping[str, Any] | None  # for /healthz; None: the placement was not asked


def plan_for(folder: Path, package: ModelPackage, settings: Serve) -> Plan:
    """With `serve.variant: auto` as placement.json says for the first provider that works here and was
    measured; `serve.max_batch`, `serve.threads` and the cores of this machine stay upper bounds.

    Raises:
        DataError: the placement is missing, was made for something else, or has no provider of this machine.
    """
    if settings.variant != "auto":
        plain = settings.providers, settings.threads, settings.max_batch, settings.max_wait_ms
        return Plan(settings.variant, *plain, None)
    placement = read_placement(folder)
    if placement is None:
        raise DataError(f"serve.variant is auto, but {folder} has no placement.json; name fp32 or int8")
    providers = settings.providers
    present = working_providers(package.path("fp32")) if providers == "auto" else list(providers)
    choice = pick(placement, present)
    if choice is None:
        raise DataError(
            f"placement.json has no choice for {', '.join(present)} within its limits; name fp32 or int8 in "
            "serve.variant"
        )
    return Plan(
        choice.variant,
        [choice.provider],
        min(settings.threads or choice.threads, choice.threads, available_threads()),
        min(settings.max_batch, choice.max_batch),
        choice.max_wait_ms,
        {"measured_on": placement["hardware"]["processor"], "table_sha256": placement["table_sha256"]},
    )


def replay_golden(model: LoadedModel, golden: list[Golden], settings: Serve, max_pixels: int) -> None:
    """Answer the golden requests and compare with what was recorded at registration, by variant fp32.

    fp32 has to agree in every class and confidence. int8 is another network: of its classes the fraction
    `serve.golden_int8_agreement` has to agree.

    Raises:
        DataError: they do not agree; the message names the first that differs.
    """
    problems = []
    for request in golden:
        try:
            image = preprocess(decode(request.data, max_pixels=max_pixels), model.manifest.preprocessing)
        except ImageError as error:
            raise DataError(f"golden request {request.name} cannot be decoded: {error}") from None
        index, confidence = top_class(model.run(image[np.newaxis])[LOGITS][0])
        tolerance = settings.golden_tolerance if model.info.variant == "fp32" else 1.0
        if problem := compare(request, index, confidence, tolerance):
            problems.append(problem)
    allowed = 0 if model.info.variant == "fp32" else len(golden) * (1 - settings.golden_int8_agreement)
    if len(problems) > allowed:
        raise DataError(
            f"{len(problems)} of {len(golden)} golden requests are answered otherwise than at registration, "
            f"first {problems[0]}"
        )


def top_class(logits: NDArray[np.float32]) -> tuple[int, float]:
    """Most probable class and its probability, from logits (classes,)."""
    probabilities = softmax(logits)
    index = int(probabilities.argmax())
    return index, float(probabilities[index])


def softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    """(classes,) to probabilities."""
    exponentials = np.exp(logits.astype(np.float64) - logits.max())
    return np.asarray(exponentials / exponentials.sum())
