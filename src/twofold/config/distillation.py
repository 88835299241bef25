"""Distillation: who teaches."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from twofold.config.base import Config


class HiddenStatesConfig(Config):
    """Decoder layers that are to compute what a teacher's layers compute, beside predicting what it predicts."""

    weight: float = Field(default=1.0, gt=0)
    """Of the mean over the matched layers of 1 - cosine similarity, in the loss of a token in nats."""

    layers: tuple[tuple[int, int], ...] | None = None
    """Pairs (decoder layer, teacher's layer): what the first reads is drawn to what the second reads; the number of
    layers stands for the normed output. null: every layer but the first, with the teacher's layer it came from where
    the pair's aligned reads tell that, else by relative depth; and the output."""


class DistillationConfig(Config):
    """A teacher for every scored token, in the loop or stored."""

    teacher: str | None = None
    """A checkpoint (folder, hub name or GGUF file) that runs beside the student. Every device holds it whole."""

    kind: Literal["auto", "decoder", "encoder_decoder"] = "auto"
    """`decoder`: a language model that reads the raw text. `encoder_decoder`: reads what the student reads.
    `auto`: as the checkpoint is."""

    targets: str | None = None
    """A folder that stage `distill-targets` wrote, instead of a teacher."""

    share: float = Field(default=1.0, gt=0, le=1)
    """Of the teacher in the loss; the rest is the right token's. 1: cross-entropy against the teacher alone
    (Gemma 2, arXiv 2408.00118, section 3.2)."""

    hidden_states: HiddenStatesConfig | None = None
    """Match hidden states too; teacher and decoder must have one width."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.teacher is None) == (self.targets is None):
            given = "neither" if self.teacher is None else "both"
            raise ValueError(f"distillation takes exactly one of teacher and targets, got {given}")
        if self.targets is not None and self.kind != "auto":
            raise ValueError(f"kind ({self.kind!r}) is of a teacher, targets have none; remove it")
        if self.targets is not None and self.hidden_states is not None:
            raise ValueError(
                "hidden_states need a teacher in the loop, stored targets have none; remove them"
            )
        return self
