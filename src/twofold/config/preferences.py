"""Stages that learn from pairs of replies, of which people or models preferred one."""

from __future__ import annotations

import warnings
from typing import Literal, Self

from pydantic import Field, model_validator

from twofold.config.base import Config
from twofold.config.recipe import Run, warn_without_held_out
from twofold.config.records import RecordData, RecordSource


class PairSource(RecordSource):
    """Preferences from files or a `datasets` dataset: a prompt, a chosen and a rejected reply in each record.

    A prompt is a text (a user's turn, where the tokenizer has a chat template) or a conversation: a list of
    {"role", "content"} or {"from", "value"}. A reply is a text, one such message, or a list of one.
    """

    prompt_field: str | None = "prompt"
    """Column of the prompt. null: chosen and rejected are whole conversations (lists of messages, or transcripts of
    "\\n\\nHuman: ...\\n\\nAssistant: ...") that differ in the last reply only."""

    chosen_field: str = "chosen"
    """Column of the reply that was preferred."""

    rejected_field: str = "rejected"
    """Column of the other."""

    margin_field: str | None = None
    """Column of a number, 0 or more: by how much the rewards should differ. For stage `reward`. null: 0."""

    max_pairs: int | None = Field(default=None, ge=1)
    """Read only so many records, from the beginning."""

    @property
    def columns(self) -> tuple[str, ...]:
        """What is read of each record."""
        names = (self.prompt_field, self.chosen_field, self.rejected_field, self.margin_field)
        return tuple(name for name in names if name is not None)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if len(set(self.columns)) != len(self.columns):
            raise ValueError(f"each field must be a column of its own, got {', '.join(self.columns)}")
        return self


class PairData(RecordData):
    """Everything between the files and batches of pairs."""

    items = "pairs"
    sources: tuple[PairSource, ...]
    held_out: tuple[PairSource, ...] = ()
    """Sources for evaluation only; pairs with a prompt that occurs there are dropped from `sources`."""

    target_length: int = Field(ge=1)
    """Most tokens of a reply, as the decoder counts them."""

    max_length_action: Literal["error", "truncate", "skip"] = "error"
    """What happens to a pair that is longer. `truncate`: the end of the prompt and the start of a reply stay."""

    pairs_per_batch: int = Field(ge=1)
    """Pairs of one batch; pairs of similar length come together."""


class PreferenceConfig(Config):
    """What stage `dpo` minimises."""

    kind: Literal["dpo", "ipo", "orpo"] = "dpo"
    """See `twofold.posttrain.preferences.PreferenceObjective`."""

    beta: float = Field(default=0.1, gt=0)
    """How strongly the model is held to the reference; of `orpo` the weight of the odds ratio (its lambda)."""

    label_smoothing: float = Field(default=0.0, ge=0, lt=0.5)
    """Of `dpo`: share of the pairs whose replies are taken to be the wrong way round."""

    reference: Literal["precomputed", "model"] = "precomputed"
    """`precomputed`: log-probabilities of the model before the first step are computed once and kept in the run's
    folder. `model`: a second copy of that model runs beside it, whole on every device; with an adapter the model itself
    with the adapter off. No effect for `orpo`."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.kind == "orpo" and self.reference != "precomputed":
            warnings.warn(
                f"reference={self.reference!r} has no effect: orpo needs no reference", stacklevel=2
            )
        if self.kind != "dpo" and self.label_smoothing:
            warnings.warn(
                f"label_smoothing={self.label_smoothing} has no effect: it is for kind 'dpo', not for {self.kind!r}",
                stacklevel=2,
            )
        return self


class PairRun(Run):
    """What both stages have."""

    data: PairData

    @model_validator(mode="after")
    def _evaluations_have_data(self) -> Self:
        warn_without_held_out(self.evaluate_every, self.data)
        return self

    def describe_step(self) -> str:
        """See `Run`."""
        return f"{self.data.pairs_per_batch * self.accumulate_batches:,} pairs"


class PreferenceRecipe(PairRun):
    """Tuning on preferences without a reward model."""

    stage: Literal["dpo"]

    preference: PreferenceConfig = PreferenceConfig()

    @model_validator(mode="after")
    def _margins_are_for_rewards(self) -> Self:
        for source in (*self.data.sources, *self.data.held_out):
            if source.margin_field is not None:
                warnings.warn(
                    f"margin_field={source.margin_field!r} has no effect: it is for stage 'reward'",
                    stacklevel=2,
                )
        return self


class RewardRecipe(PairRun):
    """A reward model: the encoder of a pair, which reads prompt and reply, with a number as its answer."""

    stage: Literal["reward"]

    @model_validator(mode="after")
    def _has_no_decoder(self) -> Self:
        if self.cross_attention_warmup_steps:
            raise ValueError(
                f"cross_attention_warmup_steps is {self.cross_attention_warmup_steps}, but a reward model has no "
                "decoder and no cross-attention; set it to 0"
            )
        if self.adapter is not None and (self.adapter.lm_head or not self.adapter.merge):
            raise ValueError(
                "a reward model has no LM head and is read whole: adapter.lm_head must be false and adapter.merge true"
            )
        if self.samples is not None:
            raise ValueError("a reward model writes nothing, so it has no samples to show; set samples=null")
        return self
