"""A run goes on with another number of processes as if nothing had happened, or says why it does not."""

from __future__ import annotations

import dataclasses
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import deepspeed
import pytest
import torch
from deepspeed.checkpoint import ds_to_universal
from forked import in_processes
from small_training import DISTRIBUTED, Counting, run, training

from flows import files, params
from flows.errors import ConfigError, Interrupted, ResourceError
from flows.params import Training
from flows.training import Checkpoints, Result, initialize_processes, settings_that_name, universal
from flows.training import checkpoints as module

ROOT = Path(__file__).resolve().parents[3]


class Cast(Counting):
    """For weights in bf16."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.to(self.first.weight.dtype)).float()


def part(folder: Path, settings: Training, stop_at: int | None = None, **job: Any) -> Result | str:
    """What a process of the run has to say: its result, or where it was stopped."""
    try:
        return run(folder, settings, stop_at=stop_at, make=Cast, **job)
    except Interrupted as interrupted:
        return str(interrupted)


def interrupted_pair(folder: Path, settings: Training) -> None:
    """A checkpoint of two processes after seven steps, in the middle between two logged ones."""
    for answer in in_processes(2, part, folder, settings, 7):
        assert str(answer).startswith("stopped at step 7 of 30"), answer


MODES = [(0, "fp32"), (1, "fp32"), (2, "fp32"), (3, "fp32"), (1, "bf16"), (3, "bf16")]
TOLERANCE = {"fp32": 1e-5, "bf16": 0.1}
"""Relative: 1e-6 was measured in fp32. AdamW would show wrong moments, counts or decay in the next losses."""


def parts_in_all_modes(folder: Path, raw: dict[str, Any], stop_at: int | None = None) -> list[Result | str]:
    return [
        part(folder / f"{stage}-{precision}", mode(raw, stage, precision), stop_at)
        for stage, precision in MODES
    ]


def mode(raw: dict[str, Any], stage: int, precision: str, **change: Any) -> Training:
    return training(raw, zero_stage=stage, precision=precision, log_every=4, **change)


@pytest.fixture(scope="module")
def elastic(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Result]]:
    """Folder and results of runs in each mode on two processes, then on one, then on two again, stopped
    between two logged steps."""
    folder, raw = tmp_path_factory.mktemp("elastic"), params.read(ROOT / "params.yaml")
    for answers in in_processes(2, parts_in_all_modes, folder, raw, 7):
        assert all(str(answer).startswith("stopped at step 7 of 30") for answer in answers), answers
    for answer in parts_in_all_modes(folder, raw, 9):
        assert str(answer).startswith("stopped at step 16")
    results, others = in_processes(2, parts_in_all_modes, folder, raw)
    assert all(isinstance(result, Result) for result in (*results, *others)), (results, others)
    return folder, results


@pytest.mark.parametrize(("stage", "precision"), MODES)
def test_two_then_one_then_two_processes_train_like_one(
    stage: int,
    precision: str,
    elastic: tuple[Path, list[Result]],
    tmp_path: Path,
    raw_params: dict[str, Any],
) -> None:
    resumed = elastic[1][MODES.index((stage, precision))]
    assert resumed.began.startswith("resume: step 16 from")
    assert resumed.began.endswith("saved by 1 and now in 2 processes")
    settings, close = mode(raw_params, stage, precision), TOLERANCE[precision]
    whole = part(tmp_path, settings)
    assert isinstance(whole, Result)
    losses = [[row["train_loss"] for row in result.curves] for result in (resumed, whole)]
    assert losses[0] == pytest.approx(losses[1], rel=close)
    assert resumed.validation[-1]["val_loss"] == pytest.approx(whole.validation[-1]["val_loss"], rel=close)
    for name, value in whole.weights.items():
        torch.testing.assert_close(resumed.weights[name], value, atol=close, rtol=close)
    assert float(resumed.weights["calls"]) == settings.steps, "a buffer, which DeepSpeed would not load"


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_another_run_continues_on_one_process_and_leaves_the_first_as_it_was(
    stage: int, elastic: tuple[Path, list[Result]], tmp_path: Path, raw_params: dict[str, Any]
) -> None:
    folder = elastic[0] / f"{stage}-fp32"
    assert not list(folder.glob("*universal*")), "a copy lasts until the next checkpoint"
    before = sorted(folder.rglob("*"))
    longer = mode(raw_params, stage, "fp32", steps=32)
    continued = part(tmp_path, longer, continue_from=folder / "step-00000030")
    assert isinstance(continued, Result)
    assert continued.began.startswith("continue: step 30 from")
    assert sorted(folder.rglob("*")) == before


# ---- a load that is not what was saved ----


def zero_moments(engine: Any) -> None:
    for state in base_state(engine):
        state["exp_avg"].zero_()


def forget_the_optimizer(engine: Any) -> None:
    for state in base_state(engine):
        state.clear()


def restart_the_count(engine: Any) -> None:
    for state in base_state(engine):
        state["step"] = torch.zeros(1)


def shift_second_moments(engine: Any) -> None:
    for state in base_state(engine):
        state["exp_avg_sq"].copy_(state["exp_avg_sq"].flatten().roll(1).view_as(state["exp_avg_sq"]))


def swap_two_weights(engine: Any) -> None:
    flat = engine.optimizer.single_partition_of_fp32_groups[0].data
    flat[:2] = flat[:2].flip(0)


def change_the_model_only(engine: Any) -> None:
    engine.module.second.weight.data.mul_(1.01)


def forget_a_buffer(engine: Any) -> None:
    engine.module.calls.zero_()


def base_state(engine: Any) -> list[dict[str, Any]]:
    optimizer = engine.optimizer
    return list(getattr(optimizer, "optimizer", optimizer).state.values())


@pytest.mark.parametrize(
    ("stage", "spoil", "words"),
    [
        (0, zero_moments, "first moments 0 instead of"),
        (1, zero_moments, "first moments 0 instead of"),
        (3, zero_moments, "first moments 0 instead of"),
        (1, forget_the_optimizer, "second moments 0 instead of"),
        (1, restart_the_count, "optimizer steps 0 instead of 12"),
        (1, shift_second_moments, "second moments .* instead of"),
        (1, swap_two_weights, "weights .* instead of"),
        (1, change_the_model_only, "restored weights whose loss is"),
        (1, forget_a_buffer, "buffers 0 instead of"),
    ],
)
def test_a_load_that_brings_back_something_else_is_refused(
    stage: int,
    spoil: Callable[[Any], None],
    words: str,
    tmp_path: Path,
    raw_params: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    settings = training(raw_params, zero_stage=stage)
    part(tmp_path, settings, 12)
    load = deepspeed.DeepSpeedEngine.load_checkpoint

    def spoilt(engine: Any, *arguments: Any, **options: Any) -> Any:
        answer = load(engine, *arguments, **options)
        spoil(engine)
        return answer

    with monkeypatch.context() as patch:
        patch.setattr(deepspeed.DeepSpeedEngine, "load_checkpoint", spoilt)
        with pytest.raises(ResourceError, match=rf"step-00000012 .*{words}.*delete that folder"):
            part(tmp_path, settings)
    assert isinstance(part(tmp_path, settings), Result), "nothing was lost"


# ---- the conversion ----


def killed_while_converting(folder: Path, settings: Training) -> None:
    ds_to_universal._save_optimizer_state = lambda *arguments: os.kill(os.getpid(), signal.SIGKILL)
    part(folder, settings)


def test_a_kill_during_the_conversion_loses_nothing(
    tmp_path: Path, raw_params: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = training(raw_params)
    interrupted_pair(tmp_path, settings)
    assert in_processes(1, killed_while_converting, tmp_path, settings) == [-signal.SIGKILL]
    assert len(list(tmp_path.glob(".universal-*"))) == 1, "it was killed in the middle"

    def fail(*arguments: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:  # killed once more, now after the conversion
        patch.setattr(module.restoration, "summarize", fail)
        with pytest.raises(KeyboardInterrupt):
            part(tmp_path, settings)
    assert [path.name for path in tmp_path.glob("*universal*")] == ["universal-step-00000007"]
    assert not list(tmp_path.glob(".universal-*")), "the half copy makes room"
    with monkeypatch.context() as patch:
        patch.setattr(universal, "convert", lambda *paths: pytest.fail("it has been converted"))
        resumed = part(tmp_path, settings)
    assert isinstance(resumed, Result)
    assert resumed.began.startswith("resume: step 7 from")


def test_a_copy_of_another_checkpoint_is_not_used(tmp_path: Path, raw_params: dict[str, Any]) -> None:
    settings = training(raw_params)
    interrupted_pair(tmp_path, settings)
    (tmp_path / "universal-step-00000007").mkdir()
    files.write_json(tmp_path / "universal-step-00000007" / "origin.json", {"step": 7, "processes": 2})
    assert isinstance(part(tmp_path, settings), Result)


def test_a_partition_that_is_missing_is_named(tmp_path: Path, raw_params: dict[str, Any]) -> None:
    settings = training(raw_params)
    interrupted_pair(tmp_path, settings)
    missing = next((tmp_path / "step-00000007").glob("*pp_rank_1*optim_states.pt"))
    missing.unlink()
    with pytest.raises(ResourceError, match=r"step-00000007 cannot be read .*delete that folder"):
        part(tmp_path, settings)


# ---- what a run is ----


def test_a_run_is_the_same_however_its_steps_are_divided(raw_params: dict[str, Any]) -> None:
    def named(**change: Any) -> dict[str, Any]:
        raw = params.overlay(raw_params, {"pretrain": {"training": change}}, "test")
        return settings_that_name(params.check(raw, "test").pretrain)

    assert named(processes=2, threads=3, accumulation=4) == named()
    assert named(batch_size=64) != named()
    assert named(zero_stage=2) != named()


def hold(folder: Path, names: list[str], settings: Training, machines: int, patience_s: float) -> str:
    """What `hold` says to processes whose runs have these names, by rank."""
    module.SHARED_PATIENCE_S = patience_s
    processes = dataclasses.replace(initialize_processes(settings, DISTRIBUTED), machines=machines)
    try:
        with Checkpoints(folder / names[processes.rank], processes).hold():
            return "held"
    except (ConfigError, ResourceError) as error:
        return f"{type(error).__name__}: {error}"


def test_processes_that_would_train_something_else_are_refused(
    tmp_path: Path, raw_params: dict[str, Any]
) -> None:
    settings = training(raw_params)
    for answer in in_processes(2, hold, tmp_path, ["a", "b"], settings, 1, 1.0):
        assert answer.startswith("ConfigError: "), answer
        assert "(process 1) would train something else than" in answer
    assert in_processes(2, hold, tmp_path, ["a", "a"], settings, 1, 1.0) == ["held", "held"]


def part_with_own_accumulation(folder: Path, settings: Training) -> Result | str:
    rank = int(os.environ["RANK"])
    return part(folder, settings.model_copy(update={"accumulation": 1 + rank}))


def test_machines_that_divide_a_step_differently_are_refused(
    tmp_path: Path, raw_params: dict[str, Any]
) -> None:
    """They would wait for one another: accumulation does not name a run."""
    for answer in in_processes(2, part_with_own_accumulation, tmp_path, training(raw_params)):
        assert isinstance(answer, ConfigError), answer
        assert "`test.training.accumulation` is not the same" in str(answer)


def test_machines_that_do_not_share_the_folder_are_refused(
    tmp_path: Path, raw_params: dict[str, Any]
) -> None:
    settings = training(raw_params)
    for answer in in_processes(2, hold, tmp_path, ["mine/run", "yours/run"], settings, 2, 1.0):
        assert answer.startswith("ResourceError: "), answer
        assert "does not see the folder of checkpoints" in answer
        assert "PIPELINE_SCRATCH" in answer
    assert in_processes(2, hold, tmp_path, ["mine/run", "mine/run"], settings, 2, 30.0) == ["held", "held"]


def test_a_number_of_processes_that_does_not_divide_the_batch_is_refused(
    tmp_path: Path, raw_params: dict[str, Any]
) -> None:
    for answer in in_processes(3, part, tmp_path, training(raw_params)):
        assert isinstance(answer, ConfigError), answer
        assert "batch_size 8 is not divisible by 3 processes x accumulation 1" in str(answer)
