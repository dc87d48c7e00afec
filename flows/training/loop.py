"""The training loop: fetch, forward, backward, step, log, save.

The images of a step are a pure function of the step, and what is random in it besides (drop path, mixing) is
seeded by (seed, step, process), so a resumed run repeats an undisturbed one bit for bit (CPU, same number of
processes). On another number the images stay the same and sums are rounded otherwise: the losses agree up to
that, unless the task draws noise that depends on how the images are divided.
"""

from __future__ import annotations

import math
import resource
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from torch import nn

from flows.errors import ConfigError, Diverged, Interrupted
from flows.params import Training
from flows.training.checkpoints import Checkpoints
from flows.training.distributed import Processes, build_engine
from flows.training.optimizer import ParameterGroup, build_optimizer
from flows.training.schedule import learning_rate

Batch = TypeVar("Batch")
Value = TypeVar("Value")
Row = dict[str, float]


@dataclass
class Job(Generic[Batch]):
    """What is trained: the small interface between a task and the loop.

    `batches(step)` yields the micro-batches of this process from optimiser step `step` on, `accumulation` per
    step.
    `loss(model, batch)` calls the model (DeepSpeed's engine) and returns a scalar.
    `validate(model)` returns metrics; it is called on all processes, in eval mode and without gradients.
    `probe(model)`, called alike, is the loss of a fixed batch, however it is divided among processes; a
    resume checks by it what it restored.
    """

    name: str  # section of params.yaml
    model: nn.Module
    settings: Training
    seed: int
    groups: list[ParameterGroup]
    batches: Callable[[int], Iterator[Batch]]
    loss: Callable[[Any, Batch], torch.Tensor]
    validate: Callable[[Any], Row]
    probe: Callable[[Any], float]
    initialized_from: str = ""
    """Where the model's weights come from; empty means random initialisation."""
    continue_from: Path | None = None
    """A checkpoint of another run whose weights, optimiser and step are taken over."""
    label: str = ""  # shown in the log, default: the name
    unit: str = "images"  # what the speed in the log counts
    units_per_sample: int = 1  # of these in one of the settings' batch_size
    on_log: Callable[[Row, int], None] = lambda row, step: None
    stop_requested: Callable[[], bool] = lambda: False


@dataclass
class Result:
    weights: dict[str, torch.Tensor]
    curves: list[Row]
    validation: list[Row]
    device_seconds: float
    """Time in steps and validations, over all attempts and processes."""
    began: str


@dataclass
class _State:
    """All that a resume needs beside what DeepSpeed keeps."""

    step: int = 0
    logged_step: int = 0
    loss_sum: float = 0.0  # over the steps since `logged_step` and all processes
    processes: int = 1  # which it is the sum over
    curves: list[Row] = field(default_factory=list)
    validation: list[Row] = field(default_factory=list)
    device_seconds: float = 0.0


