"""Early stopping: which evaluation was the best, and how many came since."""

from __future__ import annotations

from dataclasses import dataclass

from twofold.config.watching import EarlyStoppingConfig
from twofold.train.evaluate import Evaluation


@dataclass(frozen=True, slots=True)
class Best:
    """The best evaluation so far."""

    step: int
    value: float
    num_since: int = 0
    """Evaluations after it."""


def judge(best: Best | None, config: EarlyStoppingConfig, step: int, value: float) -> Best:
    """The best evaluation once one more is known. The first is the best so far; NaN never is better."""
    if best is None:
        return Best(step, value)
    gain = best.value - value if config.goal == "lower" else value - best.value
    if gain > config.min_delta:
        return Best(step, value)
    return Best(best.step, best.value, best.num_since + 1)


def metric_of(evaluation: Evaluation, name: str) -> float:
    """A metric of an evaluation by name."""
    return evaluation.loss if name == "loss" else evaluation.metrics[name]


def check_stopping(config: EarlyStoppingConfig, known: list[str], *, has_held_out: bool) -> None:
    """Refuse what could never be judged, before the first step.

    Args:
        known: metrics of evaluations.

    Raises:
        ValueError: nothing is held out, or an unknown metric.
    """
    if not has_held_out:
        raise ValueError(
            "early_stopping looks at held-out data, and nothing is held out; set data.held_out or "
            "data.held_out_fraction, or remove it"
        )
    if config.metric not in known:
        raise ValueError(
            f"early_stopping.metric is {config.metric!r}, but evaluations of this stage have {', '.join(known)}"
        )
