"""The planner: what autograd really keeps, sensible plans, clear refusals."""

from __future__ import annotations

import pytest
import torch

import models
from flows.errors import ConfigError
from flows.planning import memory
from flows.planning.memory import Choice, Network, count_saved, footprint, trace
from flows.planning.training_plan import describe, plan_training
from flows.training import distributed
from models.pretext.simmim import SimMIM, random_masks

PICO = Network("swin_v2_pico", 32, 4, "fp32")


def test_what_is_traced_is_what_a_real_step_keeps() -> None:
    model = SimMIM(models.create("swin_v2_pico", image_size=32, window_size=4), 8).train()
    images, mask = torch.randn(3, 3, 32, 32), random_masks(3, 4, 0.6)
    with count_saved(model, list(model.backbone.layers)) as totals:
        model(images, mask)
    assert trace(PICO, Choice()).of_batch(3) == pytest.approx(sum(totals), rel=0.15)


def test_each_measure_saves_what_it_is_for() -> None:
    def needs(**choice: int) -> dict[str, float]:
        chosen = Choice(**{"micro_batch": 4, "zero_stage": 1, "devices": 4, **choice})
        return vars(footprint(PICO, chosen, trace(PICO, chosen)))

    plain = needs()
    assert needs(devices=8)["states"] == plain["states"] / 2
    assert needs(zero_stage=2)["gradients"] == plain["gradients"] / 4
    assert needs(checkpointed_stages=2)["activations"] < plain["activations"]
    tiny = Network("swin_v2_tiny", 64, 8)  # larger than the buffer that weights are gathered in
    traced = trace(tiny, Choice())
    whole, sharded = (footprint(tiny, Choice(stage, devices=4), traced) for stage in (2, 3))
    assert sharded.weights < 0.7 * whole.weights
    offloaded = footprint(tiny, Choice(2, "optimizer", devices=4), traced)
    assert offloaded.states == 0.0
    assert offloaded.host > whole.states


def test_more_devices_fit_what_one_does_not() -> None:
    parameters = trace(PICO, Choice()).parameters
    tight = 14 * parameters / 2**30
    plan = plan_training(PICO, tight, 0, 64)
    assert plan.choice.devices > 1
    assert plan.needs.total <= tight * 2**30
    assert plan.choice.micro_batch * plan.choice.devices * plan.accumulation == 64
    assert any("total" in line for line in describe(plan, PICO, tight))


def test_what_cannot_be_is_refused_in_one_sentence() -> None:
    with pytest.raises(ConfigError, match="does not fit: the least"):
        plan_training(PICO, 0.001, 1, 64)
    with pytest.raises(ConfigError, match="unknown"):
        plan_training(Network("nothing", 32, 4), 80, 1, 64)


def test_buffers_are_planned_as_training_sets_them() -> None:
    for name in ("BUCKET_MIN", "BUCKET_MAX", "BUCKETS"):
        assert getattr(memory, name) == getattr(distributed, name)
