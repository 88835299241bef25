"""The learning rate as a function of the step alone, so that a resumed run needs no state for it."""

import math

from twofold.config.recipe import ScheduleConfig


def learning_rate_factor(step: int, schedule: ScheduleConfig, total_steps: int) -> float:
    """The share of the highest learning rate that a step uses.

    It rises in a line to 1 at step `warmup_steps`, then falls to `final_share` at the last step: in a line,
    along half a cosine wave (arXiv 1608.03983, equation 5, without restarts), or not at all.

    Args:
        step: 1 for the first.
        total_steps: number of the last step.
    """
    if step <= schedule.warmup_steps:
        return step / schedule.warmup_steps
    if schedule.decay == "constant":
        return 1.0
    progress = (step - schedule.warmup_steps) / (total_steps - schedule.warmup_steps)
    left = 1 - progress if schedule.decay == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
    return schedule.final_share + (1 - schedule.final_share) * left
