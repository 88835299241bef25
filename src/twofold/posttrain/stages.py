"""The stages of `twofold train`, by the name that a recipe gives: what a recipe of each holds, and who runs it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from pkgutil import resolve_name

from twofold.config.recipe import Run, read_content, read_recipe
from twofold.train.callbacks import Callback, TrainResult

STAGES = {
    "pretrain": ("twofold.config.recipe:Recipe", "twofold.train.run:train"),
    "sft": ("twofold.config.recipe:Recipe", "twofold.train.run:train"),
    "dpo": ("twofold.config.preferences:PreferenceRecipe", "twofold.posttrain.pair_runs:train_preferences"),
    "grpo": ("twofold.config.grpo:PolicyRecipe", "twofold.posttrain.grpo_runs:train_policy"),
    "reward": ("twofold.config.preferences:RewardRecipe", "twofold.posttrain.pair_runs:train_reward"),
}
"""A subclass of `Run`, and a function with the arguments of `twofold.train.train`; imported when they are needed."""


def stage_of(path: str | Path, overrides: Sequence[str] = ()) -> str:
    """What a recipe calls its stage.

    Raises:
        FileNotFoundError, ValueError: see `twofold.config.recipe.load_recipe`; or a stage that is not known.
    """
    stage = read_content(path, overrides).get("stage")
    known = [*STAGES, "distill-targets"]
    if stage not in known:
        raise ValueError(f"{path}: stage is {stage!r}; use one of {', '.join(known)}")
    return str(stage)


def read_run(path: str | Path, overrides: Sequence[str] = ()) -> Run:
    """A recipe of any stage that updates a model. Errors as for `stage_of` and `load_recipe`."""
    kind: type[Run] = resolve_name(STAGES[stage_of(path, overrides)][0])
    return read_recipe(kind, path, overrides)


def train_stage(recipe: Run, *, resume: bool = False, callbacks: Sequence[Callback] = ()) -> TrainResult:
    """Do what a recipe says. Arguments and errors as for `twofold.train.train`."""
    train = resolve_name(STAGES[recipe.stage][1])
    result: TrainResult = train(recipe, resume=resume, callbacks=callbacks)
    return result
