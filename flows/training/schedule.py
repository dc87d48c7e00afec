"""Learning rate as a pure function of the step (SimMIM, section 4.1; step schedule: data scaling study)."""

from __future__ import annotations

import math

from flows.params import Training


def learning_rate(step: int, settings: Training) -> float:
    """Learning rate of optimiser step `step` (from 0) of `settings.steps`.

    Linear warm-up from `warmup_lr`; the cosine runs from the end of the warm-up (not from step 0, which would
    make the rate jump when the warm-up ends) to `min_lr` at the last step. The step schedule multiplies by
    `step_factor` from `step_at * steps` on.
    """
    if step < settings.warmup_steps:
        return settings.warmup_lr + (settings.lr - settings.warmup_lr) * step / settings.warmup_steps
    if settings.schedule == "step":
        return settings.lr * (settings.step_factor if step >= settings.step_at * settings.steps else 1.0)
    last = max(1, settings.steps - 1 - settings.warmup_steps)
    progress = (step - settings.warmup_steps) / last
    return settings.min_lr + (settings.lr - settings.min_lr) * 0.5 * (1.0 + math.cos(math.pi * progress))
