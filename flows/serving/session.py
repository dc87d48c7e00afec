"""The only place that makes ONNX Runtime sessions.

Parity, benchmarks and servers all run models through here, so that what was checked is what is served: same
providers, same threads, same options. A session never runs elsewhere than asked: ONNX Runtime itself only
warns when a GPU provider cannot be loaded and continues on the CPU.
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from flows.errors import ConfigError, DataError, ResourceError

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # read at the import: also when DVC alone runs a stage
import onnxruntime

CPU = "CPUExecutionProvider"
PREFERENCE = ("CUDAExecutionProvider", "ROCMExecutionProvider", "CoreMLExecutionProvider", CPU)
"""What `auto` considers, best first. Not TensorRT and OpenVINO: they compile or approximate, so ask for them
by name."""
PROVIDER_OPTIONS: dict[str, dict[str, str]] = {
    "CUDAExecutionProvider": {"use_tf32": "0"},  # 10-bit mantissas would break the fp32 parity gate
}
LOGITS, FEATURES = "logits", "features"
"""Names of the outputs: (n, classes), and the embedding that the head reads, (n, C). Exports made before
there was `features` have only the first."""
CGROUP = Path("/sys/fs/cgroup")


class Session:
    """One loaded network. Safe to share between threads; made by `open_session`."""

    def __init__(self, runtime: onnxruntime.InferenceSession, path: Path, threads: int) -> None:
        self._runtime = runtime
        self.path = path
        self.threads = threads
        self.providers: tuple[str, ...] = tuple(runtime.get_providers())
        image_input = runtime.get_inputs()[0]
        self.input_name: str = image_input.name
        self.output_names: tuple[str, ...] = tuple(output.name for output in runtime.get_outputs())
        self.image_shape: tuple[int, ...] = tuple(image_input.shape[1:])

    @property
    def provider(self) -> str:
        """The one that was asked for; ONNX Runtime appends the CPU for operators it lacks."""
        return self.providers[0]

    def run(self, images: NDArray[np.float32]) -> NDArray[np.float32]:
        """Logits, float32 (n, classes), of preprocessed images, float32 (n, 3, S, S).

        Raises:
            ValueError: another shape or type.
        """
        return self._run([LOGITS], images)[0]

    def run_all(self, images: NDArray[np.float32]) -> dict[str, NDArray[np.float32]]:
        """Every output by its name, for the same images as `run`; logits are those that `run` gives."""
        return dict(zip(self.output_names, self._run(list(self.output_names), images), strict=True))

    def _run(self, names: list[str], images: NDArray[np.float32]) -> list[NDArray[np.float32]]:
        if (
            images.dtype != np.float32
            or images.ndim != 4
            or images.shape[1:] != self.image_shape
            or not len(images)
        ):
            raise ValueError(f"expected float32 (n, {self.image_shape}), got {images.dtype} {images.shape}")
        answers = self._runtime.run(names, {self.input_name: np.ascontiguousarray(images)})
        return [np.asarray(answer, dtype=np.float32) for answer in answers]

    def warm_up(self, batch_sizes: Iterable[int]) -> None:
        """Run each batch size once, so that the first request does not pay for memory plans and kernels."""
        for size in batch_sizes:
            self.run(np.zeros((size, *self.image_shape), dtype=np.float32))


def open_session(
    path: Path, providers: Literal["auto"] | Sequence[str] = "auto", threads: int = 0
) -> Session:
    """Load `path` and verify that it runs on the providers asked for.

    Args:
        providers: names in order of preference; "auto" is the best one that works.
        threads: intra-op threads; 0 means `available_threads()`.

    Raises:
        ConfigError: a provider that does not exist.
        ResourceError: a provider that is not available here.
        DataError: the file is missing or not a usable model.
    """
    threads = threads or available_threads()
    if providers == "auto":
        return _open_best(path, threads)
    return _open(path, list(providers), threads)


def working_providers(path: Path) -> list[str]:
    """The providers of `PREFERENCE` on which the model at `path` really opens, best first."""
    found = []
    for provider in _candidates():
        try:
            _open(path, [provider], threads=1)
        except ResourceError:
            continue
        found.append(provider)
    return found


def available_threads() -> int:
    """Cores that this process may use: its CPU affinity, cut by the container's quota (rounded down, at least
    1)."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, math.floor(min(cores, _cgroup_cores())))


