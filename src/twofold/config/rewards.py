"""Rewards of reinforcement learning: what says how good a completion is."""

from __future__ import annotations

import re
from math import isfinite
from typing import Annotated, Literal, Self

from pydantic import Field, field_validator, model_validator

from twofold.config.base import Config


class _Reward(Config):
    """What all have."""

    weight: float = 1.0
    """What the reward is multiplied with before all are added up; below 0 it is a penalty. 0: logged only."""

    name: str | None = None
    """In metrics. null: its kind."""

    @property
    def label(self) -> str:
        """Its name in metrics."""
        return self.name or str(getattr(self, "kind"))  # noqa: B009

    @property
    def columns(self) -> tuple[str, ...]:
        """What must be in a record, under the names that rewards know it by."""
        field = getattr(self, "field", None)
        return () if field is None else (field,)

    @field_validator("weight")
    @classmethod
    def _weight_is_finite(cls, weight: float) -> float:
        if not isfinite(weight):
            raise ValueError(f"weight must be a finite number, got {weight}")
        return weight

    @field_validator("name")
    @classmethod
    def _name_is_plain(cls, name: str | None) -> str | None:
        if name is not None and not re.fullmatch(r"\w+", name):
            raise ValueError(f"name must be of letters, digits and underscores, got {name!r}")
        return name


class MathReward(_Reward):
    """1 if the last result in the completion has the value of the record's answer (math-verify), else 0."""

    kind: Literal["math"]

    field: str = "answer"
    """A number or an expression; of a text with "#### " (GSM8K) what follows it. Of completions likewise."""


class ExactMatchReward(_Reward):
    """1 if the completion is one of the record's answers, but for case, punctuation, articles and spaces; else 0."""

    kind: Literal["exact_match"]

    field: str = "answer"
    """A text, or a list of texts that are all right."""


class FormatReward(_Reward):
    """1 if the completion matches a pattern, else 0."""

    kind: Literal["format"]

    pattern: str
    """Python regular expression; `.` matches line ends too."""

    whole: bool = False
    """The completion must match as a whole, not somewhere."""

    @field_validator("pattern")
    @classmethod
    def _pattern_compiles(cls, pattern: str) -> str:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"pattern {pattern!r} is no regular expression: {error}") from error
        return pattern


class RougeReward(_Reward):
    """F1 of ROUGE against the record's reference, 0 to 1, the best over several (Lin 2004; Porter's stemmer)."""

    kind: Literal["rouge"]

    field: str = "answer"
    """A text, or a list of texts."""

    variant: Literal["rouge1", "rouge2", "rougeL"] = "rougeL"


class LengthReward(_Reward):
    """0 up to `target_words`, then in a line down to -1 at twice as many and beyond: against answers that run on."""

    kind: Literal["length"]

    target_words: int = Field(ge=1)
    """Of the completion, as its spaces separate them."""


class RewardModelReward(_Reward):
    """What a reward model of stage `reward` says."""

    kind: Literal["reward_model"]

    path: str
    """Its folder."""

    of_empty: float = -10.0
    """The reward of a completion without text, which the model cannot read."""


class FunctionReward(_Reward):
    """A Python function: (prompts, completions, records), lists of as many, to a list of numbers."""

    kind: Literal["function"]

    path: str
    """`file.py:name`. The file is run, with all it may do: it is yours."""

    @field_validator("path")
    @classmethod
    def _path_names_a_function(cls, path: str) -> str:
        file, _, name = path.rpartition(":")
        if not file.endswith(".py") or not name.isidentifier():
            raise ValueError(
                f"path must be like rewards.py:score (a file and a function in it), got {path!r}"
            )
        return path


class CodeReward(_Reward):
    """Share of a record's tests that the completion's Python code passes, each run in a process of its own."""

    kind: Literal["code"]

    field: str = "tests"
    """Python statements (`assert f(1) == 2`) that fail where the code is wrong: a text, or a list of them, each run
    after the code on its own."""

    runs_model_code: bool = False
    """Must be true: code that a model wrote runs on this machine. See `twofold.posttrain.sandbox` for what the limits
    below protect against, and what not."""

    time_s: float = Field(default=5.0, gt=0)
    """Seconds for each test, of the clock and (rounded up) of the processor."""

    memory_mb: int = Field(default=512, ge=32)
    """Address space of a test."""

    @model_validator(mode="after")
    def _is_wanted(self) -> Self:
        if not self.runs_model_code:
            raise ValueError(
                "reward 'code' runs what the model writes on this machine; set runs_model_code=true if that is wanted, "
                "and read first what its limits protect against (docs/reinforcement.md)"
            )
        return self


RewardConfig = Annotated[
    MathReward
    | ExactMatchReward
    | FormatReward
    | RougeReward
    | LengthReward
    | RewardModelReward
    | FunctionReward
    | CodeReward,
    Field(discriminator="kind"),
]
"""A reward, told apart by `kind`."""