def train(job: Job[Any], processes: Processes, checkpoints: Checkpoints) -> Result:
    """Train to `job.settings.steps` and return consolidated weights and curves.

    Raises:
        ConfigError: the processes divide a step differently, or there is nothing to continue from.
        Diverged: the loss is not finite; the last checkpoint stays.
        Interrupted: `job.stop_requested` became true; a checkpoint was written.
    """
    settings = job.settings
    if len(set(processes.gather(settings.accumulation))) > 1:  # not part of what names a run
        raise ConfigError(
            f"`{job.name}.training.accumulation` is not the same on all machines; make it equal"
        )
    engine = build_engine(job.model, build_optimizer(job.model, job.groups, settings), settings, processes)
    state, began, path = _begin(job, engine, checkpoints, processes)
    progress = Progress(job.label or job.name, settings.steps, processes.is_main, job.unit)
    progress.note(began)
    # what params.yaml says counts, not what a checkpoint says (DeepSpeed's universal form says it wrongly)
    for group, optimizer_group in zip(job.groups, engine.optimizer.param_groups, strict=True):
        optimizer_group.update(betas=settings.betas, weight_decay=group.weight_decay)

    batches = job.batches(state.step)
    # The sum over processes was saved; it goes on in one of them. In double precision a sum of a few
    # single-precision numbers is exact, so that the curves do not depend on where it was split.
    loss_sum = torch.tensor(
        state.loss_sum if processes.is_main else 0.0, dtype=torch.float64, device=processes.device
    )
    total, stepping = Stopwatch(), Stopwatch()
    spent_before = state.device_seconds
    engine.train()
    while state.step < settings.steps:
        stepping.start()
        step = state.step
        for group, optimizer_group in zip(job.groups, engine.optimizer.param_groups, strict=True):
            optimizer_group["lr"] = learning_rate(step, settings) * group.lr_scale

        for micro_step in range(settings.accumulation):
            batch = next(batches)
            torch.manual_seed(_seed(job.seed, step, micro_step, processes.rank))
            loss = job.loss(engine, batch)
            engine.backward(loss)
            engine.step()
            loss_sum += loss.detach() / settings.accumulation
        state.step += 1
        is_last = state.step == settings.steps
        stepping.stop()

        if state.step % settings.log_every == 0 or is_last:
            steps = state.step - state.logged_step
            row = {
                "step": state.step,
                "train_loss": processes.sum([float(loss_sum)])[0] / processes.world_size / steps,
                "lr": learning_rate(step, settings),
                "grad_norm": _gradient_norm(engine),
                f"{job.unit}_per_s": stepping.laps
                * settings.batch_size
                * job.units_per_sample
                / max(stepping.reset(), 1e-9),
                "memory_mb": peak_memory_mb(),
            }
            _check_finite(row["train_loss"], job, step)
            state.curves.append(row)
            state.logged_step = state.step
            loss_sum.zero_()
            progress.show(row)
            job.on_log(row, state.step)

        if state.step % settings.validate_every == 0 or is_last:
            metrics = {"step": state.step, **_without_gradients(engine, job.validate)}
            state.validation.append(metrics)
            progress.show_validation(metrics)
            job.on_log(metrics, state.step)

        stop = processes.any(job.stop_requested()) and not is_last
        if stop or is_last or state.step % settings.checkpoint_every == 0:
            state.loss_sum, state.processes = processes.sum([float(loss_sum)])[0], processes.world_size
            _check_finite(state.loss_sum, job, step)
            probe = _without_gradients(engine, job.probe)
            _check_finite(probe, job, step)  # the last step's loss was that of the weights before it
            state.device_seconds = spent_before + total.elapsed() * processes.world_size
            path = checkpoints.save(engine, state.step, vars(state), probe)
        if stop:
            progress.close()
            raise Interrupted(
                f"stopped at step {state.step} of {settings.steps}; the same command continues there"
            )

    progress.close()
    assert (
        path is not None
    )  # the last step saves, and a finished run has been resumed from its last checkpoint
    weights = checkpoints.consolidated(engine, path) if processes.is_main else {}
    return Result(weights, state.curves, state.validation, state.device_seconds, began)


def _begin(
    job: Job[Any], engine: Any, checkpoints: Checkpoints, processes: Processes
) -> tuple[_State, str, Path | None]:
    """The four ways to begin, in this order: resume, continue, initialise, scratch.

    Returns:
        the state, a line about it, and the checkpoint it comes from.

    Raises:
        ConfigError: there is nothing to continue from, or it has had all steps already.
    """

    def load(path: Path) -> tuple[_State, str]:
        saved = checkpoints.load(engine, path, job.settings, lambda: _without_gradients(engine, job.probe))
        state = _State(**saved)
        if state.processes == processes.world_size:
            return state, ""
        note = f", saved by {state.processes} and now in {processes.world_size} processes"
        state.loss_sum *= processes.world_size / state.processes
        state.processes = processes.world_size
        return state, note

    if own := checkpoints.newest():
        state, note = load(own)
        return state, f"resume: step {state.step} from {own}{note}", own
    if job.continue_from is not None:
        if not (job.continue_from / "complete.json").is_file():
            raise ConfigError(
                f"`{job.name}.continue_from`: {job.continue_from} is not the folder of a whole checkpoint "
                "(step-…)"
            )
        state, note = load(job.continue_from)
        if state.step >= job.settings.steps:
            raise ConfigError(
                f"`{job.name}.continue_from`: {job.continue_from} has had {state.step} steps; "
                f"{job.name}.training.steps must be larger, found {job.settings.steps}"
            )
        return state, f"continue: step {state.step} from {job.continue_from}{note}", job.continue_from
    if job.initialized_from:
        return _State(), f"initialise: weights from {job.initialized_from}", None
    return _State(), "scratch: random weights", None