def _candidates() -> list[str]:
    present = onnxruntime.get_available_providers()
    return [provider for provider in PREFERENCE if provider in present]


def _open_best(path: Path, threads: int) -> Session:
    problem: ResourceError | None = None
    for provider in _candidates():
        try:
            return _open(path, [provider], threads)
        except ResourceError as error:
            problem = error
    raise problem or ResourceError("ONNX Runtime has no execution provider here; install onnxruntime again")


def _open(path: Path, providers: list[str], threads: int) -> Session:
    runtime = open_runtime(path, providers, threads)
    if LOGITS not in (names := [output.name for output in runtime.get_outputs()]):
        raise DataError(f"{path} has no output {LOGITS!r}, only {', '.join(names)}; export the model again")
    return Session(runtime, path, threads)


def open_runtime(
    path: Path,
    providers: list[str],
    threads: int,
    initializers: Mapping[str, NDArray[Any]] | None = None,
    spin: bool = True,
) -> onnxruntime.InferenceSession:
    """The bare session of a graph with any inputs and outputs, on exactly the providers asked for.

    Args:
        initializers: values for weights that the file keeps outside. They are not copied.
        spin: idle threads wait for work without sleeping. False where other processes need the cores.

    Raises:
        ConfigError, ResourceError, DataError: as `open_session`.
    """
    _check_known(providers)
    present = onnxruntime.get_available_providers()
    if missing := [provider for provider in providers if provider not in present]:
        raise ResourceError(
            f"asked for execution provider {missing[0]}, but this ONNX Runtime only has "
            f"{', '.join(present)}; install the matching onnxruntime package or change `providers`"
        )
    if not path.is_file():
        raise DataError(f"{path} does not exist")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "1" if spin else "0")
    options.log_severity_level = 4  # its warnings come back as errors below
    if initializers:
        values = [onnxruntime.OrtValue.ortvalue_from_numpy(value) for value in initializers.values()]
        options.add_external_initializers(list(initializers), values)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            runtime = onnxruntime.InferenceSession(
                path,
                options,
                providers=[(provider, PROVIDER_OPTIONS.get(provider, {})) for provider in providers],
            )
    except Exception as error:  # the runtime's exception types share no base class
        raise DataError(f"ONNX Runtime cannot load {path}: {' '.join(str(error).split())[:300]}") from None
    granted = runtime.get_providers()
    if granted != providers and granted != [*providers, CPU]:
        raise ResourceError(
            f"asked for {', '.join(providers)}, got {', '.join(granted)}: the provider's libraries or device "
            "cannot be used here; repair the installation or change `providers`"
        )
    return runtime


def _check_known(providers: list[str]) -> None:
    known = onnxruntime.get_all_providers()
    if not providers:
        raise ConfigError("`providers` is empty; name at least one execution provider or use auto")
    for provider in providers:
        if provider not in known:
            raise ConfigError(
                f"unknown execution provider {provider!r}; ONNX Runtime knows {', '.join(known)}"
            )


def _cgroup_cores(root: Path = CGROUP) -> float:
    """CPU quota of the container in cores; infinite without one. Reads cgroup v2, then v1."""
    try:
        quota, period = (root / "cpu.max").read_text().split()
        return math.inf if quota == "max" else int(quota) / int(period)
    except (OSError, ValueError):
        pass
    try:
        quota_us = int((root / "cpu" / "cpu.cfs_quota_us").read_text())
        period_us = int((root / "cpu" / "cpu.cfs_period_us").read_text())
        return quota_us / period_us if quota_us > 0 else math.inf
    except (OSError, ValueError, ZeroDivisionError):
        return math.inf
