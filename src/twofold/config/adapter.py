"""Adapters: a few trained numbers beside a frozen model."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from twofold.config.base import Config

ATTENTION_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "source_k_proj", "source_v_proj")
"""Projections of self-attention and of attention to the source. Layout 'separate' has the same names once more in
`cross_attn`. In layout 'merged' a decoder layer reads source and target with one set of projections, so that adapting
`self_attn` adapts both; where the source has projections of its own, they are the last two names."""

TARGETS = {"attention": ATTENTION_TARGETS, "all": (*ATTENTION_TARGETS, "gate_proj", "up_proj", "down_proj")}
"""The names are those of every family: donors' tensors are mapped to them."""


class AdapterConfig(Config):
    """A low-rank adapter of linear layers, by PEFT: W x + (alpha / rank) B A x with B = 0 at the start, so that
    training begins at the model itself. All else is frozen."""

    kind: Literal["lora", "dora"] = "lora"
    """`lora`: arXiv 2106.09685. `dora` (arXiv 2402.09353): the length of each row of the sum is trained apart from its
    direction; slower, for ranks too low for LoRA."""

    rank: int = Field(default=16, ge=1)

    alpha: float = Field(default=32.0, gt=0)
    """Over `rank`: the factor of B A."""

    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Of what A reads."""

    targets: Literal["all", "attention"] | tuple[str, ...] = "all"
    """`all`: attention, cross-attention and MLP of both stacks, which it takes to come near full tuning (arXiv
    2305.14314, section 4). A list: ends of module names, such as q_proj, cross_attn.v_proj or layers.0.mlp.up_proj."""

    lm_head: bool = False
    """Train the head whole, too; only where it is not tied to an embedding."""

    merge: bool = True
    """Write model/ beside adapter/: the model with the adapter added to its weights, which every command takes."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not self.targets or any(not name for name in self.targets):
            raise ValueError(
                f"targets must be 'all', 'attention' or names of linear layers, got {self.targets!r}"
            )
        return self
