"""What one batch of a stage is made of: how many rows, and what a row holds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

from twofold.config import EncoderDecoderConfig
from twofold.config.preferences import PreferenceRecipe, RewardRecipe
from twofold.config.recipe import Recipe, Run
from twofold.models.flops import Row, answers_row, example_row, packed_row

Planned: TypeAlias = Recipe | PreferenceRecipe | RewardRecipe


@dataclass(frozen=True)
class Load:
    """Of one micro-batch."""

    rows: int
    """Of the encoder."""

    row: Row
    rows_key: Literal["data.rows_per_batch", "data.pairs_per_batch"]
    """What a recipe calls the size of a batch."""

    rows_of_key: int = 1
    """Rows for each of what `rows_key` counts."""

    tokens_per_row: int = 0
    """Of both sides, as far as lengths were given; else positions."""


def load_of(recipe: Planned, config: EncoderDecoderConfig, lengths: tuple[int, int] | None) -> Load:
    """The load of a recipe.

    Args:
        lengths: mean (source, target) tokens of an example, or of a prompt and a reply. None: as long as is allowed.

    Raises:
        ValueError: lengths that the recipe does not allow.
    """
    data = recipe.data
    most = data.source_length, data.target_length
    if lengths is not None and not all(
        1 <= given <= limit for given, limit in zip(lengths, most, strict=True)
    ):
        raise ValueError(
            f"mean lengths of examples must lie between 1 and the row's {most[0]} and {most[1]} tokens, got "
            f"{lengths[0]} and {lengths[1]}"
        )
    source, target = most if lengths is None else lengths
    if isinstance(recipe, RewardRecipe):
        # Two texts a pair, each a prompt with its reply; nothing is decoded.
        row = example_row(config, source + target, 0)
        return Load(2 * recipe.data.pairs_per_batch, row, "data.pairs_per_batch", 2, source + target)
    if isinstance(recipe, PreferenceRecipe):
        row = answers_row(config, source, target, answers=2)
        return Load(
            recipe.data.pairs_per_batch, row, "data.pairs_per_batch", tokens_per_row=source + 2 * target
        )
    if lengths is None:
        row = example_row(config, source, target)
        return Load(recipe.data.rows_per_batch, row, "data.rows_per_batch", tokens_per_row=source + target)
    packing = recipe.data.packing
    fitting = min(most[0] // source, most[1] // target) if packing else 1
    row = packed_row(config, *(most if packing else lengths), [lengths] * fitting)
    tokens = fitting * (source + target)
    return Load(recipe.data.rows_per_batch, row, "data.rows_per_batch", tokens_per_row=tokens)


def planned(recipe: Run) -> Planned:
    """A recipe of a stage that can be planned.

    Raises:
        ValueError: of another.
    """
    if isinstance(recipe, (Recipe, PreferenceRecipe, RewardRecipe)):
        return recipe
    raise ValueError(
        f"stage {recipe.stage!r} cannot be planned: besides a step it samples answers, whose time and memory depend on "
        "what the model writes. Planned are pretrain, sft, dpo and reward; a dpo recipe of the same model and lengths "
        "says about what one update needs"
    )


def notes_on(recipe: Planned) -> tuple[str, ...]:
    """What a plan leaves out."""
    if isinstance(recipe, PreferenceRecipe) and recipe.preference.kind != "orpo":
        if recipe.preference.reference == "model":
            return (
                "the reference runs in the loop: float32 weights whole on every device, a forward pass a batch",
            )
        return (
            "the reference's log-probabilities: one forward pass over all pairs before the first step, every device "
            "with the whole model; neither is in these figures",
        )
    return ()
