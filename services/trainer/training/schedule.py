"""The learning rate of each step."""

from __future__ import annotations

import math

from services.trainer.spec import Schedule


def learning_rate(
    step: int, *, total_steps: int, peak: float, warmup_ratio: float, schedule: Schedule
) -> float:
    """Return the rate of `step` (from 0): linear warm-up to `peak`, then cosine or linear to 0, or constant.

    Cosine: Loshchilov and Hutter 2016, arXiv 1608.03983, equation 5, without restarts.
    """
    warmup_steps = math.ceil(warmup_ratio * total_steps)
    if step < warmup_steps:
        return peak * (step + 1) / (warmup_steps + 1)
    if schedule is Schedule.CONSTANT:
        return peak
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    if schedule is Schedule.LINEAR:
        return peak * (1.0 - progress)
    return peak * 0.5 * (1.0 + math.cos(math.pi * progress))