def _without_gradients(engine: Any, measure: Callable[[Any], Value]) -> Value:
    engine.eval()
    with torch.no_grad():
        value = measure(engine)
    engine.train()
    return value


def _check_finite(loss: float, job: Job[Any], step: int) -> None:
    if not math.isfinite(loss):
        raise Diverged(
            f"the loss is {loss} at step {step}; "
            f"lower {job.name}.training.lr, lengthen warmup_steps or use fp32"
        )


def _seed(seed: int, step: int, micro_step: int, rank: int) -> int:
    """Distinct for all realistic arguments; a multiplication spreads it over the generator's 64 bits."""
    return ((((seed << 20) + rank) << 32) + step * 1024 + micro_step) * 0x9E3779B97F4A7C15 % 2**63


def _gradient_norm(engine: Any) -> float:
    norm = engine.get_global_grad_norm()
    return float(norm) if norm is not None else 0.0


def peak_memory_mb() -> float:
    """Peak memory of this process: device memory on a GPU, resident memory else."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


class Stopwatch:
    """Seconds over the laps between `start` and `stop`."""

    def __init__(self) -> None:
        self.created = self.began = time.monotonic()
        self.seconds, self.laps = 0.0, 0

    def start(self) -> None:
        self.began = time.monotonic()

    def stop(self) -> None:
        self.seconds += time.monotonic() - self.began
        self.laps += 1

    def reset(self) -> float:
        seconds, self.seconds, self.laps = self.seconds, 0.0, 0
        return seconds

    def elapsed(self) -> float:
        """Since creation."""
        return time.monotonic() - self.created


class Progress:
    """One refreshed line on a terminal, plain lines elsewhere, silence on other processes."""

    def __init__(self, name: str, steps: int, is_main: bool, unit: str = "images") -> None:
        self.name, self.steps, self.enabled, self.unit = name, steps, is_main, unit
        self.is_terminal = sys.stderr.isatty()
        self.started, self.first_step = time.monotonic(), -1

    def note(self, text: str) -> None:
        if self.enabled:
            print(f"{self.name}: {text}", file=sys.stderr, flush=True)

    def show(self, row: Row) -> None:
        step = int(row["step"])
        if self.first_step < 0:
            self.first_step, self.started = step, time.monotonic()
        done = step - self.first_step
        left = (time.monotonic() - self.started) / done * (self.steps - step) if done else 0.0
        text = (
            f"{self.name}: step {step}/{self.steps}  loss {row['train_loss']:.4f}  lr {row['lr']:.2e}  "
            f"{row[f'{self.unit}_per_s']:.0f} {self.unit}/s"
            + (f"  {left:.0f} s left" if done and step < self.steps else "")
        )
        if self.enabled:
            print(
                "\r\033[K" + text if self.is_terminal else text,
                end="" if self.is_terminal else "\n",
                file=sys.stderr,
                flush=True,
            )

    def show_validation(self, metrics: Row) -> None:
        values = "  ".join(f"{name} {value:.4f}" for name, value in metrics.items() if name != "step")
        if self.enabled:
            start = "\r\033[K" if self.is_terminal else ""
            print(
                f"{start}{self.name}: step {int(metrics['step'])}/{self.steps}  {values}",
                file=sys.stderr,
                flush=True,
            )

    def close(self) -> None:
        if self.enabled and self.is_terminal:
            print(file=sys.stderr, flush=True)
