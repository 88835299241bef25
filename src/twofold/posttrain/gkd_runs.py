"""From a recipe of stage `gkd` to a run: student, teacher, data, engine, and all checks before the first step."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TypeAlias

from twofold.config.distillation import DistillationConfig
from twofold.config.gkd import OnPolicyRecipe
from twofold.data import Convention, Loader, Prefetcher
from twofold.models import EncoderDecoder
from twofold.posttrain.gkd import Answering, OnPolicyLoader, OnPolicyObjective, StoredAnswers
from twofold.posttrain.rollouts import RolloutEngine
from twofold.train.build import build_on_ranks, require_tokenizer
from twofold.train.callbacks import Callback, TrainResult, tokenise_progress
from twofold.train.loop import fit
from twofold.train.run import (
    RunFiles,
    build_loaders,
    build_model,
    check_lengths,
    find_checked_start,
    weights_of,
)
from twofold.train.teacher import Distillation, open_distillation
from twofold.train.world import World, start_world

Parts: TypeAlias = tuple[Loader, Loader | None, Distillation]


def train_on_policy(
    recipe: OnPolicyRecipe, *, resume: bool = False, callbacks: Sequence[Callback] = ()
) -> TrainResult:
    """Stage `gkd`: learn from a teacher on answers of one's own. Arguments and errors as for `twofold.train.train`.

    The loss is the divergence per token, the held-out one that on the answers of the held-out data.
    """
    with start_world(recipe) as world:
        checkpoint = world.from_main(lambda: find_checked_start(recipe, Path(recipe.output), resume=resume))
        model, (train_loader, held_out, distillation) = build_on_ranks(
            world,
            make=lambda: build_model(recipe.model, weights_of(recipe, checkpoint)),
            make_empty=EncoderDecoder,
            read=lambda model: _read(recipe, model, world, callbacks),
        )
        answering = Answering(
            convention=Convention.of(model.config),
            teaching=distillation.teaching(()),
            pad_multiple=recipe.data.pad_multiple,
        )
        engine = None
        if recipe.gkd.on_policy_share > 0:
            assert recipe.rollout is not None
            engine = RolloutEngine(model, recipe.rollout, world)
        watchers = (
            [RunFiles(recipe, model, train_loader.report()), *callbacks] if world.is_main else callbacks
        )
        with Prefetcher(train_loader) as prefetched:
            return fit(
                model,
                OnPolicyLoader(prefetched, answering, engine, recipe, world),
                None if held_out is None else StoredAnswers(held_out, answering),
                recipe,
                recipe.output,
                watchers,
                resume=resume,
                world=world,
                objective=partial(OnPolicyObjective, teacher=distillation.teacher, config=recipe.gkd),
            )


def _read(
    recipe: OnPolicyRecipe, model: EncoderDecoder, world: World, callbacks: Sequence[Callback]
) -> Parts:
    """Loaders and teacher of one rank."""

    require_tokenizer(model)
    data = recipe.data
    # A decoder's prefix is at most a row, and an answer follows it.
    check_lengths(data.source_length, data.target_length + recipe.longest_answer, model.config)
    distillation = open_distillation(
        DistillationConfig(teacher=recipe.gkd.teacher, kind=recipe.gkd.kind),
        model,
        pad_multiple=data.pad_multiple,
        max_raw_length=data.source_length + data.target_length + recipe.longest_answer,
        precision=recipe.precision,
        device=world.device,
    )
    train_loader, held_out = build_loaders(
        data,
        model,
        num_streams=recipe.accumulate_batches,
        owned=world.streams(recipe.accumulate_batches),
        progress=tokenise_progress(callbacks) if world.is_main else None,
    )
    distillation.check(model)
    for callback in callbacks:
        callback.on_data(train_loader.report())
    return train_loader, held_out, distillation
