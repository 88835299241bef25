"""What is made of evaluations: when a run has seen enough, and what it shows."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from twofold.config.base import Config


class EarlyStoppingConfig(Config):
    """End a run when the held-out metric no longer improves; the best weights are kept as model-best/."""

    metric: str = "loss"
    """Of evaluations, as metrics.jsonl has it behind `held_out_`: loss, or what the stage measures (accuracy...)."""

    goal: Literal["lower", "higher"] = "lower"
    """What is better."""

    patience: int = Field(ge=1)
    """Evaluations in a row without improvement after which the run ends."""

    min_delta: float = Field(default=0.0, ge=0)
    """By how much the best value has to be passed to count as improvement."""


class SamplesConfig(Config):
    """A few held-out prompts are answered, greedily, at every evaluation: samples.jsonl, and text in TensorBoard."""

    count: int = Field(default=4, ge=1)
    """Prompts: the first of the held-out data."""

    max_new_tokens: int = Field(default=64, ge=1)
    """Of an answer."""
