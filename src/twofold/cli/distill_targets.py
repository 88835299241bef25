"""`twofold train` for stage `distill-targets`: a teacher's predictions, stored."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from twofold.cli.console import note, print_json
from twofold.config.recipe import read_recipe
from twofold.config.targets import TargetsRecipe
from twofold.train.make_targets import TargetsProgress, make_targets


def distill_targets(recipe: Path, overrides: Sequence[str], *, json: bool) -> None:
    """Make the targets, or go on where they were stopped."""
    run = read_recipe(TargetsRecipe, recipe, overrides)
    kept = f"the {run.k} likeliest tokens" if run.method == "top_k" else f"{run.k} draws"
    note(f"{run.stage} of {run.teacher} with {recipe}: {kept} of every prediction, into {run.output}")

    def on_shard(progress: TargetsProgress) -> None:
        note(f"shard {progress.shards_done} of {progress.num_shards}: {progress.tokens:,} tokens")

    result = make_targets(run, on_shard=on_shard)
    if result.is_complete:
        note(f"wrote {result.output}; use it with distillation.targets={result.output}")
    else:
        note(
            f"wrote {result.num_shards} of {result.num_shards_of_all} shards; other processes have the others"
        )
    if json:
        print_json(
            {
                "finished": result.is_complete,
                "shards": result.num_shards_of_all,
                "shards_of_this_process": result.num_shards,
                "output": str(result.output),
            }
        )
