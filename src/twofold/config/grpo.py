"""Stage `grpo`: a model writes several answers to every prompt, and learns from how they compare."""

from __future__ import annotations

import warnings
from collections import Counter
from typing import Literal, Self

from pydantic import Field, model_validator

from twofold.config.base import Config
from twofold.config.recipe import Run, warn_without_held_out
from twofold.config.records import RecordData, RecordSource
from twofold.config.rewards import RewardConfig
from twofold.config.rollouts import RolloutEngineConfig


class PromptSource(RecordSource):
    """Prompts from files or a `datasets` dataset, with what rewards have to know of each."""

    prompt_field: str = "prompt"
    """Column of the prompt: a text (a user's turn, where the tokenizer has a chat template), a list of texts (joined
    with spaces), or a conversation: a list of {"role", "content"} or {"from", "value"}."""

    template: str = "{prompt}"
    """What a text is put into."""

    columns: dict[str, str] = Field(default_factory=dict)
    """What rewards are given of each record: the name they know it by, and the column. A name that a reward asks for
    and that is not here is the column's own."""

    max_prompts: int | None = Field(default=None, ge=1)
    """Read only so many records, from the beginning."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.template.count("{prompt}") != 1:
            raise ValueError(f"template must hold {{prompt}} once, got {self.template!r}")
        return self


class PromptData(RecordData):
    """Everything between the files and the prompts of a step."""

    items = "prompts"
    sources: tuple[PromptSource, ...]
    held_out: tuple[PromptSource, ...] = ()
    """Sources for evaluation only; prompts that occur there are dropped from `sources`."""

    max_length_action: Literal["error", "truncate", "skip"] = "error"
    """What happens to a prompt that is longer. `truncate`: its end stays."""

    prompts_per_batch: int = Field(ge=1)
    """Prompts of one batch, each with all its answers; a step takes `accumulate_batches` of them."""


class HeldOutSampling(Config):
    """How held-out prompts are answered."""

    temperature: float = Field(default=0.0, ge=0)
    """0: greedily."""

    num_samples: int = Field(default=1, ge=1)
    """Answers to each prompt; more than one needs a temperature."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.num_samples > 1 and self.temperature == 0:
            raise ValueError(
                f"num_samples={self.num_samples} greedy answers would all be equal; set a temperature, or num_samples=1"
            )
        return self


class RolloutConfig(RolloutEngineConfig):
    """How answers are sampled, by the engine, with the weights of the step."""

    num_samples: int = 8
    """Answers to each prompt, which the encoder reads once."""

    held_out: HeldOutSampling = HeldOutSampling()

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.num_samples < 2:
            raise ValueError(
                f"num_samples must be at least 2, got {self.num_samples}: an answer is compared with others to its "
                "prompt"
            )
        most = max(self.num_samples, self.held_out.num_samples)
        if most > self.batch_size:
            raise ValueError(
                f"batch_size is {self.batch_size}, but {most} answers to one prompt are written together; raise it"
            )
        return self


class PolicyConfig(Config):
    """What stage `grpo` minimises; see `twofold.posttrain.grpo.PolicyObjective`."""

    baseline: Literal["group_mean", "leave_one_out"] = "group_mean"
    """What an answer's reward is compared with: the mean over all answers to its prompt (GRPO), or over all others
    (RLOO)."""

    scale: Literal["std", "batch", "none"] = "std"
    """What advantages are divided by: the standard deviation of the rewards of the same prompt, of all rewards of the
    step, or nothing (Dr. GRPO, RLOO)."""

    aggregation: Literal["token", "sequence", "constant"] = "token"
    """`token`: every token of a step weighs the same (DAPO). `sequence`: every answer does, its tokens share that
    (GRPO). `constant`: the sum over an answer's tokens, divided by max_new_tokens (Dr. GRPO, RLOO)."""

    clip_low: float = Field(default=0.2, gt=0, lt=1)
    """The importance ratio counts down to 1 - clip_low."""

    clip_high: float = Field(default=0.2, gt=0)
    """And up to 1 + clip_high (0.28 in DAPO)."""

    num_iterations: int = Field(default=1, ge=1)
    """Updates on each rollout. With one, the ratio is 1 and nothing is clipped."""

    kl_coefficient: float = Field(default=0.0, ge=0)
    """Weight of the divergence from the model before the first step; 0: no copy of it is held."""

    mask_truncated: bool = False
    """Answers that were cut at max_new_tokens teach nothing; they count in the group's mean and in the divisor."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.num_iterations == 1 and (self.clip_low, self.clip_high) != (0.2, 0.2):
            warnings.warn(
                f"clip_low={self.clip_low}, clip_high={self.clip_high} have no effect: with num_iterations=1 the ratio "
                "is 1",
                stacklevel=2,
            )
        return self


class PolicyRecipe(Run):
    """Reinforcement learning with rewards for whole answers (GRPO, RLOO)."""

    stage: Literal["grpo"]

    data: PromptData

    rewards: tuple[RewardConfig, ...]
    """Each times its weight, added up."""

    rollout: RolloutConfig

    policy: PolicyConfig = PolicyConfig()

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not self.rewards:
            raise ValueError("rewards must name at least one reward, got none")
        twice = [
            name for name, count in Counter(reward.label for reward in self.rewards).items() if count > 1
        ]
        if twice:
            raise ValueError(f"several rewards are named {', '.join(twice)}; give each a name of its own")
        if all(reward.weight == 0 for reward in self.rewards):
            raise ValueError("all rewards have weight 0, so that there is nothing to learn; raise one")
        warn_without_held_out(self.evaluate_every, self.data)
        return self

    def describe_step(self) -> str:
        """See `Run`."""
        prompts = self.data.prompts_per_batch * self.accumulate_batches
        return f"{prompts:,} prompts with {self.rollout.num_samples} answers each"
