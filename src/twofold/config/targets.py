"""Distillation: what is kept of what a teacher says."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from twofold.config.base import Config
from twofold.config.data import DataConfig
from twofold.config.recipe import ModelConfig


class TargetsRecipe(Config):
    """Stage `distill-targets`: a teacher reads the data of a run once, and its predictions are stored."""

    stage: Literal["distill-targets"]

    teacher: str
    """A decoder-only checkpoint: folder, hub name or GGUF file."""

    model: ModelConfig
    """The student's, for its tokenizer and conventions; its weights are not read."""

    data: DataConfig
    """The student's; what is held out there is not read."""

    output: str
    """Folder of the targets. One that is not complete yet is gone on with."""

    method: Literal["top_k", "sample"] = "sample"
    """`top_k`: the k likeliest tokens, renormalised. `sample`: k tokens drawn from the distribution, each with the
    share of the draws that it got; without bias (Gemma 3, arXiv 2503.19786, section 2.2)."""

    k: int = Field(default=256, ge=1)
    """Tokens kept or drawn at each position."""

    seed: int = Field(default=0, ge=0)
    """Of the draws."""

    precision: Literal["float32", "bfloat16"] = "bfloat16"
    """Of the teacher."""

    shard_tokens: int = Field(default=2**18, ge=1)
    """Tokens of one file, which is what is lost when a process is killed."""

    device: Literal["auto", "cpu", "cuda"] = "auto"

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not self.output:
            raise ValueError("output must name a folder, got an empty string")
        return self
