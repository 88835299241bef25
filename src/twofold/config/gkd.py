"""Stage `gkd`: a student learns from a teacher's distribution over what it writes itself."""

from __future__ import annotations

import warnings
from typing import Literal, Self

from pydantic import Field, model_validator

from twofold.config.base import Config
from twofold.config.data import DataConfig
from twofold.config.recipe import Run, warn_without_held_out
from twofold.config.rollouts import RolloutEngineConfig


class OnPolicyConfig(Config):
    """Who teaches, on whose answers, and what is minimised (Agarwal et al. 2023, arXiv 2306.13649)."""

    teacher: str
    """A checkpoint (folder, hub name or GGUF file) that runs beside the student: a language model, which reads prompt
    and answer as one text, or an encoder-decoder of the student's conventions. Every device holds it whole."""

    kind: Literal["auto", "decoder", "encoder_decoder"] = "auto"
    """See `DistillationConfig.kind`."""

    divergence: Literal["forward_kl", "reverse_kl", "jsd"] = "jsd"
    """See `twofold.posttrain.divergence.chunked_divergence`."""

    beta: float = Field(default=0.5, gt=0, lt=1)
    """Of `jsd`: near 0 it is like the forward KL, near 1 like the reverse."""

    on_policy_share: float = Field(default=0.5, ge=0, le=1)
    """Share of the batches (the paper's lambda) whose answers the student writes, with the weights of the step; the
    others keep the answers of the data."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.divergence != "jsd" and self.beta != 0.5:
            warnings.warn(
                f"beta={self.beta} has no effect: it is for divergence 'jsd', not for {self.divergence!r}",
                stacklevel=2,
            )
        return self


class OnPolicyRecipe(Run):
    """On-policy distillation (GKD)."""

    stage: Literal["gkd"]

    data: DataConfig
    """Prompts with answers, as for stage `sft`."""

    gkd: OnPolicyConfig

    rollout: RolloutEngineConfig | None = None
    """How the student's answers are written. null: only where it writes none."""

    @model_validator(mode="after")
    def _parts_fit(self) -> Self:
        objective = self.data.objective.name
        if objective != "supervised":
            raise ValueError(f"stage 'gkd' needs data.objective.name 'supervised', got {objective!r}")
        share = self.gkd.on_policy_share
        if share > 0 and self.rollout is None:
            raise ValueError(
                f"gkd.on_policy_share is {share}, so the student writes answers: set rollout.max_new_tokens"
            )
        if share == 0 and self.rollout is not None:
            warnings.warn("rollout has no effect: gkd.on_policy_share is 0", stacklevel=2)
        warn_without_held_out(self.evaluate_every, self.data)
        return self

    @property
    def longest_answer(self) -> int:
        """Tokens that may follow a prompt beyond its stored answer's row."""
        return 0 if self.rollout is None else self.rollout.max_new_tokens

    def describe_step(self) -> str:
        """See `Run`."""
        return f"{self.data.rows_per_batch * self.accumulate_batches:,} rows"
