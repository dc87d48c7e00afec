"""The training loop on a small regression: it learns, resumes bit for bit, stops cleanly, refuses NaN."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from small_training import TARGET, Net, run, samples, training

from flows import files
from flows.errors import Diverged, Interrupted, ResourceError
from flows.training import Checkpoints, Processes, Result, group_parameters


def same(left: Result, right: Result) -> bool:
    return left.weights.keys() == right.weights.keys() and all(
        torch.equal(left.weights[name], right.weights[name]) for name in left.weights
    )


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_it_learns_and_resumes_bit_for_bit(stage: int, tmp_path: Path, raw_params: dict[str, Any]) -> None:
    settings = training(raw_params, zero_stage=stage)
    whole = run(tmp_path / "whole", settings)
    assert whole.validation[-1]["val_loss"] < 0.5 * whole.validation[0]["val_loss"]
    assert whole.began.startswith("scratch")

    with pytest.raises(Interrupted, match="step 17 of 30"):
        run(tmp_path / "parts", settings, stop_at=17)
    resumed = run(tmp_path / "parts", settings)
    assert resumed.began.startswith("resume: step 17")
    assert same(whole, resumed)
    losses = [
        [(row["step"], row["train_loss"], row["lr"]) for row in result.curves] for result in (whole, resumed)
    ]
    for left, right in zip(*losses, strict=True):
        assert left == pytest.approx(right, abs=1e-6)
    assert [row["val_loss"] for row in whole.validation] == [row["val_loss"] for row in resumed.validation]


@pytest.mark.parametrize(("stage", "offload"), [(1, "optimizer"), (2, "optimizer"), (3, "parameters")])
def test_offload_changes_no_weight_and_resumes(
    stage: int, offload: str, tmp_path: Path, raw_params: dict[str, Any]
) -> None:
    expected = run(tmp_path / "device", training(raw_params, zero_stage=stage))
    settings = training(raw_params, zero_stage=stage, zero_offload=offload)
    with pytest.raises(Interrupted):
        run(tmp_path / "host", settings, stop_at=17)
    resumed = run(tmp_path / "host", settings)
    assert resumed.began.startswith("resume: step 17")
    for name, weights in expected.weights.items():
        torch.testing.assert_close(resumed.weights[name], weights, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("stage", [0, 1])
def test_bf16_keeps_fp32_weights_to_add_small_updates_to(
    stage: int, tmp_path: Path, raw_params: dict[str, Any]
) -> None:
    class Cast(Net):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x.to(self.first.weight.dtype)).float()

    settings = training(raw_params, precision="bf16", zero_stage=stage)
    whole = run(tmp_path / "whole", settings, make=Cast)
    with pytest.raises(Interrupted):
        run(tmp_path / "parts", settings, stop_at=17, make=Cast)
    resumed = run(tmp_path / "parts", settings, make=Cast)
    assert same(whole, resumed)
    weight = whole.weights["first.weight"]
    assert not torch.equal(weight, weight.bfloat16().float())


def test_accumulation_equals_one_large_batch(tmp_path: Path, raw_params: dict[str, Any]) -> None:
    """With equal samples, two half batches give the step of one whole batch (no dropout, up to rounding)."""

    class Plain(Net):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.second(torch.relu(self.first(x)))

    settings = training(raw_params, accumulation=2, steps=1, warmup_steps=0)
    accumulated = run(tmp_path / "a", settings, make=Plain)

    model = Plain()
    torch.manual_seed(0)
    model = Plain()
    x = samples(0, 8)
    (model(x) - x @ TARGET.T).square().mean().backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), settings.clip_grad)
    torch.optim.AdamW(
        [
            {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": settings.weight_decay},
            {"params": [p for p in model.parameters() if p.ndim == 1], "weight_decay": 0.0},
        ],
        lr=settings.lr,
        betas=settings.betas,
    ).step()
    for name, value in model.state_dict().items():
        torch.testing.assert_close(accumulated.weights[name], value, atol=2e-6, rtol=1e-5)
    assert accumulated.curves[0]["grad_norm"] == pytest.approx(float(norm), rel=1e-4)


def test_a_half_written_checkpoint_is_ignored(tmp_path: Path, raw_params: dict[str, Any]) -> None:
    settings = training(raw_params)
    whole = run(tmp_path / "whole", settings)
    with pytest.raises(Interrupted):
        run(tmp_path / "parts", settings, stop_at=23)
    found = sorted(path.name for path in (tmp_path / "parts").glob("step-*"))
    assert found == ["step-00000020", "step-00000023"], "two checkpoints are kept"
    (tmp_path / "parts" / "step-00000023" / "complete.json").unlink()
    resumed = run(tmp_path / "parts", settings)
    assert resumed.began.startswith("resume: step 20")
    assert same(whole, resumed)


def test_a_checkpoint_that_does_not_restore_is_refused(tmp_path: Path, raw_params: dict[str, Any]) -> None:
    settings = training(raw_params)
    with pytest.raises(Interrupted):
        run(tmp_path, settings, stop_at=12)
    marker = tmp_path / "step-00000012" / "complete.json"
    written = files.read_json(marker)
    for change, words in (
        ({"state": {**written["state"], "weights": [123.0, 456.0]}}, "did not restore .* weights .* of 123"),
        ({"probe": 1.001 * written["probe"]}, "restored weights whose loss is"),
    ):
        files.write_json(marker, {**written, **change})
        with pytest.raises(ResourceError, match=words):
            run(tmp_path, settings)
    files.write_json(marker, written)
    assert run(tmp_path, settings).began.startswith("resume: step 12")


def test_nan_stops_before_it_is_saved(tmp_path: Path, raw_params: dict[str, Any]) -> None:
    with pytest.raises(Diverged, match=r"nan at step .* lower test\.training\.lr"):
        run(tmp_path, training(raw_params), spoil_at=13)
    assert [path.name for path in tmp_path.glob("step-*")] == ["step-00000010"]


def test_the_four_ways_to_begin_in_order(tmp_path: Path, raw_params: dict[str, Any]) -> None:
    settings = training(raw_params)
    assert run(tmp_path / "a", settings).began.startswith("scratch")
    assert run(tmp_path / "b", settings, initialized_from="weights").began.startswith("initialise")
    with pytest.raises(Interrupted):
        run(tmp_path / "c", settings, stop_at=14)
    other = tmp_path / "c" / "step-00000014"
    continued = run(tmp_path / "d", settings, initialized_from="weights", continue_from=other)
    assert continued.began.startswith("continue: step 14")
    assert run(tmp_path / "c", settings, continue_from=other).began.startswith("resume: step 14")


def test_two_trainings_of_the_same_run_exclude_each_other(
    tmp_path: Path, raw_params: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flows.training.checkpoints.LOCK_PATIENCE_S", 0.3)
    holder = Checkpoints(tmp_path, Processes(0, 1, torch.device("cpu")))
    with holder.hold(), pytest.raises(ResourceError, match="another process is training"):
        run(tmp_path, training(raw_params))
    assert run(tmp_path, training(raw_params)).began.startswith("scratch")


def test_weight_decay_and_layer_factors_make_stable_groups() -> None:
    model = Net()
    groups = group_parameters(
        model,
        0.05,
        lambda name, parameter: parameter.ndim == 1,
        lambda name: 0.5 if name.startswith("first") else 1.0,
    )
    assert [(group.lr_scale, group.weight_decay, group.names) for group in groups] == [
        (0.5, 0.0, ("first.bias",)),
        (0.5, 0.05, ("first.weight",)),
        (1.0, 0.0, ("second.bias",)),
        (1.0, 0.05, ("second.weight",)),
    ]
