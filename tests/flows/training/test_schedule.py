"""The learning rate against its closed forms."""

from __future__ import annotations

import math
from typing import Any

import pytest

from flows.params import Training
from flows.training.schedule import learning_rate


def settings(raw: dict[str, Any], **change: Any) -> Training:
    values = {
        **raw["pretrain"]["training"],
        "steps": 100,
        "warmup_steps": 10,
        "lr": 1.0,
        "warmup_lr": 0.1,
        "min_lr": 0.2,
    }
    return Training.model_validate({**values, **change})


def test_cosine(raw_params: dict[str, Any]) -> None:
    chosen = settings(raw_params)
    assert learning_rate(0, chosen) == 0.1
    assert learning_rate(5, chosen) == pytest.approx(0.55)
    assert learning_rate(10, chosen) == 1.0, "the cosine starts at the peak, without a jump"
    assert learning_rate(99, chosen) == pytest.approx(0.2)
    assert learning_rate(50, chosen) == pytest.approx(0.2 + 0.4 * (1 + math.cos(math.pi * 40 / 89)))
    rates = [learning_rate(step, chosen) for step in range(10, 100)]
    assert rates == sorted(rates, reverse=True)


def test_step(raw_params: dict[str, Any]) -> None:
    chosen = settings(raw_params, schedule="step", step_at=0.875, step_factor=0.1)
    assert learning_rate(87, chosen) == 1.0
    assert learning_rate(88, chosen) == pytest.approx(0.1)


def test_one_step_and_no_warmup(raw_params: dict[str, Any]) -> None:
    assert learning_rate(0, settings(raw_params, steps=1, warmup_steps=0)) == 1.0
